"""The library's commands: factorize a model file, count its costs, measure latencies."""

# Everything slow (Keras, pandas) is imported inside the commands, so that --help answers at once.
import argparse
import math
import os
import sys
import warnings
import zipfile
from pathlib import Path

from fcnn_utils._terminal import say, stderr_to

ENGINES = ("keras", "onnxruntime", "openvino", "litert")
_ENGINE_OF = {".onnx": "onnxruntime", ".xml": "openvino", ".tflite": "litert"}
_MODELS = (".keras", ".h5")
_TARGETS = ("ratio", "macs", "params", "size_mb", "speedup", "max_loss")
_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}
_MAX_IMAGES = 500
_BUSY = 0.05  # share of the processor from which on the load by other programs is mentioned
_EXAMPLES = """examples:
  fcnn factorize model.keras --ratio 0.25 --output small.keras
  fcnn factorize model.keras --macs 60M --images photos/ --range 0 1 --output small.keras --export small.onnx
  fcnn factorize model.keras --method cp,tucker --speedup 2 --images images.npy --report report.html
"""


def add(commands):
    """Add the commands to the subparsers of a command line."""
    about = "make a trained model smaller and faster"
    form = argparse.RawDescriptionHelpFormatter
    _add_factorize(commands.add_parser("factorize", help=about, epilog=_EXAMPLES, formatter_class=form))
    costs = commands.add_parser("cost", help="count a model's parameters, MACs and activation bytes, layer by layer")
    costs.set_defaults(command=_quietly(_cost))
    costs.add_argument("model", type=Path, help="a .keras or .h5 file")
    _add_latency(commands.add_parser("latency", help="measure models in turn, in one engine or in several"))


def _add_factorize(parser):
    parser.set_defaults(command=_quietly(_factorize))
    parser.add_argument("model", type=Path, help="a .keras or .h5 file of a trained model")
    result = parser.add_argument_group("results, at least one")
    result.add_argument("--output", type=Path, metavar="FILE", help="write the new model, .keras")
    result.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write the new model for an engine: .onnx, .xml (OpenVINO) or .tflite (LiteRT); batch norms are folded",
    )
    result.add_argument("--report", type=Path, metavar="FILE", help="write the report, .html")
    budget = parser.add_argument_group("target, exactly one; --speedup and --max-loss need --images")
    budget.add_argument("--ratio", type=float, help="largest share of each kernel's parameters that is kept")
    budget.add_argument("--macs", type=_count, metavar="N", help="most multiply-adds for one image, for example 60M")
    budget.add_argument("--params", type=_count, metavar="N", help="most parameters, for example 500k")
    budget.add_argument("--size-mb", type=float, metavar="MB", help="largest size of the weights, in millions of bytes")
    budget.add_argument("--speedup", type=float, metavar="X", help="least measured speed-up, for example 2")
    budget.add_argument(
        "--max-loss",
        type=float,
        metavar="X",
        help="largest change of the outputs on the images, for example 0.01 (mean Kullback-Leibler divergence, nats)",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--method",
        type=_names,
        help="cp, cp4, tucker, tt, svd, spatial, separable, or several: cp,tucker (default: svd,spatial,tucker,cp)",
    )
    how.add_argument("--layers", type=_names, metavar="A,B", help="convert only these layers, named by their paths")
    how.add_argument("--exclude", type=_names, metavar="A,B", help="leave these layers as they are")
    how.add_argument("--multiple", type=int, metavar="N", help="make ranks multiples of this; 16 suits processors")
    how.add_argument("--uniform", action="store_true", default=None, help="use one ratio for all layers")
    how.add_argument("--seed", type=int, help="seed of the random numbers")
    engines = ENGINES[1:]  # `_clock` has no times for Keras
    how.add_argument("--engine", choices=engines, help="with --speedup: engine that is timed (default: onnxruntime)")
    how.add_argument("--batch", type=int, metavar="N", help="with --speedup: images per call (default: 1)")
    how.add_argument("--threads", type=int, metavar="N", help="with --speedup: threads (default: all processors)")
    how.add_argument("--quiet", action="store_const", const=0, dest="verbose", help="show no progress")
    _add_images(parser.add_argument_group("images, without labels, that ranks and factors are fitted to"))


def _add_images(images):
    images.add_argument(
        "--images",
        type=Path,
        metavar="PATH",
        help="a folder of pictures; or an .npy or .npz file of images, normalised as in training",
    )
    images.add_argument(
        "--max-images", type=int, default=_MAX_IMAGES, metavar="N", help="use N of them (default: %(default)d)"
    )
    images.add_argument(
        "--range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="what the pixel values 0 to 255 became in training: 0 1, -1 1, or 0 255. Needed for pictures, unless you "
        "give --preprocess or the model begins with a Rescaling layer for values of 0 to 255",
    )
    images.add_argument(
        "--mean", type=_numbers, metavar="M", help="subtract this after --range, for example 0.485,0.456,0.406"
    )
    images.add_argument("--std", type=_numbers, metavar="S", help="then divide by this, for example 0.229,0.224,0.225")
    images.add_argument(
        "--preprocess",
        metavar="NAME",
        help="instead of --range, --mean and --std: use preprocess_input of keras.applications.NAME, such as resnet50",
    )


def _add_latency(parser):
    parser.set_defaults(command=_quietly(_latency))
    parser.add_argument(
        "models", type=Path, nargs="+", help="files .keras, .h5, .onnx, .xml or .tflite; the first is the baseline"
    )
    parser.add_argument(
        "--engine",
        type=_names,
        help="keras, onnxruntime, openvino, litert, or several: keras,onnxruntime (default: those of the exported "
        "files, or keras). Keras models are measured in each, with folded batch norms",
    )
    parser.add_argument("--batch", type=_whole_numbers, default=[1], metavar="N", help="images per call, such as 1,64")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the engine (default: all processors)")
    parser.add_argument(
        "--rounds", type=int, default=50, metavar="N", help="measured calls of each model (default: 50)"
    )


# --- the commands ------------------------------------------------------------------------------------------------


def _factorize(options):
    from fcnn_utils import _images

    given = (
        *_TARGETS,
        "method",
        "engine",
        "batch",
        "threads",
        "layers",
        "exclude",
        "uniform",
        "multiple",
        "seed",
        "verbose",
    )
    arguments = {key: getattr(options, key) for key in given if getattr(options, key) is not None}
    if len(options.method or []) == 1:
        arguments["method"] = options.method[0]
    pixels = _images.Pixels(options.range and tuple(options.range), options.mean, options.std, options.preprocess)
    if sum(key in arguments for key in _TARGETS) != 1:
        raise ValueError("give exactly one of --ratio, --macs, --params, --size-mb, --speedup or --max-loss")
    if options.images is None and (options.speedup or options.max_loss) is not None:
        raise ValueError("--speedup and --max-loss need --images")
    _check_model_file(options.model)
    _check_results(options)
    if options.images is not None:
        _images.check(options.images, pixels)
    elif pixels != _images.Pixels():
        raise ValueError("--range, --mean, --std and --preprocess are for pictures: give --images as well")
    model = _load(options.model)
    from fcnn_utils import _report_page, batch_norm, compress, deploy

    exported = _ENGINE_OF[options.export.suffix] if options.export else "keras"
    for engine in filter(None, (exported, options.engine)):
        deploy._check_installed(engine, exports=True)  # now, not after the work
    if options.images is not None:
        arguments["images"] = _images.read(options.images, model, options.max_images, pixels, _status)
    small, report = compress.factorize(model, **arguments)
    say(str(report))
    if options.output:
        _save(small, options.output)
    if options.report:
        said = {key: value for key, value in (arguments | vars(pixels)).items() if value is not None}
        said |= {"max_images": options.max_images} if options.max_images != _MAX_IMAGES else {}
        notes = [_report_page.origin(options.model, options.images, said), *options.warnings]
        report.save(options.report, title=f"{options.model.name}, factorized", notes=notes)
        say(f"wrote {options.report}")
    if options.export:
        with stderr_to(os.devnull):  # TensorFlow's converters write lines of their own
            deploy.export(batch_norm.fold_batch_norm(small), options.export)
        say(_wrote(options.export))
    return 0


def _cost(options):
    _check_model_file(options.model)
    model = _load(options.model)
    from fcnn_utils import cost

    table = cost.layer_costs(model)
    rows = [("layer", "kind", "output", "parameters", "MACs", "other ops", "activation bytes")]
    for row in table.itertuples():
        numbers = (row.params, row.macs, row.other_ops, row.activation_bytes)
        shape = "×".join("?" if size is None else str(size) for size in row.output_shape)
        rows.append((row.layer, row.kind, shape, *("?" if math.isnan(n) else f"{n:,.0f}" for n in numbers)))
    _print_table(rows, left=3, last_apart=True)
    return 0


def _latency(options):
    paths = list(dict.fromkeys(options.models))
    for path in paths:
        _check_model_file(path, (*_MODELS, *_ENGINE_OF))
    engine_of = {path: _ENGINE_OF.get(path.suffix) for path in paths}
    engines = options.engine or list(dict.fromkeys(filter(None, engine_of.values()))) or ["keras"]
    for engine in engines:
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    for path, engine in engine_of.items():
        if engine not in (None, *engines):
            raise ValueError(f"{path} is for the engine {engine}; --engine leaves it out")
    names = {path: path.name if [p.name for p in paths].count(path.name) == 1 else str(path) for path in paths}
    models = {path: _load(path) for path in paths if not engine_of[path]}
    if not models:
        _status("loading the engine")
    with stderr_to(os.devnull):
        from fcnn_utils import batch_norm, benchmark, deploy

    for engine in engines:
        deploy._check_installed(engine, exports=bool(models))  # all of them, before the first is measured
    models = {path: batch_norm.fold_batch_norm(model) for path, model in models.items()}
    rows, load = [("model", "engine", "batch", "median ms", "quartiles", "speed-up", "95% interval")], 0.0
    for engine in engines:
        chosen = {names[path]: models.get(path, str(path)) for path in paths if engine_of[path] in (None, engine)}
        _status(f"measuring {', '.join(chosen)} in {engine}")
        table = benchmark.latency(chosen, options.batch, engine, rounds=options.rounds, threads=options.threads)
        load = max(load, table["background_load"].max())
        for row in table.itertuples():
            times = f"{row.median_ms:.3g}", f"{row.low_ms:.3g} to {row.high_ms:.3g}"
            ratios = f"{row.speedup:.2f}", f"{row.speedup_low:.2f} to {row.speedup_high:.2f}"
            rows.append((row.model, row.engine, str(row.batch), *times, *ratios))
    _print_table(rows, left=2)
    if len(engines) > 1:
        say(
            "Each speed-up is relative to the first model in the same engine. The engines were measured one after "
            "another, so small differences between them may be noise."
        )
    if load > _BUSY:
        say(f"Other programs took {load:.0%} of the processors meanwhile: measure again on a quiet machine.")
    return 0


# --- checks before the work --------------------------------------------------------------------------------------


def _check_model_file(path, suffixes=_MODELS):
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not a model file" if path.is_dir() else f"there is no file {path}")
    if path.suffix not in suffixes:
        raise ValueError(f"a model file must be one of {', '.join(suffixes)}; got {path}")


def _check_results(options):
    """Check the paths of the results: given, of the right kind, in a folder that can be written, not an input."""
    from fcnn_utils import _files

    results = {"output": (".keras",), "export": tuple(_ENGINE_OF), "report": (".html", ".htm")}
    results = {key: suffixes for key, suffixes in results.items() if getattr(options, key)}
    if not results:
        raise ValueError("say where the result goes: --output small.keras, --export small.onnx or --report report.html")
    for key, suffixes in results.items():
        path = getattr(options, key)
        if path.suffix not in suffixes:
            raise ValueError(f"--{key} takes a file {', '.join(suffixes)}; got {path}")
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} for --{key}: make it first")
        if path.is_dir():
            raise ValueError(f"--{key} is a folder, {path}: name a file")
        if path.exists() and os.path.samefile(path, options.model):
            raise ValueError(f"--{key} is the model itself, {path}: choose another name")
        _files.check_writable(path.parent)


# --- models ------------------------------------------------------------------------------------------------------


def _load(path):
    """Load a Keras model, without code that it may carry.

    Raises:
        ValueError: it is damaged, or needs code that is not Keras's own.
    """
    _status(f"loading {path}")
    with stderr_to(os.devnull):  # TensorFlow writes many lines when it starts
        import keras

        from fcnn_utils import _engines
    try:
        with stderr_to(os.devnull):
            return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # a damaged file or a user's class may raise anything
        raise ValueError(f"{path} cannot be loaded: {_why_not(path, error, _engines.reason(error))}") from None


def _why_not(path, error, reason):
    """Return why a model cannot be loaded, and what to do."""
    text = str(error)
    if path.suffix == ".keras" and not zipfile.is_zipfile(path):
        return "the file is damaged, or not a Keras model; save it again"
    if "safe_mode" in text or "enable_unsafe_deserialization" in text:
        return (
            "it carries Python code, such as that of a Lambda layer, which is not run. If you trust the file, load it "
            "in Python, and call fcnn_utils.factorize there"
        )
    if "custom_objects" in text or "register_keras_serializable" in text:
        return (
            "it needs a class or function that is not Keras's own. Load it in Python, where you can import it, "
            f"and call fcnn_utils.factorize there ({reason})"
        )
    return f"{reason}. Save it again by model.save"


def _save(model, path):
    """Write a model to a .keras file as a whole."""
    from fcnn_utils import _files, deploy

    with deploy.temporary_folder() as folder:
        model.save(folder / "model.keras")
        _files.write_atomic(path, (folder / "model.keras").read_bytes())
    say(_wrote(path))


def _wrote(path):
    size = path.stat().st_size
    if path.suffix == ".xml":
        size += path.with_suffix(".bin").stat().st_size  # OpenVINO keeps the weights there
    return f"wrote {path} ({size / 1e6:.3g} MB)"


# --- values and lines --------------------------------------------------------------------------------------------


def _count(text):
    """Read "60M", "1.5k" or "6e7" as a number."""
    number = text[:-1] if text[-1:] in _UNITS else text
    try:
        return float(number) * _UNITS.get(text[-1:], 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a number such as 60e6, 60M or 500k: {text!r}") from None


def _names(text):
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text):
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not numbers with commas between them: {text!r}") from None


def _whole_numbers(text):
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not whole numbers with commas between them: {text!r}") from None


def _status(line):
    """Say what is under way, apart from the results."""
    say(line, sys.stderr)


def _quietly(command):
    """Let a command print each Python warning in a line, and keep them as `options.warnings`."""

    def run(options):
        def show(message, *rest, **more):
            options.warnings.append(f"warning: {message}")
            _status(options.warnings[-1])

        options.warnings = []
        with warnings.catch_warnings():
            warnings.showwarning = show
            return command(options)

    return run


def _print_table(rows, left, last_apart=False):
    """Print rows of texts in columns; the first `left` columns are on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if number < left else text.rjust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if last_apart:
        lines.insert(-1, "-" * max(map(len, lines)))
    say("\n".join(lines))
