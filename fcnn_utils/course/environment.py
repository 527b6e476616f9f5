"""What a number came from: processor, device, backend, precision, versions, commit."""

import datetime
import functools
import logging
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import keras

from fcnn_utils.course.records import ROOT
from fcnn_utils.deploy import available_cores

_ASKED = {"deterministic": False}  # what this process was set to


def setup(seed):
    """First line of every notebook: seed Python, NumPy and the backend; print what runs here, in one line."""
    keras.utils.set_random_seed(seed)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # its warnings of retracing tell a reader nothing
    print(summary(describe()))


def deterministic():
    """From here on the same seed gives the same numbers, to the last digit, on the same machine and versions.

    To be called before anything is computed (JAX reads its flag when it starts, and does not say that it came too
    late). TensorFlow is held to deterministic kernels and to one operation at a time (two at a time, the separable
    network's gradients come out differently from run to run, on a CPU, too); JAX, on a GPU, to kernels that add in a
    fixed order; PyTorch to its deterministic algorithms.

    Raises:
        ValueError: TensorFlow has computed something already.
    """
    backend = keras.config.backend()
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


def summary(here):
    """One line that tells where a number comes from, from `describe()` or from a record."""
    when = f" · {here['date'][:10]}" if "epochs" in here else ""
    cores = f"{here['cores']} core{'s' * (here['cores'] != 1)}"
    return f"{here['device']} · {cores} · Keras {here['versions']['keras']} on {here['backend']}" + when


def describe():
    """Dict: device, cores, backend, versions, python, deterministic (whether that was asked for), date (UTC), commit
    ("unknown" outside a git checkout)."""
    return {
        "device": gpu() or processor(),
        "cores": available_cores(),
        "backend": keras.config.backend(),
        "versions": {
            name: version for name in ("keras", "tensorflow", "jax", "torch", "numpy") if (version := _version(name))
        },
        "python": platform.python_version(),
        **_ASKED,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }


@functools.cache
def processor():
    """Processor's name, "CPU" if the system does not tell."""
    name = re.search(r"model name\s*:\s*(.+)", _cpuinfo())
    if name is None and platform.system() == "Darwin":
        return (
            subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout.strip()
            or "CPU"
        )
    return f"CPU {name.group(1).strip()}" if name else f"CPU {platform.processor()}".strip()


@functools.cache
def gpu():
    """Name of the first GPU that the backend trains on, None if it trains on the CPU."""
    backend = keras.config.backend()
    if backend == "tensorflow":
        import tensorflow as tf  # the device list is the backend's own

        found = tf.config.list_physical_devices("GPU")
        return (
            f"GPU {tf.config.experimental.get_device_details(found[0]).get('device_name', '')}".strip()
            if found
            else None
        )
    if backend == "jax":
        import jax

        return None if jax.default_backend() == "cpu" else f"GPU {jax.devices()[0].device_kind}"
    if backend == "torch":
        import torch

        return f"GPU {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else None
    return None


def has_bfloat16():
    """Whether bfloat16 is faster here: AVX-512, AMX or Arm with bf16, or an NVIDIA GPU from Ampere on."""
    if gpu() is None:
        # JAX on a CPU emulates bfloat16: slower than float32 whatever the processor has.
        return keras.config.backend() == "tensorflow" and bool(
            re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", _cpuinfo())
        )
    if keras.config.backend() == "torch":
        import torch

        return torch.cuda.get_device_capability()[0] >= 8
    if keras.config.backend() == "jax":
        import jax

        return float(getattr(jax.devices()[0], "compute_capability", "0")) >= 8
    import tensorflow as tf

    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    return details.get("compute_capability", (0, 0))[0] >= 8


def precision(wanted):
    """The Keras dtype policy for "float32", "mixed_bfloat16", or "auto": the second where it is faster here."""
    if wanted == "auto":
        return "mixed_bfloat16" if has_bfloat16() else "float32"
    return wanted


@functools.cache
def commit():
    """Short hash of the checked-out commit, with "+" where tracked files differ from it; "unknown" without git."""
    try:
        run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
        changed = run(["git", "status", "--porcelain", "--untracked-files=no", "--", "fcnn_utils"]).stdout.strip()
        return run(["git", "rev-parse", "--short=10", "HEAD"]).stdout.strip() + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@functools.cache
def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().split("\n\n")[0] if path.exists() else ""


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
