"""Where a number comes from: `fcnn_utils.course.environment`."""

import datetime
import random
import re
import subprocess

import keras
import numpy as np
import pytest

from fcnn_utils import benchmark
from fcnn_utils.course import environment


@pytest.fixture
def cpu(monkeypatch):
    """A machine without a GPU whose processor is described by the text that is given."""

    def use(text):
        monkeypatch.setattr(environment, "_cpuinfo", lambda: text)

    monkeypatch.setattr(environment, "gpu", lambda: None)
    environment.processor.cache_clear()
    yield use
    environment.processor.cache_clear()


# --- basic -------------------------------------------------------------------------------------------------------


def test_a_description_has_all_that_a_record_needs():
    here = environment.describe()
    assert here.keys() == {"device", "cores", "backend", "versions", "python", "deterministic", "date", "commit"}
    assert re.match("(CPU|GPU)", here["device"]) and here["cores"] >= 1
    assert here["backend"] == keras.config.backend()
    assert here["versions"]["keras"] == keras.__version__ and here["versions"]["numpy"] == np.__version__
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(here["date"])
    assert abs(age.total_seconds()) < 60


@pytest.mark.parametrize("wanted", ["float32", "mixed_bfloat16"])
def test_a_precision_that_is_named_is_taken(wanted):
    assert environment.precision(wanted) == wanted


def test_deterministic_is_refused_once_something_was_computed():
    keras.ops.convert_to_numpy(keras.ops.ones(2) + 1)
    if keras.config.backend() == "tensorflow":
        with pytest.raises(ValueError, match="before anything is computed; start Python anew"):
            environment.deterministic()
        assert environment.describe()["deterministic"] is False


# --- correct -----------------------------------------------------------------------------------------------------


def test_the_line_tells_device_cores_and_backend():
    here = {
        "device": "CPU X",
        "cores": 2,
        "backend": "jax",
        "versions": {"keras": "3.15.1"},
        "date": "2025-01-02T03:04",
    }
    assert environment.summary(here) == "CPU X · 2 cores · Keras 3.15.1 on jax"
    assert environment.summary(here | {"cores": 1}) == "CPU X · 1 core · Keras 3.15.1 on jax"
    assert (
        environment.summary(here | {"epochs": []}) == "CPU X · 2 cores · Keras 3.15.1 on jax · 2025-01-02"
    )  # a record


def test_setup_seeds_every_generator_and_prints_the_line(capsys):
    drawn = []
    for seed in (7, 7, 8):
        environment.setup(seed)
        drawn.append((random.random(), np.random.rand(), float(keras.random.uniform(()))))
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))
    assert capsys.readouterr().out.splitlines() == [environment.summary(environment.describe())] * 3


@pytest.mark.parametrize(
    "text, name",
    [
        ("processor : 0\nmodel name\t: Intel(R) Core(TM) i7\nflags : fpu\n", "CPU Intel(R) Core(TM) i7"),
        ("Features : fp asimd\n", "CPU"),
    ],
)
def test_the_processors_name(cpu, monkeypatch, text, name):
    cpu(text)
    monkeypatch.setattr(environment.platform, "system", lambda: "Linux")
    monkeypatch.setattr(environment.platform, "processor", lambda: "")
    assert environment.processor() == name


@pytest.mark.parametrize(
    "flags, fast",
    [
        ("fpu avx512f avx512_bf16 sse", True),
        ("fpu amx_bf16", True),
        ("fp asimd bf16", True),
        ("fpu avx2 avx512f", False),
        ("fpu xbf16y", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_bfloat16_is_chosen_where_the_processor_computes_in_it(cpu, monkeypatch, flags, fast, backend):
    cpu(f"flags\t: {flags}\n")
    monkeypatch.setattr(keras.config, "backend", lambda: backend)
    expected = fast and backend == "tensorflow"  # JAX emulates it on a CPU
    assert environment.has_bfloat16() == expected
    assert environment.precision("auto") == ("mixed_bfloat16" if expected else "float32")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout of its own with one commit; `git(...)` runs a command in it."""

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    environment.commit.cache_clear()
    yield git
    environment.commit.cache_clear()


def test_the_commit_with_a_mark_where_the_package_was_changed(checkout, tmp_path):
    module, other = tmp_path / "fcnn_utils" / "a.py", tmp_path / "notes.txt"
    module.parent.mkdir()
    for path in (module, other):
        path.write_text("1")
    checkout("init", "--quiet")
    checkout("add", ".")
    checkout("commit", "--quiet", "--message", "one")
    short = checkout("rev-parse", "--short=10", "HEAD").stdout.strip()
    for path, expected in ((other, short), (module, f"{short}+")):  # only the package decides what a run does
        path.write_text("2")
        environment.commit.cache_clear()
        assert environment.commit() == expected


def test_outside_a_checkout_the_commit_is_unknown(checkout):
    assert environment.commit() == "unknown"


def test_without_git_the_commit_is_unknown(checkout, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.commit() == "unknown"


def test_throughputs_are_measured_in_turn_after_a_warm_up(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(environment.time, "perf_counter", lambda: clock[0])

    def work(name, images):
        calls.append(name)
        clock[0] += len(calls)  # the n-th call takes n seconds
        return images

    table = benchmark.alternate({"a": lambda: work("a", 60), "b": lambda: work("b", 120)}, 2)
    assert calls == ["a", "b"] * 3
    assert table.columns.tolist() == ["a", "b"]
    np.testing.assert_allclose(table, [[60 / 3, 120 / 4], [60 / 5, 120 / 6]])  # without the first round


# --- correct: the load of the machine ----------------------------------------------------------------------------


@pytest.mark.parametrize("wall, busy, own, share", [(10, 30, 10, 0.5), (10, 10, 10, 0), (10, 9, 10, 0), (10, 50, 0, 1)])
def test_the_share_of_other_programs(monkeypatch, wall, busy, own, share):
    """Of 4 cores: seconds passed, seconds worked in all, seconds of ours."""
    monkeypatch.setattr(environment.psutil, "cpu_count", lambda: 4)
    moments = iter([(100.0, 7.0, 3.0), (100.0 + wall, 7.0 + busy, 3.0 + own)])
    monkeypatch.setattr(benchmark.BackgroundLoad, "_now", staticmethod(lambda: next(moments)))
    assert benchmark.BackgroundLoad().others() == share


def test_a_result_is_waited_for(monkeypatch):
    waited = []

    class Later:
        def block_until_ready(self):
            waited.append("jax")

    benchmark.wait_for(Later())
    assert waited == ["jax"]
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        monkeypatch.setattr(tf.test.experimental, "sync_devices", lambda: waited.append("tensorflow"))
        for device in (None, "GPU"):
            monkeypatch.setattr(environment, "gpu", lambda device=device: device)
            benchmark.wait_for(keras.ops.ones(3))
        assert waited == ["jax", "tensorflow"]  # a CPU's result is there when the call returns
