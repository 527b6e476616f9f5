"""Where a number comes from: `fcnn_utils.course.environment`."""

import datetime
import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

from fcnn_utils.course import environment, paths


@pytest.fixture
def use_cpuinfo(monkeypatch):
    """Function that replaces the system's description of the processor; there is no GPU."""
    monkeypatch.setattr(environment, "gpu", lambda: None)
    environment.processor.cache_clear()
    yield lambda text: monkeypatch.setattr(environment, "_cpuinfo", lambda: text)
    environment.processor.cache_clear()


@pytest.fixture
def git(tmp_path, monkeypatch):
    """Function that runs a git command in `tmp_path`, outside every other repository."""

    def run(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    environment.commit.cache_clear()
    yield run
    environment.commit.cache_clear()


def test_description_has_all_entries_of_a_record():
    here = environment.describe()
    entries = {"device", "cores", "devices", "backend", "versions", "python", "deterministic", "date", "commit"}
    assert here.keys() == entries and here["devices"] == 1
    assert re.match("(CPU|GPU)", here["device"]) and here["cores"] >= 1
    assert here["backend"] == keras.config.backend()
    assert here["versions"]["keras"] == keras.__version__ and here["versions"]["numpy"] == np.__version__
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(here["date"])
    assert abs(age.total_seconds()) < 60


def test_summary_has_device_cores_backend_and_the_date_of_a_record():
    here = {
        "device": "CPU X",
        "cores": 2,
        "backend": "jax",
        "versions": {"keras": "3.15.1"},
        "date": "2025-01-02T03:04",
    }
    assert environment.summary(here) == "CPU X · 2 cores · Keras 3.15.1 on jax"
    assert environment.summary(here | {"cores": 1}) == "CPU X · 1 core · Keras 3.15.1 on jax"
    assert environment.summary(here | {"epochs": []}) == "CPU X · 2 cores · Keras 3.15.1 on jax · 2025-01-02"


def test_setup_seeds_every_generator_and_prints_the_summary(capsys):
    drawn = []
    for seed in (7, 7, 8):
        environment.setup(seed)
        drawn.append((random.random(), np.random.rand(), float(keras.random.uniform(()))))
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))
    assert capsys.readouterr().out.splitlines() == [environment.summary(environment.describe())] * 3


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="only TensorFlow tells that it is too late")
def test_deterministic_is_rejected_after_a_computation():
    keras.ops.convert_to_numpy(keras.ops.ones(2) + 1)
    with pytest.raises(ValueError, match="before anything is computed; start Python anew"):
        environment.deterministic()
    assert environment.describe()["deterministic"] is False


@pytest.mark.parametrize(
    "text, name",
    [
        ("processor : 0\nmodel name\t: Intel(R) Core(TM) i7\nflags : fpu\n", "CPU Intel(R) Core(TM) i7"),
        ("Features : fp asimd\n", "CPU"),
    ],
)
def test_processor_name_is_read_from_the_system(use_cpuinfo, monkeypatch, text, name):
    use_cpuinfo(text)
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
def test_auto_precision_is_bfloat16_if_the_processor_computes_in_it(use_cpuinfo, monkeypatch, flags, fast, backend):
    use_cpuinfo(f"flags\t: {flags}\n")
    monkeypatch.setattr(keras.config, "backend", lambda: backend)
    expected = fast and backend == "tensorflow"  # JAX emulates bfloat16 on a CPU
    assert environment.has_bfloat16() == expected
    assert environment.precision("auto") == ("mixed_bfloat16" if expected else "float32")
    for wanted in ("float32", "mixed_bfloat16"):
        assert environment.precision(wanted) == wanted


# --- the commit --------------------------------------------------------------------------------------------------


def test_commit_is_the_courses_with_a_mark_if_the_package_was_changed(git, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    module, other = tmp_path / "fcnn_utils" / "a.py", tmp_path / "notes.txt"
    module.parent.mkdir()
    for path in (module, other):
        path.write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    short = git("rev-parse", "--short=10", "HEAD").stdout.strip()
    for path, expected in ((other, short), (module, f"{short}+")):  # only the package decides what a run does
        path.write_text("2")
        environment.commit.cache_clear()
        assert environment.commit() == expected


def test_commit_of_a_repository_around_an_installed_package_is_not_taken(git, installed_paths, tmp_path, monkeypatch):
    """Neither if there is no course at all, nor if a copy of the course lies inside the repository."""
    monkeypatch.setattr(environment, "paths", installed_paths)
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "somebody else's")
    assert installed_paths.root() is None and environment.commit() == "unknown"
    (tmp_path / "copy" / "notebooks").mkdir(parents=True)
    (tmp_path / "copy" / "notebooks" / "profiles.toml").touch()
    monkeypatch.chdir(tmp_path / "copy")
    environment.commit.cache_clear()
    assert installed_paths.root() == tmp_path / "copy" and environment.commit() == "unknown"
    shutil.move(tmp_path / ".git", tmp_path / "copy" / ".git")  # now the copy is the top of the work tree
    environment.commit.cache_clear()
    assert environment.commit() == git("-C", "copy", "rev-parse", "--short=10", "HEAD").stdout.strip()


def test_commit_without_a_repository_or_without_git_is_unknown(git, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    assert environment.commit() == "unknown"
    git("init", "--quiet")
    environment.commit.cache_clear()
    assert environment.commit() == "unknown"  # no commit yet
    monkeypatch.setenv("PATH", str(tmp_path))
    environment.commit.cache_clear()
    assert environment.commit() == "unknown"


# --- several devices -----------------------------------------------------------------------------------------------

TRAINING = """
import sys
import keras, numpy as np
from fcnn_utils.course import augmentation, data, environment, feeding, training
from fcnn_utils.course.recipes import RECIPES
environment.use_devices(int(sys.argv[1]))
rng = np.random.default_rng(0)
fine = np.arange(50) % 10
split = data.Split(rng.integers(0, 256, (50, 8, 8, 3), dtype="uint8"), fine, fine)
keras.utils.set_random_seed(0)
stack = [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization()]
model = keras.Sequential([*stack, keras.layers.Flatten(), keras.layers.Dense(10, activation="softmax")])
recipe = RECIPES["faster"].replace(batch_size=10, learning_rate=0.01)
training.compile_model(model, recipe, 5)
scale = augmentation.channel_statistics(split)
feed = feeding.Feed(model, split, recipe, scale, steps_per_program=2)
print(feed.fit(range(2)).history["loss"], training.evaluate(model, split.first(21), scale)["loss"])
print(len(model.trainable_variables[0].value.sharding.device_set))
"""


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_losses_on_two_devices_are_those_on_one():
    """A batch normalisation has the statistics of the whole batch. 21 test images cannot be divided evenly."""
    found = {}
    for count in (1, 2):
        command = [sys.executable, "-c", TRAINING, str(count)]
        environ = {**os.environ, "KERAS_BACKEND": "jax"}
        lines = subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout.splitlines()
        assert lines[-1] == str(count)
        found[count] = [float(each) for each in re.findall(r"\d+\.\d+", lines[-2])]
    assert len(set(found[1])) == 3
    assert found[2] == pytest.approx(found[1], rel=1e-5)


def test_several_devices_need_jax_and_a_number_of_at_least_one(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "tensorflow")
    environment.use_devices(1)
    with pytest.raises(ValueError, match="several devices need the backend jax: set KERAS_BACKEND to jax; it is"):
        environment.use_devices(2)
    with pytest.raises(ValueError, match="devices must be a whole number between 1"):
        environment.use_devices(0)
