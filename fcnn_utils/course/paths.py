"""Find the folder of the course, and the folder for output; name files and print lines about them.

No other module derives the course's folder from the location of the package.
"""

import os
import re
from pathlib import Path

from fcnn_utils._terminal import say  # noqa: F401  (part of the interface)

_MARK = Path("notebooks") / "profiles.toml"  # the folder of the course has this file
_SEPARATORS = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')  # on any system


def root():
    """Find the folder of the course.

    Returns:
        Path of the checkout that contains this package, if it has `notebooks/profiles.toml`; else of
        the nearest folder with that file, from the current one upwards; None if there is no such folder.
    """
    checkout, here = Path(__file__).resolve().parents[2], Path.cwd()
    return next((folder for folder in (checkout, here, *here.parents) if (folder / _MARK).is_file()), None)


def output():
    """Find the folder that this process writes to.

    Returns:
        `$FCNN_OUTPUT` if it is set; else `build/explore` in the course's folder; else `fcnn_output`
        in the current folder.
    """
    chosen, course = os.environ.get("FCNN_OUTPUT"), root()
    if chosen:
        return Path(chosen)
    return Path.cwd() / "fcnn_output" if course is None else course / "build" / "explore"


def shown(path):
    """Format `path` for a message: relative to the current folder if it lies inside, else absolute.

    In the folder of the notebooks it is relative to the course's folder, because their texts name files so.
    """
    path, here, course = Path(path).resolve(), Path.cwd().resolve(), root()
    start = course if course and here == course / "notebooks" else here
    return str(path.relative_to(start)) if path.is_relative_to(start) else str(path)


def check_name(what, name):
    """Return `name` if it can be the name of one file or folder on every system; else raise ValueError."""
    if not isinstance(name, str) or not name or name[0] == "." or name[-1] in ". " or _SEPARATORS.search(name):
        raise ValueError(
            f"{what} becomes a folder, so it must not be empty, start with a dot, end with a dot or a space, "
            f'or contain a line break or one of / \\ : * ? " < > |; got {name!r}'
        )
    return name
