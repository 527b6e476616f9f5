"""Show the progress of work that takes longer than a second."""

import sys
import threading
import time


def progress(items, what, verbose, count=None):
    """Yield the items. After a second of work, print how many are done. In a terminal one line is overwritten.

    Args:
        items: iterable.
        what: text before the numbers.
        verbose: whether to print.
        count: number of items, if they have no length.
    """
    count, start, in_terminal = len(items) if count is None else count, time.monotonic(), sys.stdout.isatty()

    def show(number):
        line = f"{what}: {number}/{count}, {time.monotonic() - start:.0f} s"
        print(line, end="\r" if in_terminal and number < count else "\n", flush=True)

    first = threading.Timer(1, show, (0,))  # if the first item takes long
    first.daemon = True
    if verbose:
        first.start()
    try:
        for number, item in enumerate(items, 1):
            yield item
            first.cancel()
            if verbose and time.monotonic() - start > 1:
                show(number)
    finally:
        first.cancel()
