"""Write whole files: first under a temporary name in the same folder, then renamed.

Kept by hand: the standard library has no such function, and `atomicwrites` is no longer maintained.
"""

import contextlib
import errno
import os
from pathlib import Path


def write_atomic(path, content):
    """Write `content` (bytes or str) to `path`, so that a reader finds the old file or the whole new one.

    Missing folders are made.

    Raises:
        ValueError: if the file cannot be written (disk full, folder read-only).
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
    """Check that files can be written to `folder`, before an hour of work depends on it.

    Raises:
        ValueError: if nothing can be written there.
    """
    probe = Path(folder) / f".writable.{os.getpid()}"
    write_atomic(probe, b"1")
    probe.unlink()


def cannot_write(path, error):
    """Say in one sentence why `path` could not be written (`error`, an OSError), and what to do."""
    free_space = "free some space and run again"
    elsewhere = "choose a folder that can be written (the course: set FCNN_OUTPUT to it)"
    reasons = {
        errno.ENOSPC: f"the disk is full; {free_space}",
        errno.EDQUOT: f"the disk quota is used up; {free_space}",
        errno.EROFS: f"the folder is read-only; {elsewhere}",
        errno.EACCES: f"permission denied; {elsewhere}",
        errno.EPERM: f"permission denied; {elsewhere}",
    }
    return f"cannot write {path}: {reasons.get(error.errno, error.strerror or str(error))}"
