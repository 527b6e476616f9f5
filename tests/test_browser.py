"""The book's page that runs networks in the reader's browser: `book/browser/`."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import fcnn_utils as fcnn
from fcnn_utils.course import augmentation, data, paths, records
from fcnn_utils.course.data import cifar100
from tests import headless_browser

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

BOOK = paths.root() / "book"
NETWORKS = BOOK / "browser" / "networks"
FOUND = json.loads((NETWORKS / "networks.json").read_text())
NAMES = ["dense", "factorized", "int8"]
IMAGES = 100
# The browser may need so many times the time of ONNX Runtime in Python, both on one thread, or be so much faster. On an
# x86 processor it needed about 7 times as much.
SLOWER, FASTER = 20, 4
# Of a probability. Sums of integers are exact, so int8 agrees as well, unless the processors round a tie differently.
TOLERANCE = {"float32": 1e-4, "int8": 0.02}


def load(name):
    spec = importlib.util.spec_from_file_location(name, BOOK / "browser" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages, export_networks = load("pages"), load("export_networks")


@pytest.fixture(params=FOUND["networks"], ids=NAMES)
def network(request):
    return request.param


def needs_cifar100():
    if cifar100.find() is None:
        pytest.skip("CIFAR-100 is not on this machine")
    return data.load("cifar100")


def probabilities(network, images, threads=1):
    """What ONNX Runtime computes in Python for uint8 images."""
    run = fcnn.load(NETWORKS / network["file"], threads=threads)
    return run(augmentation.normalize(images, (np.float32(FOUND["mean"]), np.float32(FOUND["deviation"]))))


# --- networks.json and the files ---------------------------------------------------------------------------------


def test_description_lists_the_three_networks_and_their_files(network):
    assert [each["name"] for each in FOUND["networks"]] == NAMES
    content = (NETWORKS / network["file"]).read_bytes()
    assert (network["bytes"], network["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert {path.name for path in NETWORKS.iterdir()} == {"networks.json", *(f"{name}.onnx" for name in NAMES)}


def weights_and_macs(path):
    """Count the weights and the MACs of an ONNX file, from its convolutions and matrix products."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    shapes = {
        each.name: [axis.dim_value for axis in each.type.tensor_type.shape.dim] for each in model.graph.value_info
    }
    restored = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    params, macs = 0, 0
    for node in model.graph.node:
        names = [restored.get(name, name) for name in node.input]
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            kernel = arrays[names[1]].shape
            # (filters, channels per group, height, width) for each place; a matrix is used once
            places = np.prod(shapes[node.output[0]][2:]) if node.op_type == "Conv" else 1
            macs += int(np.prod(kernel) * places)
        if node.op_type in ("Conv", "Gemm", "MatMul", "Add"):
            params += sum(arrays[name].size for name in names if name in arrays)
    return params, macs


def test_described_costs_are_those_of_the_file(network):
    assert weights_and_macs(NETWORKS / network["file"]) == (network["params"], network["macs"])


def test_network_takes_any_number_of_images(network):
    images = data.load("standin").test.images[:3]
    several = probabilities(network, images)
    assert several.shape == (3, len(FOUND["classes"])) and np.allclose(several.sum(axis=1), 1, atol=1e-5)
    one = np.concatenate([probabilities(network, images[k : k + 1]) for k in range(3)])
    assert np.abs(one - several).max() < 1e-5


def test_described_run_is_that_of_the_record(network):
    if network["run"] is None:
        pytest.skip("this network comes from no record")
    record = records.read(paths.root() / network["run"])
    assert (record["model"], record["macs"]) == (network["model"], network["macs"])
    assert (record["recipe"]["name"], len(record["epochs"])) == (network["recipe"], network["epochs"])


def test_network_without_a_record_is_described_by_its_file(tmp_path):
    assert export_networks.origin(tmp_path / "own.keras") == {"model": "own.keras", "run": None}


def test_normalisation_is_near_the_published_statistics_of_cifar100():
    assert np.allclose(FOUND["mean"], [129.3, 124.1, 112.4], atol=1)
    assert np.allclose(FOUND["deviation"], [68.2, 65.4, 70.4], atol=1)


def test_description_has_the_normalisation_and_classes_of_the_library():
    dataset = needs_cifar100()
    scale = augmentation.channel_statistics(dataset)
    assert export_networks.contents(dataset, scale, FOUND["networks"]) == FOUND


def test_described_accuracy_holds_on_a_sample(network):
    sample = needs_cifar100().test.first(400)
    own = export_networks.accuracy(NETWORKS / network["file"], sample, (FOUND["mean"], FOUND["deviation"]))
    error = np.sqrt(network["top1"] * (1 - network["top1"]) / len(sample))
    assert abs(own - network["top1"]) < 4 * error


# --- the text of the page ----------------------------------------------------------------------------------------


def test_page_without_npm_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pages, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    runtime = pages.fetch_runtime()
    assert runtime is None and "npm is not installed" in capsys.readouterr().out
    text = pages.page(runtime)
    assert "npm" in text and "make book" in text and "<script" not in text
    pages.add_files(tmp_path / "site", runtime)
    assert not (tmp_path / "site").exists()


def test_page_with_an_unreachable_registry_says_what_is_missing(monkeypatch, tmp_path, capsys):
    def fails(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(pages, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", fails)
    assert pages.fetch_runtime() is None and "cannot download" in capsys.readouterr().out


def test_archive_with_another_hash_is_refused(tmp_path):
    (tmp_path / "other.tgz").write_bytes(b"something else")
    with pytest.raises(ValueError, match="other.tgz is not the file"):
        pages._unpack(tmp_path / "other.tgz", tmp_path)


def test_samples_are_images_of_their_classes_and_missing_without_cifar100(monkeypatch):
    dataset, found = needs_cifar100(), pages.sample_images()
    assert [name for name, _ in found] == list(pages.SAMPLES) and len(found) == 12
    for name, image in found:
        of_class = dataset.test.images[dataset.test.fine == dataset.fine_names.index(name)]
        assert (of_class == image).all(axis=(1, 2, 3)).any()
    monkeypatch.setattr(cifar100, "find", lambda: None)
    assert pages.sample_images() == []


def test_table_has_the_figures_of_the_networks(network):
    (row,) = [line for line in pages.networks_table(FOUND).splitlines() if line.startswith(f"| {network['name']} ")]
    assert f"{network['params']:,}" in row and f"{100 * network['top1']:.1f}" in row


# --- in Chromium -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site of this page alone, as `make book` makes it."""
    runtime = pages.fetch_runtime() if headless_browser.CHROMIUM else None
    if runtime is None:
        pytest.skip("Chromium, or the runtime that npm downloads, is missing")
    pytest.importorskip("myst_nb", reason="MyST-NB is not installed")
    folder = tmp_path_factory.mktemp("browser")
    shutil.copytree(BOOK / "static", folder / "source" / "static")
    shutil.copy(BOOK / "conf.py", folder / "source")
    (folder / "source" / f"{pages.NAME}.md").write_text(pages.page(runtime))
    command = [sys.executable, "-m", "sphinx", "--quiet", "-b", "html", "-D", f"root_doc={pages.NAME}"]
    subprocess.run([*command, folder / "source", folder / "html"], check=True, capture_output=True)
    pages.add_files(folder / "html", runtime)
    return folder / "html"


@pytest.fixture(scope="module")
def split():
    """Test images: of CIFAR-100 if it is on this machine, else generated ones."""
    return data.load("cifar100" if cifar100.find() else "standin").test.sample(IMAGES, seed=0)


@pytest.fixture(scope="module")
def tab(site, split):
    """The page in Chromium, with all images of `split` as its samples."""
    folder, listed = site / "_static" / "browser" / "images", []
    for number, (image, label) in enumerate(zip(split.images, split.fine, strict=True)):
        Image.fromarray(image).save(folder / f"{number}.png")
        listed.append({"file": f"{number}.png", "class": FOUND["classes"][label]})
    (folder / "images.json").write_text(json.dumps(listed))
    with headless_browser.served(site) as address, headless_browser.opened() as tab:
        tab.address = f"{address}/{pages.NAME}.html"
        tab.open(tab.address)
        tab.wait(f"{LIVE}.startsWith('Likeliest')")
        yield tab


LIVE = "document.getElementById('browser-live').textContent"
ERROR = "document.getElementById('browser-error').textContent"
CLASSIFY_ALL = """(async () => {
  const { classify, load, shrink, toTensor } = await import("./_static/browser/networks.js");
  const description = await load();
  window.description = description;
  const found = description.networks.map(() => []);
  for (const { src } of document.querySelectorAll(".browser-sample img")) {
    const canvas = await shrink(await (await fetch(src)).blob(), 32);
    window.tensor = toTensor(canvas, description);
    for (const [k, network] of description.networks.entries()) {
      found[k].push(Array.from(await classify(network, window.tensor)));
    }
  }
  return found;
})()"""
TIME = """(async () => {
  const { timeInTurn } = await import("./_static/browser/networks.js");
  const times = description.networks.map(() => []);
  for await (const { network, milliseconds } of timeInTurn(description.networks, tensor, 30)) {
    times[network].push(milliseconds);
  }
  return times;
})()"""


@pytest.fixture(scope="module")
def in_browser(tab):
    """Probabilities in the browser, (networks, images, classes)."""
    return dict(zip(NAMES, np.array(tab.run(CLASSIFY_ALL)), strict=True))


@pytest.mark.full
def test_browser_computes_the_probabilities_of_onnx_runtime(in_browser, split, network):
    expected, found = probabilities(network, split.images), in_browser[network["name"]]
    change, same = np.abs(found - expected).max(), found.argmax(axis=1) == expected.argmax(axis=1)
    print(f"{network['name']}: {same.sum()} of {IMAGES} classes are the same, probabilities differ by {change:.1e}")
    first, second = np.sort(expected, axis=1)[:, :-3:-1].T
    assert change < TOLERANCE[network["precision"]]
    assert same[first - second > 2 * TOLERANCE[network["precision"]]].all()


@pytest.mark.full
def test_browser_is_about_as_fast_as_onnx_runtime(in_browser, tab, split):
    for network, times in zip(FOUND["networks"], tab.run(TIME), strict=True):
        run = fcnn.load(NETWORKS / network["file"], threads=1)
        image = augmentation.normalize(split.images[:1], (np.float32(FOUND["mean"]), np.float32(FOUND["deviation"])))
        own = []
        for _ in range(30):
            start = time.perf_counter()
            run(image)
            own.append(1000 * (time.perf_counter() - start))
        browser, python = min(times), min(own)  # other programs only add to a time
        print(f"{network['name']}: {browser:.2f} ms in the browser, {python:.2f} ms in Python")
        assert len(times) == 30 and python / FASTER < browser < SLOWER * python


@pytest.mark.full
def test_page_shows_the_five_likeliest_classes_of_a_chosen_image(tab, split, in_browser):
    tab.run("document.querySelectorAll('.browser-sample')[1].focus()")
    tab.press("Enter", 13)
    name = FOUND["classes"][split.fine[1]].replace("_", " ")
    tab.wait(f"{LIVE}.startsWith({json.dumps(f'Likeliest classes of {name}')})")
    assert tab.run("[...document.querySelectorAll('[aria-pressed=true]')].map((each) => each.firstChild.alt)") == [name]
    shown = tab.run(
        "[...document.querySelectorAll('.browser-card')].map((card) => "
        "[...card.querySelectorAll('.browser-class')].map((each) => each.firstChild.textContent))"
    )
    for position, network in enumerate(NAMES):
        order = np.argsort(-in_browser[network][1])[:5]
        assert shown[position] == [FOUND["classes"][each].replace("_", " ") for each in order]


@pytest.mark.full
def test_own_picture_is_cropped_to_its_centre_and_shrunk(tab, split, tmp_path):
    image = Image.fromarray(split.images[2]).resize((128, 128), Image.Resampling.NEAREST)
    wide = Image.new("RGB", (200, 128), "red")
    wide.paste(image, (36, 0))
    wide.save(tmp_path / "own.png")
    tab.choose_file("#browser-file", tmp_path / "own.png")
    tab.wait(f"{LIVE}.startsWith('Likeliest classes of your picture')")
    rgba = "document.getElementById('browser-seen').getContext('2d').getImageData(0, 0, 32, 32).data"
    seen = np.reshape(tab.run(f"Array.from({rgba})"), (32, 32, 4))[..., :3]
    assert np.abs(seen - split.images[2].astype(int)).max() <= 2


@pytest.mark.full
def test_file_that_is_no_picture_gets_a_message(tab, tmp_path):
    (tmp_path / "notes.txt").write_text("This is no picture.")
    tab.choose_file("#browser-file", tmp_path / "notes.txt")
    assert "“notes.txt” is not a picture" in tab.wait(ERROR)
    tab.run("document.querySelector('.browser-sample').click()")
    tab.wait(f"{ERROR} === ''")


@pytest.mark.full
def test_chart_shows_the_times_and_can_be_stopped(tab):
    tab.run("document.getElementById('browser-measure').focus()")
    tab.press("Enter", 13)
    rounds = "parseInt(document.getElementById('browser-rounds').textContent)"
    tab.wait(f"{rounds} > 2")
    tab.press("Enter", 13)
    tab.wait("document.getElementById('browser-measure').textContent === 'Measure again'")
    assert 2 < tab.run(rounds) < 50
    tab.press("Enter", 13)
    assert "dense" in tab.wait(f"{LIVE}.startsWith('Median time') && {LIVE}")
    shown = tab.run("[...document.querySelectorAll('.browser-time')].map((each) => parseFloat(each.textContent))")
    widths = tab.run("[...document.querySelectorAll('.browser-bar')].map((each) => each.getBoundingClientRect().width)")
    assert np.allclose(np.divide(widths, max(widths)), np.divide(shown, max(shown)), atol=0.1)


@pytest.mark.full
def test_page_fits_on_a_phone(tab):
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    tab.send("Emulation.setDeviceMetricsOverride", **size)
    assert tab.run("document.documentElement.scrollWidth") == 390
    tab.send("Emulation.clearDeviceMetricsOverride")


@pytest.mark.full
def test_page_without_test_images_says_why_and_takes_an_own_picture(site, tmp_path):
    shutil.copytree(site, tmp_path / "site")
    (tmp_path / "site/_static/browser/images/images.json").write_text("[]")
    Image.new("RGB", (50, 40), "green").save(tmp_path / "green.png")
    with headless_browser.served(tmp_path / "site") as address, headless_browser.opened() as tab:
        tab.open(f"{address}/{pages.NAME}.html")
        tab.wait("!document.getElementById('browser-demo').hidden")
        assert not tab.run("document.getElementById('browser-no-samples').hidden")
        assert tab.run("document.getElementById('browser-measure').disabled")
        tab.choose_file("#browser-file", tmp_path / "green.png")
        tab.wait(f"{LIVE}.startsWith('Likeliest classes of your picture')")
        assert not tab.run("document.getElementById('browser-measure').disabled")


@pytest.mark.full
def test_page_that_is_opened_as_a_file_says_how_to_serve_it(site):
    with headless_browser.opened() as tab:
        tab.open((site / f"{pages.NAME}.html").as_uri())
        assert "make book-serve" in tab.run("document.getElementById('browser-message').textContent")
        assert tab.run("document.getElementById('browser-demo').hidden")
