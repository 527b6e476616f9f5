"""Show the progress of work that takes longer than a second."""

import sys
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
    for number, item in enumerate(items, 1):
        yield item
        seconds = time.monotonic() - start
        if verbose and seconds > 1:
            line = f"{what}: {number}/{count}, {seconds:.0f} s"
            print(line, end="\r" if in_terminal and number < count else "\n", flush=True)
