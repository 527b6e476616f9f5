"""Show the progress of work that takes longer than half a second.

tqdm is not used: it shows nothing before the first item is done, which may take long, and fills a log with its bars.
"""

import sys
import threading
import time

_QUIET = 0.5  # seconds


class Progress:
    """Print how far the steps of a piece of work are. Nothing is printed in its first half second.

    In a terminal the lines of a step overwrite each other.

    Args:
        verbose: whether to print.
    """

    def __init__(self, verbose):
        self._verbose, self._start = verbose, time.monotonic()

    def over(self, items, what, count=None, name=str):
        """Yield the items of one step.

        Args:
            items: iterable.
            what: text before the numbers.
            count: number of items, if they have no length.
            name: function from an item to its name, which is shown once it is done.
        """
        if not self._verbose:
            yield from items
            return
        count, in_terminal = len(items) if count is None else count, sys.stdout.isatty()

        def show(number, last=""):
            seconds = time.monotonic() - self._start
            line = f"{what}: {number}/{count}{last}, {seconds:.0f} s"
            print(
                f"{line:<78}" if in_terminal else line, end="\r" if in_terminal and number < count else "\n", flush=True
            )

        first = threading.Timer(
            max(0.0, self._start + _QUIET - time.monotonic()), show, (0,)
        )  # if the first takes long
        first.daemon = True
        first.start()
        try:
            for number, item in enumerate(items, 1):
                yield item
                first.cancel()
                if time.monotonic() - self._start > _QUIET:
                    show(number, f" ({name(item)})")
        finally:
            first.cancel()
