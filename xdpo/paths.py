"""From a path as a user writes it to a path: one way for all config keys, command lines and files that name files."""

import glob
import os
from pathlib import Path


def expanded(text: str) -> str:
    """`~` and `~name` at the start as that home folder: no shell expands them in YAML, nor after `key=`."""
    return os.path.expanduser(text)


def user_path(text: str | Path) -> Path:
    return Path(expanded(str(text)))


def matching(text: str) -> list[Path]:
    """The paths that a path or glob stands for, in order; none where nothing matches.

    What exists under exactly this name is meant literally, also the folders that a glob begins with: brackets are
    common in names.
    """
    path = user_path(text)
    if os.path.lexists(path):
        return [path]
    folder = next(parent for parent in path.parents if parent == Path(path.anchor) or os.path.lexists(parent))
    pattern = str(path.relative_to(folder))
    return [folder / name for name in sorted(glob.glob(pattern, root_dir=folder, recursive=True))]
