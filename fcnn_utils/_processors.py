"""Count the processors that this process may use, and limit the threads of BLAS."""

import contextlib
import functools
import os
import threading

from threadpoolctl import OpenBLASController, ThreadpoolController

_blas = functools.cache(lambda: ThreadpoolController().select(user_api="blas"))  # it searches all loaded libraries
_blas_lock = threading.Lock()
_blas_users, _blas_limit = 0, None  # how many blocks of `one_blas_thread` are open, and what the first of them set


@contextlib.contextmanager
def one_blas_thread():
    """Let BLAS use one thread in a `with` block. It also works as a decorator.

    BLAS threads wait for each other in every product of matrices. If another program occupies a processor, they
    wait long: a decomposition by small products then takes ten times as long. The number of BLAS threads belongs to
    the process, not to a Python thread. Therefore the first block that is entered sets it, and the last that is
    left, in whichever thread, restores it. Blocks may be nested. Hold one around a pool of threads that decompose
    several kernels.
    """
    global _blas_users, _blas_limit
    with _blas_lock:
        if not _blas_users:
            _blas_limit = _blas().limit(limits=1)
            OpenBLASController.clear_controlling_thread()  # else no other thread could restore it
        _blas_users += 1
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if not _blas_users:
                _blas_limit.restore_original_limits()
                OpenBLASController.clear_controlling_thread()


def available_cores():
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
