"""Find, download and read the 2-D sets of MedMNIST v2 (Yang et al. 2023, Scientific Data 10:41).

Each set is one npz file of 28×28 images. Addresses, checksums and class names are those of the
`medmnist` package 3.0.2. That package is not used because it needs PyTorch. ChestMNIST is left out
because its images have several labels each.
"""

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np

from fcnn_utils._files import read_arrays
from fcnn_utils.course.data.download import Unavailable, fetch

_STAND_IN = "choose the stand-in (--dataset greystandin)"
_URL = "https://zenodo.org/records/10519652/files/{}.npz?download=1"


@dataclasses.dataclass(frozen=True)
class MedMNIST:
    """One set: MD5 of the official file, channels, counts of the three splits, class names."""

    md5: str
    channels: int
    images: tuple
    classes: tuple


_FILES = {  # name: MD5, channels, numbers of images
    "pathmnist": ("a8b06965200029087d5bd730944a56c1", 3, (89_996, 10_004, 7_180)),
    "dermamnist": ("0744692d530f8e62ec473284d019b0c7", 3, (7_007, 1_003, 2_005)),
    "octmnist": ("c68d92d5b585d8d81f7112f81e2d0842", 1, (97_477, 10_832, 1_000)),
    "pneumoniamnist": ("28209eda62fecd6e6a2d98b1501bb15f", 1, (4_708, 524, 624)),
    "retinamnist": ("bd4c0672f1bba3e3a89f0e4e876791e4", 3, (1_080, 120, 400)),
    "breastmnist": ("750601b1f35ba3300ea97c75c52ff8f6", 1, (546, 78, 156)),
    "bloodmnist": ("7053d0359d879ad8a5505303e11de1dc", 3, (11_959, 1_712, 3_421)),
    "tissuemnist": ("ebe78ee8b05294063de985d821c1c34b", 1, (165_466, 23_640, 47_280)),
    "organamnist": ("68e3f8846a6bd62f0c9bf841c0d9eacc", 1, (34_561, 6_491, 17_778)),
    "organcmnist": ("b9ceb9546e10131b32923c5bbeaea2b1", 1, (12_975, 2_392, 8_216)),
    "organsmnist": ("9ab87b696fb54e2a387ebe992d6ed5f1", 1, (13_932, 2_452, 8_827)),
}
_ORGANS = (
    "bladder; femur-left; femur-right; heart; kidney-left; kidney-right; liver; lung-left; lung-right; pancreas; spleen"
)
_CLASSES = {
    "pathmnist": "adipose; background; debris; lymphocytes; mucus; smooth muscle; normal colon mucosa; "
    "cancer-associated stroma; colorectal adenocarcinoma epithelium",
    "dermamnist": "actinic keratoses and intraepithelial carcinoma; basal cell carcinoma; "
    "benign keratosis-like lesions; dermatofibroma; melanoma; melanocytic nevi; vascular lesions",
    "octmnist": "choroidal neovascularization; diabetic macular edema; drusen; normal",
    "pneumoniamnist": "normal; pneumonia",
    "retinamnist": "0; 1; 2; 3; 4",
    "breastmnist": "malignant; normal, benign",
    "bloodmnist": "basophil; eosinophil; erythroblast; immature granulocytes; lymphocyte; monocyte; neutrophil; "
    "platelet",
    "tissuemnist": "collecting duct, connecting tubule; distal convoluted tubule; glomerular endothelial cells; "
    "interstitial endothelial cells; leukocytes; podocytes; proximal tubule segments; thick ascending limb",
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
}
SETS = {name: MedMNIST(*facts, tuple(_CLASSES[name].split("; "))) for name, facts in _FILES.items()}


def find(name):
    """Return the file of the set `name` in `$FCNN_DATA_DIR` or `~/.medmnist`; None if there is none."""
    chosen = os.environ.get("FCNN_DATA_DIR")
    for folder in [*([Path(chosen)] if chosen else []), _home()]:
        path = folder / f"{name}.npz"
        if os.path.isfile(path):  # False if unreadable
            return path
    return None


def download(name):
    """Download the set `name` to `~/.medmnist`, and return its file.

    Raises:
        Unavailable: if the download fails; the message gives the reason.
    """
    path = _home() / f"{name}.npz"
    fetch(name, _URL.format(name), f"md5:{SETS[name].md5}", path, _advice(name))
    return path


def read(name, path):
    """Read the file `path` of the set `name`, which need not be the official file.

    Returns:
        (splits, official). `splits` has (images, labels) for training, validation and testing, with
        images (N, 28, 28, 1 or 3) uint8 and labels (N,) int64. `official` is True if the MD5 is that
        of the official file.

    Raises:
        Unavailable: if the file is damaged or is not this set; the message gives both MD5s, and what
            to do.
    """
    known = SETS[name]
    try:
        md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}; {_STAND_IN}") from None
    try:
        arrays = read_arrays(path)
        pairs = [(arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "val", "test")]
        parts = zip(("training", "validation", "test"), known.images, pairs, strict=True)
        splits = [_check_split(known, part, count, *pair) for part, count, pair in parts]
    except (KeyError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise Unavailable(
            f"{path} is damaged or not {name}: {reason} (its MD5 is {md5}, the official file's is {known.md5}); "
            f"delete it to download it again, or {_STAND_IN}"
        ) from None
    return splits, md5 == known.md5


def _check_split(known, part, count, images, labels):
    """Return images (count, 28, 28, channels) and labels (count,) int64 after checking them."""
    shape = (28, 28) if known.channels == 1 else (28, 28, 3)
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        wanted = ", ".join(map(str, ("N", *shape)))
        raise ValueError(f"its {part} images must be ({wanted}) uint8; they are {images.shape} {images.dtype}")
    if len(images) != count or labels.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"it must have {count:,} {part} images and labels; it has {len(images):,} images and {labels.size:,} labels"
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(f"its {part} labels must be whole numbers; they are {labels.dtype}")
    labels = labels.reshape(-1).astype(np.int64)
    if set(np.unique(labels)) != set(range(len(known.classes))):
        raise ValueError(f"its {part} labels must cover the classes 0 to {len(known.classes) - 1}, and no others")
    return images.reshape(count, 28, 28, known.channels), labels


def _home():
    return Path.home() / ".medmnist"


def _advice(name):
    return f"copy {name}.npz to $FCNN_DATA_DIR or ~/.medmnist, or {_STAND_IN}"
