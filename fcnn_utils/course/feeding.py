"""Feed `model.fit` with the augmented batches of a recipe, in the fastest way for each backend.

- TensorFlow: a tf.data pipeline prepares the next batch on the CPU while the device trains on the current one.
- JAX: the images stay on the device. One compiled program makes a batch and trains on it; on a GPU the program covers a
  whole epoch.
- PyTorch: the images stay on the device, and each batch is made there. TensorFlow without compilation does the same.
"""

import itertools

import keras
import numpy as np

from fcnn_utils._clock import cache_folder
from fcnn_utils.course import augmentation, environment


class Feed:
    """Input pipeline of one compiled model: it makes the batches and calls `model.fit`, as often as you like.

    On JAX and PyTorch, `fit` replaces the `train_function` of Keras by our own. Delete the one for JAX once a released
    Keras compiles `steps_per_execution` steps into one program (keras-team/keras pull request 23527).

    Args:
        model: compiled keras.Model from images to class probabilities.
        split: `data.Split` of training images: (N, H, W, C) uint8, at least one batch.
        recipe: `recipes.Recipe`.
        scale: (mean, standard deviation), from `augmentation.channel_statistics`.
        teacher: keras.Model whose probabilities have the share `recipe.distillation` of the target, or None.
        steps_per_program: number of steps in one compiled program, for JAX only. Default on a GPU: all steps of an
            epoch. Default on a CPU: 1, because XLA runs a convolution inside a loop on one core, about nine times
            slower. Metrics are means over all steps; callbacks are called once per program.
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
        """Generate the rows of `augmentation.plan` for these epochs: chunks (steps, B, 4) of up to `together` steps."""
        # The Keras callback BackupAndRestore runs inside `fit`. It stores the epoch to resume from in this attribute.
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
        options.autotune.enabled = False  # otherwise `fit` would wait at its end for the autotuner's thread
        batches = dataset.map(lambda rows: self._batch(images, labels, rows[0])).prefetch(2)
        return batches.with_options(options)

    def _train_function(self, epochs):
        if keras.config.backend() != "jax":
            return self._one_by_one(epochs)
        import jax

        distribution = keras.distribution.distribution()
        everywhere = across = None
        if distribution is not None:  # each device holds all images, and gets its share of a batch's rows
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
        """Return the JAX training function: (state, images, labels, rows (steps, B, 4)) -> (logs, new state)."""

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
    """Keep compiled programs on disk for later processes, unless JAX already has a cache folder."""
    if not jax.config.jax_compilation_cache_dir:  # JAX sets it from the variable JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # many short ones add up, too
