"""Whole-file writes: `fcnn_utils._files`."""

import errno
import os
from unittest.mock import Mock

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
