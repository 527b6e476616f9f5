"""Show the progress of work that takes longer than a second."""

import time

import keras


def progress(items, what, verbose, count=None):
    """Yield the items. After a second of work, print `what` and a progress bar of Keras.

    Args:
        items: iterable.
        what: text above the bar.
        verbose: whether to print.
        count: number of items, if they have no length.
    """
    count, bar, start = len(items) if count is None else count, None, time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if verbose and bar is None and time.monotonic() - start > 1:
            print(what, flush=True)
            bar = keras.utils.Progbar(count, unit_name="layer")
        if bar is not None:
            bar.update(number)
