"""Downloads that have an end: in a process of their own, with a line every ten seconds and a limit."""

import os
import subprocess
import sys
import time

_SECONDS = 900


class Unavailable(ValueError):
    """A data set is not on this machine and could not be downloaded."""


def fetch(what, size, code, folder, pattern, way_out, find):
    """Download `what` by the Python `code`, in a process of its own, so that the wait has an end.

    Args:
        what: name of the data set, for the messages.
        size: its size in words, for the messages.
        code: a program; its connections give up after 20 s of silence.
        folder: `Path` of where the program lays its files, whose sizes tell how far it is.
        pattern: of those files' names, as in `Path.glob`.
        way_out: what the user can do where the download fails; ends the messages.
        find: a function that returns where the data set is, None where it is not.

    Returns:
        What `find` returns afterwards.

    Raises:
        Unavailable: it took longer than `$FCNN_DOWNLOAD_SECONDS` (a quarter of an hour), or failed; says why.
        ValueError: `$FCNN_DOWNLOAD_SECONDS` is not a number.
    """
    limit = _limit()
    print(f"{what} is not on this machine: downloading {size} to {folder}, at most {limit:.0f} s", flush=True)
    child = subprocess.Popen(
        [sys.executable, "-c", f"import socket; socket.setdefaulttimeout(20); {code}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    start = shown = time.monotonic()
    try:
        while child.poll() is None and time.monotonic() - start < limit:
            time.sleep(0.5)
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                there = sum(file.stat().st_size for file in folder.glob(pattern) if file.is_file())
                print(f"  {there / 1e6:.0f} MB after {shown - start:.0f} s", flush=True)
        timed_out = child.poll() is None
    finally:
        child.kill()
        child.wait()
    if timed_out:
        raise Unavailable(f"{what} was not downloaded within {limit:.0f} s; {way_out}")
    if child.returncode or (found := find()) is None:
        said = child.stderr.read().strip().splitlines() if child.returncode else []  # else it is no error's text
        reason = (said or ["no reason given"])[-1]
        raise Unavailable(f"{what} cannot be downloaded ({reason[:200]}); {way_out}")
    return found


def _limit():
    """Seconds that a download may take: `$FCNN_DOWNLOAD_SECONDS`, else a quarter of an hour."""
    text = os.environ.get("FCNN_DOWNLOAD_SECONDS") or str(_SECONDS)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"FCNN_DOWNLOAD_SECONDS must be a number of seconds; got {text!r}") from None
