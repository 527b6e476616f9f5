"""Check the parameters of the notebooks: their names and allowed values."""

from fcnn_utils._checks import check_choice, check_number
from fcnn_utils.course.data import medmnist

# Each parameter has (type, lowest, highest) or its allowed values, the same in all notebooks. BATCH_SIZE 0
# means the recipe's batch size; 0 for TRAIN_IMAGES, MEDICAL_IMAGES and TEST_IMAGES means all images.
PARAMETERS = {
    "SEED": (int, 0, 2**31 - 1),
    "DATASET": ("auto", "cifar100", "standin"),
    "MEDICAL_DATASET": (*medmnist.SETS, "greystandin"),
    "RECIPE": ("faster", "muon", "fast", "long", "thesis"),
    "EPOCHS": (int, 1, 1000),
    "BATCH_SIZE": (int, 0, 4096),
    "TRAIN_IMAGES": (int, 0, 50_000),
    "MEDICAL_IMAGES": (int, 0, 50_000),
    "TEST_IMAGES": (int, 0, 10_000),
    "LIVE_IMAGES": (int, 100, 50_000),
    "TIMED_STEPS": (int, 1, 1000),
    "ROUNDS": (int, 1, 1000),
    "TENSORS": (int, 100, 1_000_000),
    "SWEEPS": (int, 100, 1_000_000),
    "SEEDS": (int, 1, 100),
    "CALIBRATION_IMAGES": (int, 10, 50_000),
    "TUNE_ALL": (True, False),
    "RETRAIN": (True, False),
}


def check(**values):
    """Check parameters of a notebook by name: `check(SEED=SEED, EPOCHS=EPOCHS)`.

    Raises:
        ValueError: if no notebook has a parameter of this name, or its value has the wrong type or is out of range.
    """
    for name, value in values.items():
        check_choice("parameter", name, PARAMETERS)
        rule = PARAMETERS[name]
        if isinstance(rule[0], type):
            check_number(name, value, *rule)
        elif isinstance(rule[0], bool) and not isinstance(value, bool):  # 1 == True, but 1 is not a bool
            raise ValueError(f"{name} must be one of True, False; got {value!r}")
        else:
            check_choice(name, value, rule)


def parse(name, text):
    """Convert the text of a parameter to a whole number, a bool or a str, and check it.

    Raises:
        ValueError: as `check`.
    """
    value = {"true": True, "false": False}.get(text.lower(), text)
    if value is text and text.removeprefix("-").isdecimal():
        value = int(text)
    check(**{name: value})
    return value
