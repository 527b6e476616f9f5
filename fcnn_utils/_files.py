"""Write whole files: to a temporary name in the same folder first, then renamed."""

import contextlib
import errno
import os
from pathlib import Path


def write_atomic(path, content):
    """Write `content` (bytes or str) to `path`: afterwards the file is there whole, or as it was before.

    Raises:
        ValueError: the file cannot be written (disk full, folder read-only); says why and what to do.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(cannot_write(path, error)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(folder):
    """Raise ValueError now, not after an hour of training, if nothing can be written below `folder`."""
    probe = Path(folder) / f".writable.{os.getpid()}"
    write_atomic(probe, b"1")
    probe.unlink()


def cannot_write(path, error):
    """One sentence: why `path` could not be written (`error`, an OSError), and what to do."""
    reasons = {
        errno.ENOSPC: "the disk is full; free some space and run again",
        errno.EDQUOT: "the disk quota is used up; free some space and run again",
        errno.EROFS: "the folder is read-only; set FCNN_OUTPUT to a folder that can be written",
        errno.EACCES: "permission denied; set FCNN_OUTPUT to a folder that can be written",
        errno.EPERM: "permission denied; set FCNN_OUTPUT to a folder that can be written",
    }
    return f"cannot write {path}: {reasons.get(error.errno, error.strerror or str(error))}"
