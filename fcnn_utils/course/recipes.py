"""Training recipes: optimizer, schedule, augmentation and all other settings. `RECIPES` has them by name:

faster   5 epochs, the best that was found with SGD
fast     5 epochs, common practice for a short training
muon     5 epochs, `faster` with the optimizer Muon (orthogonalised momentum), another rate and no weight decay
long     20 epochs, `faster` with larger batches and shifts
thesis   5 epochs as in the thesis; `assumed` lists what the thesis does not state
medical  20 epochs for small images of few classes; shows each class equally often
tune     1 epoch of small steps, for weights that are nearly right, such as after a factorization
"""

import dataclasses

from fcnn_utils._checks import check_choice, check_number

_RANGES = {  # setting -> kind, lowest and highest value; the highest of `cycles` is `epochs`
    "epochs": (int, 1, 1000),
    "batch_size": (int, 1, 65536),
    "learning_rate": (float, 0, 100),
    "momentum": (float, 0, 0.9999),
    "warmup": (float, 0, 1),
    "clip_norm": (float, 0, 1e6),
    "weight_decay": (float, 0, 1),
    "label_smoothing": (float, 0, 0.9999),
    "distillation": (float, 0, 0.5),
    "shift": (int, 0, 8),
    "head_scale": (float, 1e-3, 1e3),
    "factorize_to": (float, 1e-3, 0.95),
    "product_decay": (float, 0, 1),
    "seed": (int, 0, 2**31 - 1),
}
_CHOICES = {
    "optimizer": ("sgd", "adam", "rmsprop", "muon"),
    "schedule": ("constant", "one_cycle", "inverse_time"),
    "flip": (True, False, "alternating"),
    "balanced": (True, False),
    "precision": ("float32", "mixed_bfloat16", "auto"),
    "train_on": ("train", "all"),
    "initialization": ("glorot", "he"),
    "factorize_by": ("spatial", "tucker", "cp", "cp4", "tt", "svd", "separable", "auto"),
    "factors": ("decomposed", "fresh"),
    "carry": ("both", "rate", "none"),
}
_OF_THE_SWITCH = ("factorize_by", "factorize_to", "factors", "carry", "product_decay")
_IN_SUMMARY = ("name", "epochs", "batch_size", "optimizer", "learning_rate", "schedule", "assumed")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a training. Folders are named after the settings, so do not rename these.

    Attributes:
        name: name in records.
        epochs: passes over the training images, from 1 to 1000.
        batch_size: images per step; the last, incomplete batch of an epoch is dropped.
        optimizer: "sgd" (with Nesterov momentum if `momentum` > 0), "adam", "rmsprop" or "muon"
            (`optimizers.Muon`; it steps biases, norms and depthwise kernels by Adam at a twentieth of
            the rate).
        learning_rate: largest learning rate of the schedule.
        momentum: momentum of "sgd" and "muon", below 1; 0 for none.
        schedule: "constant"; or "one_cycle": a linear warm-up from 0 to `learning_rate`, then a cosine
            decay to 0 (after Smith & Topin 2018, arXiv 1708.07120); or "inverse_time":
            `learning_rate` / (1 + `learning_rate` / `epochs` × step), which was common for SGD when the
            thesis was written.
        warmup: share of a cycle's steps in the warm-up of "one_cycle".
        cycles: number of repetitions of "one_cycle"; it divides `epochs`. The network at the end of each
            cycle is a snapshot (Huang et al. 2017, arXiv 1704.00109).
        clip_norm: largest norm of the gradient of all weights together; 0 for no limit.
        weight_decay: decoupled weight decay (Loshchilov & Hutter 2017, arXiv 1711.05101): a step subtracts
            learning rate × `weight_decay` × kernel. Biases and batch norms do not decay.
        label_smoothing: share of the target that is spread evenly over all classes.
        distillation: weight of the teacher's probabilities in the target, at most 0.5; the label has the
            rest. This equals the usual sum of two losses at temperature 1, because cross-entropy is
            linear in its target (Hinton, Vinyals & Dean 2015, arXiv 1503.02531).
        flip: augmentation: True mirrors each image with probability 1/2; "alternating" mirrors one half
            in even epochs, the other half in odd ones (Jordan 2024, arXiv 2404.00498).
        shift: augmentation: largest shift in pixels along each axis, at most 8; the border is filled
            with the mean colour.
        balanced: show every class equally often. The length of an epoch does not change: images of rare
            classes are repeated, and some images of frequent classes are left out.
        precision: "float32", "mixed_bfloat16", or "auto": mixed_bfloat16 if it is faster here.
        train_on: "train" to choose settings: the network is validated after each epoch, and tested only
            if its predictions are kept. "all" for the final training: on training and validation
            images, with one test at the end.
        initialization: of the kernels, "glorot" or "he", if the network is built by its name.
        head_scale: initial scale of the last batch normalisation, if the network is built by its name.
        factorize_at: factorize the network after so many epochs, 0 for before the first step; None for never. See
            `switching`.
        factorize_by: method of `compress.factorize`.
        factorize_to: largest share of the dense network's MACs that the factorized network may need.
        factors: "decomposed": the new layers start from the kernels that they replace; or "fresh", with `factorize_at`
            0: all weights start at random.
        carry: what the factorized network keeps of the training before. "both": the learning-rate schedule goes on,
            and the weights that still exist keep their momentum, but not the averages of Adam, which "muon" has for
            some weights, too. "rate": only the schedule goes on. "none": a new schedule covers the remaining epochs.
        product_decay: rate of the Frobenius decay, used with `factorize_at`. The loss gets rate / 2 times the squared
            norms of the dense kernels that the factors stand for (`switching.decay_products`).
        seed: seed of weights, image order and augmentation, unless `experiments.train` is given another.
        assumed: sentences on what we chose because the source does not state it.
    """

    name: str
    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    momentum: float = 0.9
    schedule: str = "constant"
    warmup: float = 0.2
    cycles: int = 1
    clip_norm: float = 0.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    distillation: float = 0.0
    flip: bool | str = True
    shift: int = 0
    balanced: bool = False
    precision: str = "float32"
    train_on: str = "all"
    initialization: str = "glorot"
    head_scale: float = 1.0
    factorize_at: int | None = None
    factorize_by: str = "spatial"
    factorize_to: float = 0.25
    factors: str = "decomposed"
    carry: str = "both"
    product_decay: float = 0.0
    seed: int = 0
    assumed: tuple = ()

    def __post_init__(self):
        for setting, (kind, low, high) in _RANGES.items():
            check_number(setting, getattr(self, setting), kind, low, high)
        for setting, allowed in _CHOICES.items():
            check_choice(setting, getattr(self, setting), allowed)
        check_number("cycles", self.cycles, int, 1, self.epochs)
        if self.cycles > 1 and (self.epochs % self.cycles or self.schedule != "one_cycle"):
            raise ValueError(
                f"cycles above 1 need the schedule one_cycle and must divide the epochs; got {self.cycles} cycles of "
                f"{self.schedule} in {self.epochs} epochs"
            )

        if self.factorize_at is not None:
            check_number("factorize_at", self.factorize_at, int, 0, self.epochs - 1)
        for field in dataclasses.fields(self):
            is_set = field.name in _OF_THE_SWITCH and getattr(self, field.name) != field.default
            if is_set and self.factorize_at is None:
                raise ValueError(f"{field.name} needs factorize_at; it is None")
        if self.factors == "fresh" and self.factorize_at != 0:
            raise ValueError(f"factors can be fresh only if factorize_at is 0; it is {self.factorize_at}")
        if self.factorize_at is not None and self.cycles > 1:
            raise ValueError(f"factorize_at needs one cycle; got {self.cycles} cycles")

    def __str__(self):
        """Return one line: the main settings, and those others that are not at their default."""
        others = [
            f", {field.name} {getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name not in _IN_SUMMARY and getattr(self, field.name) != field.default
        ]
        return (
            f"{self.name}: {self.epochs} epoch{'s' if self.epochs > 1 else ''} in batches of {self.batch_size}, "
            f"{self.optimizer} at {self.learning_rate:g} ({self.schedule}){''.join(others)}"
        )

    @property
    def epochs_a_cycle(self):
        """Number of epochs per cycle."""
        return self.epochs // self.cycles

    def replace(self, **changes):
        """Return a recipe with changed settings; the changes, except a seed, are added to its name.

            get_recipe("fast").replace(epochs=2)      # its name is "fast-epochs2"

        Returns:
            Recipe.

        Raises:
            ValueError: if there is no such setting, or a value is not allowed.
        """
        settings = [field.name for field in dataclasses.fields(self) if field.name != "name"]
        unknown = sorted(set(changes) - set(settings))
        if unknown:
            raise ValueError(f"recipe has no setting {unknown[0]!r} to change; it has {', '.join(settings)}")
        changes = {key: value for key, value in changes.items() if getattr(self, key) != value}
        suffix = "".join(f"-{key.replace('_', '')}{value}" for key, value in sorted(changes.items()) if key != "seed")
        return dataclasses.replace(self, **changes, name=self.name + suffix)

    def as_dict(self):
        """Return the settings as a dict of JSON types, as stored in a record."""
        return dataclasses.asdict(self) | {"assumed": list(self.assumed)}


_ASSUMED = (  # records contain these sentences, so they must not change
    "5 epochs are stated; batch 32 follows from 1562 steps an epoch (50,000 / 32, the rest dropped).",
    "Optimizer and rate are not stated: SGD, Nesterov momentum 0.9, rate 0.01 / (1 + 0.002 step), which of "
    "those tried comes nearest to the thesis's training curves.",
    "Augmentation is not stated: mirroring and shifts of up to 3 pixels (a tenth of the width).",
    "Scaling of the images is not stated: mean 0 and standard deviation 1 for each channel.",
)
_THESIS = Recipe("thesis", 5, 32, "sgd", 0.01, schedule="inverse_time", shift=3, assumed=_ASSUMED)
_FAST = Recipe("fast", 5, 128, "sgd", 0.2, schedule="one_cycle", label_smoothing=0.1, shift=2, precision="auto")
_FASTER = dataclasses.replace(_FAST, name="faster", batch_size=64, weight_decay=5e-4, head_scale=6.0)
_LONG = dataclasses.replace(_FASTER, name="long", epochs=20, batch_size=128, shift=4)
_MUON = dataclasses.replace(
    _FASTER, name="muon", optimizer="muon", learning_rate=0.24, weight_decay=0.0, precision="float32"
)
_MEDICAL = dataclasses.replace(  # the best of a few; their validation results hardly differ
    _FASTER, name="medical", epochs=20, learning_rate=0.05, balanced=True, train_on="train"
)
_TUNE = dataclasses.replace(_FAST, name="tune", epochs=1, learning_rate=0.01, clip_norm=1.0)
RECIPES = {recipe.name: recipe for recipe in (_THESIS, _FAST, _FASTER, _MUON, _LONG, _MEDICAL, _TUNE)}


def get_recipe(name, **changes):
    """Get a recipe by its name.

    Args:
        name: "faster", "muon", "fast", "long", "thesis", "medical" or "tune".
        changes: settings to change, as in `Recipe.replace`. The values 0, None and False change nothing,
            so that a parameter of a notebook can mean "as in the recipe"; for these, call `replace`.

    Raises:
        ValueError: if there is no such recipe or setting, or a value is not allowed.
    """
    recipe = RECIPES[check_choice("recipe", name, RECIPES)]
    return recipe.replace(**{key: value for key, value in changes.items() if value})
