"""The reference's two errors on every sample, recorded by the first run that computes them, reused by every later one.

By the determinism rule they depend on (key, position) alone: the key has the reference's weights, the pairs, the
seed and how examples and noise are made. A record is (position, chosen, rejected). Each process appends blocks to its
own file, so processes never write to the same one, even on shared storage. The last block of a killed process may be
cut and is then ignored.
"""

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from xdpo.cache.shards import CacheError
from xdpo.files import check_writable, reading, write_text, writing

RECORD = np.dtype([("position", "<i8"), ("chosen", "<f4"), ("rejected", "<f4")])
_HEADER = np.dtype([("magic", "S4"), ("count", "<u4"), ("crc32", "<u4")])  # of a block; the sum is of its records
_MAGIC = b"xref"


class ReferenceCache:
    """Errors under one key, in `FOLDER/{hash of the key}/`, which is created where it doesn't exist.

    Storage that can't be read or written raises StorageError. An existing folder may be read-only: only `record`
    writes.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]):
        """Read all that is recorded. Raises CacheError for a damaged file, naming it."""
        text = json.dumps(key, indent=2, sort_keys=True, default=str)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._write_key(text + "\n")
        self._errors = np.empty((0, 2), dtype=np.float32)  # by position; NaN: not recorded
        self._file: IO[bytes] | None = None
        with reading(self.folder):
            paths = sorted(self.folder.glob("errors-*.bin"))
        for path in paths:
            for records in _read_records(path):
                self._remember(records)

    def __len__(self) -> int:
        """How many samples are recorded."""
        return int((~np.isnan(self._errors[:, 0])).sum())

    def has(self, positions: range) -> bool:
        """Whether all of `positions` are recorded."""
        if not len(positions):
            return True
        recorded = self._errors[positions.start : positions.stop]
        return len(recorded) == len(positions) and not np.isnan(recorded[:, 0]).any()

    def get(self, positions: Sequence[int] | Tensor, device: torch.device) -> Tensor | None:
        """The errors of a batch, (2, B) float32 with the chosen ones first; None unless all of them are recorded."""
        indices = np.asarray(positions)
        if indices.max() >= len(self._errors):
            return None
        errors = self._errors[indices]
        return None if np.isnan(errors).any() else torch.from_numpy(errors.T.copy()).to(device, non_blocking=True)

    def check_writable(self) -> None:
        """Raise StorageError where nothing can be recorded."""
        check_writable(self.folder, "cache.reference")

    def record(self, positions: Sequence[int] | Tensor, errors: Tensor) -> None:
        """Append a batch's errors, (2, B), and flush them to the operating system, so that a kill loses none of them.

        Errors that are not finite are left out.
        """
        records = np.empty(len(positions), dtype=RECORD)
        records["position"] = np.asarray(positions)
        records["chosen"], records["rejected"] = errors.detach().float().cpu().numpy()
        records = records[np.isfinite(records["chosen"]) & np.isfinite(records["rejected"])]
        if not len(records):
            return
        content = records.tobytes()
        with writing(self.folder):
            if self._file is None:
                self._file = (self.folder / f"errors-{uuid.uuid4().hex}.bin").open("ab")
            self._file.write(np.array((_MAGIC, len(records), zlib.crc32(content)), _HEADER).tobytes() + content)
            self._file.flush()
        self._remember(records)

    def close(self) -> None:
        """Flush the records to the disk. Network storage may report only here that it is full."""
        if self._file is not None:
            with writing(self.folder):
                os.fsync(self._file.fileno())
                self._file.close()
            self._file = None

    def _write_key(self, text: str) -> None:
        """Write the key into the folder, for people, unless it is already there."""
        path = self.folder / "key.json"
        with reading(path):
            if path.is_file() and path.read_bytes() == text.encode():
                return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, text)

    def _remember(self, records: np.ndarray) -> None:
        if not len(records):
            return
        missing = int(records["position"].max()) + 1 - len(self._errors)
        if missing > 0:
            room = np.full((max(missing, len(self._errors)), 2), np.nan, dtype=np.float32)  # doubles at least
            self._errors = np.concatenate([self._errors, room])
        self._errors[records["position"], 0] = records["chosen"]
        self._errors[records["position"], 1] = records["rejected"]


def _read_records(path: Path) -> Iterator[np.ndarray]:
    """The records of all whole blocks of a file, many blocks at once.

    A block holds a micro-batch, so a long run writes a million, nearly all of one size. Consecutive blocks of one size
    are read together, twice as many each time; where another size begins, one block is read alone.
    """
    with reading(path):
        content = path.read_bytes()
    start, at_once = 0, 1
    while start + _HEADER.itemsize <= len(content):
        magic, count, _ = np.frombuffer(content, _HEADER, 1, start)[0].tolist()
        size = _HEADER.itemsize + count * RECORD.itemsize
        whole = (len(content) - start) // size
        if magic == _MAGIC and not whole and _MAGIC not in content[start + len(magic) :]:
            return  # cut by a kill
        if magic != _MAGIC or not whole:
            raise _damaged(path, start)
        headers = np.ndarray(min(at_once, whole), _HEADER, content, start, (size,))
        is_alike = (headers["magic"] == _MAGIC) & (headers["count"] == count)
        blocks = len(headers) if is_alike.all() else int(is_alike.argmin())
        body = start + _HEADER.itemsize
        checksums = _crc32(np.ndarray((blocks, count * RECORD.itemsize), np.uint8, content, body, (size, 1)))
        is_sound = checksums == headers["crc32"][:blocks]
        if not is_sound.all():
            raise _damaged(path, start + int(is_sound.argmin()) * size)
        yield np.ndarray((blocks, count), RECORD, content, body, (size, RECORD.itemsize)).flatten()
        at_once = 2 * at_once if blocks == at_once else 1
        start += blocks * size


def _damaged(path: Path, start: int) -> CacheError:
    return CacheError(f"{path} is damaged at byte {start}; remove the file: what it held is computed again when needed")


def _crc32(rows: np.ndarray) -> np.ndarray:
    """CRC-32 of each row: (rows, bytes) uint8 → (rows,) uint32. Many short rows are summed together, byte by byte."""
    if len(rows) < 32 * rows.shape[1]:
        return np.array([zlib.crc32(row) for row in rows], dtype=np.uint32)
    sums = np.full(len(rows), 0xFFFFFFFF, dtype=np.uint32)
    for column in rows.T:
        sums = _OF_A_BYTE[(sums ^ column) & 0xFF] ^ (sums >> 8)
    return ~sums


def _crc32_table() -> np.ndarray:
    """CRC-32's table, (256,) uint32: the change of the sum by each value of a byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, 0xEDB88320 ^ (table >> 1), table >> 1).astype(np.uint32)
    return table


_OF_A_BYTE = _crc32_table()
