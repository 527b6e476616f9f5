"""Factorizations of kernels, compared with singular values, known bounds, sums over windows and Keras layers."""

import functools
import itertools
import warnings

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers

from fcnn_utils import factorizations
from fcnn_utils.factorizations import CP, CP4, SVD, DepthwiseSeparable, SpatialSVD, TensorTrain, Tucker2

METHODS = list(factorizations.FACTORIZATIONS)
RANKS = {"cp": (6,), "cp4": (6,), "tucker": (4, 3), "tt": (4, 6, 3), "svd": (5,), "spatial": (5,), "separable": (2,)}


def random_kernel(shape=(3, 3, 6, 8), seed=0):  # RANKS are possible for this shape
    return np.random.default_rng(seed).standard_normal(shape)


def with_first_rank(method, rank):
    return (rank, *RANKS[method][1:])


def small_ranks(method, shape):
    """Return ranks of at most 2 that a kernel of this shape can have."""
    return tuple(min(2, high) for high in factorizations.get(method).max_ranks(shape))


def tail(matrix, rank):
    """Return the squared error of the best approximation of a matrix at a rank."""
    return np.sum(np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2)


def convolve(x, layer, kernel):
    """Apply a chain layer with this Keras kernel to (N, *spatial, C), without padding, in NumPy."""
    count = x.ndim - 2
    space, window = list(range(1, 1 + count)), list(range(4, 4 + count))  # labels of einsum's axes; 0: N, 7: C
    windows = np.lib.stride_tricks.sliding_window_view(x, layer.kernel_size, tuple(space))
    reads, written = [0, *space, 7, *window], [7, 8] if layer.is_depthwise else [8]
    y = np.einsum(windows, reads, kernel, [*window, 7, 8], [0, *space, *written])
    return y.reshape(*y.shape[: 1 + count], -1)


# --- ranks, kernels and options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_decomposition_reports_ranks_size_and_error(method):
    kernel = random_kernel()
    result = factorizations.decompose(kernel, method, RANKS[method])
    assert type(result) is factorizations.get(method) is factorizations.get(type(result))
    assert result.kernel_shape == kernel.shape and result.ranks == RANKS[method]
    error = np.linalg.norm(kernel - result.to_kernel()) / np.linalg.norm(kernel)
    assert 0 < result.relative_error < 1 and result.relative_error == pytest.approx(error)
    assert result.kernel_norm == pytest.approx(np.linalg.norm(kernel))
    assert all(factor.dtype == np.float64 for factor in result.factors)
    line = repr(result)
    assert "\n" not in line and "3×3×6×8" in line and f"{result.parameters:,} parameters" in line


@pytest.mark.parametrize("method", METHODS)
def test_ranks_out_of_range_are_rejected(method):
    for wrong in (0, -2, 1.5, 10_000, True, "1", None, float("nan")):
        with pytest.raises(ValueError, match=rf"rank of {method} .* whole number between 1 and \d+; got {wrong!r}"):
            factorizations.decompose(random_kernel(), method, with_first_rank(method, wrong))
    for wrong in ((1, 2, 3, 4), ()):
        with pytest.raises(ValueError, match=f"{method} has . ranks?, at most .*; got"):
            factorizations.decompose(random_kernel(), method, wrong)
    assert factorizations.get(method).check_ranks((3, 3, 6, 8), with_first_rank(method, np.int64(2)))[0] == 2


def test_ranks_that_no_chain_has_together_are_rejected():
    for method, ranks in (("tucker", (1, 10)), ("tt", (1, 4, 8)), ("tt", (16, 2, 32))):
        with pytest.raises(ValueError, match="inconsistent"):
            factorizations.get(method).check_ranks((3, 3, 16, 32), ranks)


def test_a_chain_from_scratch_may_have_ranks_above_the_maximum():
    assert SpatialSVD.max_ranks((3, 3, 4, 4)) == (12,)
    assert [layer.parameters for layer in SpatialSVD.chain((3, 3, 4, 4), 20)] == [3 * 4 * 20, 3 * 4 * 20]
    with pytest.raises(ValueError, match="rank of spatial must be a whole number"):
        SpatialSVD.chain((3, 3, 4, 4), 0)


def test_invalid_kernels_are_rejected():
    one_infinite = np.where(np.arange(432).reshape(3, 3, 6, 8) == 7, np.inf, 1.0)
    for kernel, message in (
        (np.full((3, 3, 6, 8), np.nan), "finite; 432 of"),
        (one_infinite, "finite; 1 of"),
        (np.ones(8), r"kernel shape must be .*spatial.*got \(8,\)"),
        (np.ones((2, 2, 2, 2, 6, 8)), "at most three spatial axes"),
        (np.ones((3, 3, 0, 8)), "kernel shape must be"),
        (np.full((3, 3, 6, 8), "a"), "an array of real numbers"),
        (np.ones((3, 3, 6, 8), complex), "an array of real numbers"),
    ):
        for method in METHODS:
            with pytest.raises(ValueError, match=message):
                factorizations.decompose(kernel, method, RANKS[method])
    with pytest.raises(ValueError, match="kernel shape must be"):
        CP.max_ranks((3, 3, 1.5, 2))


@pytest.mark.parametrize("method", METHODS)
def test_a_kernel_of_zeros_is_decomposed_without_warnings(method):
    zeros = np.zeros((3, 3, 6, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = factorizations.decompose(zeros, method, RANKS[method])
        assert result.relative_error == 0 and not result.to_kernel().any()
        if isinstance(result, CP):
            assert result.degeneracy == result.noise_sensitivity == result.total_norm == 0
            bounded = CP.decompose(zeros, 6, max_norm=2.0)
            assert not factorizations.error_preserving_correction(zeros, bounded).to_kernel().any()


def test_options_out_of_range_are_rejected():
    kernel = random_kernel()
    fit = CP.decompose(kernel, 3)
    cp, tucker = functools.partial(CP.decompose, kernel, 3), functools.partial(Tucker2.decompose, kernel, (2, 2))
    correct = functools.partial(factorizations.error_preserving_correction, kernel, fit)
    for name, wrong, functions in (
        ("n_starts", 0, [cp]),
        ("seed", -1, [cp]),
        ("max_norm", 0.5, [cp]),
        ("n_iter", 0, [cp, tucker, correct]),
        ("n_iter", 2.5, [cp, tucker, correct]),
        ("tol", "small", [cp, tucker, correct]),
        ("until", -1.0, [correct]),
        ("error", 0.5 * fit.relative_error, [correct]),
    ):
        for function in functions:
            with pytest.raises(ValueError, match=f"{name} must be a .*number between"):
                function(**{name: wrong})


@pytest.mark.parametrize("method", factorizations.FACTORIZATIONS.values(), ids=lambda method: method.name)
@pytest.mark.parametrize("shape", [(3, 3, 6, 8), (3, 6, 8)])
def test_a_ladder_of_ranks_gives_the_decomposition_at_each(method, shape):
    kernel = np.random.default_rng(0).normal(size=shape)
    count = len(method.max_ranks(shape))
    ladder = [(2,) * count, (1,) * count, (3,) * count, (2,) * count]
    options = {"n_iter": 2} if method in (CP, factorizations.CP4, Tucker2) else {}
    for found, ranks in zip(factorizations.decompose_ladder(method, kernel, ladder, **options), ladder, strict=True):
        alone = method.decompose(kernel, ranks, **options)
        assert found.ranks == ranks and np.isclose(found.relative_error, alone.relative_error, atol=1e-9)
        assert np.allclose(found.to_kernel(), alone.to_kernel(), atol=1e-9)
    with pytest.raises(ValueError, match="has no option 'sweeps'"):
        factorizations.decompose_ladder(method, kernel, ladder, sweeps=3)


def test_unknown_methods_and_foreign_decompositions_are_rejected():
    kernel = random_kernel()
    for unknown in ("qr", None, dict, factorizations.Factorization):
        with pytest.raises(ValueError, match="method must be one of .*cp4.*; got"):
            factorizations.decompose(kernel, unknown, 3)
    with pytest.raises(ValueError, match="must be a CP or a CP4; got a Tucker2"):
        factorizations.error_preserving_correction(kernel, Tucker2.decompose(kernel, (2, 2)))
    with pytest.raises(ValueError, match="the decomposition is of a"):
        factorizations.error_preserving_correction(random_kernel((3, 3, 6, 9)), CP.decompose(kernel, 2))


def test_unknown_options_are_rejected_with_those_there_are():
    for method, options in (("cp", "n_starts.*max_norm"), ("tucker", "n_iter, tol"), ("spatial", "none")):
        with pytest.raises(ValueError, match=f"{method} has no option 'speed'; it has {options}"):
            factorizations.decompose(random_kernel(), method, RANKS[method], speed=3)


def test_half_precision_kernels_are_accepted():
    assert SpatialSVD.decompose(random_kernel().astype(ml_dtypes.bfloat16), 18).relative_error < 1e-12


# --- the chain, for kernels of zero to three spatial axes --------------------------------------------------------

SHAPES = [(6, 8), (5, 1), (3, 4, 6), (1, 3, 4), (3, 3, 6, 8), (3, 1, 4, 2), (5, 5, 1, 1), (2, 3, 2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_largest_ranks_are_exact_and_all_views_of_a_decomposition_agree(method, shape):
    cls, kernel = factorizations.get(method), random_kernel(shape)
    exact = cls.decompose(kernel, cls.max_ranks(shape))
    assert exact.ranks == cls.max_ranks(shape) and exact.relative_error < 1e-12
    assert np.allclose(exact.to_kernel(), kernel, atol=1e-12)
    for result in (exact, cls.decompose(kernel, small_ranks(method, shape))):
        assert np.allclose(result.basis() @ result.last_factor(), result.to_kernel().reshape(-1, shape[-1]))
        weights, chain = result.layer_weights(), result.layers
        assert result.parameters == cls.count_parameters(shape, result.ranks) == sum(weight.size for weight in weights)
        channels = shape[-2]
        for layer, weight in zip(chain, weights, strict=True):
            assert layer.in_channels == channels and weight.size == layer.parameters
            last = layer.filters // channels if layer.is_depthwise else layer.filters
            assert weight.shape == (*layer.kernel_size, channels, last)
            channels = layer.filters
        assert channels == shape[-1]
        along = [max(layer.kernel_size[axis] for layer in chain) for axis in range(len(shape) - 2)]
        assert along == list(shape[:-2])


@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 6), (3, 2, 4, 5), (2, 3, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_chain_computes_the_convolution_with_the_rebuilt_kernel(method, shape):
    """By sums over windows; without spatial axes both are products of matrices."""
    result = factorizations.decompose(random_kernel(shape), method, small_ranks(method, shape))
    x = random_kernel((2, *(5,) * (len(shape) - 2), shape[-2]), seed=1)
    y = x
    for layer, weight in zip(result.layers, result.layer_weights(), strict=True):
        y = convolve(y, layer, weight)
    windows = np.lib.stride_tricks.sliding_window_view(x, shape[:-2], tuple(range(1, x.ndim - 1)))
    rows = np.moveaxis(windows, len(shape) - 1, -1).reshape(*y.shape[:-1], -1)  # a patch in each position
    assert np.allclose(y, rows @ result.to_kernel().reshape(-1, shape[-1]))
    assert len(shape) > 2 or np.allclose(y, x @ result.to_kernel())


def test_one_dimensional_chains_equal_keras_layers():
    """Conv1D and DepthwiseConv1D with the chain's weights and strides, against one dense Conv1D."""

    def applied(layer, x, weight):
        layer.build(x.shape)
        layer.set_weights([weight])
        return layer(x)

    kernel = random_kernel((3, 4, 6))
    for size, padding, (stride, dilation) in itertools.product((9, 10), ("same", "valid"), ((1, 1), (2, 1), (1, 2))):
        options = {"padding": padding, "use_bias": False}
        x = random_kernel((2, size, 4), seed=1).astype("float32")
        dense = applied(layers.Conv1D(6, 3, strides=stride, dilation_rate=dilation, **options), x, kernel)
        for method in METHODS:
            result = factorizations.decompose(kernel, method, factorizations.get(method).max_ranks(kernel.shape))
            strides = factorizations.place_strides(result.layers, stride)
            y = x
            for layer, (step,), weight in zip(result.layers, strides, result.layer_weights(), strict=True):
                place = {"strides": step, "dilation_rate": dilation if layer.axes else 1, **options}
                if layer.is_depthwise:
                    multiplier = layer.filters // layer.in_channels
                    keras_layer = layers.DepthwiseConv1D(layer.kernel_size[0], depth_multiplier=multiplier, **place)
                else:
                    keras_layer = layers.Conv1D(layer.filters, layer.kernel_size[0], **place)
                y = applied(keras_layer, y, weight)
            assert y.shape == dense.shape and keras.ops.max(keras.ops.abs(y - dense)) < 1e-4


def test_published_counts():
    """Lebedev's chain of an (8, 4, 3, 3) kernel at R = 10, its merged form, Tucker-2; a strided column and row."""
    assert CP4.count_parameters((3, 3, 8, 4), 10) == 10 * (3 + 3 + 8 + 4) == 180
    assert CP.count_parameters((3, 3, 8, 4), 10) == 10 * (9 + 8 + 4) == 210
    assert Tucker2.count_parameters((3, 3, 8, 4), (5, 2)) == 8 * 5 + 9 * 5 * 2 + 2 * 4 == 138
    assert 14 * 14 * SpatialSVD.count_macs((5, 5, 32, 64), 40, (2, 2)) == 5_017_600  # 28×28 to 14×14 positions


def test_invalid_strides_are_rejected():
    for wrong in (0, 1.5, (2, 2, 2), (2, "1")):
        with pytest.raises(ValueError, match="strides must be"):
            factorizations.place_strides(CP.chain((3, 5, 4, 6), 2), wrong)


# --- best approximations -----------------------------------------------------------------------------------------


def test_svd_methods_are_optimal_truncations():
    kernel = random_kernel((3, 5, 6, 7))
    matrix, norm = kernel.transpose(0, 2, 1, 3).reshape(18, 35), np.linalg.norm(kernel)
    for rank in (1, 4, 17):
        expected = np.sqrt(tail(matrix, rank)) / norm
        assert SpatialSVD.decompose(kernel, rank).relative_error == pytest.approx(expected, rel=1e-10)
    for rank in (1, 4, 6):
        expected = np.sqrt(sum(tail(kernel[:, :, s].reshape(15, 7), rank) for s in range(6))) / norm
        assert DepthwiseSeparable.decompose(kernel, rank).relative_error == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("shape", [(40, 9), (9, 40), (3, 3, 4, 40)])
def test_svd_of_outputs_loses_their_smallest_principal_components(shape):
    kernel, rng = random_kernel(shape), np.random.default_rng(1)
    matrix = kernel.reshape(-1, shape[-1])
    covariance = np.cov(rng.standard_normal((len(matrix), 300)))
    outputs = matrix.T @ covariance @ matrix
    variances = np.linalg.eigvalsh(outputs)[::-1]
    for rank in (1, 5, min(matrix.shape)):
        lost = matrix - SVD.decompose(kernel, rank, outputs=outputs).to_kernel().reshape(matrix.shape)
        error = np.trace(lost.T @ covariance @ lost)
        assert error == pytest.approx(variances[rank:].sum(), rel=1e-6, abs=1e-10 * variances.sum())


def test_tucker_lies_between_its_bounds_and_improves_on_the_truncated_hosvd():
    """No Tucker-2 is better than its worse unfolding allows; the truncated HOSVD is at most √2 times the best."""
    kernel = random_kernel((3, 3, 16, 20))
    norm, unfoldings = np.linalg.norm(kernel), [np.moveaxis(kernel, m, 0).reshape(kernel.shape[m], -1) for m in (2, 3)]
    tails = [tail(unfolding, rank) for unfolding, rank in zip(unfoldings, (5, 4), strict=True)]
    frames = [np.linalg.svd(unfolding)[0][:, :rank] for unfolding, rank in zip(unfoldings, (5, 4), strict=True)]
    hosvd = np.einsum("ijst,sa,ua,tb,vb->ijuv", kernel, frames[0], frames[0], frames[1], frames[1], optimize=True)
    hosvd_error = np.linalg.norm(kernel - hosvd) / norm
    result = Tucker2.decompose(kernel, (5, 4))
    assert np.sqrt(max(tails)) / norm <= result.relative_error < hosvd_error <= np.sqrt(sum(tails)) / norm
    assert hosvd_error <= np.sqrt(2) * result.relative_error
    for frame in (result.factors[0], result.factors[2]):
        assert np.allclose(frame.T @ frame, np.eye(frame.shape[1]), atol=1e-10)


def test_tensor_train_lies_between_its_bounds():
    """Not better than its worst unfolding allows, at most √3 times the best: the tails of the unfoldings add up."""
    kernel = random_kernel((3, 3, 8, 10))
    train, norm = kernel.transpose(2, 0, 1, 3), np.linalg.norm(kernel)  # (s, i, j, t)
    error = TensorTrain.decompose(kernel, (5, 9, 6)).relative_error
    tails = [tail(train.reshape(rows, -1), rank) for rows, rank in ((8, 5), (24, 9), (72, 6))]
    assert np.sqrt(max(tails)) / norm <= error <= np.sqrt(sum(tails)) / norm
    assert np.sqrt(sum(tails)) <= np.sqrt(3) * np.sqrt(max(tails))
