"""Recipes: how a network is trained, as data.

Those that have a name, for `get_recipe` and `training.train`:

    faster   5 epochs, the best of those searched for
    fast     5 epochs, common practice for a short training, not searched for
    long     20 epochs, common practice, not searched for
    thesis   5 epochs as in the thesis; what it does not state is listed in `assumed`
    medical  20 epochs for small images of few classes, which are shown equally often; trains without validation images
    tune     1 epoch of small steps, for weights that are nearly right: what `convert` made
"""

import dataclasses

from fcnn_utils._checks import check_choice, check_number


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        name: what records call it.
        epochs: how often the training images are gone through, from 1 to 1000.
        batch_size: images a step; what does not fill a batch is left out of the epoch.
        learning_rate: the largest of its schedule.
        momentum: of "sgd", below 1; 0: none.
        warmup: share of a cycle's steps in which "one_cycle" rises.
        optimizer: "sgd" (with Nesterov momentum if `momentum` > 0), "adam" or "rmsprop".
        schedule: "constant", or "one_cycle": linear from 0 to `learning_rate` over the first `warmup` of all steps,
            then down to 0 along half a cosine (after Smith & Topin 2018, arXiv 1708.07120); or "inverse_time":
            `learning_rate` / (1 + `learning_rate` / `epochs` × step), the decay that tutorials of the time gave SGD.
        cycles: how many times "one_cycle" is gone through, each in as many epochs; after each the network is as if
            trained (a snapshot: Huang et al. 2017, arXiv 1704.00109).
        clip_norm: largest norm of the gradient, all weights together; a longer one is shortened to it. 0: any.
        weight_decay: share of each kernel, times the learning rate, that a step takes from it; biases and the batch
            norms' scales keep theirs (decoupled, Loshchilov & Hutter 2017, arXiv 1711.05101).
        label_smoothing: share of the target spread evenly over all classes.
        distillation: share of the target that the teacher's probabilities for the same image have, at most 0.5; the
            rest is the label's. As cross-entropy is linear in its target, this is the usual sum of two losses, at
            temperature 1 (Hinton, Vinyals & Dean 2015, arXiv 1503.02531).
        flip: augmentation: whether half of the images, drawn anew each epoch, are mirrored; or "alternating", half of
            them in the first epoch, the other half in the next, and so on (Jordan 2024, arXiv 2404.00498).
        shift: augmentation: by how many pixels, at most 8, each image is moved at most in either direction, the border
            filled with the mean colour.
        balanced: whether every class is shown equally often: an epoch has as many images as ever, of the rarer classes
            some several times, of the commoner ones not all.
        precision: "float32", "mixed_bfloat16", or "auto": mixed_bfloat16 where the hardware computes in it.
        train_on: "train", for settings that are being chosen: validated after each epoch on the validation images,
            never tested unless their predictions are kept (`training.train`); or "all": both together, for settings
            that are chosen already, tested once.
        initialization: how kernels start, "glorot" or "he", of a network that is built by its name (`networks.build`).
        head_scale: what the last batch normalisation's scale starts at, of such a network.
        seed: starts weights, order and augmentation where none is given to `training.train`.
        assumed: what the source of the recipe does not state and we chose.
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
    seed: int = 0
    assumed: tuple = ()

    def __post_init__(self):
        check_number("epochs", self.epochs, int, 1, 1000)
        check_number("batch_size", self.batch_size, int, 1, 65536)
        check_number("learning_rate", self.learning_rate, float, 0, 100)
        check_number("momentum", self.momentum, float, 0, 0.9999)
        check_number("warmup", self.warmup, float, 0, 1)
        check_number("cycles", self.cycles, int, 1, self.epochs)
        if self.cycles > 1 and (self.epochs % self.cycles or self.schedule != "one_cycle"):
            raise ValueError(
                f"cycles are of the one_cycle schedule, and divide the epochs; got {self.cycles} of {self.schedule} in "
                f"{self.epochs} epochs"
            )
        check_number("clip_norm", self.clip_norm, float, 0, 1e6)
        check_number("weight_decay", self.weight_decay, float, 0, 1)
        check_number("label_smoothing", self.label_smoothing, float, 0, 0.9999)
        check_number("distillation", self.distillation, float, 0, 0.5)
        check_number("shift", self.shift, int, 0, 8)
        check_number("seed", self.seed, int, 0, 2**31 - 1)
        check_choice("flip", self.flip, (True, False, "alternating"))
        check_choice("balanced", self.balanced, (True, False))
        check_choice("optimizer", self.optimizer, ("sgd", "adam", "rmsprop"))
        check_choice("schedule", self.schedule, ("constant", "one_cycle", "inverse_time"))
        check_choice("precision", self.precision, ("float32", "mixed_bfloat16", "auto"))
        check_choice("train_on", self.train_on, ("train", "all"))
        check_choice("initialization", self.initialization, ("glorot", "he"))
        check_number("head_scale", self.head_scale, float, 1e-3, 1e3)

    @property
    def epochs_a_cycle(self):
        """Epochs of one of the `cycles`."""
        return self.epochs // self.cycles

    def replace(self, **changes):
        """This recipe with some settings changed, and a name that tells, but for the seed.

            get_recipe("fast").replace(epochs=2)      # is called "fast-epochs2"

        Raises:
            ValueError: there is no such setting, or its value is not allowed.
        """
        settings = [field.name for field in dataclasses.fields(self) if field.name != "name"]
        unknown = sorted(set(changes) - set(settings))
        if unknown:
            raise ValueError(f"recipe has no setting {unknown[0]!r} to change; it has {', '.join(settings)}")
        changes = {key: value for key, value in changes.items() if getattr(self, key) != value}
        suffix = "".join(f"-{key.replace('_', '')}{value}" for key, value in sorted(changes.items()) if key != "seed")
        return dataclasses.replace(self, **changes, name=self.name + suffix)

    def as_dict(self):
        """The settings as they stand in a record (JSON types)."""
        return dataclasses.asdict(self) | {"assumed": list(self.assumed)}


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="thesis",
            epochs=5,
            batch_size=32,
            optimizer="sgd",
            learning_rate=0.01,
            momentum=0.9,
            schedule="inverse_time",
            shift=3,
            assumed=(
                "5 epochs are stated; batch 32 follows from 1562 steps an epoch (50,000 / 32, the rest dropped).",
                "Optimizer and rate are not stated: SGD, Nesterov momentum 0.9, rate 0.01 / (1 + 0.002 step), which of "
                "those tried comes nearest to the thesis's training curves.",
                "Augmentation is not stated: mirroring and shifts of up to 3 pixels (a tenth of the width).",
                "Scaling of the images is not stated: mean 0 and standard deviation 1 for each channel.",
            ),
        ),
        Recipe(
            name="fast",  # common practice for a short training, not searched for
            epochs=5,
            batch_size=128,
            optimizer="sgd",
            learning_rate=0.2,
            momentum=0.9,
            schedule="one_cycle",
            label_smoothing=0.1,
            shift=2,
            precision="auto",
        ),
        Recipe(
            name="faster",  # the best of those searched for
            epochs=5,
            batch_size=64,
            optimizer="sgd",
            learning_rate=0.2,
            momentum=0.9,
            schedule="one_cycle",
            weight_decay=5e-4,
            label_smoothing=0.1,
            shift=2,
            head_scale=6.0,
            precision="auto",
        ),
        Recipe(
            name="long",  # common practice for trainings of 20 epochs and more, not searched for
            epochs=20,
            batch_size=128,
            optimizer="sgd",
            learning_rate=0.2,
            momentum=0.9,
            schedule="one_cycle",
            weight_decay=5e-4,
            label_smoothing=0.1,
            shift=4,
            head_scale=6.0,
            precision="auto",
        ),
        Recipe(
            name="medical",  # of few tried, by validation images, which hardly tell them apart
            epochs=20,
            batch_size=64,
            optimizer="sgd",
            learning_rate=0.05,
            momentum=0.9,
            schedule="one_cycle",
            weight_decay=5e-4,
            label_smoothing=0.1,
            shift=2,
            balanced=True,
            precision="auto",
            train_on="train",
            head_scale=6.0,
        ),
        Recipe(
            name="tune",  # what `convert` made, from weights that are nearly right
            epochs=1,
            batch_size=128,
            optimizer="sgd",
            learning_rate=0.01,
            momentum=0.9,
            schedule="one_cycle",
            clip_norm=1.0,
            label_smoothing=0.1,
            shift=2,
            precision="auto",
        ),
    )
}


def get_recipe(name, **changes):
    """A recipe by its name.

    Args:
        name: "faster", "fast", "long", "thesis", "medical" or "tune".
        changes: as of `Recipe.replace`; those that are 0 (or None, or False) change nothing.

    Raises:
        ValueError: there is no such recipe or setting, or a value is not allowed.
    """
    recipe = RECIPES[check_choice("recipe", name, RECIPES)]
    return recipe.replace(**{key: value for key, value in changes.items() if value})
