"""Download a file with a progress bar, a time limit and a checksum. pooch does the work."""

import math
import os
import time

from tqdm import tqdm

from fcnn_utils.course.paths import say


class Unavailable(ValueError):
    """A data set is not on this machine and could not be downloaded, or its files are damaged."""


class _TimedProgressBar(tqdm):
    """Progress bar that stops a download after `seconds`. pooch updates it after each kilobyte."""

    def __init__(self, seconds, **options):
        super().__init__(**options)
        self.seconds, self.deadline = seconds, time.monotonic() + seconds

    def __bool__(self):
        return True  # tqdm's own value depends on the size, which pooch does not know yet

    def update(self, n=1):
        if time.monotonic() > self.deadline:
            raise TimeoutError(f"it took longer than {self.seconds:g} s, the limit in FCNN_DOWNLOAD_SECONDS")
        return super().update(n)


def fetch(what, url, checksum, path, advice, processor=None):
    """Download one file, verify its checksum, and only then give it its name.

    pooch downloads to a temporary name and deletes that file if the checksum differs. Therefore the
    login page of a network, or half a file, is never left under the name of the data set.

    Args:
        what: name of the data set, for the messages.
        url: HTTP address of the file.
        checksum: "md5:..." or "sha256:...".
        path: `Path` of the file. If a file with this checksum is already there, it is used.
        advice: what the user can do if the download fails, for the message.
        processor: pooch processor that unpacks the file.

    Raises:
        Unavailable: if the download fails, the server is silent for 20 seconds, or the download
            takes longer than `$FCNN_DOWNLOAD_SECONDS` (default: 900).
        ValueError: if `$FCNN_DOWNLOAD_SECONDS` is not a positive, finite number.
    """
    import pooch  # takes as long as NumPy to import, and most calls find their files on the disk

    seconds = _time_limit()
    say(f"{what} is not on this machine: downloading it to {path.parent}, at most {seconds:g} s")
    try:
        with _TimedProgressBar(seconds, unit="B", unit_scale=True, mininterval=1) as progress:
            downloader = pooch.HTTPDownloader(progress, timeout=min(20, seconds))
            pooch.retrieve(url, checksum, path.name, path.parent, processor, downloader)
    except (OSError, ValueError) as error:  # connection, disk and time limit; checksum
        raise Unavailable(f"{what} cannot be downloaded ({str(error)[:300]}); {advice}") from error


def _time_limit():
    text = os.environ.get("FCNN_DOWNLOAD_SECONDS") or "900"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"FCNN_DOWNLOAD_SECONDS must be a positive, finite number of seconds; got {text!r}")
    return seconds
