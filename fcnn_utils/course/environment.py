"""Describe where a result comes from: device, backend, versions, commit of the course.

Keras does not tell a device's name or abilities. Therefore `gpu`, `has_bfloat16` and `deterministic`
import the active backend, inside the function, so that no other one is loaded. Keras itself is imported inside
functions, too: the first chapters need none.
"""

import contextlib
import datetime
import functools
import logging
import os
import platform
import random
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

from fcnn_utils._checks import check_number
from fcnn_utils._processors import available_cores
from fcnn_utils.course import paths

_ASKED = {"deterministic": False}  # whether this process called `deterministic`


def setup(seed):
    """Start a notebook: seed Python, NumPy and, if Keras is imported, the backend; print a line about this machine."""
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(seed)
        logging.getLogger("tensorflow").setLevel(logging.ERROR)  # hide warnings about retracing
        if os.environ.get("FCNN_EAGER") and _backend() == "tensorflow":  # see `runner`
            import tensorflow as tf

            tf.config.run_functions_eagerly(True)
            tf.data.experimental.enable_debug_mode()  # else it warns that data pipelines stay compiled
        paths.say(summary(describe()))
    else:
        random.seed(seed)
        np.random.seed(seed)
        paths.say(f"{processor()} · {_counted(available_cores())}")


def deterministic():
    """Make all following results reproducible to the last digit, on the same machine and versions.

    Call it before anything is computed: JAX reads its flag only when it starts.

    TensorFlow then uses deterministic kernels and runs one operation at a time. Otherwise the gradients
    of the separable network differ from run to run, even on a CPU. JAX on a GPU uses kernels that add in
    a fixed order. PyTorch uses its deterministic algorithms.

    Raises:
        ValueError: if TensorFlow has already computed something.
    """
    backend = _backend()
    if backend == "tensorflow":
        import tensorflow as tf

        try:
            tf.config.threading.set_inter_op_parallelism_threads(1)
        except RuntimeError:
            raise ValueError("deterministic must be set before anything is computed; start Python anew") from None
        tf.config.experimental.enable_op_determinism()
    elif backend == "jax":
        flag = "--xla_gpu_exclude_nondeterministic_ops=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    elif backend == "torch":
        import torch

        torch.use_deterministic_algorithms(True)
    _ASKED["deterministic"] = True


def use_devices(count):
    """Train on several devices: each computes its share of every batch.

    Up to rounding, the results are those of one device. It uses `keras.distribution.DataParallel` and needs JAX. Call
    it before anything is built or computed. Without a GPU, JAX splits the CPU into `count` devices. That lets you test
    the code, but it is not faster.

    Args:
        count: number of devices, at least 1; 1 changes nothing. It must divide the batch size.

    Raises:
        ValueError: if the backend is not JAX, or there are not so many devices, also because JAX has already started.
    """
    check_number("devices", count, int, 1, 4096)
    if count == 1:
        return
    if _backend() != "jax":
        raise ValueError(f"several devices need the backend jax: set KERAS_BACKEND to jax; it is {_backend()}")
    import jax
    import keras

    with contextlib.suppress(RuntimeError):  # JAX has started: then it has the devices it has
        jax.config.update("jax_num_cpu_devices", count)  # no effect where there is a GPU
    found = keras.distribution.list_devices()
    if len(found) < count:
        raise ValueError(f"devices must be at most {len(found)} here, the number that JAX finds; got {count}")
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(devices=found[:count], auto_shard_dataset=False)
    )


def devices():
    """Return how many devices share each batch (see `use_devices`)."""
    import keras

    distribution = keras.distribution.distribution()
    return 1 if distribution is None else int(distribution.device_mesh.devices.size)


def describe():
    """Describe this machine and its software by a dict of JSON types, part of every record.

    Its entries are device, cores, devices, backend, versions (package -> version), python, deterministic (whether
    it was called), date (UTC) and commit.
    """
    versions = {name: _version(name) for name in ("keras", "tensorflow", "jax", "torch", "numpy")}
    return {
        "device": gpu() or processor(),
        "cores": available_cores(),
        "devices": devices(),
        "backend": _backend(),
        "versions": {name: version for name, version in versions.items() if version},
        "python": platform.python_version(),
        **_ASKED,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def summary(here):
    """Format the dict of `describe`, or a record, as one line. The line of a record ends with its date."""
    date = f" · {here['date'][:10]}" if "epochs" in here else ""
    keras = f"Keras {here['versions']['keras']} on {here['backend']}"
    return f"{here['device']} · {_counted(here['cores'])} · {keras}{date}"


def _counted(cores):
    return f"{cores} core" + ("s" if cores != 1 else "")


@functools.cache
def processor():
    """Return the name of the processor, "CPU …"; only "CPU" if it is unknown."""
    found = re.search(r"model name\s*:\s*(.+)", _cpuinfo())
    if found:
        return f"CPU {found.group(1).strip()}"
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "CPU"
    return f"CPU {platform.processor()}".strip()


def _backend():
    import keras

    return keras.config.backend()


@functools.cache
def gpu():
    """Return the name of the backend's first GPU, "GPU …"; None if it computes on the CPU."""
    backend = _backend()
    if backend == "tensorflow":
        import tensorflow as tf

        found = tf.config.list_physical_devices("GPU")
        name = tf.config.experimental.get_device_details(found[0]).get("device_name", "") if found else ""
        return f"GPU {name}".strip() if found else None
    if backend == "jax":
        import jax

        return None if jax.default_backend() == "cpu" else f"GPU {jax.devices()[0].device_kind}"
    if backend == "torch":
        import torch

        return f"GPU {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else None
    return None


def has_bfloat16():
    """Return whether bfloat16 is faster than float32 here, judged by the hardware, not measured.

    It is faster on an NVIDIA GPU from Ampere on, and on a CPU with AVX-512, AMX or Arm instructions for
    bfloat16 under TensorFlow. JAX emulates bfloat16 on a CPU, which is slower than float32.
    """
    backend = _backend()
    if gpu() is None:
        return backend == "tensorflow" and bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", _cpuinfo()))
    if backend == "torch":
        import torch

        return torch.cuda.get_device_capability()[0] >= 8
    if backend == "jax":
        import jax

        return float(getattr(jax.devices()[0], "compute_capability", "0")) >= 8
    import tensorflow as tf

    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    return details.get("compute_capability", (0, 0))[0] >= 8


def precision(wanted):
    """Return the Keras dtype policy for a recipe's precision; "auto" is mixed_bfloat16 if that is faster here."""
    if wanted == "auto":
        return "mixed_bfloat16" if has_bfloat16() else "float32"
    return wanted


@functools.cache
def commit():
    """Return the short hash of the course's commit, with "+" if the package has uncommitted changes.

    The environment variable FCNN_COMMIT replaces it: on a cluster the package is a copy without git. Otherwise it is
    "unknown" if the course's folder (`paths.root`) is not the top folder of a git repository: a repository around it
    says nothing about the course. Files that git does not track do not count.
    """
    folder = paths.root()
    if os.environ.get("FCNN_COMMIT"):
        return os.environ["FCNN_COMMIT"]
    if folder is None:
        return "unknown"
    try:
        if not Path(_git(folder, "rev-parse", "--show-toplevel")).samefile(folder):
            return "unknown"
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", "fcnn_utils")
        return _git(folder, "rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return "unknown"


def _git(folder, *arguments):
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


@functools.cache
def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().split("\n\n")[0] if path.exists() else ""


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
