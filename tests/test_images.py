"""Calibration images from folders of pictures and NumPy files: choice, size, scaling, refusals."""

import pickle

import keras
import numpy as np
import pytest
from keras import layers
from PIL import Image

from fcnn_utils import _images
from fcnn_utils._images import Pixels

UNIT = Pixels(range=(0, 1))


def network(shape=(6, 8, 3), *first):
    return keras.Sequential([keras.Input(shape), *first, layers.Conv2D(2, 3)])


@pytest.fixture
def folder(tmp_path):
    """Ten pictures in two folders, of one colour each: red is the number of the picture."""
    for number in range(10):
        path = tmp_path / "pictures" / "ab"[number // 5] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 12), (number, 100, 255)).save(path)
    return tmp_path / "pictures"


def read(path, model, limit=500, pixels=UNIT):
    lines = []
    _images.check(path, pixels)
    return _images.read(path, model, limit, pixels, lines.append), lines


# --- pictures ----------------------------------------------------------------------------------------------------


def test_pictures_of_all_folders_are_read_in_order_and_spread_evenly(folder):
    images, lines = read(folder, network(), pixels=Pixels(range=(0, 255)))
    assert images.shape == (10, 6, 8, 3) and images.dtype == "float32" and lines == [f"images: 10 in {folder}"]
    assert images[:, 3, 4].tolist() == [[number, 100, 255] for number in range(10)]
    images, lines = read(folder, network(), limit=4, pixels=Pixels(range=(0, 255)))
    assert images[:, 0, 0, 0].tolist() == [0, 3, 6, 9] and lines == [f"images: 4 of 10 in {folder}"]


def test_picture_is_cut_around_the_centre_and_keeps_its_proportions(tmp_path):
    picture = np.zeros((10, 40, 3), np.uint8)
    picture[:, 15:25] = 255  # the middle quarter, a square
    Image.fromarray(picture).save(tmp_path / "a.png")
    images, _ = read(tmp_path, network((5, 5, 3)))
    assert images.shape == (1, 5, 5, 3) and images[:, :, 1:-1].min() == 1 and images.min() > 0.8  # smooth edges


def test_rotation_that_a_camera_notes_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it to the right by a quarter
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:, :4] = 255  # its left half becomes the upper one
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif, quality=100)
    images, _ = read(tmp_path, network((8, 8, 3)))
    assert images[0, :4].min() > 0.95 and images[0, 4:].max() < 0.05


@pytest.mark.parametrize("channels, value", [(1, [54]), (4, [0, 77, 255, 255])])
def test_pictures_become_grey_or_get_an_opaque_alpha_channel(tmp_path, channels, value):
    colour = (0, 77, 255)
    Image.new("RGB", (6, 6), colour).save(tmp_path / "a.png")
    images, _ = read(tmp_path, network((6, 6, channels)), pixels=Pixels(range=(0, 255)))
    grey = round(0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])  # ITU-R 601
    assert images.shape == (1, 6, 6, channels)
    assert images[0, 0, 0].tolist() == ([pytest.approx(grey, abs=1)] if channels == 1 else value)


@pytest.mark.parametrize(
    "pixels, expected",
    [
        (Pixels((0, 1)), [9 / 255, 100 / 255, 1]),
        (Pixels((-1, 1)), [9 / 127.5 - 1, 100 / 127.5 - 1, 1]),
        (Pixels((0, 1), [0.5], [0.25]), [(9 / 255 - 0.5) / 0.25, (100 / 255 - 0.5) / 0.25, 2]),
        (Pixels((0, 1), [0.1, 0.2, 0.3], [1, 2, 4]), [9 / 255 - 0.1, (100 / 255 - 0.2) / 2, 0.7 / 4]),
        (Pixels(preprocess="resnet50"), [255 - 103.939, 100 - 116.779, 9 - 123.68]),  # BGR, minus ImageNet's means
        (Pixels(preprocess="mobilenet_v2"), [9 / 127.5 - 1, 100 / 127.5 - 1, 1]),
    ],
    ids=str,
)
def test_pixel_values_are_scaled_as_asked(folder, pixels, expected):
    images, _ = read(folder, network(), pixels=pixels)
    assert images[9, 2, 2] == pytest.approx(expected, abs=1e-4) and images.dtype == "float32"


def test_scaling_is_never_guessed(folder):
    with pytest.raises(ValueError, match="say how its training images were scaled: --range 0 1"):
        read(folder, network(), pixels=Pixels())
    after_weights = keras.Sequential([network(), layers.Rescaling(1 / 255)])
    half = network((6, 8, 3), layers.Rescaling(2, offset=-1))  # it reads 0 to 1
    for model in (after_weights, half):
        with pytest.raises(ValueError, match="does not scale pixel values itself"):
            read(folder, model, pixels=Pixels())
    assert read(folder, half)[0].max() == 1


def test_rescaling_at_the_start_takes_pictures_as_they_are(folder):
    model = network((6, 8, 3), layers.RandomFlip(), layers.Rescaling(1 / 127.5, offset=-1))
    assert read(folder, model, pixels=Pixels())[0].max() == 255
    with pytest.raises(ValueError, match="scales pixel values of 0 to 255 itself"):
        read(folder, model)


def test_unreadable_and_deep_pictures_are_left_out_and_named(folder):
    (folder / "a" / "0.png").write_bytes(b"no picture")
    Image.fromarray(np.full((20, 12), 40_000, np.uint16)).save(folder / "b" / "9.png")
    (folder / "._1.png").write_bytes(b"")  # such files come from macOS
    images, lines = read(folder, network(), pixels=Pixels(range=(0, 255)))
    assert images[:, 0, 0, 0].tolist() == [*range(1, 9)]
    assert "left out 2 files" in lines[1] and "0.png" in lines[1] and "9.png" in lines[1]
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no picture in .* can be read, for example"):
        read(folder, network())


@pytest.mark.parametrize(
    "pixels, message",
    [
        (Pixels((0, 1), preprocess="resnet50"), "not both"),
        (Pixels((0, 1), [0.5]), "--mean and --std go together"),
        (Pixels(None, [0.5], [0.5]), "with the --range that they refer to"),
        (Pixels((1, 0)), "--range takes the lower value first; got 1 0"),
        (Pixels((0, 1), [0.5], [0.0]), "--std must be positive; got 0"),
        (Pixels((0, 1), [0.5, 0.5], [1.0]), "--mean takes a number for each of 3 channels; got 2"),
        (Pixels(preprocess="imagenet_utils"), "--preprocess must be one of convnext, .*; got 'imagenet_utils'"),
    ],
    ids=str,
)
def test_contradictory_scaling_is_refused(folder, pixels, message):
    with pytest.raises(ValueError, match=message):
        read(folder, network(), pixels=pixels)


@pytest.mark.parametrize("shape", [(None, None, 3), (6, 8, 5), (6, 3)])
def test_model_that_reads_no_pictures_of_a_fixed_size_is_refused(folder, shape):
    first = keras.Input(shape)
    with pytest.raises(ValueError, match="pictures need a model with one input of fixed size"):
        read(folder, keras.Model(first, layers.Activation("relu")(first)))


# --- arrays ------------------------------------------------------------------------------------------------------


def test_arrays_are_used_as_they_are(tmp_path):
    array = np.random.default_rng(0).standard_normal((7, 6, 8, 3)).astype("float32")
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", photos=array)
    for name in ("a.npy", "a.npz"):
        assert np.array_equal(read(tmp_path / name, network(), pixels=Pixels())[0], array)
        chosen, lines = read(tmp_path / name, network(), limit=3, pixels=Pixels())
        assert np.array_equal(chosen, array[[0, 3, 6]]) and lines == [f"images: 3 of 7 in {tmp_path / name}"]
        with pytest.raises(ValueError, match="is used as it is: leave out --range"):
            read(tmp_path / name, network())


def test_file_with_an_array_for_each_input_becomes_a_dict(tmp_path):
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    model = keras.Model([left, right], layers.Add()([left, right]))
    given = {"right": np.ones((5, 4)), "left": np.zeros((5, 4)), "labels": np.arange(5)}
    np.savez(tmp_path / "a.npz", **given)
    found, _ = read(tmp_path / "a.npz", model, pixels=Pixels())
    assert set(found) == {"left", "right"} and found["right"].all() and not found["left"].any()
    np.savez(tmp_path / "b.npz", left=np.ones(5), labels=np.ones(5))
    with pytest.raises(ValueError, match="or one for each input of the model: left, right; it holds left, labels"):
        read(tmp_path / "b.npz", model, pixels=Pixels())


class Trap:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("kind", ["pickle", "npy of objects", "npz of objects", "damaged", "empty"])
def test_file_of_objects_or_a_damaged_one_is_refused_and_runs_nothing(tmp_path, kind):
    path, trap = tmp_path / ("a.npz" if "npz" in kind else "a.npy"), Trap(str(tmp_path / "ran"))
    if kind == "pickle":
        path.write_bytes(pickle.dumps(trap))
    elif kind == "damaged":
        np.save(path, np.ones((50, 3)))
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        {"npy of objects": np.save, "npz of objects": np.savez}[kind](path, np.array([trap], object))
    with pytest.raises(ValueError, match="is not a whole NumPy file of numbers"):
        read(path, network(), pixels=Pixels())
    assert not (tmp_path / "ran").exists()


def test_path_without_images_is_refused_before_a_model_is_needed(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for path, message in [
        (tmp_path, "has no pictures: it must have files .png"),
        (tmp_path / "none", "there is no file or folder"),
        (tmp_path / "notes.txt", "must be a folder of pictures, or a file .npy or .npz"),
    ]:
        with pytest.raises(ValueError, match=message):
            _images.check(path, Pixels())
