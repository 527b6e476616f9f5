"""Measure what a layer, or the chain in its place, costs in seconds in an inference engine.

    clock = Clock("onnxruntime", batch=1, threads=2)
    clock.measure([(site, None, None), (site, CP, (32,)), (site, CP, (96,))])
    saved = clock.seconds(site) - clock.seconds(site, CP, (64,))

The time of a chain is the sum of the times of its convolutions, the `Piece`s. Each is measured by itself, within a
small model (`_small_models`), because the same pieces occur in many chains, and because a piece has at most two ranks.
Between measured ranks the times are interpolated. Measured times are kept in a file, one for each machine, engine,
batch size and number of threads.

A small model finds its weights in the processor's cache. A network does not if it is larger than the cache: the time
of reading them from memory is then added, in proportion to their size.

What this leaves out: activations, which are the same before and after, and the overhead of a call. Therefore time the
whole network in the end.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import time
import warnings
from pathlib import Path

import numpy as np
import scipy.optimize

from fcnn_utils import _engines, _small_models, deploy
from fcnn_utils._checks import check_choice, check_number
from fcnn_utils._files import write_atomic
from fcnn_utils._pieces import Piece, pieces_of
from fcnn_utils._processors import available_cores
from fcnn_utils._progress import Progress

# All three engines compute the outputs of convolutions in blocks of 16 channels (AVX-512), or of a divisor of 16.
MULTIPLE = 16
_LADDER = 5  # ranks
_TOGETHER = 24  # pieces that are measured in turn
_COPIES, _COPIED_MACS, _COPIED_BYTES = 4, 1e8, 8e6  # most copies of a piece; MACs and bytes of weights of all of them
_STREAM = Piece((1,), 1024, 1024)  # copies of it measure the time of reading weights from memory
_UNKNOWN_CACHE = 16 * 2**20  # bytes
_AGREEMENT = 0.1, 2e-6  # times agree if they differ by less than this share and these seconds
_ATTEMPTS = 5  # to measure a piece until two times agree
_ROUNDS, _TURN = 3, 0.002  # turns of each model, each at least 3 calls and these seconds
_FORMAT = 1  # of the file; raise it when the way of measuring changes


_STREAMED = "from memory"  # key of the time of `_STREAM` with weights from memory


class Clock:
    """The measured times of layers and chains in an engine on this machine.

    Attributes:
        engine, batch, threads: what was given.
        path: the file of the kept times.
    """

    def __init__(self, engine, batch=1, threads=None, cache=None, *, weight_bytes=0):
        """Read the kept times.

        Args:
            engine: "onnxruntime", "openvino" or "litert", in float32.
            batch: images per call.
            threads: threads of the engine; default: all available processors.
            cache: folder of the kept times; default: `cache_folder()`.
            weight_bytes: size of the weights of the whole network, 4 bytes for each in float32.

        Raises:
            ValueError: an argument is not as above, or the engine is not installed.
        """
        self.engine = check_choice("engine of the measured times", engine, tuple(_small_models.PACKAGES))
        self.batch = int(check_number("batch", batch, int, 1, 65536))
        self.threads = int(check_number("threads", available_cores() if threads is None else threads, int, 1, 4096))
        deploy._check_installed(engine, exports=True)
        self._key = _machine() | {
            "engine": engine,
            "version": importlib.metadata.version(_small_models.PACKAGES[engine]),
        }
        self._key |= {"precision": "float32", "batch": self.batch, "threads": self.threads, "format": _FORMAT}
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(cache_folder() if cache is None else cache) / f"clock-{engine}-{digest}.json"
        self._times = self._read()  # text of a piece -> seconds
        # Share of the weights that are read from memory and not from the cache. The formula was fitted to the times of
        # networks whose weights take 0.5 to 3 times the cache.
        self._missing = float(np.clip(weight_bytes / _last_cache() - 0.25, 0, 1))
        self._families = None  # family -> list of pieces with their times, made when it is needed

    def measure(self, requests, progress=None):
        """Measure what is not known yet.

        Args:
            requests: sequence of (site, method, ranks): `_sites.Site`, a class of `factorizations` and its ranks, or
                (site, None, None) for the dense layer.
            progress: `Progress` to print with, or None.

        Returns:
            list of the seconds of the requests, as `seconds` gives them.

        Raises:
            ValueError: a layer reads images of any size, or the engine cannot run a piece.
        """
        requests = list(requests)
        wanted = {piece for request in requests for piece in pieces_of(*request)}
        wanted |= {_STREAM} if self._missing else set()
        wanted = sorted(piece for piece in wanted if _text(piece) not in self._times)
        chunks, unsure = [wanted[start : start + _TOGETHER] for start in range(0, len(wanted), _TOGETHER)], 0
        try:
            what = f"groups of small models timed in {_engines.TITLES[self.engine]}"
            for chunk in (progress or Progress(0)).over(chunks, what, name=lambda chunk: f"{len(chunk)} models"):
                times = self._measure(chunk)
                if _STREAM in chunk:
                    self._times[_STREAMED] = self._measure_stream()
                unsure += sum(not _agree(found) for found in times.values())
                self._times |= {_text(piece): min(found) for piece, found in times.items()}
        finally:
            self._families = None
            if wanted:
                self._write()
        if unsure > 0.1 * len(wanted):
            warnings.warn(
                f"{unsure} of {len(wanted)} measured times vary by more than {_AGREEMENT[0]:.0%}: other programs "
                "disturb them; measure again while the machine is quiet",
                stacklevel=2,
            )
        return [self.seconds(*request) for request in requests]

    def seconds(self, site, method=None, ranks=None):
        """Return the seconds of a chain, or of the dense layer without a method, for all calls and the whole batch.

        Measured pieces count as measured. Others are estimated from measured ones that differ only in their channels.

        Raises:
            ValueError: nothing alike has been measured.
        """
        pieces = pieces_of(site, method, ranks)
        total = sum(self._seconds(piece) for piece in pieces)
        if self._missing:
            per_weight = max(0.0, self._times.get(_STREAMED, 0) - self._seconds(_STREAM)) / _STREAM.parameters
            total += self._missing * per_weight * sum(piece.parameters for piece in set(pieces))
        return total

    def ladder(self, site, method, low, high):
        """Return at most 5 tuples of ranks from `low` to `high`, for `measure`.

        They are multiples of 16 or the largest rank, in about equal ratios.

        Args:
            site: `_sites.Site`.
            method: a class of `factorizations`.
            low, high: ranks as the method takes them.
        """
        shape = site.kernel_shape
        largest = method.max_ranks(shape)
        ends = [np.broadcast_to(ranks, len(largest)) for ranks in (low, high)]
        found = []
        for ranks in np.geomspace(*ends, _LADDER):
            snapped = [max(1, round(rank / MULTIPLE)) * MULTIPLE for rank in ranks]
            found.append(tuple(int(min(rank, limit)) for rank, limit in zip(snapped, largest, strict=True)))
        return [ranks for ranks in dict.fromkeys(found) if _is_consistent(method, shape, ranks)]

    # --- measuring -----------------------------------------------------------------------------------------------

    def _measure(self, pieces):
        """Return dict piece -> list of times, of which two agree if that was possible.

        Each time is that of a model loaded anew: on a busy machine a model may keep all its threads on one processor.
        """
        times = {piece: [] for piece in pieces}
        for _ in range(_ATTEMPTS):
            runs, copies = {}, {}
            for piece in (piece for piece in pieces if not _agree(times[piece])):
                # Several copies make the times of waking threads and of the call itself matter less.
                limits = _COPIED_MACS / (piece.macs * self.batch), _COPIED_BYTES / (4 * piece.parameters)
                copies[piece] = count = int(np.clip(min(limits), 1, _COPIES))
                empty = _base(piece, count)
                if empty not in runs:
                    runs[empty] = self._start(piece, count, empty=True)
                runs[piece] = self._start(piece, count)
            least = _least_times(runs)
            for piece, count in copies.items():
                times[piece].append(max(least[piece] - least[_base(piece, count)], 1e-7) / count)
        return times

    def _measure_stream(self):
        """Return the time of one copy of `_STREAM` if there are so many that no cache holds their weights."""
        copies = max(8, -(-2 * _last_cache() // (4 * _STREAM.parameters)))
        runs = {empty: self._start(_STREAM, copies, empty) for empty in (False, True)}
        least = _least_times(runs)
        return max(least[False] - least[True], 1e-7) / copies

    def _start(self, piece, copies, empty=False):
        try:
            return _small_models.start(self.engine, piece, copies, self.batch, self.threads, empty=empty)
        except Exception as error:  # each engine has exceptions of its own
            raise ValueError(
                f"{_engines.TITLES[self.engine]} cannot run a layer that must be timed, {piece}: "
                f"{_engines.reason(error)}"
            ) from error

    # --- estimating ----------------------------------------------------------------------------------------------

    def _seconds(self, piece):
        known = self._times.get(_text(piece))
        if known is not None:
            return known
        if self._families is None:
            found = collections.defaultdict(list)
            for text, seconds in self._times.items():
                if text == _STREAMED:
                    continue
                parts = json.loads(text)
                found[_family(parts)].append((*self._channels(parts), seconds))
            self._families = {family: _fit(*np.transpose(points)) for family, points in found.items()}
        parts = json.loads(_text(piece))
        if _family(parts) not in self._families:
            raise ValueError(f"measure layers like {piece} first: nothing alike has a time yet")
        return self._families[_family(parts)](*self._channels(parts))

    def _channels(self, parts):
        """Return the channels that a piece reads and writes, as whole blocks where the engine computes whole blocks."""
        _, reads, writes, *_ = parts
        return (_in_blocks(reads) if self.engine == "onnxruntime" else reads), _in_blocks(writes)

    # --- the file ------------------------------------------------------------------------------------------------

    def _read(self):
        try:
            if not self.path.exists():
                return {}
            content = json.loads(self.path.read_text())
            times = {str(text): float(seconds) for text, seconds in content["seconds"].items()}
            if content["key"] != self._key or not all(0 < seconds < math.inf for seconds in times.values()):
                raise ValueError
            for text in times.keys() - {_STREAMED}:
                _family(json.loads(text))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            warnings.warn(f"{self.path} is damaged or cannot be read: the times are measured again", stacklevel=3)
            return {}
        return times

    def _write(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a damaged file, which is now replaced
            self._times = self._read() | self._times  # another process may have added some
        try:
            write_atomic(self.path, json.dumps({"key": self._key, "seconds": self._times}, indent=0))
        except ValueError as error:
            warnings.warn(f"the measured times are not kept: {error}", stacklevel=3)


def cache_folder():
    """Return the folder of this user's measured times: FCNN_CACHE, or fcnn-utils in XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("FCNN_CACHE"):
        return Path(os.environ["FCNN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "fcnn-utils"


@functools.cache
def _machine():
    """Return what distinguishes this machine from others."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else ""
    fields = {name: re.search(rf"^{name}\s*:\s*(.+)$", text, re.M) for name in ("model name", "cpu family", "model")}
    name = " ".join(found[1] for found in fields.values() if found) or platform.processor()
    return {"processor": name, "machine": platform.machine(), "system": platform.system(), "cores": available_cores()}


@functools.cache
def _last_cache():
    """Return the bytes of the processor's largest cache."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max([int(size[:-1]) * 2**10 for size in sizes if size[:-1].isdigit()], default=_UNKNOWN_CACHE)


def _is_consistent(method, kernel_shape, ranks):
    try:
        method.check_ranks(kernel_shape, ranks)
    except ValueError:
        return False
    return True


def _base(piece, copies):
    """Return what the model without the pieces depends on."""
    return piece.size, piece.reads, bool(piece.kernel_size), copies


def _agree(times):
    """Return whether the two least times agree."""
    if len(times) < 2:
        return False
    first, second = sorted(times)[:2]
    return second < first * (1 + _AGREEMENT[0]) + _AGREEMENT[1]


def _least_times(runs):
    """Return the least time of each function of the dict `runs`; they take turns.

    Other programs only ever add to a time. A turn is several calls, so that the threads of the engine are awake, and
    those of the model before it have gone to sleep.
    """
    least = dict.fromkeys(runs, math.inf)
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            start, count = time.perf_counter(), 0
            while count < 3 or time.perf_counter() - start < _TURN:
                taken = _time(run)
                count += 1
                if count > 1:
                    least[name] = min(least[name], taken)
    return least


def _time(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _text(piece):
    return json.dumps(dataclasses.astuple(piece))


def _family(parts):
    """Return what pieces have in common between which times are interpolated."""
    size, reads, writes, groups, *geometry = parts
    kind = ("depthwise", writes // reads) if groups == reads > 1 else groups
    return json.dumps([size, kind, *geometry])


def _in_blocks(channels):
    return -(-channels // MULTIPLE) * MULTIPLE


def _fit(reads, writes, seconds):
    """Return a function of channels read and written that goes through measured times.

    The times are fitted by  a + b reads + c writes + d reads · writes  with no negative coefficient: the overhead,
    the memory that is read and written, and the multiplications. The ratio of measured to fitted time is interpolated
    between the measured points, each weighted by its inverse square distance in the logarithms of the channels.
    """
    reads, writes, seconds = (np.asarray(values, float) for values in (reads, writes, seconds))

    def terms(reads, writes):
        return np.stack([np.ones_like(reads), reads, writes, reads * writes], axis=-1)

    scale = terms(reads, writes).max(axis=0)
    relative = terms(reads, writes) / scale / seconds[:, None]
    coefficients, _ = scipy.optimize.nnls(relative, np.ones(len(seconds)))
    ratios = seconds / (terms(reads, writes) / scale @ coefficients)

    def at(one_reads, one_writes):
        fitted = terms(np.float64(one_reads), np.float64(one_writes)) / scale @ coefficients
        distances = np.log(reads / one_reads) ** 2 + np.log(writes / one_writes) ** 2
        return float(fitted * np.average(ratios, weights=1 / (distances + 1e-9)))

    return at
