"""What a setting may be: checks that answer a bad value with one sentence, and the parameters of the notebooks."""

from fcnn_utils._checks import check_choice, check_number
from fcnn_utils.course.data import medmnist

# Every parameter that a notebook has: (kind, lowest, highest), or the values it may take. One name means the same
# thing in all notebooks; 0 is the recipe's own batch size, and all images.
PARAMETERS = {
    "SEED": (int, 0, 2**31 - 1),
    "DATASET": ("auto", "cifar100", "standin"),
    "MEDICAL_DATASET": (*medmnist.SETS, "greystandin"),
    "RECIPE": ("faster", "fast", "long", "thesis"),
    "EPOCHS": (int, 1, 1000),
    "BATCH_SIZE": (int, 0, 4096),
    "TRAIN_IMAGES": (int, 0, 50_000),
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
        ValueError: a name that no notebook has, or a value of the wrong type or outside its range.
    """
    for name, value in values.items():
        check_choice("parameter", name, PARAMETERS)
        rule = PARAMETERS[name]
        if isinstance(rule[0], type):
            check_number(name, value, *rule)
        elif rule == (True, False) and not isinstance(value, bool):
            check_choice(name, str(value), rule)  # 1 equals True, and is not it
        else:
            check_choice(name, value, rule)


def parsed(name, text):
    """The value of parameter `name` from the command line's `text`, checked: a number, true or false, or a word.

    Raises:
        ValueError: as `check`.
    """
    words = {"true": True, "false": False}
    try:
        value = words.get(text.lower())
        value = int(text) if value is None else value
    except ValueError:
        value = text
    check(**{name: value})
    return value
