"""The command line: `python -m fcnn_utils run` and `python -m fcnn_utils train`."""

import argparse
import os
import sys

from fcnn_utils.course import data, parameters, runner

_STOPPED = 130  # the shell's code for Ctrl-C


def main(arguments=None):
    """Run the command line; returns the exit code: 0 well, 1 a run failed, 2 a bad argument or file, 130 stopped."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except runner.NotebookFailed as failure:
        print(failure, file=sys.stderr)
        return 2 if failure.bad_value else 1
    except ArithmeticError as diverged:
        print(f"stopped: {diverged}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"fcnn_utils: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return _STOPPED
    return 0


def _run(options):
    settings = dict(_setting(text) for text in options.set)
    runner.run(options.profile, options.only, options.start, options.dataset, settings, options.fresh)


def _train(options):
    with runner.stderr_to(os.devnull):  # Keras starts here: not before the arguments are read
        from fcnn_utils.course import environment, networks, training

        if options.deterministic:
            environment.deterministic()
        environment.describe()
    networks.run_name(options.model, options.width)  # refuses what is none
    recipe = training.get_recipe(options.recipe)
    if options.epochs is not None:
        recipe = recipe.replace(epochs=options.epochs)
    dataset = data.load(options.dataset, options.train_images, options.test_images)
    print(dataset.describe(), flush=True)
    how = {key: getattr(options, key) for key in ("width", "retrain", "save_model", "save_predictions")}
    training.train(options.model, dataset, recipe, options.seed, **how)


def _setting(text):
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes NAME=VALUE; got {text!r}")
    return name, parameters.parsed(name, value)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m fcnn_utils", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="run | train")

    run = commands.add_parser("run", help="execute the notebooks in order")
    run.add_argument("--profile", default="quick", help="smoke, quick (default) or full")
    run.add_argument("--only", nargs="+", default=[], metavar="NN", help="run these notebooks only, e.g. 07 08")
    run.add_argument("--from", dest="start", metavar="NN", help="run this notebook and those after it")
    run.add_argument("--dataset", help="cifar100, standin, or auto: the first where it can be had, else the second")
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="set a notebook's parameter")
    run.add_argument("--fresh", action="store_true", help="forget what earlier runs of the profile left")
    run.set_defaults(command=_run)

    train = commands.add_parser("train", help="train a network without a notebook")
    train.add_argument(
        "model",
        help="simple, wider_factorized, wider_separable, deeper_dense, deeper_tucker, deeper_separable, simple_cp, "
        "inception, xception, wang, resnet18, or a wide residual network by depth and width, wrn-16-4",
    )
    train.add_argument(
        "--recipe",
        default="faster",
        help="faster (default), fast (not searched for), long (20 epochs), thesis, medical (small images of few "
        "classes, all shown as often), or tune (small steps, for trained weights)",
    )
    train.add_argument("--seed", type=int, default=None, help="default: the recipe's, 0")
    train.add_argument("--width", type=float, default=1.0, help="factor of the numbers of filters (default: 1)")
    train.add_argument("--dataset", default="auto", help=", ".join(data.NAMES) + " (default)")
    train.add_argument("--epochs", type=int, help="default: the recipe's")
    train.add_argument("--train-images", type=int, default=0, metavar="N", help="train on N images only")
    train.add_argument("--test-images", type=int, default=0, metavar="N", help="test on N images only")
    train.add_argument("--retrain", action="store_true", help="train anew though there is a record, and replace it")
    train.add_argument("--deterministic", action="store_true", help="the same seed gives the same digits")
    train.add_argument("--save-model", action="store_true", help="keep the trained network beside the record")
    train.add_argument("--save-predictions", action="store_true", help="keep what it says of the test images, too")
    train.set_defaults(command=_train)
    return parser


if __name__ == "__main__":
    sys.exit(main())
