"""Factorize, count and time trained models; execute the notebooks of the course, or train one of its networks."""

# Everything slow (Keras, pandas, papermill) is imported inside the commands, so that --help answers at once.
import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path

from fcnn_utils import _commands
from fcnn_utils._checks import check_choice

_STOPPED = 130  # a shell's exit code for Ctrl-C
_EXTRAS = dict.fromkeys(("onnx", "tf2onnx", "onnxruntime", "openvino", "ai_edge_litert"), "export")
_EXTRAS |= dict.fromkeys(("papermill", "nbclient", "IPython"), "course,jupyter")
_EXTRAS |= {"jax": "jax", "torch": "torch", "onnxscript": "torch", "ray": "ray"}  # missing module -> extra that has it


def main(arguments=None):
    """Run the command line; return the exit code.

    0: success; 1: a notebook or a training failed; 2: an argument or a file is bad; 130: Ctrl-C or SIGTERM.
    """
    options = _parser().parse_args(arguments)
    try:
        with _terminable():
            return options.command(options)
    except ArithmeticError as diverged:
        print(f"stopped: {diverged}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:  # OSError: standard output is closed, or goes to a full disk
        print(f"fcnn_utils: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as missing:
        print(f"fcnn_utils: {_install(missing.name, options)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        again = "; run the same command to continue from here" if options.is_of_the_course else ""
        print(f"stopped: {stopped}" if str(stopped) else f"stopped{again}", file=sys.stderr)
        return _STOPPED


def _install(module, options):
    """Say how to install what has a missing module."""
    module = (module or "a package").split(".")[0]
    extra = _EXTRAS.get(module, "course" if options.is_of_the_course else "")
    what = f".[{extra}]" if extra else "."
    return f'this command needs {module}: pip install "{what}" in a clone'


@contextlib.contextmanager
def _terminable():
    """Make SIGTERM end a run as Ctrl-C does, and Ctrl-C work even if a shell started this process in the background."""

    def stop(signum, frame):
        raise KeyboardInterrupt

    handlers = {signal.SIGTERM: stop, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(options):
    from fcnn_utils.course import runner

    settings = dict(_setting(text) for text in options.set)
    try:
        runner.run(options.profile, options.only, options.start, options.dataset, settings, options.fresh, options.jobs)
    except runner.NotebookFailed as failure:
        print(failure, file=sys.stderr)
        return 2 if failure.bad_value else 1
    return 0


def _setting(text):
    from fcnn_utils.course import parameters

    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes NAME=VALUE; got {text!r}")
    return name, parameters.parse(name, value)


def _train(options):
    from fcnn_utils._terminal import stderr_to
    from fcnn_utils.course import data, paths
    from fcnn_utils.course.recipes import get_recipe

    with stderr_to(os.devnull):  # TensorFlow writes many lines when it starts
        from fcnn_utils.course import environment, experiments, networks

        if options.deterministic:
            environment.deterministic()
        environment.use_devices(options.devices)
        environment.describe()
    networks.run_name(options.model, options.width)  # checks both, and the next lines the rest, before data is loaded
    given = {"epochs": options.epochs, "seed": options.seed}
    recipe = get_recipe(options.recipe).replace(**{key: value for key, value in given.items() if value is not None})
    dataset = data.load(options.dataset, options.train_images, options.test_images)
    paths.say(str(dataset))
    how = {key: getattr(options, key) for key in ("width", "retrain", "save_model", "save_predictions")}
    experiments.train(options.model, dataset, recipe, **how)
    return 0


def _sweep(options):
    from fcnn_utils._terminal import stderr_to
    from fcnn_utils.course import comparison, grids, networks, paths, sweeps

    with stderr_to(os.devnull):  # as above
        runs = grids.read(options.grid)
        names = {f"{networks.run_name(run.network, run.width)}/{run.recipe.name}" for run in runs}
    if options.baseline is not None:
        check_choice("--baseline", options.baseline, sorted(names))
    results = sweeps.train(runs, options.address)
    kept = [record for record in results.values() if not isinstance(record, str)]
    if kept:
        done = {f"{record['model']}/{record['recipe']['name']}" for record in kept}
        baseline = tuple(options.baseline.split("/")) if options.baseline in done else None
        paths.say(comparison.over_seeds(kept, baseline).to_string(float_format="{:.2f}".format))
    return 1 if len(kept) < len(results) else 0


def _parser():
    program = "fcnn" if Path(sys.argv[0]).stem == "fcnn" else "python -m fcnn_utils"  # as it was started
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.set_defaults(is_of_the_course=False)
    commands = parser.add_subparsers(required=True, metavar="factorize | cost | latency | run | train | sweep")
    _commands.add(commands)
    _add_run(commands.add_parser("run", help="execute the notebooks in order"))
    _add_train(commands.add_parser("train", help="train a network of the course without a notebook"))
    _add_sweep(commands.add_parser("sweep", help="train a grid of networks, recipes and seeds, also on a Ray cluster"))
    return parser


def _add_run(run):
    run.set_defaults(command=_run, is_of_the_course=True)
    run.add_argument("--profile", default="quick", help="smoke (few images), quick (default) or full (as published)")
    run.add_argument("--only", nargs="+", default=[], metavar="NN", help="run only these notebooks, for example 11 14")
    run.add_argument("--from", dest="start", metavar="NN", help="run this notebook and all after it")
    run.add_argument("--dataset", help="cifar100, standin, or auto: cifar100 if it is available, otherwise standin")
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="set a parameter of the notebooks"
    )
    run.add_argument("--jobs", type=int, default=2, help="notebooks to run side by side; those that time run alone")
    run.add_argument("--fresh", action="store_true", help="first delete the output of earlier runs of this profile")


def _add_train(train):
    train.set_defaults(command=_train, is_of_the_course=True)
    train.add_argument(
        "model",
        help="simple, wider_dense, wider_factorized, wider_separable, deeper_dense, deeper_tucker, deeper_separable, "
        "simple_cp, inception, xception, wang, resnet18, or a wide residual network by depth and width, for example "
        "wrn-16-4",
    )
    train.add_argument(
        "--recipe",
        default="faster",
        help="faster (default), muon (another optimizer), fast (common practice), long (20 epochs), thesis, medical "
        "(small images of few classes, each class shown equally often), or tune (small steps, for pretrained weights)",
    )
    train.add_argument("--seed", type=int, help="seed of weights, image order and augmentation (default: 0)")
    train.add_argument("--width", type=float, default=1.0, help="factor on the number of filters (default: 1)")
    train.add_argument(
        "--dataset",
        default="auto",
        help="cifar100; a set of MedMNIST: pathmnist, dermamnist, octmnist, pneumoniamnist, retinamnist, breastmnist, "
        "bloodmnist, tissuemnist, organamnist, organcmnist, organsmnist; a generated stand-in: standin, "
        "greystandin; or auto (default): cifar100 if it is available, otherwise standin",
    )
    train.add_argument("--epochs", type=int, help="number of epochs (default: the recipe's)")
    train.add_argument("--train-images", type=int, default=0, metavar="N", help="use N training and validation images")
    train.add_argument("--test-images", type=int, default=0, metavar="N", help="use N test images")
    train.add_argument("--retrain", action="store_true", help="train even if there is a record, and replace it")
    train.add_argument("--deterministic", action="store_true", help="make results reproducible to the last digit")
    train.add_argument(
        "--devices", type=int, default=1, metavar="N", help="divide each batch over N devices (JAX only)"
    )
    train.add_argument("--save-model", action="store_true", help="keep the trained network beside the record")
    train.add_argument("--save-predictions", action="store_true", help="keep the predictions beside the record")


def _add_sweep(sweep):
    sweep.set_defaults(command=_sweep, is_of_the_course=True)
    sweep.add_argument("grid", help="TOML file with the networks, recipes and seeds (see fcnn_utils/course/grids.py)")
    sweep.add_argument(
        "--address",
        help="address of a Ray cluster: auto for one on this machine, or ray://HOST:10001; default: use this machine "
        "only, with Ray if it is installed, otherwise one run after another",
    )
    sweep.add_argument(
        "--baseline",
        metavar="NETWORK/RECIPE",
        help="compare the accuracies with those of this network and recipe of the grid, seed by seed",
    )


if __name__ == "__main__":
    sys.exit(main())
