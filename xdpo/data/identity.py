"""Identifies a source's images without reading all of them: by every size, and the bytes of some.

This runs at each start. For a million images it takes seconds, where hashing 300 GB takes hours (measured in
docs/performance.md). An edited image nearly always has another size. Where images are separate files, the sizes of at
most MOST_FILES are read, and an edit of another file goes unnoticed.
"""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

SAMPLED = 256  # images per column whose bytes are read
MOST_FILES = 20_000  # files per column whose sizes are read


def image_digest(dataset: "Dataset", columns: tuple[str, ...]) -> str:
    """16 hexadecimal digits of a SHA-256 over the images of some columns, the same wherever the files lie."""
    digest = hashlib.sha256()
    for name in columns:
        column = dataset.data.column(name)
        digest.update(_sizes(column).astype("<i8").tobytes())
        for row in _evenly(len(column), SAMPLED):
            digest.update(hashlib.sha256(bytes_of(column[int(row)].as_py())).digest())
    return digest.hexdigest()[:16]


def file_states(paths: list[str]) -> dict[str, list[int]]:
    """Size and time of the last change of files, by path; files that don't exist are left out."""
    states = {}
    for path in paths:
        if os.path.isfile(path):
            status = os.stat(path)
            states[path] = [status.st_size, status.st_mtime_ns]
    return states


def _sizes(column: "pa.ChunkedArray") -> np.ndarray:
    """Bytes of each image, −1 where there is none; of separate files at most MOST_FILES, evenly spaced."""
    import pyarrow as pa
    import pyarrow.compute as pc

    is_struct = pa.types.is_struct(column.type)
    chunks = [pc.struct_field(chunk, "bytes") if is_struct else chunk for chunk in column.chunks]
    if pa.types.is_string(column.type) or (is_struct and all(chunk.null_count == len(chunk) for chunk in chunks)):
        cells = (column[int(row)].as_py() for row in _evenly(len(column), MOST_FILES))
        return np.array([_file_size(_path_of(cell)) for cell in cells], dtype=np.int64)
    lengths = [pc.fill_null(pc.binary_length(chunk), -1).to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate([np.empty(0, np.int64), *lengths])


def _evenly(count: int, most: int) -> np.ndarray:
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
