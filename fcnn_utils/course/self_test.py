"""Test what works on this machine: Python, Keras, devices, data sets, engines, a training step, the output folder.

Nothing is downloaded, and no exception leaves this module. What does not work becomes a line that says what is missing,
and what to do about it.
"""

import functools
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np

from fcnn_utils import _files
from fcnn_utils._processors import available_cores
from fcnn_utils._terminal import stderr_to
from fcnn_utils.course import environment, paths

PYTHONS = (3, 11), (3, 14)  # the first that is supported, and the first that is not yet
ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "litert": "LiteRT"}
_GPU_PACKAGES = {"tensorflow": "tensorflow[and-cuda]", "jax": "jax[cuda12]", "torch": "torch"}
_BATCH = 32


class Missing(Exception):
    """Something does not work here. The message is one sentence: what it is, and what to do."""


def run(timed_steps=2):
    """Print one line for each test: "ok", or "missing" and what to do. This takes about 20 seconds.

    Args:
        timed_steps: number of training steps that are timed; the shortest counts.
    """
    with stderr_to(os.devnull), warnings.catch_warnings(action="ignore"):  # backends and exporters write many lines
        for name, test in tests(timed_steps).items():
            paths.say(line(name, test))
            logging.getLogger("tensorflow").setLevel(logging.ERROR)  # after Keras: its import sets another level


def line(name, test):
    """Return the line of one test, a function that returns a text or raises an exception."""
    try:
        return f"ok       {name}: {test()}"
    except Missing as missing:
        return f"missing  {name}: {missing}"
    except ModuleNotFoundError as error:
        return f"missing  {name}: this needs the package {error.name}. {_advice()}"
    except Exception as error:  # whatever is wrong with a package that is installed
        reason = (str(error).splitlines() or [""])[0][:200]
        return f"missing  {name}: it stops with {type(error).__name__}: {reason}. {_advice()}"


def tests(timed_steps=2):
    """Return the tests in order: dict name -> function."""
    return {
        "Python": _python,
        "Keras": _keras,
        "device": _device,
        "precision": _precision,
        "CIFAR-100": _cifar100,
        "PneumoniaMNIST": _pneumoniamnist,
        **{title: functools.partial(_engine, name) for name, title in ENGINES.items()},
        "training step": functools.partial(_training_step, timed_steps),
        "output folder": _output_folder,
    }


def _advice():
    if "google.colab" in sys.modules:
        return "Restart the session, then run the first code cell of this notebook."
    return f"In the folder of the course, run: {sys.executable} -m pip install -r requirements.txt"


def _python():
    lowest, too_new = PYTHONS
    if not lowest <= sys.version_info[:2] < too_new:
        newest = f"3.{too_new[1] - 1}"
        raise Missing(
            f"this is {platform.python_version()}, and the course needs 3.{lowest[1]} to {newest}. Install one of "
            f"them, and run: make lab PYTHON=python{newest}"
        )
    return platform.python_version()


def _keras():
    try:
        import keras
    except ModuleNotFoundError as error:
        if error.name not in _GPU_PACKAGES:
            raise
        raise Missing(
            f"its backend {error.name} is not installed. Run: pip install {error.name}; or choose another one by the "
            "variable KERAS_BACKEND"
        ) from None
    backend = keras.config.backend()
    return f"{keras.__version__} on {backend} {metadata.version(backend)}"


def _device():
    import keras

    cores, found = available_cores(), environment.gpu()
    if found is None and _nvidia():
        package = _GPU_PACKAGES.get(keras.config.backend(), keras.config.backend())
        raise Missing(
            f'{keras.config.backend()} does not use the GPU of this machine, {_nvidia()}. Run: pip install "{package}"'
        )
    if found is None:
        return f"{environment.processor()}, {cores} cores; no GPU, which is enough for the course"
    return f"{found}, and {cores} cores"


def _nvidia():
    """Return the name of the first NVIDIA GPU, whether or not the backend can use it; "" if there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return "" if told.returncode else told.stdout.partition("\n")[0].strip()


def _precision():
    chosen = environment.precision("auto")
    faster = "faster here" if chosen != "float32" else "no faster here"
    return f"{chosen}, because bfloat16 is {faster}"


def _cifar100():
    from fcnn_utils.course.data import cifar100

    folder = cifar100.find()
    if folder is None:
        _tell_what_happens_without("cifar100", "CIFAR-100", "169 MB")
    (train, test), *_ = _read(cifar100.read, folder)
    return f"{len(train[0]):,} training and {len(test[0]):,} test images in {_shown(folder)}"


def _pneumoniamnist():
    from fcnn_utils.course.data import medmnist

    path = medmnist.find("pneumoniamnist")
    if path is None:
        _tell_what_happens_without("pneumoniamnist", "pneumoniamnist.npz", "4 MB, only for chapter 21")
    splits, _ = _read(medmnist.read, "pneumoniamnist", path)
    return f"{sum(len(images) for images, _ in splits):,} images in {_shown(path)}"


def _read(reader, *arguments):
    from fcnn_utils.course.data.download import Unavailable

    try:
        return reader(*arguments)
    except Unavailable as damaged:
        raise Missing(f"{damaged}") from None


def _tell_what_happens_without(name, what, size):
    """Raise Missing for a data set that is not on this machine."""
    from fcnn_utils.course import data

    try:
        data.check_chosen_folder(what)
    except ValueError as error:
        raise Missing(f"{error}") from None
    raise Missing(
        f"it is not on this machine. The first chapter that needs it downloads it ({size}), or uses generated images "
        f'if that fails. To download it now, run in a new cell: from fcnn_utils.course import data; data.load("{name}")'
    )


def _engine(engine):
    """Export a small network, and run it."""
    import keras

    from fcnn_utils import deploy

    small = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten()])
    try:
        network = deploy.load(small, engine)
    except ValueError as error:
        raise Missing(f"{error}") from None
    network(np.zeros((1, 8, 8, 3), "float32"))
    return "a small network is exported to it and runs"


def _training_step(timed_steps):
    """Time a step of the simple network: the shortest after the first, which compiles it."""
    from fcnn_utils.course import networks, training
    from fcnn_utils.course.recipes import get_recipe

    model = networks.build("simple", dtype=environment.precision("auto"))
    training.compile_model(model, get_recipe("faster"), steps=1 + timed_steps)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(_BATCH, 32, 32, 3)).astype("float32")
    labels = np.eye(100, dtype="float32")[rng.integers(0, 100, _BATCH)]
    seconds = []
    for _ in range(1 + timed_steps):
        start = time.perf_counter()
        model.train_on_batch(images, labels)
        seconds.append(time.perf_counter() - start)
    best = min(seconds[1:])
    return (
        f"{best:.2g} s for {_BATCH} images in the simple network of chapter 08, {_BATCH / best:.0f} images per second"
    )


def _output_folder():
    try:
        _files.check_writable(paths.output())
    except ValueError as error:
        raise Missing(f"{error}") from None
    return f"records can be written to {paths.shown(paths.output() / 'results')}"


def _shown(path):
    """Format a path, with ~ for the home folder."""
    path, home = Path(path).absolute(), Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)
