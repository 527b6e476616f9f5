"""Tests of downloads, with a server on this machine."""

import contextlib
import hashlib
import http.server
import importlib.util
import io
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pooch
import pytest

from fcnn_utils.course import data
from fcnn_utils.course.data import cifar100, medmnist
from fcnn_utils.course.data.download import Unavailable, _TimedProgressBar, fetch

CONTENT = np.random.default_rng(0).bytes(50_000)
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Start a server that calls `answer(handler)`, and return its address. Home is empty."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("KERAS_HOME", "FCNN_DATA_DIR", "FCNN_DOWNLOAD_SECONDS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:

        def start(answer):
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    with contextlib.suppress(ConnectionError):  # the client gave up
                        answer(self)

                def log_message(self, *arguments):
                    pass

            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}/file"

        yield start


def reply(content, length):
    """An answer with `content` that announces `length` bytes, or no length for None."""

    def answer(handler):
        handler.send_response(200)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def drip(length):
    """An answer of a few kilobytes per second, for 20 seconds."""

    def answer(handler):
        reply(b"", length)(handler)
        for _ in range(200):
            handler.wfile.write(bytes(2000))
            time.sleep(0.1)

    return answer


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# --- one file ----------------------------------------------------------------------------------------------------


def test_file_is_written_with_progress(serve, tmp_path, capsys):
    path = tmp_path / "new" / "file.npz"
    fetch("a set", serve(reply(CONTENT, len(CONTENT))), CHECKSUM, path, "advice")
    assert path.read_bytes() == CONTENT and files(path.parent) == {"file.npz"}
    printed = capsys.readouterr()
    assert "a set is not on this machine" in printed.out and "900 s" in printed.out
    assert "100%" in printed.err


def test_verified_file_is_not_downloaded_again(serve, tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    fetch("a set", serve(reply(b"another file", None)), CHECKSUM, tmp_path / "file", "advice")


FAILURES = {
    "login page": (reply(b"<html>Please log in</html>", None), "does not match the known hash"),
    "half a file": (reply(CONTENT[:20_000], len(CONTENT)), "IncompleteRead"),
    "error": (lambda handler: handler.send_error(404), "404"),
}


@pytest.mark.parametrize("answer, reason", FAILURES.values(), ids=FAILURES)
def test_failed_download_leaves_no_file(serve, tmp_path, answer, reason):
    with pytest.raises(Unavailable, match=rf"a set cannot be downloaded \(.*{reason}.*\); take another"):
        fetch("a set", serve(answer), CHECKSUM, tmp_path / "folder" / "file", "take another")
    assert not files(tmp_path)


def test_unreachable_server_and_unusable_folder_are_reported(serve, tmp_path):
    with pytest.raises(Unavailable, match="refused.*take another"):
        fetch("a set", "http://127.0.0.1:1/file", CHECKSUM, tmp_path / "file", "take another")
    (tmp_path / "no folder").touch()
    with pytest.raises(Unavailable, match="no folder.*take another"):
        fetch("a set", serve(reply(CONTENT, len(CONTENT))), CHECKSUM, tmp_path / "no folder" / "file", "take another")


SLOW = {"slow": drip(10**6), "slow, unknown size": drip(None), "silent": lambda handler: time.sleep(10)}


@pytest.mark.parametrize("answer", SLOW.values(), ids=SLOW)
def test_time_limit_stops_a_download(serve, tmp_path, monkeypatch, answer):
    monkeypatch.setenv("FCNN_DOWNLOAD_SECONDS", "0.5")
    start = time.monotonic()
    with pytest.raises(Unavailable, match="longer than 0.5 s, the limit in FCNN_DOWNLOAD_SECONDS|timed out.*=0.5"):
        fetch("a set", serve(answer), CHECKSUM, tmp_path / "folder" / "file", "advice")
    assert time.monotonic() - start < 8 and not files(tmp_path)


@pytest.mark.parametrize("limit", ["soon", "nan", "inf", "0", "-1"])
def test_invalid_time_limit_is_rejected(serve, tmp_path, monkeypatch, limit):
    monkeypatch.setenv("FCNN_DOWNLOAD_SECONDS", limit)
    with pytest.raises(ValueError, match=f"FCNN_DOWNLOAD_SECONDS must be a positive.*{limit!r}") as error:
        fetch("a set", serve(reply(CONTENT, len(CONTENT))), CHECKSUM, tmp_path / "file", "advice")
    assert not isinstance(error.value, Unavailable) and not files(tmp_path)


def test_interrupted_download_leaves_no_file(serve, tmp_path, monkeypatch):
    def interrupt(self, n=1):
        raise KeyboardInterrupt

    monkeypatch.setattr(_TimedProgressBar, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch("a set", serve(reply(CONTENT, len(CONTENT))), CHECKSUM, tmp_path / "folder" / "file", "advice")
    assert not files(tmp_path)


# --- CIFAR-100 ---------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(serve, monkeypatch):
    """Serve a small archive with the layout of CIFAR-100's. Returns the list of requests."""
    packed, requests = io.BytesIO(), []
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name in ("meta", "test", "train"):
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = 3000
            tar.addfile(info, io.BytesIO(name[:1].encode() * 3000))

    def answer(handler):
        requests.append(handler.path)
        reply(packed.getvalue(), len(packed.getvalue()))(handler)

    monkeypatch.setattr(cifar100, "_URL", serve(answer))
    monkeypatch.setattr(cifar100, "_CHECKSUM", f"sha256:{hashlib.sha256(packed.getvalue()).hexdigest()}")
    return requests


KEPT = {"cifar-100-python-target_archive"} | {
    f"cifar-100-python-target/cifar-100-python/{name}" for name in ("train", "test", "meta")
}


def test_cifar100_is_downloaded_to_keras_folder(archive, tmp_path):
    datasets = tmp_path / "home" / ".keras" / "datasets"
    folder = datasets / "cifar-100-python-target" / "cifar-100-python"
    folder.mkdir(parents=True)
    (folder / "train").write_text("half a file of an earlier run")
    assert data.locate("cifar100") == folder
    assert (folder / "train").read_bytes() == b"t" * 3000 and (folder / "meta").read_bytes() == b"m" * 3000
    assert files(datasets) == KEPT
    (folder / "train").unlink()  # the archive is kept, so it is unpacked again without a second download
    assert data.locate("cifar100") == folder and files(datasets) == KEPT and len(archive) == 1


def test_interrupted_unpacking_leaves_no_batch(archive, tmp_path, monkeypatch):
    def fill_disk(self, fname, extract_dir):
        folder = Path(extract_dir, "cifar-100-python")
        folder.mkdir()
        for name in ("train", "test", "meta"):
            (folder / name).write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pooch.Untar, "_extract_file", fill_disk)
        with pytest.raises(Unavailable, match="No space left.*--dataset standin"):
            data.load("cifar100")
    assert cifar100.find() is None and len(files(tmp_path / "home")) == 1
    assert files(data.locate("cifar100")) == {"train", "test", "meta"}


def test_cifar100_address_and_checksum_are_those_of_keras():
    package = Path(importlib.util.find_spec("keras").origin).parent
    source = (package / "src" / "datasets" / "cifar100.py").read_text()
    assert cifar100._URL in source and cifar100._CHECKSUM.removeprefix("sha256:") in source


# --- MedMNIST ----------------------------------------------------------------------------------------------------


def test_medmnist_file_is_downloaded_with_its_md5(serve, tmp_path, monkeypatch):
    assert medmnist._URL.format("pathmnist").endswith("/records/10519652/files/pathmnist.npz?download=1")
    home = tmp_path / "home" / ".medmnist"
    monkeypatch.setattr(medmnist, "_URL", serve(reply(CONTENT, len(CONTENT))) + "/{}")
    with pytest.raises(Unavailable, match="pneumoniamnist cannot be downloaded .*MD5.*--dataset greystandin"):
        data.load("pneumoniamnist")
    assert not files(home)
    known = medmnist.MedMNIST(hashlib.md5(CONTENT).hexdigest(), 1, (2, 2, 2), ("well", "ill"))
    monkeypatch.setitem(medmnist.SETS, "pneumoniamnist", known)
    assert data.locate("pneumoniamnist") == home / "pneumoniamnist.npz"
    assert (home / "pneumoniamnist.npz").read_bytes() == CONTENT and files(home) == {"pneumoniamnist.npz"}


@pytest.mark.parametrize("answer", [failure[0] for failure in FAILURES.values()], ids=FAILURES)
def test_failed_download_of_medmnist_breaks_no_later_load(serve, tmp_path, monkeypatch, capsys, answer):
    """A login page, for example, is never left as the data set: the next call downloads again."""
    monkeypatch.setattr(medmnist, "_URL", serve(answer) + "/{}")
    for _ in range(2):
        with pytest.raises(Unavailable, match="pneumoniamnist cannot be downloaded"):
            data.load("pneumoniamnist")
        assert data.load("pneumoniamnist", or_stand_in=True).name == "greystandin"
        assert "NOTICE: pneumoniamnist cannot be downloaded" in capsys.readouterr().out and not files(tmp_path)


@pytest.mark.parametrize("works", [True, False], ids=["download", "failed download"])
def test_wrong_file_is_replaced_by_a_verified_one_or_stays(serve, tmp_path, works):
    path = tmp_path / "file"
    path.write_bytes(b"<html>Please log in</html>")
    address = serve(reply(CONTENT if works else b"another page", None))
    with contextlib.nullcontext() if works else pytest.raises(Unavailable, match="does not match the known hash"):
        fetch("a set", address, CHECKSUM, path, "advice")
    assert path.read_bytes() == (CONTENT if works else b"<html>Please log in</html>")
    assert files(tmp_path) == {"file"}
