"""How factorizations are computed: singular vectors from Gram matrices, compared with TensorLy, and threads of BLAS."""

import threading
import time

import numpy as np
import pytest
from tensorly.decomposition import partial_tucker, tensor_train
from threadpoolctl import OpenBLASController, threadpool_info, threadpool_limits

from fcnn_utils import factorizations
from fcnn_utils.factorizations import SVD, Factorization, TensorTrain, Tucker2, base, gram, one_blas_thread

METHODS = list(factorizations.FACTORIZATIONS)


def random_kernel(shape):
    return np.random.default_rng(0).standard_normal(shape)


# --- singular vectors from Gram matrices -------------------------------------------------------------------------

SPECTRA = {
    "flat": np.ones(12),
    "falling": np.arange(1.0, 13) ** -1,
    "steep": 10.0 ** -np.arange(12),  # the Gram matrix loses those below 1e-8
    "of rank 4": np.arange(12) < 4,
    "of rank 4 and rounding": np.where(np.arange(12) < 4, 1, 1e-15),
    "zero": np.zeros(12),
}


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (12, 12), (3, 12, 20), (3, 20, 12)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_truncated_svds_from_gram_matrices_are_optimal(spectrum, shape):
    rng, sigma = np.random.default_rng(0), np.sort(SPECTRA[spectrum].astype(float))[::-1]
    left, right = (np.linalg.qr(rng.standard_normal((*shape[:-2], size, 12)))[0] for size in shape[-2:])
    matrix = left * sigma @ np.swapaxes(right, -1, -2)
    for rank in (1, 4, 7, 12):
        best, scale = np.linalg.norm(sigma[rank:]), np.linalg.norm(sigma)
        u, found, vt = gram.truncated_svd(matrix, rank)
        errors = np.linalg.norm(matrix - u * found[..., None, :] @ vt, axis=(-2, -1))
        assert np.allclose(errors, best, rtol=1e-7, atol=1e-14 * scale)
        assert np.allclose(found, sigma[:rank], rtol=1e-7, atol=1e-14 * scale)
        for vectors in [gram.left_vectors(matrix, rank)] if matrix.ndim == 2 else []:
            assert np.allclose(vectors.T @ vectors, np.eye(rank), atol=1e-13)
            residue = np.linalg.norm(matrix - vectors @ (vectors.T @ matrix))
            assert residue == pytest.approx(best, rel=1e-7, abs=1e-14 * scale)


def kernels_of_several_kinds(shape):
    """Yield kernels: noise, in both precisions; with falling spectra; of multilinear rank 4, exactly and in noise."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(shape)
    yield from (noise, noise.astype("float32"))
    for power in (1, 4):
        yield noise * np.arange(1.0, shape[-1] + 1) ** -power * np.arange(1.0, shape[-2] + 1)[:, None] ** -power
    core = rng.standard_normal((*shape[:-2], 4, 4))
    low = np.einsum("...ab,sa,tb->...st", core, *(rng.standard_normal((size, 4)) for size in shape[-2:]))
    yield from (low + scale * noise for scale in (0, 1e-9, 1e-6, 1e-3))


@pytest.mark.parametrize("shape", [(3, 3, 16, 24), (5, 12, 16), (2, 3, 2, 12, 8), (20, 15)], ids=str)
def test_tucker_and_tensor_train_have_the_error_of_tensorly(shape):
    largest = Tucker2.max_ranks(shape)
    for kernel in kernels_of_several_kinds(shape):
        kernel64 = kernel.astype(float)
        for ranks in ((1, 1), (4, 4), (largest[0] // 2, largest[1] // 2), largest):
            modes = [kernel.ndim - 2, kernel.ndim - 1]
            (core, frames), _ = partial_tucker(kernel64, ranks, modes=modes, n_iter_max=100, tol=1e-6)
            rebuilt = np.einsum("...ab,sa,tb->...st", core, *frames)
            error = np.linalg.norm(kernel64 - rebuilt) / np.linalg.norm(kernel64)
            assert Tucker2.decompose(kernel, ranks).relative_error == pytest.approx(error, rel=1e-6, abs=1e-14)
        ranks = tuple(min(2, high) for high in TensorTrain.max_ranks(shape))
        train = tensor_train(np.moveaxis(kernel64, -2, 0), [1, *ranks, 1])
        error = np.linalg.norm(np.moveaxis(kernel64, -2, 0) - train.to_tensor()) / np.linalg.norm(kernel64)
        assert TensorTrain.decompose(kernel, ranks).relative_error == pytest.approx(error, rel=1e-6, abs=1e-14)


@pytest.mark.bench
def test_large_kernels_are_decomposed_in_seconds():
    """At 20% of the parameters; on a quiet 2-core machine about half of the given times."""
    kernel = random_kernel((3, 3, 256, 256))
    for method, ranks, seconds in (("tucker", (95, 95), 6), ("spatial", 76, 1), ("tt", (73, 219, 73), 1)):
        start = time.perf_counter()
        factorizations.decompose(kernel, method, ranks)
        assert time.perf_counter() - start < seconds, method


# --- threads of BLAS ---------------------------------------------------------------------------------------------


def blas_threads():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture
def two_blas_threads():
    """Let BLAS use two threads, in a way that any Python thread may change."""
    limits = threadpool_limits(2, "blas")
    OpenBLASController.clear_controlling_thread()
    if blas_threads() != {2}:
        pytest.skip("threadpoolctl does not control this BLAS")
    yield
    limits.restore_original_limits()
    OpenBLASController.clear_controlling_thread()


@pytest.mark.parametrize("method", METHODS)
def test_a_decomposition_uses_one_blas_thread(two_blas_threads, monkeypatch, method):
    seen, to_kernel = [], Factorization.to_kernel
    monkeypatch.setattr(Factorization, "to_kernel", lambda self: (seen.append(blas_threads()), to_kernel(self))[1])
    ranks = (2,) * len(factorizations.get(method).max_ranks((3, 3, 6, 8)))
    factorizations.decompose(random_kernel((3, 3, 6, 8)), method, ranks)
    assert seen and all(threads == {1} for threads in seen) and blas_threads() == {2}
    with pytest.raises(ValueError, match="finite"):
        factorizations.decompose(np.full((3, 3, 6, 8), np.nan), method, ranks)
    assert blas_threads() == {2}


def test_svds_of_one_large_kernel_share_the_blas_threads_and_several_jobs_do_not(two_blas_threads, monkeypatch):
    seen, to_kernel, kernel = [], Factorization.to_kernel, random_kernel((3, 3, 6, 8))
    monkeypatch.setattr(Factorization, "to_kernel", lambda self: (seen.append(blas_threads()), to_kernel(self))[1])
    monkeypatch.setattr(base, "_LARGE", kernel.size - 1)
    svd, tucker = (SVD, [2, 4], {}), (Tucker2, [(2, 2)], {})
    factorizations.decompose_ladders(kernel, [svd])
    assert len(seen) == 3 and all(threads == {2} for threads in seen)
    seen.clear()
    factorizations.decompose_ladders(kernel, [svd, tucker])
    list(factorizations.decompose_many({"kernel": (SVD, kernel, 2, {})}))
    factorizations.decompose(kernel, "tucker", (2, 2))
    assert len(seen) == 6 and all(threads == {1} for threads in seen) and blas_threads() == {2}


def test_the_last_thread_that_decomposes_restores_the_blas_threads(two_blas_threads):
    """Blocks of two Python threads overlap; the one that began first ends first, and is still alive at the end."""
    entered, leave, left, end = (threading.Event() for _ in range(4))

    def first():
        with one_blas_thread():
            entered.set()
            leave.wait(5)
        left.set()
        end.wait(5)

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(5) and blas_threads() == {1}
    with one_blas_thread(), one_blas_thread():
        leave.set()
        assert left.wait(5) and blas_threads() == {1}
    assert blas_threads() == {2}
    end.set()
    thread.join()
