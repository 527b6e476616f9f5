// Run the networks of networks.json with ONNX Runtime Web on pictures of 32×32 pixels, and time them in turn.
// This file knows nothing of the page: page.js shows what it computes.

import * as ort from "./ort.mjs";

const WARM_UP_MS = 100; // of each network, before it is timed
const TURN_MS = 20; // a network runs for at least so long before the next one: browsers round their clock to 1 ms

ort.env.logLevel = "error"; // not the warnings about operations that the runtime moves
ort.env.wasm.numThreads = 1; // more would need headers that a simple server does not send
ort.env.wasm.wasmPaths = { wasm: new URL("ort.wasm", import.meta.url).href };

// Fetch the description of the networks, and each network as a session of the runtime.
export async function load() {
  const answer = await fetch(new URL("networks/networks.json", import.meta.url));
  const description = await answer.json();
  for (const network of description.networks) {
    const address = new URL(`networks/${network.file}`, import.meta.url).href;
    network.session = await ort.InferenceSession.create(address, { executionProviders: ["wasm"] });
  }
  return description;
}

// Decode a picture (a file, or an image of the page), crop its centre to a square, and shrink it to size × size pixels.
// It is halved several times, because a browser that shrinks in one step may skip pixels. Returns a canvas.
export async function shrink(file, size) {
  if (file instanceof HTMLImageElement) await file.decode();
  const picture = await createImageBitmap(file); // unlike an image of the page, it has the size of the picture itself
  let side = Math.min(picture.width, picture.height);
  let [x, y] = [(picture.width - side) / 2, (picture.height - side) / 2];
  let source = picture;
  for (;;) {
    const next = side > 2 * size ? Math.ceil(side / 2) : size;
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = next;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white"; // behind transparent pixels
    context.fillRect(0, 0, next, next);
    context.imageSmoothingQuality = "high";
    context.drawImage(source, x, y, side, side, 0, 0, next, next);
    if (next === size) return canvas;
    [source, side, x, y] = [canvas, next, 0, 0];
  }
}

// Make the input of the networks, (1, height, width, 3), from a canvas of that size: normalised as in training.
export function toTensor(canvas, { input, mean, deviation }) {
  const [height, width, channels] = input;
  const rgba = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const values = new Float32Array(height * width * channels);
  for (let pixel = 0; pixel < height * width; pixel++) {
    for (let channel = 0; channel < channels; channel++) {
      const value = rgba[4 * pixel + channel];
      values[channels * pixel + channel] = (value - mean[channel]) / deviation[channel];
    }
  }
  return new ort.Tensor("float32", values, [1, ...input]);
}

// Compute the probabilities of the classes, a Float32Array.
export async function classify({ session }, tensor) {
  const outputs = await session.run({ [session.inputNames[0]]: tensor });
  return outputs[session.outputNames[0]].data;
}

// Time the networks in turn, and yield {network, milliseconds} after each turn; `network` is its position.
// In every round each network has one turn, and another one begins. Between the turns the page can react.
export async function* timeInTurn(networks, tensor, rounds) {
  const repeats = [];
  for (const network of networks) {
    const start = performance.now();
    let runs = 0;
    for (; runs < 2 || performance.now() - start < WARM_UP_MS; runs++) await classify(network, tensor);
    repeats.push(Math.ceil((TURN_MS * runs) / (performance.now() - start)));
    await pause();
  }
  for (let turn = 0; turn < rounds * networks.length; turn++) {
    const round = Math.floor(turn / networks.length);
    const network = (turn + round) % networks.length;
    const start = performance.now();
    for (let run = 0; run < repeats[network]; run++) await classify(networks[network], tensor);
    yield { network, milliseconds: (performance.now() - start) / repeats[network] };
    await pause();
  }
}

// Compute the quartiles [first, median, third], interpolated between neighbouring values.
export function quartiles(values) {
  const sorted = Float64Array.from(values).sort();
  return [0.25, 0.5, 0.75].map((share) => {
    const place = share * (sorted.length - 1);
    const below = Math.floor(place);
    const above = Math.min(below + 1, sorted.length - 1);
    return sorted[below] + (place - below) * (sorted[above] - sorted[below]);
  });
}

function pause() {
  return new Promise((resolve) => setTimeout(resolve));
}
