"""Decompositions, against independent computations: TensorLy, singular values, known bounds, hand-made tensors."""

import time
import warnings

import keras
import numpy as np
import pytest
import tensorly
from tensorly.decomposition import parafac

from fcnn_utils import decompose, ranks
from fcnn_utils.course import records

RANKS = {"cp": 6, "cp4": 6, "tucker": (4, 3), "tt": (4, 6, 3), "spatial": 5, "separable": 2}
CHECKPOINT = records.ROOT / "results" / "cifar100" / "simple" / "fast" / "seed0.keras"


def random_kernel(shape=(3, 3, 6, 8), seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def low_rank_tensor(shape, rank, seed=0):
    rng = np.random.default_rng(seed)
    return np.einsum("ir,jr,kr->ijk", *(rng.standard_normal((size, rank)) for size in shape))


def as_kernel(tensor):
    """(I, J, K) -> (I, 1, J, K), whose merged modes are the tensor's."""
    return tensor[:, None]


def error_of(kernel, result):
    return np.linalg.norm(kernel - result.to_kernel()) / np.linalg.norm(kernel)


def tail(matrix, rank):
    return np.sum(np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2)


def unfold(kernel, mode):
    return np.moveaxis(kernel, mode, 0).reshape(kernel.shape[mode], -1)


@pytest.fixture(scope="module")
def trained():
    """Kernels of the committed baseline."""
    network = keras.saving.load_model(CHECKPOINT, compile=False)
    return {layer.name: np.asarray(layer.kernel) for layer in network.layers if layer.name.startswith("conv")}


# --- basic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ranks.METHODS)
def test_a_decomposition_tells_its_ranks_size_and_error(method):
    kernel = random_kernel()
    result = decompose.decompose(kernel, method, RANKS[method])
    expected = RANKS[method] if isinstance(RANKS[method], tuple) else (RANKS[method],)
    assert (result.method, result.shape, result.ranks) == (method, kernel.shape, expected)
    assert result.parameters == ranks.parameters(method, kernel.shape, expected)
    assert result.to_kernel().shape == kernel.shape
    assert 0 < result.relative_error < 1 and result.relative_error == pytest.approx(error_of(kernel, result))
    assert all(factor.dtype == np.float64 for factor in result.factors)


@pytest.mark.parametrize("method", ranks.METHODS)
@pytest.mark.parametrize("wrong", [0, -2, 1.5, 10_000])
def test_ranks_that_are_none_are_refused(method, wrong):
    given = (wrong, *RANKS[method][1:]) if isinstance(RANKS[method], tuple) else wrong
    with pytest.raises(ValueError, match=rf"rank of {method} .* whole number between 1 and \d+; got {wrong}"):
        decompose.decompose(random_kernel(), method, given)


@pytest.mark.parametrize("method", ranks.METHODS)
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (np.full((3, 3, 6, 8), np.nan), "432 values that are not finite"),
        (np.where(np.arange(432).reshape(3, 3, 6, 8) == 7, np.inf, 1.0), "1 values that are not finite"),
        (np.ones((3, 6, 8)), r"a kernel has the shape \(kh, kw, in_channels, filters\).*got \(3, 6, 8\)"),
        (np.ones((3, 3, 6, 8, 1)), "a kernel has the shape"),
        (np.ones((3, 3, 0, 8)), "a kernel has the shape"),
        (np.full((3, 3, 6, 8), "a"), "an array of real numbers"),
        (np.ones((3, 3, 6, 8), complex), "an array of real numbers"),
    ],
)
def test_kernels_that_are_none_are_refused(method, kernel, message):
    with pytest.raises(ValueError, match=message):
        decompose.decompose(kernel, method, RANKS[method])


@pytest.mark.parametrize("method", ranks.METHODS)
def test_a_kernel_of_zeros_is_a_valid_answer_without_warning(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = decompose.decompose(np.zeros((3, 3, 6, 8)), method, RANKS[method])
        assert result.relative_error == 0 and not result.to_kernel().any()
        if method in ("cp", "cp4"):
            assert result.degeneracy == result.sensitivity == 0
            again = decompose.cp(np.zeros((3, 3, 6, 8)), 6, max_norm=2.0)
            assert not decompose.correct(np.zeros((3, 3, 6, 8)), again).to_kernel().any()


@pytest.mark.parametrize(
    "option",
    [{"n_starts": 0}, {"seed": -1}, {"n_iter": 0}, {"tol": -1.0}, {"tol": "small"}, {"max_norm": 0.5}, {"n_iter": 2.5}],
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be a"):
        decompose.cp(random_kernel(), 3, **option)


def test_other_names_and_objects_are_refused():
    kernel = random_kernel()
    with pytest.raises(ValueError, match="method must be one of"):
        decompose.decompose(kernel, "svd", 3)
    with pytest.raises(ValueError, match="component norms are those of a CP; this is a tucker"):
        decompose.correct(kernel, decompose.tucker2(kernel, (2, 2)))
    with pytest.raises(ValueError, match="the decomposition is of a"):
        decompose.correct(random_kernel((3, 3, 6, 9)), decompose.cp(kernel, 2))
    fit = decompose.cp(kernel, 2)
    with pytest.raises(ValueError, match="error must be a number between"):
        decompose.correct(kernel, fit, error=0.5 * fit.relative_error)


def test_half_precision_kernels_are_read():
    kernel = keras.ops.convert_to_numpy(keras.ops.cast(random_kernel(), "bfloat16"))
    assert decompose.spatial_svd(kernel, 18).relative_error < 1e-12


# --- correct: every method ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ranks.METHODS)
@pytest.mark.parametrize("shape", [(3, 3, 6, 8), (2, 2, 3, 5), (3, 1, 4, 2), (1, 1, 3, 4), (5, 5, 1, 1), (1, 1, 1, 1)])
def test_the_largest_ranks_are_exact(method, shape):
    kernel = random_kernel(shape)
    largest = ranks.maximum(method, shape)
    result = decompose.decompose(kernel, method, largest)
    assert result.ranks == largest and result.relative_error < 1e-12
    assert np.allclose(result.to_kernel(), kernel, atol=1e-12)


@pytest.mark.parametrize("method", ["cp", "cp4"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_kernel_of_low_cp_rank_is_found(method, rank):
    rng = np.random.default_rng(rank)
    kernel = np.einsum("ir,jr,sr,tr->ijst", *(rng.standard_normal((size, rank)) for size in (3, 3, 10, 12)))
    assert decompose.decompose(kernel, method, rank, n_iter=500, tol=1e-12, n_starts=3).relative_error < 1e-6


def test_error_falls_with_the_fraction():
    table = decompose.error_curve(random_kernel((3, 3, 12, 16)), "tucker", [0.1, 0.3, 0.6, 2.0])
    assert (table["share"].diff()[1:] > 0).all() and (table["relative_error"].diff()[1:] < 0).all()
    assert (table["share"][:3] <= [0.1, 0.3, 0.6]).all() and table["relative_error"][3] < 1e-12


def test_spatial_svd_is_the_optimal_truncation():
    kernel = random_kernel((3, 5, 6, 7))
    matrix = kernel.transpose(0, 2, 1, 3).reshape(18, 35)
    for rank in (1, 4, 17):
        expected = np.sqrt(tail(matrix, rank)) / np.linalg.norm(kernel)
        assert decompose.spatial_svd(kernel, rank).relative_error == pytest.approx(expected, rel=1e-10)


def test_depthwise_separable_is_the_optimal_truncation_of_each_channel():
    kernel = random_kernel()
    for rank in (1, 4, 7):
        expected = sum(tail(kernel[:, :, s].reshape(9, 8), rank) for s in range(6))
        assert decompose.depthwise_separable(kernel, rank).relative_error == pytest.approx(
            np.sqrt(expected) / np.linalg.norm(kernel), rel=1e-10
        )


def test_tucker_lies_between_its_bounds_and_improves_on_the_truncated_hosvd():
    """No Tucker-2 is better than its worse unfolding allows; the truncated HOSVD is at most √2 times the best."""
    kernel = random_kernel((3, 3, 16, 20))
    tails = tail(unfold(kernel, 2), 5), tail(unfold(kernel, 3), 4)
    frames = [np.linalg.svd(unfold(kernel, mode))[0][:, :rank] for mode, rank in ((2, 5), (3, 4))]
    hosvd = np.einsum("ijst,sa,ua,tb,vb->ijuv", kernel, frames[0], frames[0], frames[1], frames[1], optimize=True)
    hosvd_error = np.linalg.norm(kernel - hosvd) / np.linalg.norm(kernel)
    ours = decompose.tucker2(kernel, (5, 4))
    norm = np.linalg.norm(kernel)
    assert np.sqrt(max(tails)) / norm <= ours.relative_error < hosvd_error <= np.sqrt(sum(tails)) / norm
    assert hosvd_error <= np.sqrt(2) * ours.relative_error
    for frame in (ours.factors[0], ours.factors[2]):
        assert np.allclose(frame.T @ frame, np.eye(frame.shape[1]), atol=1e-10)


def test_tensor_train_lies_between_its_bounds():
    """Not better than its worst unfolding allows, at most √3 times the best: the tails of the unfoldings add up."""
    kernel = random_kernel((3, 3, 8, 10))
    train = kernel.transpose(2, 0, 1, 3)  # (s, i, j, t)
    result = decompose.tensor_train(kernel, (5, 9, 6))
    tails = [tail(train.reshape(rows, -1), rank) for rows, rank in ((8, 5), (24, 9), (72, 6))]
    norm = np.linalg.norm(kernel)
    assert np.sqrt(max(tails)) / norm <= result.relative_error <= np.sqrt(sum(tails)) / norm
    assert np.sqrt(sum(tails)) <= np.sqrt(3) * np.sqrt(max(tails))


# --- correct: CP -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("true_rank", "fit_rank"), [(1, 1), (3, 4)])
def test_shape_of_tensorlys_own_example(true_rank, fit_rank):
    kernel = as_kernel(low_rank_tensor((6, 8, 7), true_rank))
    assert decompose.cp(kernel, fit_rank, n_starts=3).relative_error < 0.01


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("rank", [2, 7, 30])
def test_alternating_least_squares_is_that_of_tensorly(merge, rank):
    kernel = random_kernel((3, 3, 9, 11))
    tensor = kernel.reshape(9, 9, 11) if merge else kernel
    start = decompose._start(tensor, rank, seed=0, number=1)
    theirs = parafac(tensor, rank, n_iter_max=12, init=(np.ones(rank), [f.copy() for f in start]), tol=None)
    theirs = np.linalg.norm(tensor - tensorly.cp_to_tensor(theirs)) / np.linalg.norm(tensor)
    found, error = decompose._sweeps(tensor, start, decompose._least_squares, 12, 0.0)
    ours = np.linalg.norm(tensor - tensorly.cp_to_tensor((None, found))) / np.linalg.norm(tensor)
    assert ours == pytest.approx(theirs, abs=1e-6) and error == pytest.approx(ours, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_error_never_rises(seed):
    tensor = random_kernel((3, 3, 6, 8), seed).reshape(9, 6, 8)
    factors, errors = decompose._start(tensor, 12, seed, 1), []
    for _ in range(200):
        factors, squared = decompose._sweep(tensor, factors, decompose._least_squares)
        errors.append(squared)
    assert np.max(np.diff(errors)) <= 1e-12 * np.sum(tensor**2) and errors[-1] < 0.9 * errors[0]


def test_more_starts_are_not_worse_and_the_seed_decides():
    kernel = random_kernel()
    one, five = decompose.cp(kernel, 8, seed=1), decompose.cp(kernel, 8, n_starts=5, seed=1)
    assert five.relative_error <= one.relative_error
    assert np.array_equal(five.to_kernel(), decompose.cp(kernel, 8, n_starts=5, seed=1).to_kernel())
    assert five.relative_error != decompose.cp(kernel, 8, n_starts=5, seed=2).relative_error


def test_components_are_balanced_and_sorted():
    result = decompose.cp(random_kernel(), 8, merge_spatial=False)
    norms = np.array([np.linalg.norm(factor, axis=0) for factor in result.factors])
    assert np.allclose(norms, norms[0]) and np.allclose(result.component_norms, norms[0] ** 4)
    assert (np.diff(result.component_norms) <= 1e-12).all()
    assert result.degeneracy == pytest.approx(result.component_norms[0] / result.kernel_norm)


def test_sensitivity_is_the_expected_change_under_noise():
    """Monte Carlo, with noise so small that the change is linear in it."""
    rng, scale = np.random.default_rng(0), 1e-5
    result = decompose.cp(random_kernel((3, 3, 5, 4)), 3)
    changes = []
    for _ in range(2000):
        noisy = [factor + scale * rng.standard_normal(factor.shape) for factor in result.factors]
        changes.append(np.sum((np.einsum("pr,sr,tr->pst", *noisy) - result.to_kernel().reshape(9, 5, 4)) ** 2))
    expected = np.mean(changes) / scale**2 / result.kernel_norm**2
    assert result.sensitivity == pytest.approx(expected, rel=4 * np.std(changes) / np.mean(changes) / np.sqrt(2000))


@pytest.mark.timed
def test_all_kernels_of_the_simple_network_in_fifteen_seconds(trained):
    """At 15% of their parameters, one start each; about 4 s on a quiet 2-core machine."""
    assert [name for name, kernel in trained.items() if kernel.shape[0] == 3] == [f"conv{n}" for n in range(1, 8)]
    start = time.perf_counter()
    for kernel in trained.values():
        if kernel.shape[0] == 3:
            result = decompose.cp(kernel, *ranks.for_fraction("cp", kernel.shape, 0.15))
            assert result.parameters <= 0.15 * kernel.size and result.relative_error < 0.8
    assert time.perf_counter() - start < 15


@pytest.mark.parametrize("method", ranks.METHODS)
def test_the_last_factor_combines_the_basis(method):
    result = decompose.decompose(random_kernel(), method, RANKS[method])
    assert np.allclose(result.basis() @ result.last_factor(), result.to_kernel().reshape(-1, 8))


# --- degeneracy and its cure -------------------------------------------------------------------------------------


def outer(*vectors):
    return np.einsum("i,j,k->ijk", *vectors)


def test_correction_on_a_border_rank_tensor():
    """W = aab + aba + baa has rank 3 and border rank 2: ((a+εb)⊗³ − (a−εb)⊗³) / 2ε comes as near as one likes."""
    a, b = np.eye(2)
    kernel = as_kernel(outer(a, a, b) + outer(a, b, a) + outer(b, a, a))
    epsilon = 0.003
    factors = [np.stack([a + epsilon * b, a - epsilon * b], axis=1)] * 2
    factors.append(factors[0] * [1 / (2 * epsilon), -1 / (2 * epsilon)])
    near = decompose._cp_of(kernel, "cp", factors)
    cured = decompose.correct(kernel, near, error=near.relative_error + 0.01)
    assert near.relative_error < 1e-4 and near.degeneracy > 90
    assert cured.degeneracy < near.degeneracy / 10 and cured.relative_error <= near.relative_error + 0.01 + 1e-9


def test_correction_where_plain_least_squares_degenerates_at_border_rank_three():
    """A second derivative, aac + aca + caa + abb + bab + bba, in noise, by 3 components."""
    rng = np.random.default_rng(0)
    a, b, c = np.eye(3)
    core = sum(outer(*v) for v in (*three_orders(a, c), *three_orders(b, a)))
    frames = [np.linalg.qr(rng.standard_normal((10, 10)))[0][:, :3] for _ in range(3)]
    tensor = np.einsum("abc,ia,jb,kc->ijk", core, *frames)
    noise = rng.standard_normal(tensor.shape)
    kernel = as_kernel(tensor + 0.4 * np.linalg.norm(tensor) / np.linalg.norm(noise) * noise)
    plain = decompose.cp(kernel, 3, n_iter=5000, tol=0.0, n_starts=3)
    cured = decompose.correct(kernel, plain)
    assert plain.degeneracy > 10 * cured.degeneracy
    assert cured.relative_error <= 1.01 * plain.relative_error * (1 + 1e-9)


def three_orders(x, z):
    return (x, x, z), (x, z, x), (z, x, x)


@pytest.mark.parametrize(("layer", "rank", "n_iter"), [("conv1", 12, 5000), ("conv2", 61, 1000)])
def test_correction_on_a_trained_kernel(trained, layer, rank, n_iter):
    plain = decompose.cp(trained[layer], rank, n_iter=n_iter, tol=0.0)
    cured = decompose.correct(trained[layer], plain)
    assert plain.degeneracy > 3 and cured.degeneracy < plain.degeneracy / 10
    assert cured.sensitivity < plain.sensitivity / 10
    assert cured.relative_error <= 1.01 * plain.relative_error * (1 + 1e-9)


def test_a_bound_on_the_norms_is_kept(trained):
    plain = decompose.cp(trained["conv1"], 12, n_iter=2000, tol=0.0)
    for max_norm in (3.0, 1.0):
        bounded = decompose.cp(trained["conv1"], 12, n_iter=2000, tol=0.0, max_norm=max_norm)
        root = np.sqrt(np.sum(bounded.component_norms**2)) / bounded.kernel_norm
        assert root <= max_norm * (1 + 1e-9) and bounded.degeneracy <= max_norm
        assert bounded.relative_error >= plain.relative_error
    assert np.sqrt(np.sum(plain.component_norms**2)) > 3 * plain.kernel_norm


def test_a_bound_below_what_the_error_allows_costs_error():
    """Border rank: the bound that 1% more error can't reach is enforced, and the error is what it then is."""
    a, b = np.eye(2)
    kernel = as_kernel(outer(a, a, b) + outer(a, b, a) + outer(b, a, a))
    plain = decompose.cp(kernel, 2, n_starts=3, n_iter=3000, tol=0.0)
    bounded = decompose.cp(kernel, 2, n_starts=3, n_iter=3000, tol=0.0, max_norm=1.5)
    assert np.sqrt(np.sum(plain.component_norms**2)) > 1.5 * plain.kernel_norm
    assert np.sqrt(np.sum(bounded.component_norms**2)) <= 1.5 * bounded.kernel_norm * (1 + 1e-9)
    assert 1.01 * plain.relative_error < bounded.relative_error < 0.2


def test_a_bound_that_holds_already_changes_nothing():
    kernel = random_kernel()
    assert np.array_equal(decompose.cp(kernel, 4).to_kernel(), decompose.cp(kernel, 4, max_norm=50.0).to_kernel())


def test_the_corrections_norm_never_rises():
    kernel = random_kernel()
    steps = [decompose.cp(kernel, 10, n_iter=300, tol=0.0)]
    allowed = 1.01 * steps[0].relative_error
    for _ in range(6):
        steps.append(decompose.correct(kernel, steps[-1], error=allowed, n_iter=1))
    sums = [np.sum(step.component_norms**2) for step in steps]
    assert (np.diff(sums) <= 1e-9 * sums[0]).all() and sums[-1] < sums[0]


def test_an_exact_decomposition_is_left_as_it_is():
    kernel = decompose.cp(random_kernel(), 3).to_kernel()
    exact = decompose._cp_of(kernel, "cp", decompose.cp(random_kernel(), 3).factors)
    assert exact.relative_error < 1e-14 and decompose.correct(kernel, exact).relative_error < 1e-14


@pytest.mark.parametrize("figure", ["component_norms", "degeneracy", "sensitivity"])
@pytest.mark.parametrize("kernel", [random_kernel(), np.zeros((3, 3, 6, 8))], ids=["some", "zero"])
def test_figures_of_a_cp_are_refused_for_others(figure, kernel):
    with pytest.raises(ValueError, match="component norms are those of a CP; this is a tucker"):
        getattr(decompose.tucker2(kernel, (2, 2)), figure)


@pytest.mark.parametrize("options", [{"n_iter": 0}, {"n_iter": -3}, {"tol": -1.0}, {"tol": "small"}])
def test_numbers_of_the_iterations_are_checked(options):
    kernel = random_kernel()
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name} must be a .*number between"):
        decompose.tucker2(kernel, (2, 2), **options)
    with pytest.raises(ValueError, match=f"{name} must be a .*number between"):
        decompose.correct(kernel, decompose.cp(kernel, 3), **options)
    with pytest.raises(ValueError, match="until must be a number between"):
        decompose.correct(kernel, decompose.cp(kernel, 3), until=-1.0)
