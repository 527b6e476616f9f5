"""The 2-D sets of MedMNIST v2 (Yang et al. 2023, Scientific Data 10:41) at 28×28: where they are, and what is in them.

One npz file a set, read where it lies or downloaded from the address that the `medmnist` package publishes, with its
MD5. That package itself needs PyTorch, and is not needed here. ChestMNIST is left out: its images have several labels
each.

The sets are "pathmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist", "bloodmnist",
"tissuemnist", "organamnist", "organcmnist" and "organsmnist".
"""

import dataclasses
import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np

from fcnn_utils.course.data.download import Unavailable, fetch

_ADDRESS = "https://zenodo.org/records/10519652/files/{}.npz?download=1"
_ORGANS = (
    "bladder",
    "femur-left",
    "femur-right",
    "heart",
    "kidney-left",
    "kidney-right",
    "liver",
    "lung-left",
    "lung-right",
    "pancreas",
    "spleen",
)


@dataclasses.dataclass(frozen=True)
class MedMNIST:
    """One set: its file's MD5, channels of an image, numbers of training, validation and test images, class names."""

    md5: str
    channels: int
    images: tuple
    classes: tuple


SETS = {  # as in medmnist 3.0.2
    "pathmnist": MedMNIST(
        "a8b06965200029087d5bd730944a56c1",
        3,
        (89_996, 10_004, 7_180),
        (
            "adipose",
            "background",
            "debris",
            "lymphocytes",
            "mucus",
            "smooth muscle",
            "normal colon mucosa",
            "cancer-associated stroma",
            "colorectal adenocarcinoma epithelium",
        ),
    ),
    "dermamnist": MedMNIST(
        "0744692d530f8e62ec473284d019b0c7",
        3,
        (7_007, 1_003, 2_005),
        (
            "actinic keratoses and intraepithelial carcinoma",
            "basal cell carcinoma",
            "benign keratosis-like lesions",
            "dermatofibroma",
            "melanoma",
            "melanocytic nevi",
            "vascular lesions",
        ),
    ),
    "octmnist": MedMNIST(
        "c68d92d5b585d8d81f7112f81e2d0842",
        1,
        (97_477, 10_832, 1_000),
        ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    ),
    "pneumoniamnist": MedMNIST("28209eda62fecd6e6a2d98b1501bb15f", 1, (4_708, 524, 624), ("normal", "pneumonia")),
    "retinamnist": MedMNIST("bd4c0672f1bba3e3a89f0e4e876791e4", 3, (1_080, 120, 400), ("0", "1", "2", "3", "4")),
    "breastmnist": MedMNIST("750601b1f35ba3300ea97c75c52ff8f6", 1, (546, 78, 156), ("malignant", "normal, benign")),
    "bloodmnist": MedMNIST(
        "7053d0359d879ad8a5505303e11de1dc",
        3,
        (11_959, 1_712, 3_421),
        (
            "basophil",
            "eosinophil",
            "erythroblast",
            "immature granulocytes",
            "lymphocyte",
            "monocyte",
            "neutrophil",
            "platelet",
        ),
    ),
    "tissuemnist": MedMNIST(
        "ebe78ee8b05294063de985d821c1c34b",
        1,
        (165_466, 23_640, 47_280),
        (
            "collecting duct, connecting tubule",
            "distal convoluted tubule",
            "glomerular endothelial cells",
            "interstitial endothelial cells",
            "leukocytes",
            "podocytes",
            "proximal tubule segments",
            "thick ascending limb",
        ),
    ),
    "organamnist": MedMNIST("68e3f8846a6bd62f0c9bf841c0d9eacc", 1, (34_561, 6_491, 17_778), _ORGANS),
    "organcmnist": MedMNIST("b9ceb9546e10131b32923c5bbeaea2b1", 1, (12_975, 2_392, 8_216), _ORGANS),
    "organsmnist": MedMNIST("9ab87b696fb54e2a387ebe992d6ed5f1", 1, (13_932, 2_452, 8_827), _ORGANS),
}


def find(name):
    """File of the set `name`, None if there is none. Looked for in `$FCNN_DATA_DIR` and in `~/.medmnist`.

    Raises:
        Unavailable: `$FCNN_DATA_DIR` is set, and the file is in neither.
    """
    chosen = os.environ.get("FCNN_DATA_DIR")
    for folder in [*([Path(chosen)] if chosen else []), Path.home() / ".medmnist"]:
        path = folder / f"{name}.npz"
        if os.path.isfile(path):  # False if it may not be read
            return path
    if chosen:
        raise Unavailable(f"FCNN_DATA_DIR is {chosen!r}, but {name}.npz is not there; {_way_out(name)}")
    return None


def download(name):
    """Download the set `name` through Keras, with its MD5 checked, and find it: the file, as from `find`.

    Raises:
        Unavailable: it cannot be downloaded; says why.
    """
    home, file = Path.home(), f"{name}.npz"
    code = (
        f"import keras; keras.utils.get_file({file!r}, {_ADDRESS.format(name)!r}, file_hash={SETS[name].md5!r}, "
        f"hash_algorithm='md5', cache_dir={str(home)!r}, cache_subdir='.medmnist')"
    )
    return fetch(name, "its file", code, home / ".medmnist", f"{name}*", _way_out(name), lambda: find(name))


def read(name, path):
    """What is in the file `path` of the set `name`.

    Returns:
        (splits, official). The splits are (images, labels) for training, validation and testing, with images
        (N, 28, 28, 1 or 3) uint8 and labels (N,) int64. Official is whether the file has the official one's MD5.

    Raises:
        ValueError: the file is damaged, or not of this set; says what is wrong, both MD5s, and what to do.
    """
    known = SETS[name]
    try:
        md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None

    def wrong(what):
        return ValueError(
            f"{path} {what} (its MD5 is {md5}, the official file's {known.md5}): delete it and, without FCNN_DATA_DIR, "
            "it is downloaded again"
        )

    try:
        with np.load(path, allow_pickle=False) as arrays:
            pairs = [(arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "val", "test")]
    except KeyError as error:
        raise wrong(f"is not {name}: it has no {str(error).split()[0].strip(chr(39))}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise wrong(f"is damaged or no npz file: {error}") from None
    splits = []
    for part, count, (images, labels) in zip(("training", "validation", "test"), known.images, pairs, strict=True):
        shape = (28, 28) if known.channels == 1 else (28, 28, 3)
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            wanted = ", ".join(map(str, ("N", *shape)))
            raise wrong(f"is not {name}: its {part} images are {images.shape} {images.dtype}, not ({wanted}) uint8")
        if len(images) != count or labels.size != count:
            raise wrong(f"must hold {count:,} {part} images and labels; it has {len(images):,} and {labels.size:,}")
        labels = labels.reshape(-1).astype(np.int64)
        if set(np.unique(labels)) != set(range(len(known.classes))):
            raise wrong(
                f"must have {part} images of each of the classes 0 to {len(known.classes) - 1}, and of no other"
            )
        splits.append((images.reshape(count, 28, 28, known.channels), labels))
    return splits, md5 == known.md5


def _way_out(name):
    return f"lay {name}.npz into $FCNN_DATA_DIR or ~/.medmnist, or choose the stand-in (--dataset greystandin)"
