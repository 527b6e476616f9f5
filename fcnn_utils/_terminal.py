"""Write to the terminal: lines that any encoding can show, and silence for noisy backends."""

import contextlib
import os
import sys


def say(line, file=None, end="\n"):
    """Print a line at once, by default on standard output.

    What the terminal cannot show becomes a question mark: it must not end a long computation.
    """
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), file=file, end=end, flush=True)


@contextlib.contextmanager
def stderr_to(path):
    """Send what this process and its children write to standard error to the file `path`: backends are noisy."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(path, "ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
