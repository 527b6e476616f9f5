"""Write whole files: first under a temporary name in the same folder, then renamed. Lock and check files, too.

Kept by hand: the standard library has no such function, and `atomicwrites` is no longer maintained.
"""

import contextlib
import errno
import os
import platform
import threading
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None


class Busy(ValueError):
    """Another process does the same work."""


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


def check_writable(folder, size=1):
    """Check that a file of `size` bytes can be written to `folder`, before an hour of work depends on it.

    Raises:
        ValueError: if it cannot.
    """
    probe = Path(folder) / f".writable.{os.getpid()}.{threading.get_ident()}"
    write_atomic(probe, bytes(size))
    probe.unlink()


@contextlib.contextmanager
def locked(path, what):
    """Hold the lock file `path` inside a `with` block, so that no second process does the same work.

    The system frees the lock when the process ends, even if it is killed. The file then stays, and the next process
    takes it over. It names its process and machine, because some network drives do not lock across machines.

    Args:
        path: `Path` of the lock file; its folder is made.
        what: the work, for the message: "this training".

    Raises:
        Busy: if another process holds the lock.
        ValueError: if a process on another machine may hold it, or the file cannot be written.
    """
    owner, machine = f"process {os.getpid()}", f" on {platform.node()}"
    with _open_locked(path, what) as file:
        earlier = file.read().strip()
        if earlier and not earlier.endswith(machine):
            raise ValueError(
                f"{what} may be under way in {earlier}, another machine, by {path}; wait for it, or delete this file "
                "if that process has ended, and run again"
            )
        try:
            file.truncate(0)
            file.write(owner + machine)
            file.flush()
        except OSError as error:
            raise ValueError(cannot_write(path, error)) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _open_locked(path, what):
    """Open the file `path`, at its start, with a lock that ends when it is closed."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", errors="replace")  # noqa: SIM115 (the caller closes it)
        except OSError as error:
            raise ValueError(cannot_write(path, error)) from None
        file.seek(0)
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                owner = file.read().strip() or "another process"
            raise Busy(f"{what} is under way in {owner}; wait until it ends, or stop it, and run again") from None
        except OSError:  # a file system without locks: the name in the file is all there is
            pass
        with contextlib.suppress(FileNotFoundError):  # its last owner has deleted it since it was opened
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def read_arrays(path):
    """Read an npz file.

    Returns:
        dict name -> array of numbers or text.

    Raises:
        ValueError: if it is damaged, or contains objects, which could run code; the message does not name the file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror or error}") from None
    except Exception:  # errors of many kinds; NumPy's message about objects tells how to run them
        raise ValueError("it is not a whole npz file of numbers") from None


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
