"""Read a grid of trainings from a TOML file.

networks = ["simple", "wider_dense"]
widths = [0.5]                # factors on the number of filters; default [1.0]
recipes = ["faster"]          # default
seeds = [0, 1, 2]             # default [0]
dataset = "cifar100"          # default "auto"
train_images = 0              # number of training and validation images; default 0 for all
test_images = 0               # number of test images; default 0 for all
deterministic = false         # true: results reproducible to the last digit
save_models = false           # true: keep each trained network beside its record
cpus = 2                      # processors (threads) per run; default: all of this machine, so one run at a time
gpus = 0.5                    # GPUs per run, with Ray; default: 1 if a machine has one, otherwise 0

[settings]                    # changes to the recipes; with lists, every combination of values is a run
optimizer = "muon"
learning_rate = [0.12, 0.24]
"""

import dataclasses
import itertools
import tomllib
from pathlib import Path

from fcnn_utils._checks import check_choice, check_number
from fcnn_utils._processors import available_cores
from fcnn_utils.course.recipes import Recipe, get_recipe

_LISTS = {"networks": str, "widths": float, "recipes": str, "seeds": int}
_DEFAULTS = {"widths": [1.0], "recipes": ["faster"], "seeds": [0], "dataset": "auto", "train_images": 0}
_DEFAULTS |= {"test_images": 0, "deterministic": False, "save_models": False, "cpus": None, "gpus": None}
_DEFAULTS["settings"] = {}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of a grid.

    Attributes:
        network, width, recipe: as in `networks.build`; the recipe has the seed.
        grid: dict of the grid's dataset, train_images, test_images, deterministic, save_models, cpus and gpus.
    """

    network: str
    width: float
    recipe: Recipe
    grid: dict = dataclasses.field(compare=False)

    def __str__(self):
        from fcnn_utils.course import networks

        return f"{networks.run_name(self.network, self.width)} · {self.recipe.name} · seed {self.recipe.seed}"


def read(path):
    """Read a grid from a TOML file (see the module).

    Returns:
        list of `Run`, not empty, sorted by seed, so that a stopped sweep has complete seeds to compare.

    Raises:
        ValueError: if the file cannot be read, or a value is not allowed; the message names the file.
    """
    try:
        grid = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from None
    try:
        return _runs(grid)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _runs(grid):
    from fcnn_utils.course import data, networks

    for key in grid:
        check_choice("each key of a grid", key, ["networks", *_DEFAULTS])
    if "networks" not in grid:
        raise ValueError('networks is missing; give a list of names, such as networks = ["simple"]')
    grid = _DEFAULTS | {"cpus": available_cores()} | grid
    for key, kind in _LISTS.items():
        if not isinstance(grid[key], list) or not grid[key]:
            raise ValueError(f"{key} must be a list with at least one value; got {grid[key]!r}")
        for value in grid[key] if kind is not str else ():
            check_number(f"each of {key}", value, kind, *((0, 2**31 - 1) if kind is int else (1e-3, 1e3)))
    for key in ("deterministic", "save_models"):
        if not isinstance(grid[key], bool):
            raise ValueError(f"{key} must be true or false; got {grid[key]!r}")
    for key, low in (("train_images", 0), ("test_images", 0), ("cpus", 1)):
        check_number(key, grid[key], int, low, 10**9)
    if grid["gpus"] is not None:
        check_number("gpus", grid["gpus"], float, 0, 1000)
    check_choice("dataset", grid["dataset"], data.NAMES)
    if not isinstance(grid["settings"], dict):
        raise ValueError(f"settings must be a table of a recipe's settings; got {grid['settings']!r}")
    spread = {key: value if isinstance(value, list) else [value] for key, value in grid["settings"].items()}
    for key, values in spread.items():
        if not values or key in ("seed", "assumed", "distillation"):
            why = "a grid cannot change it" if values else "give it at least one value"
            why = "put seeds into the list seeds, above [settings]" if key == "seed" else why
            raise ValueError(f"settings has {key} = {grid['settings'][key]!r}: {why}")
    options = {key: grid[key] for key in _DEFAULTS if key not in _LISTS and key != "settings"}
    found = []
    for network, width, name in itertools.product(grid["networks"], grid["widths"], grid["recipes"]):
        networks.run_name(network, width)  # checks both
        for values in itertools.product(*spread.values()):
            recipe = get_recipe(name).replace(**dict(zip(spread, values, strict=True)))
            found += [Run(network, width, recipe.replace(seed=seed), options) for seed in grid["seeds"]]
    keys = [str(run) for run in found]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ValueError(f"a run occurs twice: {repeated[0]}; give each value once")
    return sorted(found, key=lambda run: run.recipe.seed)
