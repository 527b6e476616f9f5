"""CP decomposition of kernels, compared with TensorLy, known tensors and Monte Carlo; degeneracy and its cure."""

import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorly
from tensorly.decomposition import parafac

from fcnn_utils import rank_selection
from fcnn_utils.factorizations import CP, CP4, als, cp, error_preserving_correction

CHECKPOINT = Path(__file__).parents[1] / "results" / "cifar100" / "simple" / "fast" / "seed0.keras"


def random_kernel(shape=(3, 3, 6, 8), seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def outer(*vectors):
    return np.einsum("i,j,k->ijk", *vectors)


def border_rank_kernel():
    """Return aab + aba + baa as a (2, 1, 2, 2) kernel: rank 3, and components of rank 2 come as near as one likes."""
    a, b = np.eye(2)
    return (outer(a, a, b) + outer(a, b, a) + outer(b, a, a))[:, None]


@pytest.fixture(scope="module")
def trained():
    """Kernels of the committed baseline."""
    network = keras.saving.load_model(CHECKPOINT, compile=False)
    return {
        layer.name: keras.ops.convert_to_numpy(layer.kernel)
        for layer in network.layers
        if layer.name.startswith("conv") and layer.kernel_size == (3, 3)
    }


@pytest.mark.parametrize("rank", [12, 60])
def test_cp_in_float32_has_the_error_of_float64(monkeypatch, trained, rank):
    kernel = trained["conv3"]
    double = CP.decompose(kernel, rank, max_norm=1.0, n_iter=60)
    monkeypatch.setattr(cp, "_FLOAT32", 0)
    single = CP.decompose(kernel, rank, max_norm=1.0, n_iter=60)
    assert single.relative_error == pytest.approx(double.relative_error, rel=2e-3)
    assert single.relative_error != double.relative_error and single.total_norm <= 1 + 1e-9
    assert all(factor.dtype == np.float64 for factor in single.factors)


def test_cp_in_float32_is_refined_in_float64_if_the_error_is_small(monkeypatch):
    rng = np.random.default_rng(0)
    kernel = np.einsum("pr,sr,tr->pst", *(rng.standard_normal((size, 2)) for size in (9, 10, 12))).reshape(3, 3, 10, 12)
    options = {"max_norm": 3.0, "n_iter": 500, "tol": 1e-12}
    monkeypatch.setattr(cp, "_FLOAT32", 0)
    error = CP.decompose(kernel, 2, **options).relative_error
    monkeypatch.setattr(cp, "_SMALL_ERROR", -1)  # float32 alone
    assert error < 1e-7 and 3 * error < CP.decompose(kernel, 2, **options).relative_error


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_cp_in_float32_does_not_depend_on_the_scale_of_the_kernel(monkeypatch, trained, scale):
    monkeypatch.setattr(cp, "_FLOAT32", 0)
    kernel = trained["conv3"].astype(np.float64)
    plain, scaled = (CP.decompose(each, 20, max_norm=1.0, n_iter=10) for each in (kernel, scale * kernel))
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_kernel_of_low_cp_rank_is_found(rank):
    rng = np.random.default_rng(rank)
    kernel = np.einsum("ir,jr,sr,tr->ijst", *(rng.standard_normal((size, rank)) for size in (3, 3, 10, 12)))
    for method in (CP, CP4):
        assert method.decompose(kernel, rank, n_iter=500, tol=1e-12, n_starts=3).relative_error < 1e-6
    tensor = np.einsum("ir,jr,kr->ijk", *(rng.standard_normal((size, rank)) for size in (6, 8, 7)))
    assert CP.decompose(tensor[:, None], rank + 1, n_starts=3).relative_error < 0.01  # TensorLy's own example


@pytest.mark.parametrize("shape", [(9, 9, 11), (3, 3, 9, 11)])
@pytest.mark.parametrize("rank", [2, 7, 30])
def test_alternating_least_squares_equals_that_of_tensorly(shape, rank):
    tensor = random_kernel(shape)
    start = als.initial_factors(tensor, rank, seed=0, number=1)
    theirs = parafac(tensor, rank, n_iter_max=12, init=(np.ones(rank), [f.copy() for f in start]), tol=None)
    ours, error = als.sweeps(tensor, start, 12, 0.0)
    errors = [np.linalg.norm(tensor - tensorly.cp_to_tensor(cp)) for cp in (theirs, (None, ours))]
    theirs, ours = errors / np.linalg.norm(tensor)
    assert ours == pytest.approx(theirs, abs=1e-6) and error == pytest.approx(ours, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_sweep_never_raises_the_error(seed):
    tensor = random_kernel((9, 6, 8), seed)
    factors, errors = als.initial_factors(tensor, 12, seed, 1), []
    for _ in range(200):
        factors, squared = als.sweep(tensor, factors)
        errors.append(squared)
    assert np.max(np.diff(errors)) <= 1e-12 * np.sum(tensor**2) and errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("method", [CP, CP4])
def test_100_sweeps_with_a_momentum_reach_what_300_plain_ones_reach(trained, method):
    """A trained kernel, and collinear components, where plain sweeps hardly lower the error for a long time."""
    rng = np.random.default_rng(5)
    modes = [rng.standard_normal((size, 1)) + 0.3 * rng.standard_normal((size, 10)) for size in (3, 3, 20, 20)]
    for kernel, rank in ((trained["conv3"][:, :, :48, :48], 29), (np.einsum("ir,jr,sr,tr->ijst", *modes), 10)):
        tensor = method._modes(kernel.astype(float))
        _, plain = als.sweeps(tensor, als.initial_factors(tensor, rank, 0, 0), 300, 0.0)
        assert method.decompose(kernel, rank, n_iter=100, momentum=0.5).relative_error < plain


@pytest.mark.parametrize("seed", range(3))
def test_extrapolation_never_raises_the_error(seed):
    tensor = random_kernel((9, 6, 8), seed)
    start = als.initial_factors(tensor, 12, seed, 1)
    fits = [als.sweeps(tensor, start, count, 0.0, momentum=0.5) for count in range(1, 60, 3)]
    errors = [error for _, error in fits]
    assert (np.diff(errors) <= 0).all() and errors[-1] < als.sweeps(tensor, start, 58, 0.0)[1]
    for factors, error in fits:
        rebuilt = np.einsum("ir,jr,kr->ijk", *factors)
        assert np.linalg.norm(tensor - rebuilt) / np.linalg.norm(tensor) == pytest.approx(error, rel=1e-6)


def test_more_starts_are_not_worse_and_the_seed_determines_the_result():
    kernel = random_kernel()
    one, five = CP.decompose(kernel, 8, seed=1), CP.decompose(kernel, 8, n_starts=5, seed=1)
    assert five.relative_error <= one.relative_error
    assert np.array_equal(five.to_kernel(), CP.decompose(kernel, 8, n_starts=5, seed=1).to_kernel())
    assert five.relative_error != CP.decompose(kernel, 8, n_starts=5, seed=2).relative_error


def test_components_are_balanced_and_sorted():
    result = CP4.decompose(random_kernel(), 8)
    norms = np.array([np.linalg.norm(factor, axis=0) for factor in result.factors])
    assert np.allclose(norms, norms[0]) and np.allclose(result.component_norms, norms[0] ** 4)
    assert (np.diff(result.component_norms) <= 1e-12).all()
    assert result.degeneracy == pytest.approx(result.component_norms[0] / result.kernel_norm)


def test_noise_sensitivity_is_the_expected_change_under_noise():
    """Monte Carlo, with noise so small that the change is linear in it."""
    rng, scale = np.random.default_rng(0), 1e-5
    result = CP.decompose(random_kernel((3, 3, 5, 4)), 3)
    changes = []
    for _ in range(2000):
        noisy = [factor + scale * rng.standard_normal(factor.shape) for factor in result.factors]
        changes.append(np.sum((np.einsum("pr,sr,tr->pst", *noisy) - result.to_kernel().reshape(9, 5, 4)) ** 2))
    expected = np.mean(changes) / scale**2 / result.kernel_norm**2
    tolerance = 4 * np.std(changes) / np.mean(changes) / np.sqrt(2000)
    assert result.noise_sensitivity == pytest.approx(expected, rel=tolerance)


@pytest.mark.bench
def test_all_kernels_of_the_simple_network_take_at_most_fifteen_seconds(trained):
    """At 15% of their parameters, one start each; about 4 s on a quiet 2-core machine."""
    assert list(trained) == [f"conv{n}" for n in range(1, 8)]
    start = time.perf_counter()
    for kernel in trained.values():
        result = CP.decompose(kernel, rank_selection.ranks_for_fraction("cp", kernel.shape, 0.15))
        assert result.parameters <= 0.15 * kernel.size and result.relative_error < 0.8
    assert time.perf_counter() - start < 15


# --- degeneracy of CP and its cure -------------------------------------------------------------------------------


def test_correction_of_a_degenerate_border_rank_decomposition():
    """((a + εb)⊗³ − (a − εb)⊗³) / 2ε: the smaller ε, the smaller the error and the larger the components."""
    kernel, epsilon = border_rank_kernel(), 0.003
    a, b = np.eye(2)
    factors = [np.stack([a + epsilon * b, a - epsilon * b], axis=1)] * 2
    factors.append(factors[0] * [1 / (2 * epsilon), -1 / (2 * epsilon)])
    near = CP.from_factors(kernel, factors)
    cured = error_preserving_correction(kernel, near, error=near.relative_error + 0.01)
    assert near.relative_error < 1e-4 and near.degeneracy > 90
    assert cured.degeneracy < near.degeneracy / 10 and cured.relative_error <= near.relative_error + 0.01 + 1e-9


def test_correction_where_plain_least_squares_degenerates_at_border_rank_three():
    """A second derivative, aac + aca + caa + abb + bab + bba, in noise, by 3 components."""
    rng = np.random.default_rng(0)
    a, b, c = np.eye(3)
    terms = [(a, a, c), (a, c, a), (c, a, a), (b, b, a), (b, a, b), (a, b, b)]
    core = sum(outer(*vectors) for vectors in terms)
    frames = [np.linalg.qr(rng.standard_normal((10, 10)))[0][:, :3] for _ in range(3)]
    tensor = np.einsum("abc,ia,jb,kc->ijk", core, *frames)
    noise = rng.standard_normal(tensor.shape)
    kernel = (tensor + 0.4 * np.linalg.norm(tensor) / np.linalg.norm(noise) * noise)[:, None]
    plain = CP.decompose(kernel, 3, n_iter=5000, tol=0.0)
    cured = error_preserving_correction(kernel, plain)
    assert plain.degeneracy > 10 * cured.degeneracy
    assert cured.relative_error <= 1.01 * plain.relative_error * (1 + 1e-9)


@pytest.mark.parametrize(("layer", "rank", "n_iter"), [("conv1", 12, 4000), ("conv2", 30, 500)])
def test_correction_of_a_trained_kernel(trained, layer, rank, n_iter):
    plain = CP.decompose(trained[layer], rank, n_iter=n_iter, tol=0.0)
    cured = error_preserving_correction(trained[layer], plain)
    assert plain.degeneracy > 3 and cured.degeneracy < plain.degeneracy / 10
    assert cured.noise_sensitivity < plain.noise_sensitivity / 10
    assert cured.relative_error <= 1.01 * plain.relative_error * (1 + 1e-9)


def test_a_bound_on_the_norms_is_kept_and_changes_nothing_if_it_holds_already(trained):
    kernel = random_kernel()
    for momentum in (0.0, 0.5):
        plain, loose = (CP.decompose(kernel, 4, momentum=momentum, max_norm=bound) for bound in (None, 50.0))
        assert np.array_equal(plain.to_kernel(), loose.to_kernel())
    assert np.array_equal(loose.to_kernel(), CP.decompose(kernel, 4, max_norm=50.0).to_kernel())  # the default
    plain = CP.decompose(trained["conv1"], 12, n_iter=1000, tol=0.0, momentum=0.5)
    assert plain.total_norm > 3
    for max_norm in (3.0, 1.0):
        bounded = CP.decompose(trained["conv1"], 12, n_iter=1000, tol=0.0, max_norm=max_norm)
        root = np.sqrt(np.sum(bounded.component_norms**2)) / bounded.kernel_norm
        assert bounded.total_norm == pytest.approx(root) and root <= max_norm * (1 + 1e-9)
        assert bounded.degeneracy <= max_norm and bounded.relative_error > 0.999 * plain.relative_error


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("first", [0.0, 0.05, 100.0])
@pytest.mark.parametrize("share", [0.3, 0.95, 2.0])
def test_bounded_update_needs_no_eigenvectors_even_if_columns_are_equal(dtype, first, share):
    """From any first λ the bound is kept, the solution by eigenvectors is near, and the returned error is right."""
    rng = np.random.default_rng(0)
    z, x = rng.standard_normal((60, 8)), rng.standard_normal((5, 60))
    z = np.concatenate([z, z[:, :3]], axis=1)
    z, x = (z / np.linalg.norm(z, axis=0)).astype(dtype), x.astype(dtype)
    gram, product, total = z.T @ z, x @ z, np.sum(x**2)
    bound = share * np.linalg.norm(product @ np.linalg.pinv(gram, rcond=1e-4))
    factor, squared, _ = als._solve(gram, product, total, bound**2, first)
    expected, least, _ = als._solve_by_eigenvectors(gram, product, total, bound**2, None)
    assert np.linalg.norm(factor) <= bound * (1 + 1e-4)
    assert np.linalg.norm(factor - expected) < 0.01 * np.linalg.norm(expected)
    assert squared == pytest.approx(np.sum((x - factor @ z.T) ** 2), rel=1e-3) == pytest.approx(least, rel=2e-3)


def test_a_bound_costs_a_trained_kernel_less_than_two_percent_of_error(trained):
    kernel = trained["conv3"][:, :, :48, :48]
    for rank in (29, 59):
        plain, bounded = (CP.decompose(kernel, rank, momentum=0.5, max_norm=bound) for bound in (None, 1.0))
        assert plain.total_norm > 3 and bounded.total_norm <= 1 + 1e-9
        assert plain.relative_error < bounded.relative_error < 1.02 * plain.relative_error


def test_a_bound_below_what_the_error_allows_costs_error():
    """Border rank: a bound that 1% more error cannot reach is enforced."""
    plain = CP.decompose(border_rank_kernel(), 2, n_starts=2, n_iter=500, tol=0.0)
    bounded = CP.decompose(border_rank_kernel(), 2, n_starts=2, n_iter=500, tol=0.0, max_norm=1.5)
    assert plain.total_norm > 1.5 >= bounded.total_norm * (1 - 1e-9)
    assert 1.01 * plain.relative_error < bounded.relative_error < 0.2


def test_a_step_of_the_correction_never_raises_the_norm():
    kernel = random_kernel()
    steps = [CP.decompose(kernel, 10, n_iter=300, tol=0.0)]
    allowed = 1.01 * steps[0].relative_error
    for _ in range(6):
        steps.append(error_preserving_correction(kernel, steps[-1], error=allowed, n_iter=1))
    sums = [np.sum(step.component_norms**2) for step in steps]
    assert (np.diff(sums) <= 1e-9 * sums[0]).all() and sums[-1] < sums[0]


def test_an_exact_decomposition_is_not_corrected():
    fit = CP.decompose(random_kernel(), 3)
    exact = CP.from_factors(fit.to_kernel(), fit.factors)
    corrected = error_preserving_correction(fit.to_kernel(), exact)
    assert exact.relative_error < 1e-14 and corrected.relative_error < 1e-14


def test_factors_found_in_float32_keep_the_bound_at_any_number_of_sweeps():
    """The bound is on the sum of the squared norms of the components."""
    tensor = np.random.default_rng(0).standard_normal((9, 12, 14))
    bound = np.sum(tensor**2)
    for seed in range(4):
        for count in (1, 2, 5, 20):
            starts = [als.initial_factors(tensor, 20, seed, 1)]
            factors, error = als.sweeps_in_float32(tensor, starts, count, 0, 0.5, squared_norm=bound)
            sizes = np.prod([np.sum(factor**2, axis=0) for factor in factors], axis=0)
            assert sizes.sum() <= bound * (1 + 1e-12)
            rebuilt = np.einsum("ir,jr,kr", *factors)
            assert np.linalg.norm(tensor - rebuilt) / np.sqrt(bound) == pytest.approx(error, rel=1e-3) and error < 0.97
