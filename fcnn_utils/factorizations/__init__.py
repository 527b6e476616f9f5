"""Factorizations of convolution kernels: one class for each, from a kernel to factors to a chain of small layers.

    name         class                 chain                                        can represent
    "cp"         `CP`                  1×1, k×k depthwise, 1×1                      CP rank ≤ R, space merged
    "cp4"        `CP4`                 1×1, k×1 and 1×k depthwise, 1×1              CP rank ≤ R
    "tucker"     `Tucker2`             1×1, k×k, 1×1                                multilinear ranks ≤ R1, R2
    "tt"         `TensorTrain`         1×1, k×1, 1×k, 1×1                           tensor-train ranks ≤ R1, R2, R3
    "svd"        `SVD`                 k×k, 1×1; two dense layers for a matrix      rank ≤ R as a (k² S × T) matrix
    "spatial"    `SpatialSVD`          k×1, 1×k                                     rank ≤ R as a (k S × k T) matrix
    "separable"  `DepthwiseSeparable`  k×k depthwise with R outputs a channel, 1×1  rank ≤ R, channel by channel

Kernels are (*spatial, in_channels, filters), as in Keras, with zero to three spatial axes. Everything is computed
in float64 by NumPy, SciPy and TensorLy's NumPy backend; nothing here imports Keras. To add a factorization, write a
file with its class and import it here.
"""

from fcnn_utils._processors import one_blas_thread
from fcnn_utils.factorizations.base import (
    FACTORIZATIONS,
    Factorization,
    check_kernel,
    check_kernel_shape,
    decompose,
    get,
)
from fcnn_utils.factorizations.chain import ChainLayer, place_strides
from fcnn_utils.factorizations.cp import CP, CP4, error_preserving_correction
from fcnn_utils.factorizations.many import decompose_ladder, decompose_ladders, decompose_many
from fcnn_utils.factorizations.svd import SVD, DepthwiseSeparable, SpatialSVD
from fcnn_utils.factorizations.tensor_train import TensorTrain
from fcnn_utils.factorizations.tucker import Tucker2
