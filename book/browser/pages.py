"""The book's page that runs networks in the reader's browser, and what the page loads.

`make book` calls `page` for its text, and `add_files` once the site is built: the program, the networks, twelve test
images if CIFAR-100 is on this machine, and ONNX Runtime Web. npm downloads this runtime once, to `build/`. Without npm
the book is built all the same, and the page says what is missing.
"""

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

from fcnn_utils.course.data import cifar100
from fcnn_utils.course.data.download import Unavailable

HERE = Path(__file__).resolve().parent
NAME = "in_your_browser"  # of the page
RUNTIME = "onnxruntime-web@1.30.0"  # a package of npm
RUNTIME_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"  # of its archive
RUNTIME_FILES = {"ort.mjs": "ort.wasm.bundle.min.mjs", "ort.wasm": "ort-wasm-simd-threaded.wasm"}  # here: there
CACHE = HERE.parents[1] / "build" / RUNTIME.replace("@", "-")
# The first test image of each of these classes is shown.
SAMPLES = ("apple", "bicycle", "bridge", "butterfly", "castle", "clock")
SAMPLES += ("lion", "orchid", "palm_tree", "rocket", "sea", "streetcar")
MISSING = (
    "This book was built without the runtime of the networks. `npm`, a program of Node.js, downloads it: install "
    "Node.js, make sure that you are online, and run `make book` again."
)
IN_PRINT = "The networks run on the page `in_your_browser.html` of the site. Here you find their description."


def page(runtime):
    """Write the text of the page: the demo (on the site, not in the PDF), the table of networks, and the classes.

    Args:
        runtime: folder that `fetch_runtime` returns, or None.
    """
    found = _networks()
    demo = f"```{{raw}} html\n{(HERE / 'page.html').read_text()}```" if runtime else MISSING
    classes = ", ".join(name.replace("_", " ") for name in found["classes"])
    parts = {
        "demo": f"````{{only}} not singlehtml\n{demo}\n````\n\n````{{only}} singlehtml\n{IN_PRINT}\n````",
        "networks": networks_table(found),
        "classes": f"<details><summary>The {len(found['classes'])} classes</summary>\n\n{classes}\n\n</details>",
    }
    text = (HERE.parent / f"{NAME}.md").read_text()
    for mark, part in parts.items():
        text = text.replace(f"<!-- {mark} -->", part)
    return text


def networks_table(found):
    """Format the networks of networks.json as a table, and name the runs that they come from."""
    lines = ["| network | million MACs | parameters | file (MB) | top-1 (%) |"]
    lines += ["|---|--:|--:|--:|--:|"]
    for each in found["networks"]:
        figures = [f"{each['macs'] / 1e6:.1f}", f"{each['params']:,}", f"{each['bytes'] / 1e6:.2f}"]
        lines += [f"| {' | '.join([each['name'], *figures, format(100 * each['top1'], '.1f')])} |"]
    dense, factorized, _ = found["networks"]
    lines += ["", f"The dense network is {_run(dense)} The factorized network is {_run(factorized)}"]
    lines += [f"The int8 network is the factorized one, quantised with {found['calibration_images']} training images."]
    lines += [f"The accuracy, top-1, is that on {found['test_images']:,} test images in ONNX Runtime. MACs"]
    lines += ["(multiply-accumulate operations) are per image. Batch norms are folded into the convolutions."]
    return "\n".join(lines)


def _run(network):
    if network["run"] is None:
        return f"`{network['model']}`."
    epochs = f"{network['epochs']} epoch" + "s" * (network["epochs"] > 1)
    return f"`{network['model']}` after {epochs} of the recipe `{network['recipe']}` (record: `{network['run']}`)."


def fetch_runtime():
    """Return the folder with the files of ONNX Runtime Web, which npm downloads once; None if it cannot."""
    if all((CACHE / name).exists() for name in RUNTIME_FILES):
        return CACHE
    npm = shutil.which("npm")
    if npm is None:
        print("no networks in the browser: npm is not installed; install Node.js, and run this again")
        return None
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        try:
            command = [npm, "pack", RUNTIME, "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
            _unpack(next(Path(folder).glob("*.tgz")), Path(folder))
        except (OSError, ValueError, StopIteration, tarfile.TarError, subprocess.SubprocessError) as error:
            print(f"no networks in the browser: npm cannot download {RUNTIME} ({error})")
            return None
    return CACHE


def _unpack(archive, folder):
    """Move the files that are needed to the cache, each in one step."""
    if hashlib.sha256(archive.read_bytes()).hexdigest() != RUNTIME_SHA256:
        raise ValueError(f"{archive.name} is not the file whose hash is known")
    with tarfile.open(archive) as tar:
        for name, packed in RUNTIME_FILES.items():
            (folder / name).write_bytes(tar.extractfile(f"package/dist/{packed}").read())
            (folder / name).replace(CACHE / name)


def add_files(site, runtime):
    """Copy what the page loads into a built site; nothing if there is no runtime."""
    if runtime is None:
        return
    folder = site / "_static" / "browser"
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("*.py", "page.html", "__pycache__"))
    for name in RUNTIME_FILES:
        shutil.copy(runtime / name, folder)
    (folder / "images").mkdir()
    listed = []
    for name, image in sample_images():
        Image.fromarray(image).save(folder / "images" / f"{name}.png")
        listed.append({"file": f"{name}.png", "class": name})
    (folder / "images" / "images.json").write_text(json.dumps(listed))


def sample_images():
    """Return [(class, image)], one test image for each of `SAMPLES`; [] if CIFAR-100 is not on this machine."""
    place = cifar100.find()
    if place is None:
        return []
    try:
        images, labels, _ = cifar100.read_batch(place / "test", per_class=100)
    except Unavailable:  # the file is damaged
        return []
    return [(name, images[labels == _networks()["classes"].index(name)][0]) for name in SAMPLES]


def _networks():
    return json.loads((HERE / "networks" / "networks.json").read_text())
