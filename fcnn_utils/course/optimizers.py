"""Muon for convolutions."""

import keras


@keras.saving.register_keras_serializable("fcnn_utils")
class Muon(keras.optimizers.Muon):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) that also steps the kernels of convolutions.

    Muon replaces the averaged gradient of a matrix by the nearest semi-orthogonal matrix: all its singular
    values become about 1. `keras.optimizers.Muon` does this for matrices and steps everything else by Adam.
    Here a kernel (*spatial, in_channels, filters) is taken as a matrix (fan-in, filters). Depthwise kernels,
    biases and batch norms have no such matrix: Adam steps them.

    A matrix with more columns than rows steps further, by the root of columns / rows, as in the authors'
    code. All arguments are those of `keras.optimizers.Muon`.
    """

    def __init__(self, *args, rms_rate=None, **options):
        super().__init__(*args, rms_rate=rms_rate, **options)

    def _should_use_adamw(self, variable):
        return len(variable.shape) < 2 or variable.shape[-1] == 1

    def _muon_update_step(self, gradient, variable, lr, m):
        self.assign_add(m, (1 - self.momentum) * (gradient - m))
        direction = (1 - self.momentum) * gradient + self.momentum * m if self.nesterov else m
        matrix = keras.ops.reshape(direction, (-1, variable.shape[-1]))
        update = self.zeropower_via_newtonschulz5(matrix, self.ns_steps)
        further = max(1, matrix.shape[1] / matrix.shape[0]) ** 0.5
        self.assign_sub(variable, lr * further * keras.ops.reshape(update, variable.shape))
