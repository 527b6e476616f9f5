"""Find the folder of the course, and the folder for output.

No other module derives the course's folder from the location of the package.
"""

import os
from pathlib import Path

_MARK = Path("notebooks") / "profiles.toml"  # the folder of the course has this file


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
    """Format `path` for a message: relative to the course's folder if it lies inside, else absolute."""
    path, course = Path(path).resolve(), root()
    return str(path.relative_to(course)) if course and path.is_relative_to(course) else str(path)
