"""Paths as users write them, read in one way in config keys, on command lines and in files that name files."""

import glob
import os
from pathlib import Path


def expanded(text: str) -> str:
    """The text with `~` or `~name` at its start expanded: no shell does it in YAML, nor after `key=`."""
    return os.path.expanduser(text)


def user_path(text: str | Path) -> Path:
    return Path(expanded(str(text)))


def matching(text: str) -> list[Path]:
    """The existing paths that a path or glob matches, in order.

    A path that exists under exactly this name is taken literally, and so are the folders at a glob's start: brackets
    are common in names.
    """
    path = user_path(text)
    if os.path.lexists(path):
        return [path]
    folder = next(parent for parent in path.parents if parent == Path(path.anchor) or os.path.lexists(parent))
    pattern = str(path.relative_to(folder))
    return [folder / name for name in sorted(glob.glob(pattern, root_dir=folder, recursive=True))]
