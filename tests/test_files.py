"""Whole-file writes: `fcnn_utils._files`."""

import errno
import os
import platform
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest

from fcnn_utils import _files

REMEDIES = {
    errno.ENOSPC: "disk is full; free some space",
    errno.EDQUOT: "quota is used up; free some space",
    errno.EROFS: "read-only; choose a folder .*FCNN_OUTPUT",
    errno.EACCES: "permission denied; choose a folder .*FCNN_OUTPUT",
    errno.EPERM: "permission denied; choose a folder .*FCNN_OUTPUT",
    errno.EIO: "Input/output error",
}


@pytest.mark.parametrize("content", [b"\x00bytes\n", "text · äöü\n"])
def test_write_atomic_writes_bytes_and_text_into_new_folders(tmp_path, content):
    path = tmp_path / "new" / "folder" / "file"
    _files.write_atomic(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode("utf-8"))
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("number", [*REMEDIES, None], ids=lambda number: errno.errorcode.get(number, "interrupt"))
def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch, call, number):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    error = OSError(number, "Input/output error") if number else KeyboardInterrupt()
    monkeypatch.setattr(os, call, Mock(side_effect=error))
    with pytest.raises(ValueError if number else KeyboardInterrupt, match=REMEDIES.get(number)) as raised:
        _files.write_atomic(path, b"new")
    assert number is None or f"cannot write {path}: " in str(raised.value)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_write_names_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(ValueError, match="cannot write .*file/below"):
        _files.write_atomic(tmp_path / "file" / "below", b"x")
    with pytest.raises(ValueError, match="cannot write .*file/folder"):
        _files.check_writable(tmp_path / "file" / "folder")


def test_check_writable_leaves_no_file(tmp_path):
    _files.check_writable(tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []


# --- locks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock `tmp_path / "new" / "lock"`."""
    program = "import sys, pathlib; from fcnn_utils import _files\n"
    program += "with _files.locked(pathlib.Path(sys.argv[1]), 'a work'): print(flush=True), input()"
    command = [sys.executable, "-c", program, str(tmp_path / "new" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_second_process_is_told_of_the_first_and_a_dead_one_does_not_block(tmp_path, other):
    path, process = tmp_path / "new" / "lock", other
    message = f"a work is under way in process {process.pid} on {platform.node()}; wait until it ends, or stop it"
    with pytest.raises(ValueError, match=message), _files.locked(path, "a work"):
        pytest.fail("it was done twice")
    process.kill()
    process.wait()
    assert path.exists()  # it could not tidy up
    for _ in range(2):
        with _files.locked(path, "a work"):
            assert path.read_text() == f"process {os.getpid()} on {platform.node()}"
        assert not path.exists()


def test_lock_is_freed_after_an_error_and_one_of_another_machine_is_named(tmp_path):
    path = tmp_path / "lock"
    with pytest.raises(KeyboardInterrupt), _files.locked(path, "a work"):
        raise KeyboardInterrupt
    assert not path.exists()
    path.write_text("process 7 on another-machine")
    with (
        pytest.raises(ValueError, match="may be under way in process 7 on another-machine.*delete this file") as error,
        _files.locked(path, "a work"),
    ):
        pytest.fail("it was done twice")
    assert str(path) in str(error.value) and path.read_text() == "process 7 on another-machine"


def test_lock_that_its_owner_has_just_deleted_is_not_taken(tmp_path, monkeypatch):
    path, flock, calls = tmp_path / "lock", _files.fcntl.flock, []

    def delete_first(file, how):
        calls.append(how)
        if len(calls) == 1:
            path.unlink()
        flock(file, how)

    monkeypatch.setattr(_files.fcntl, "flock", delete_first)
    with _files.locked(path, "a work"):
        assert path.exists() and len(calls) == 2


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK])
def test_file_system_without_locks_does_not_forbid_the_work(tmp_path, monkeypatch, number):
    monkeypatch.setattr(_files.fcntl, "flock", Mock(side_effect=OSError(number, "no locks")))
    with _files.locked(tmp_path / "lock", "a work"):
        pass


# --- arrays ------------------------------------------------------------------------------------------------------


class Touch:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_arrays_are_read_and_objects_are_refused_without_running_them(tmp_path):
    path, touched = tmp_path / "a.npz", tmp_path / "touched"
    np.savez(path, a=np.arange(3), text="x")
    read = _files.read_arrays(path)
    assert read["a"].tolist() == [0, 1, 2] and str(read["text"]) == "x"
    np.savez(path, a=np.array([Touch(touched)], object))
    with pytest.raises(ValueError, match="^it is not a whole npz file of numbers$"):
        _files.read_arrays(path)
    assert not touched.exists()
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        _files.read_arrays(tmp_path / "none.npz")
