"""Show how far the notebooks are that `runner` executes: the cell, the time so far, and what the cell does."""

import contextlib
import dataclasses
import io
import re
import shutil
import sys
import threading
import time

from fcnn_utils.course import paths

_SET_UP = {"colab", "parameters", "injected-parameters"}  # tags of cells that only prepare


class RunProgress:
    """Print a line for each notebook that runs. Use it in a `with` block.

    In a terminal the lines of all running notebooks are at the bottom, and are redrawn every second. Elsewhere, for
    example in a log file, a notebook gets a line at most every `every` seconds, and more rarely while its cell is the
    same. All other lines must be printed with `say`, so that they do not run into these.
    """

    def __init__(self, every=30.0, file=None):
        self.file, self.every = sys.stdout if file is None else file, every
        self.is_live = self.file.isatty()
        self._running, self._drawn, self._lock, self._ended = {}, 0, threading.RLock(), threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self):
        self._ticker.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._ticker.join()
        with self._lock:
            self._running.clear()
            self._redraw(time.monotonic())

    def say(self, line):
        """Print a line that stays, above the lines of the running notebooks."""
        with self._lock:
            self._redraw(time.monotonic(), line)

    @contextlib.contextmanager
    def showing(self, name):
        """Show the notebook `name` inside a `with` block."""
        if not self.is_live:
            self.say(f"  {name:<30} running")
        with self._lock:
            now = time.monotonic()
            self._running[name] = _Line(name, now, now)
        try:
            yield
        finally:
            with self._lock:
                del self._running[name]

    def at(self, name, place, what):
        """Note where the notebook `name` is ("cell 7 of 19"), and what happens there. `draw` prints it."""
        with self._lock:
            self._running[name].place, self._running[name].what = place, what

    def draw(self, now):
        """Print the lines that are due at the time `now`, in seconds of the monotonic clock."""
        with self._lock:
            if self.is_live:
                self._redraw(now)
                return
            for line in self._running.values():
                wait = line.wait if line.place == line.shown else self.every
                if now - line.printed >= wait:
                    line.printed, line.shown, line.wait = now, line.place, 2 * wait
                    paths.say(line.text(now), self.file)

    def _tick(self):
        while not self._ended.wait(1.0):
            try:
                self.draw(time.monotonic())
            except (OSError, ValueError):  # standard output is closed: the next `say` reports it
                return

    def _redraw(self, now, *lasting):
        width = shutil.get_terminal_size().columns
        lines = [*lasting]
        if self.is_live:
            lines += [_shortened(line.text(now), width - 1) for line in self._running.values()]
            up = f"\x1b[{self._drawn}A\r\x1b[J" if self._drawn else ""
            self._drawn = len(self._running)
            paths.say(up + "".join(f"{line}\n" for line in lines), self.file, end="")
        else:
            for line in lines:
                paths.say(line, self.file)


@dataclasses.dataclass
class _Line:
    """A notebook that runs. `shown` is the place that was printed last, at `printed`; the next waits for `wait`."""

    name: str
    started: float
    printed: float
    place: str = "starting"
    what: str = ""
    shown: str = ""
    wait: float = 0.0

    def text(self, now):
        parts = [self.place, _clock(now - self.started), *filter(None, [self.what])]
        return f"  {self.name:<30} {' · '.join(parts)}"


class CellCounter:
    """Report each code cell that starts. nbclient takes such an object as `on_cell_start`.

    Args:
        cells: cells of the notebook.
        report: function of two texts, such as "cell 7 of 19" and "3. Fine-tune the network".
    """

    def __init__(self, cells, report):
        self._count = sum(map(_runs, cells))
        self._report, self._number, self._heading = report, 0, ""

    def __call__(self, cell, cell_index):
        if cell.cell_type == "markdown":
            headings = re.findall(r"^##+ (.+)$", cell.source, re.MULTILINE)
            self._heading = headings[-1] if headings else self._heading
        elif _runs(cell):
            self._number += 1
            self._report(f"cell {self._number} of {self._count}", what_it_does(cell, self._heading))


def _runs(cell):
    """Return whether a cell counts: not one without code, nor that with the parameters of a profile."""
    is_injected = "injected-parameters" in cell.metadata.get("tags", [])
    return cell.cell_type == "code" and bool(cell.source.strip()) and not is_injected


def what_it_does(cell, heading):
    """Describe a code cell: the comment in its first line, otherwise the heading above it, without markup.

    A comment that goes on in the next line ends with "…". Cells above the first heading are the set-up.
    """
    first, *others = cell.source.strip().splitlines()
    text = heading
    if first.startswith("#") and not _SET_UP & set(cell.metadata.get("tags", [])):
        text = first + ("…" if others and others[0].startswith("#") else "")
    return re.sub(r"[*`$]", "", text).strip("# .") or "set-up"


class EpochLines(io.TextIOBase):
    """File that receives what a running notebook prints, and passes on only the lines on a training's progress."""

    def __init__(self, say):
        self._say = say

    def write(self, text):
        for line in text.splitlines():
            if " · epoch " in line:
                self._say(f"    {line}")
        return len(text)


def _clock(seconds):
    """Format seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _shortened(line, width):
    return line if len(line) <= width else f"{line[: width - 1]}…"
