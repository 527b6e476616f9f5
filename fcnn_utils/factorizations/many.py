"""Decompose several kernels, or one kernel at several ranks and by several methods, on all processors."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fcnn_utils._processors import available_cores, one_blas_thread
from fcnn_utils.factorizations.base import check_kernel
from fcnn_utils.factorizations.chain import SPATIAL


def decompose_many(kernels):
    """Decompose several kernels at a time, one on each processor.

    Args:
        kernels: dict name, such as "layer 'conv1'", -> (method, kernel, ranks, options); methods are classes.

    Yields:
        (name, `Factorization`), in the order of `kernels`.

    Raises:
        ValueError: an argument is not allowed; the message names the kernel.
    """
    with one_blas_thread(), ThreadPoolExecutor(available_cores()) as pool:
        running = {}
        for name, (method, kernel, ranks, options) in sorted(kernels.items(), key=_size, reverse=True):  # large first
            running[name] = pool.submit(method.decompose, kernel, ranks, **options)
        for name in kernels:
            try:
                yield name, running[name].result()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def decompose_ladder(method, kernel, ladder, **options):
    """Decompose one kernel at several ranks, from one decomposition if the method is nested.

    Args:
        method: a class.
        kernel: (*spatial, S, T) array.
        ladder: list of ranks, each as in `Factorization.decompose`.
        options: of the method.

    Returns:
        list of `Factorization`, in the order of `ladder`.

    Raises:
        ValueError: an argument is not allowed.
    """
    return decompose_ladders(kernel, [(method, ladder, options)])[0]


def decompose_ladders(kernel, ladders):
    """Decompose one kernel by several methods, each at several ranks.

    Args:
        kernel: (*spatial, S, T) array.
        ladders: list of (method, ladder, options), each as in `decompose_ladder`.

    Returns:
        list with a list of `Factorization` for each of them.

    Raises:
        ValueError: an argument is not allowed.
    """
    kernel, jobs = check_kernel(kernel), []
    for method, ladder, options in ladders:
        method.check_options(options)
        ladder = [method.check_ranks(kernel.shape, ranks) for ranks in ladder]
        steps = [ladder] if method.is_nested and ladder else [[ranks] for ranks in ladder]
        jobs.append([(method, kernel, step, options) for step in steps])
    has_one_job = sum(map(len, jobs)) == 1  # then BLAS may have the other processors
    with contextlib.nullcontext() if has_one_job else one_blas_thread(), ThreadPoolExecutor(available_cores()) as pool:
        running = [[pool.submit(_steps, *job) for job in group] for group in jobs]
        return [[result for future in group for result in future.result()] for group in running]


def _size(item):
    return np.size(item[1][1])


def _steps(method, kernel, ladder, options):
    """Decompose a kernel at the largest of several ranks; the others take the first columns of its factors."""
    whole = method.decompose(kernel, max(ladder), **options)
    if len(ladder) == 1:
        return [whole]
    (rank,) = {letter for layer in whole.layers for letter in layer.letters} - set(SPATIAL + "st")
    axes = [layer.letters[::-1].index(rank) for layer in whole.layers]  # merged spatial axes come first: from the end
    return [
        method.from_factors(
            kernel, [np.take(f, range(count), -1 - axis) for f, axis in zip(whole.factors, axes, strict=True)]
        )
        for (count,) in ladder
    ]
