"""Feed `model.fit` with the augmented batches of a recipe, as it is fastest on each backend.

TensorFlow   a tf.data pipeline makes the next batch on the processor while the device trains on this one
JAX          images stay on the device; one program makes the batches and trains on them, on a GPU a whole epoch at once
PyTorch      images stay on the device, and the batches are made there; likewise on TensorFlow without compilation
"""

import itertools

import keras
import numpy as np

from fcnn_utils._clock import cache_folder
from fcnn_utils.course import augmentation, environment


class Feed:
    """Training images on their way into one compiled model. One object serves several calls of `fit`.

    On JAX and PyTorch `fit` runs our own `train_function` instead of the one that Keras would make. With a released
    Keras that compiles `steps_per_execution` into one program (keras-team/keras pull request 23527), that of JAX goes.

    Args:
        model: compiled keras.Model from images to class probabilities.
        split: `data.Split` of training images, at least one batch.
        recipe: `recipes.Recipe`.
        scale: (mean, standard deviation), from `augmentation.channel_statistics`.
        teacher: keras.Model whose probabilities have the share `recipe.distillation` of the target, or None.
        steps_per_program: JAX: number of steps in one program; default: all of an epoch on a GPU, 1 on a CPU, where XLA
            computes the convolutions of a loop on one core, some nine times slower. Metrics, callbacks and the check
            for divergence come once per program.
    """

    def __init__(self, model, split, recipe, scale, teacher=None, steps_per_program=None):
        self.model, self.split, self.recipe, self.scale = model, split, recipe, scale
        self.teacher = teacher if recipe.distillation else None
        self.steps = len(split) // recipe.batch_size
        if keras.config.backend() != "jax":
            steps_per_program = 1
        elif steps_per_program is None:
            steps_per_program = self.steps if environment.gpu() else 1
        self.steps_per_program = min(steps_per_program, self.steps)
        self._resident = None  # images and labels on the device, and the program, made by the first `fit`

    def fit(self, epochs, callbacks=(), verbose=0):
        """Call `model.fit` for a range of epochs.

        Args:
            epochs: range of their numbers, from 0; image order and augmentation depend on them.
            callbacks, verbose: as in `keras.Model.fit`.

        Returns:
            keras.callbacks.History.
        """
        options = {"epochs": epochs.stop, "initial_epoch": epochs.start, "steps_per_epoch": self.steps}
        options |= {"callbacks": list(callbacks), "verbose": verbose, "shuffle": False}
        if keras.config.backend() == "tensorflow" and not self.model.run_eagerly:
            return self.model.fit(self._dataset(epochs), **options)
        before = self.model.train_function, self.model.steps_per_execution
        self.model.train_function, self.model.steps_per_execution = self._train_function(epochs), self.steps_per_program
        # `fit` reads the shapes from this batch; what it trains on comes from the train function.
        shapes = (self.recipe.batch_size, *self.split.images.shape[1:]), (self.recipe.batch_size, self._classes)
        batch = tuple(np.zeros(shape, "float32") for shape in shapes)
        try:
            return self.model.fit((batch for _ in itertools.count()), **options)
        finally:
            self.model.train_function, self.model.steps_per_execution = before

    @property
    def _classes(self):
        return self.model.output_shape[-1]

    def _rows(self, epochs, together=1):
        """Generate the rows of the plan for these epochs, (steps, B, 4), at most so many steps together."""
        # Keras's callback BackupAndRestore sets the epoch to go on with in this attribute, after `fit` was called.
        first = getattr(self.model, "_initial_epoch", None) or epochs.start
        for epoch in range(first, epochs.stop):
            plan = augmentation.plan(self.split, self.recipe, epoch)
            yield from (plan[start : start + together] for start in range(0, self.steps, together))

    def _batch(self, images, labels, rows):
        """Make one batch, with the teacher's share in its labels."""
        x, y = augmentation.make_batch(images, labels, rows, self.scale, self._classes)
        if self.teacher is None:
            return x, y
        share = self.recipe.distillation
        wanted = keras.ops.cast(self.teacher(x, training=False), y.dtype)
        return x, (1 - share) * y + share * keras.ops.stop_gradient(wanted)

    def _dataset(self, epochs):
        import tensorflow as tf  # the pipeline of this backend

        if self._resident is None:
            self._resident = tf.constant(self.split.images), tf.constant(self.split.fine)
        images, labels = self._resident
        rows = tf.TensorSpec((1, self.recipe.batch_size, 4), "int32")
        dataset = tf.data.Dataset.from_generator(lambda: self._rows(epochs), output_signature=rows)
        options = tf.data.Options()
        options.autotune.enabled = False  # at the end of `fit` its thread would be waited for
        batches = dataset.map(lambda rows: self._batch(images, labels, rows[0])).prefetch(2)
        return batches.with_options(options)

    def _train_function(self, epochs):
        if keras.config.backend() != "jax":
            return self._one_by_one(epochs)
        import jax

        distribution = keras.distribution.distribution()
        everywhere = across = None
        if distribution is not None:  # images on each device, and the rows of a batch dealt out to them
            mesh, axis = distribution.device_mesh.backend_mesh, distribution.batch_dim_name
            everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            across = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, axis))
        if self._resident is None:
            _cache_programs(jax)
            stay = [jax.device_put(each, everywhere) for each in (self.split.images, self.split.fine)]
            self._resident = stay, self._program(jax)
        (images, labels), program = self._resident
        chunks = self._rows(epochs, self.steps_per_program)

        def train_function(state, _):
            return program(state, images, labels, jax.device_put(next(chunks), across))

        return train_function

    def _program(self, jax):
        """Return the function from the state and (steps, B, 4) rows to the logs and the state after these steps."""

        def step(state, images, labels, rows):
            logs, state = self.model.train_step(state, self._batch(images, labels, rows))
            return state, logs

        def several(state, images, labels, rows):
            if len(rows) == 1:
                state, logs = step(state, images, labels, rows[0])
            else:
                state, logs = jax.lax.scan(lambda state, rows: step(state, images, labels, rows), state, rows)
                logs = jax.tree.map(lambda each: each[-1], logs)
            return logs, state

        return several if self.model.run_eagerly else jax.jit(several, donate_argnums=0)

    def _one_by_one(self, epochs):
        if self._resident is None:
            self._resident = [keras.ops.convert_to_tensor(each) for each in (self.split.images, self.split.fine)]
        rows = self._rows(epochs)

        def train_function(_):
            return self.model.train_step(self._batch(*self._resident, keras.ops.convert_to_tensor(next(rows)[0])))

        return train_function


def _cache_programs(jax):
    """Keep compiled programs on disk for the next process, unless JAX is set up to keep them elsewhere."""
    if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR is read into it
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # many short ones add up, too
