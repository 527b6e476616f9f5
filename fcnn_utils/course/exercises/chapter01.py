"""Checks of the exercises of chapter 01, low-rank matrices."""

import numpy as np

from fcnn_utils.course.exercises import compare_numbers, exercise


@exercise("01.1")
def ranks_of_tables(answer):
    """The ranks of tables of sin(x + y), (x - y)^2 and exp(x + y)."""
    x, y = np.linspace(0.3, 2, 12), np.linspace(0.1, 3, 15)[None]
    x = x[:, None]
    truth = [np.linalg.matrix_rank(table) for table in (np.sin(x + y), (x - y) ** 2, np.exp(x + y))]
    return compare_numbers(answer, truth, "write each function as a sum of products g(x) h(y), as short as possible")


@exercise("01.2")
def largest_ranks(answer):
    """The largest R with R (n + m) < n m, for 128 × 128 and 480 × 640."""
    truth = [max(rank for rank in range(n) if rank * (n + m) < n * m) for n, m in ((128, 128), (480, 640))]
    return compare_numbers(answer, truth, "compare R (n + m) with n m; at equality nothing is saved")


@exercise("01.3")
def smallest_rank(function):
    """A function (matrix, error) -> smallest rank whose relative error is at most `error`."""
    rng = np.random.default_rng(13)
    for n, m, error, decay in (
        (7, 5, 0.5, 1),
        (5, 9, 0.3, 1),
        (11, 11, 0.1, 0.6),
        (6, 13, 0.02, 0.3),
        (9, 4, 0.8, 0.9),
    ):
        matrix = rng.normal(size=(n, n)) * decay ** np.arange(n) @ rng.normal(size=(n, m))
        u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
        for truth in range(min(n, m) + 1):
            rest = matrix - (u[:, :truth] * sigma[:truth]) @ vt[:truth]
            if np.linalg.norm(rest) <= error * np.linalg.norm(matrix):
                break
        rank = function(matrix.copy(), error)
        if rank != truth:
            side = "high" if rank > truth else "low"
            return f"for a {n} × {m} matrix and the error {error}, it returns {rank}, which is too {side}"
    return ""


@exercise("01.4")
def split_rank_one(function):
    """A function kernel -> (column, row) whose outer product is the kernel of rank 1."""
    rng = np.random.default_rng(14)
    columns = [np.array([1.0, 2.0, 1.0]), np.array([0.0, -3.0, 0.5, 0.0, 2.0]), *rng.normal(size=(3, 7))]
    rows = [np.array([1.0, 0.0, -1.0]), np.array([0.0, 0.0, 4.0]), *rng.normal(size=(3, 5))]
    for column, row in zip(columns, rows, strict=True):
        kernel = np.outer(column, row)
        parts = function(kernel.copy())
        if len(parts) != 2:
            return f"it must return two vectors, a column and a row; it returns {len(parts)} things"
        a, b = (np.ravel(np.asarray(part, float)) for part in parts)
        if (a.size, b.size) != kernel.shape:
            return f"for a {kernel.shape} kernel, the column and the row have {a.size} and {b.size} entries"
        if not np.allclose(np.outer(a, b), kernel):
            return f"the product of column and row is not the kernel {np.round(kernel, 2).tolist()}"
    return ""


@exercise("01.5")
def errors_of_the_disk(answer):
    """The relative errors of the best kernels of rank 1, 2 and 3 of the 11 × 11 disk."""
    squares = np.arange(-5, 6) ** 2
    disk = (np.add.outer(squares, squares) <= 5.5**2).astype(float)
    u, sigma, vt = np.linalg.svd(disk)
    rests = [disk - (u[:, :rank] * sigma[:rank]) @ vt[:rank] for rank in (1, 2, 3)]
    truth = [np.linalg.norm(rest) / np.linalg.norm(disk) for rest in rests]
    hint = "an error is the root of the squared singular values left out, over the root of all; 0.5 means 50%"
    return compare_numbers(answer, truth, hint, atol=0.002)
