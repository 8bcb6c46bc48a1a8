"""Identifies a source's images without reading all of them: by every size, and the bytes of some.

This runs at each start. For a million images it takes seconds, where hashing 300 GB takes hours (measured in
docs/performance.md). An edited image nearly always has another size. Where images are separate files, the sizes of at
most MOST_FILES are read, and an edit of another file goes unnoticed.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from xdpo.data.rows import Images

SAMPLED = 256  # images per column whose bytes are read
MOST_FILES = 20_000  # files per column whose sizes are read


def image_digest(images: Images, rows: int, end: int) -> str:
    """16 hexadecimal digits of a SHA-256 over the images of a source, the same wherever the files lie.

    rows: of the source. end: only images of the rows before it are identified.
    """
    digest = hashlib.sha256()
    for side in (0, 1):
        sizes = images.sizes(side, end)
        if (sizes < 0).all():  # separate files
            paths = map(_path_of, images.cells(side, evenly(end, MOST_FILES)))
            sizes = np.array([_file_size(path) for path in paths], dtype=np.int64)
        digest.update(sizes.astype("<i8").tobytes())
        for row in [row for row in sampled_rows(rows).tolist() if row < end]:
            digest.update(bytes.fromhex(images.recorded_digest(side, row) or image_sha256(images.cell(row, side))))
    return digest.hexdigest()[:16]


def sampled_rows(count: int) -> np.ndarray:
    """The rows of a source of `count` rows whose images' bytes are read, ascending."""
    return evenly(count, SAMPLED)


def image_sha256(cell: Any) -> str:
    """Hexadecimal SHA-256 of an image's encoded file."""
    return hashlib.sha256(bytes_of(cell)).hexdigest()


def file_states(paths: list[str]) -> dict[str, list[int]]:
    """Size and time of the last change of files, by path; files that don't exist are left out."""
    states = {}
    for path in paths:
        if os.path.isfile(path):
            status = os.stat(path)
            states[path] = [status.st_size, status.st_mtime_ns]
    return states


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers 0 … count − 1, evenly spaced and ascending."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def _path_of(cell: Any) -> str | None:
    return cell["path"] if isinstance(cell, dict) else cell


def _file_size(path: str | None) -> int:
    return os.path.getsize(path) if path and os.path.isfile(path) else -1


def bytes_of(cell: Any) -> bytes:
    """An image's encoded file from a cell of a source: bytes, a path, or a dictionary of both. Empty where missing."""
    if isinstance(cell, dict) and cell["bytes"] is not None:
        return cell["bytes"]
    if isinstance(cell, bytes):
        return cell
    path = _path_of(cell)
    return Path(path).read_bytes() if path and os.path.isfile(path) else b""
