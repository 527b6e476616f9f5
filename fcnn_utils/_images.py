"""Read calibration images from a folder of pictures, or from a NumPy file."""

import dataclasses
from pathlib import Path

import numpy as np

from fcnn_utils._checks import check_choice, check_number

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
ARRAYS = (".npy", ".npz")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name
_SMALL_SCALE = 1 / 50  # a Rescaling by at most this expects values up to 255, by more up to 1


@dataclasses.dataclass
class Pixels:
    """How pixel values of 0 to 255 become what a network was trained on.

    Attributes:
        range: (low, high), the values that 0 and 255 become; None: not given.
        mean, std: lists of a number for each channel, or of one for all. After `range`, the mean is subtracted, and the
            result is divided by the standard deviation.
        preprocess: a family of `keras.applications`, whose `preprocess_input` is applied; None: not given.
    """

    range: tuple | None = None
    mean: list | None = None
    std: list | None = None
    preprocess: str | None = None

    @property
    def is_given(self):
        return self.range is not None or self.preprocess is not None

    def check(self):
        """Raise ValueError if the attributes contradict each other."""
        if self.preprocess is not None and (self.range, self.mean, self.std) != (None, None, None):
            raise ValueError("give either --preprocess, or --range (with --mean and --std if you need them), not both")
        if (self.mean is None) != (self.std is None) or self.mean is not None and self.range is None:
            raise ValueError(
                "--mean and --std go together, with the --range that they refer to, for example --range 0 1 "
                "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
            )
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"--range takes the lower value first; got {self.range[0]:g} {self.range[1]:g}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"--std must be positive; got {min(self.std):g}")

    def prepare(self, channels):
        """Return the function from pictures (N, H, W, channels), floats of 0 to 255, to the network's values."""
        if self.preprocess is not None:
            return _preprocess_input(self.preprocess, channels)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, channels):
                raise ValueError(f"--{name} takes a number for each of {channels} channels; got {len(values)}")
        low, high = (0, 255) if self.range is None else self.range
        mean, std = (0, 1) if self.mean is None else (np.array(self.mean, "float32"), np.array(self.std, "float32"))
        return lambda pictures: ((low + pictures * ((high - low) / 255) - mean) / std).astype("float32")


def check(path, pixels):
    """Check what can be checked without the model.

    Raises:
        ValueError: there are no images at `path`, or `pixels` is given and of no use.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}")
    pixels.check()
    if path.is_dir():
        if not _pictures(path):
            raise ValueError(f"folder {path} has no pictures: it must have files {', '.join(PICTURES)}")
        return
    if path.suffix.lower() not in ARRAYS:
        raise ValueError(f"images must be a folder of pictures, or a file {' or '.join(ARRAYS)}; got {path}")
    if pixels.is_given or pixels.mean is not None:
        raise ValueError(f"{path} is used as it is: leave out --range, --mean, --std and --preprocess")


def read(path, model, limit, pixels, say=print):
    """Read images for a model.

    Args:
        path: path of a folder, or of an .npy or .npz file. Pictures in the folder and its subfolders are cropped around
            the centre to the proportions of the model's input, and resized. The arrays of a file are used unchanged.
        model: built keras.Model.
        limit: largest number of images; they are spread evenly over all images, in the order of their names.
        pixels: `Pixels`, of pictures.
        say: function that is called with a line on what was read.

    Returns:
        An array (N, ...); from an .npz file with an array for each input of the model, a dict of them.

    Raises:
        ValueError: the file is damaged, holds Python objects or does not fit; the model reads no pictures of a fixed
            size; or it is not known how the pixel values must be scaled.
    """
    check_number("number of images", limit, int, 1, 1_000_000)
    if Path(path).is_dir():
        return _read_pictures(Path(path), model, limit, pixels, say)
    return _read_arrays(Path(path), model, limit, say)


# --- arrays ------------------------------------------------------------------------------------------------------


def _read_arrays(path, model, limit, say):
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(found, np.ndarray):
            found = {path.name: found}
        else:
            with found:
                found = {name: found[name] for name in found.files}
    except Exception:  # errors of many kinds; NumPy's message about objects tells how to run them
        raise ValueError(f"{path} is not a whole NumPy file of numbers: save the images again by np.save") from None
    names = [x.name for x in model.inputs]
    if len(found) > 1 and not set(names) <= set(found):
        raise ValueError(
            f"{path} must hold one array, or one for each input of the model: {', '.join(names)}; it holds "
            f"{', '.join(found)}"
        )
    found = {name: found[name] for name in names} if len(found) > 1 else found
    counts = {len(array) if array.ndim else 0 for array in found.values()}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"{path} must hold at least one image, and as many for each input of the model")
    chosen = _spread(counts.pop(), limit, path, say)
    arrays = {name: np.array(array[chosen]) for name, array in found.items()}
    return arrays if len(names) > 1 and len(arrays) > 1 else next(iter(arrays.values()))


def _spread(count, limit, path, say):
    """Return at most `limit` of `count` numbers, evenly spread, and say how many."""
    chosen = np.unique(np.linspace(0, count - 1, min(count, limit)).astype(int))
    say(f"images: {len(chosen)}{f' of {count:,}' if len(chosen) < count else ''} in {path}")
    return chosen


# --- pictures ----------------------------------------------------------------------------------------------------


def _pictures(folder):
    """Return the paths of a folder's pictures, in order. Names that start with a dot are no pictures."""
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and not path.name.startswith(".")]
    return sorted(path for path in paths if path.is_file())


def _read_pictures(folder, model, limit, pixels, say):
    height, width, channels = _picture_shape(model)
    scale = pixels.prepare(channels)
    _check_scaling(model, pixels)
    paths = _pictures(folder)
    pictures, bad = [], []
    for number in _spread(len(paths), limit, folder, say):
        try:
            pictures.append(_read_picture(paths[number], (width, height), _MODES[channels]))
        except Exception:  # Pillow raises errors of many kinds
            bad.append(paths[number])
    if not pictures:
        raise ValueError(f"no picture in {folder} can be read, for example {bad[0]}")
    if bad:
        named = ", ".join(str(path) for path in bad[:3]) + (", ..." if len(bad) > 3 else "")
        say(f"left out {len(bad)} files that cannot be read as 8-bit pictures: {named}")
    pictures = np.stack(pictures).reshape(-1, height, width, channels)  # grey pictures have no axis of channels
    return scale(pictures.astype("float32"))


def _read_picture(path, size, mode):
    """Return a picture as an array of 8 bits; `size` is (width, height)."""
    from PIL import Image, ImageOps  # only pictures need it

    with Image.open(path) as picture:
        if picture.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits")
        picture = ImageOps.exif_transpose(picture).convert(mode)
        return np.asarray(ImageOps.fit(picture, size, Image.Resampling.BILINEAR))


def _picture_shape(model):
    shapes = [tuple(x.shape[1:]) for x in model.inputs]
    is_picture = len(shapes) == 1 and len(shapes[0]) == 3 and None not in shapes[0] and shapes[0][-1] in _MODES
    if not is_picture:
        raise ValueError(
            f"pictures need a model with one input of fixed size and 1, 3 or 4 channels, (height, width, channels); "
            f"it reads {' and '.join(map(str, shapes))}: save the images by np.save, and give the .npy file"
        )
    return shapes[0]


def _check_scaling(model, pixels):
    """Raise ValueError unless it is known how pixel values of 0 to 255 are scaled, in one place."""
    scales_itself = _takes_bytes(model)
    if not scales_itself and not pixels.is_given:
        raise ValueError(
            "the model does not scale pixel values itself, so say how its training images were scaled: --range 0 1, "
            "--range -1 1, --range 0 255, or --preprocess with a family of keras.applications such as resnet_v2"
        )
    if scales_itself and pixels.range not in (None, (0, 255)):
        raise ValueError("the model scales pixel values of 0 to 255 itself, by a Rescaling layer: leave out --range")


def _takes_bytes(model):
    """Return whether a Rescaling at the start of the model expects values of 0 to 255."""
    from keras import layers  # slow to import

    from fcnn_utils import keras_graph

    for node in keras_graph.layer_nodes(model):
        if isinstance(node.layer, layers.Rescaling):
            return float(np.max(np.abs(node.layer.scale))) <= _SMALL_SCALE
        if node.layer.weights:  # augmentation and others without weights may come before
            return False
    return False


def _preprocess_input(name, channels):
    from keras import applications  # slow to import

    modules = {key: value for key, value in vars(applications).items() if hasattr(value, "preprocess_input")}
    check_choice("--preprocess", name, [key for key in modules if key != "imagenet_utils"])
    if channels != 3:
        raise ValueError(f"--preprocess needs a model that reads 3 channels; it reads {channels}")
    return modules[name].preprocess_input
