// The page "The networks in your browser": pictures to choose, the likeliest classes, and a bar chart of the times.

import { classify, load, quartiles, shrink, timeInTurn, toTensor } from "./networks.js";

const SHOWN_CLASSES = 5;
const ROUNDS = 50;

const $ = (name) => document.getElementById(`browser-${name}`);
let description; // the contents of networks.json, and a session for each network
let tensor; // the chosen picture, as the networks read it
let choices = 0; // number of the latest choice of a picture: slower ones before it are dropped
let measurement = null; // the one that runs

start().catch((error) => say(`The networks could not be started (${error.message}). Reload the page, or try another browser.`));

async function start() {
  say("Loading the runtime and the networks …");
  const images = await (await fetch(new URL("images/images.json", import.meta.url))).json();
  description = await load();
  $("results").replaceChildren(...description.networks.map(makeCard));
  $("chart").replaceChildren(...description.networks.map(makeBar));
  $("samples").replaceChildren(...images.map(makeSample));
  $("no-samples").hidden = images.length > 0;
  $("file").addEventListener("change", () => $("file").files[0] && chooseFile($("file").files[0]));
  $("measure").addEventListener("click", measure);
  $("demo").hidden = false;
  say("");
  if (images.length) $("samples").firstChild.click();
}

// Show a message in place of the page's contents.
function say(text) {
  $("message").textContent = text;
}

// Tell a screen reader what has changed.
function announce(text) {
  $("live").textContent = text;
}

function make(tag, name, ...content) {
  const element = document.createElement(tag);
  element.className = name;
  element.append(...content);
  return element;
}

function words(className) {
  return className.replaceAll("_", " ");
}

// --- pictures -------------------------------------------------------------------------------------------------------

function makeSample(sample) {
  const image = make("img", "");
  image.src = new URL(`images/${sample.file}`, import.meta.url).href;
  image.alt = words(sample.class);
  const button = make("button", "browser-sample", image);
  button.type = "button";
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => show(image, sample.class, button));
  return button;
}

async function chooseFile(file) {
  try {
    await show(file, null, null);
  } catch {
    $("error").textContent = `“${file.name}” is not a picture that this browser can read: choose a PNG, JPEG, GIF or WebP file.`;
  }
}

// Classify a picture: a file of the reader, or the image on a button with its true class.
async function show(picture, truth, button) {
  const choice = ++choices;
  $("error").textContent = "";
  const canvas = await shrink(picture, description.input[0]);
  if (choice !== choices) return;
  for (const each of $("samples").children) each.setAttribute("aria-pressed", String(each === button));
  const seen = $("seen");
  seen.getContext("2d").drawImage(canvas, 0, 0);
  const name = truth === null ? "your picture" : words(truth);
  seen.setAttribute("aria-label", `${name}, in ${canvas.width}×${canvas.height} pixels`);
  $("name").textContent = truth === null ? "Your picture" : `Class: ${name}`;
  tensor = toTensor(canvas, description);
  $("measure").disabled = false;
  const likeliest = [];
  for (const [position, network] of description.networks.entries()) {
    const probabilities = await classify(network, tensor);
    if (choice !== choices) return;
    likeliest.push(`${network.name} ${fill($("results").children[position], probabilities, truth)}`);
  }
  announce(`Likeliest classes of ${name}: ${likeliest.join(", ")}.`);
}

// --- classes --------------------------------------------------------------------------------------------------------

function makeCard(network) {
  return make("div", `browser-card browser-${network.name}`, make("h3", "", network.name), make("ol", ""));
}

// List the likeliest classes in a card, and return the first one as text.
function fill(card, probabilities, truth) {
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  const rows = order.slice(0, SHOWN_CLASSES).map((number) => {
    const name = description.classes[number];
    const share = percent(probabilities[number]);
    const bar = make("span", "browser-share");
    bar.style.setProperty("--share", `${100 * probabilities[number]}%`);
    const label = make("span", "browser-class", words(name));
    if (name === truth) {
      label.classList.add("browser-true");
      label.append(" ✓", make("span", "browser-unseen", " (its class)"));
    }
    return make("li", "", label, " ", make("span", "browser-percent", share), bar);
  });
  card.querySelector("ol").replaceChildren(...rows);
  return `${words(description.classes[order[0]])} (${percent(probabilities[order[0]])})`;
}

function percent(probability) {
  return probability < 0.005 ? "<1%" : `${(100 * probability).toFixed(0)}%`;
}

// --- times ----------------------------------------------------------------------------------------------------------

function makeBar(network) {
  const track = make("span", "browser-track", make("span", "browser-bar"), make("span", "browser-whisker"));
  return make("li", `browser-${network.name}`, make("span", "browser-label", network.name), track, make("span", "browser-time", "–"));
}

// Start a measurement, or stop the one that runs.
async function measure() {
  if (measurement) {
    finish();
    return;
  }
  const own = (measurement = {});
  $("measure").textContent = "Stop";
  $("rounds").textContent = "Warming up …";
  const times = description.networks.map(() => []);
  for await (const { network, milliseconds } of timeInTurn(description.networks, tensor, ROUNDS)) {
    if (measurement !== own) return;
    times[network].push(milliseconds);
    draw(times);
  }
  finish();
  const medians = times.map((each, k) => `${description.networks[k].name} ${number(quartiles(each)[1])} ms`);
  announce(`Median time per image: ${medians.join(", ")}.`);
}

function finish() {
  measurement = null;
  $("measure").textContent = "Measure again";
}

function draw(times) {
  const drawn = times.map((own) => (own.length ? quartiles(own) : [0, 0, 0]));
  const longest = 1.05 * Math.max(...drawn.flat());
  for (const [position, [first, median, third]] of drawn.entries()) {
    const row = $("chart").children[position];
    row.style.setProperty("--first", `${(100 * first) / longest}%`);
    row.style.setProperty("--median", `${(100 * median) / longest}%`);
    row.style.setProperty("--third", `${(100 * third) / longest}%`);
    row.lastChild.textContent = median ? `${number(median)} ms (${number(first)} to ${number(third)})` : "–";
  }
  $("rounds").textContent = `${Math.min(...times.map((own) => own.length))} of ${ROUNDS} rounds`;
}

function number(milliseconds) {
  return milliseconds < 100 ? milliseconds.toPrecision(3) : milliseconds.toFixed(0);
}
