"""Which images a source has, told without reading all of them: every size, and the bytes of some.

A source of a million images is read at each start as far as this goes: seconds, not the hours that hashing 300 GB takes
(docs/performance.md has it measured). An edited image nearly always has another size; where images are files of
their own, those of more than MOST_FILES are sampled too, and an edit in between goes unseen.
"""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLED = 256  # images a column whose bytes are read
MOST_FILES = 20_000  # files a column whose sizes are asked for


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
    """Size and time of the last change of files, by path; those that are not here are left out."""
    found = {}
    for path in paths:
        if os.path.isfile(path):
            status = os.stat(path)
            found[path] = [status.st_size, status.st_mtime_ns]
    return found


def _sizes(column: Any) -> np.ndarray:
    """Bytes of each image; of files no more than MOST_FILES, evenly spaced. −1 where there is none."""
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
    """The file of an image as a source has it: bytes, a path, or both in a dictionary. Empty where there is none."""
    if isinstance(cell, dict) and cell["bytes"] is not None:
        return cell["bytes"]
    if isinstance(cell, bytes):
        return cell
    path = _path_of(cell)
    return Path(path).read_bytes() if path and os.path.isfile(path) else b""
