"""The reference's two errors of every sample, recorded by whoever computes them, reused by every later run.

By the determinism rule they depend on (key, position) alone: the key has the reference's weights, the pairs, the
seed and how examples and noise are made. A record is (position, chosen, rejected). Every writing process appends
blocks to a file of its own, so no two of them meet, on shared storage neither; the last block of a process that was
killed may be cut and then counts as absent.
"""

import hashlib
import json
import os
import struct
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from xdpo.cache.shards import CacheError, replacing

RECORD = np.dtype([("position", "<i8"), ("chosen", "<f4"), ("rejected", "<f4")])
_HEADER = struct.Struct("<4sII")  # magic, number of records, CRC-32 of the records
_MAGIC = b"xref"


class ReferenceCache:
    """Errors under one key, in `FOLDER/{hash of the key}/`; made where it doesn't exist."""

    def __init__(self, folder: Path, key: Mapping[str, Any]):
        """Read all that is recorded. Raises CacheError for a damaged file, naming it."""
        text = json.dumps(key, indent=2, sort_keys=True, default=str)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"cache.reference: can't make {self.folder} ({error}); choose another folder") from error
        with replacing(self.folder / "key.json") as file:
            file.write(text + "\n")
        self._errors = np.empty((0, 2), dtype=np.float32)  # by position; NaN: not known
        self._file: IO[bytes] | None = None
        for path in sorted(self.folder.glob("errors-*.bin")):
            self._remember(_read_records(path))

    def __len__(self) -> int:
        """How many samples are known."""
        return int((~np.isnan(self._errors[:, 0])).sum())

    def has(self, positions: range) -> bool:
        """Whether all of `positions` are known."""
        if not len(positions):
            return True
        known = self._errors[positions.start : positions.stop]
        return len(known) == len(positions) and not np.isnan(known[:, 0]).any()

    def get(self, positions: Sequence[int] | Tensor, device: torch.device) -> Tensor | None:
        """The errors of a batch, (2, B) float32 with the chosen ones first; None unless all of them are known."""
        wanted = np.asarray(positions)
        if wanted.max() >= len(self._errors):
            return None
        found = self._errors[wanted]
        return None if np.isnan(found).any() else torch.from_numpy(found.T.copy()).to(device, non_blocking=True)

    def record(self, positions: Sequence[int] | Tensor, errors: Tensor) -> None:
        """Append a batch's errors, (2, B), and hand them to the system: a killed process loses none of them.

        Errors that are not finite are left out. Raises CacheError when they can't be written.
        """
        records = np.empty(len(positions), dtype=RECORD)
        records["position"] = np.asarray(positions)
        records["chosen"], records["rejected"] = errors.detach().float().cpu().numpy()
        records = records[np.isfinite(records["chosen"]) & np.isfinite(records["rejected"])]
        content = records.tobytes()
        try:
            if self._file is None:
                self._file = (self.folder / f"errors-{uuid.uuid4().hex}.bin").open("ab")
            self._file.write(_HEADER.pack(_MAGIC, len(records), zlib.crc32(content)) + content)
            self._file.flush()
        except OSError as error:
            raise CacheError(f"cache.reference: could not write in {self.folder}: {error}") from error
        self._remember(records)

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _remember(self, records: np.ndarray) -> None:
        if not len(records):
            return
        missing = int(records["position"].max()) + 1 - len(self._errors)
        if missing > 0:
            room = np.full((max(missing, len(self._errors)), 2), np.nan, dtype=np.float32)  # doubles at least
            self._errors = np.concatenate([self._errors, room])
        self._errors[records["position"], 0] = records["chosen"]
        self._errors[records["position"], 1] = records["rejected"]


def _read_records(path: Path) -> np.ndarray:
    """All whole blocks of a file."""
    content, start, blocks = path.read_bytes(), 0, [np.empty(0, dtype=RECORD)]
    while start + _HEADER.size <= len(content):
        magic, count, checksum = _HEADER.unpack_from(content, start)
        body = content[start + _HEADER.size : start + _HEADER.size + count * RECORD.itemsize]
        is_cut = magic == _MAGIC and len(body) < count * RECORD.itemsize
        if is_cut:
            break
        if magic != _MAGIC or zlib.crc32(body) != checksum:
            raise CacheError(
                f"{path} is damaged at byte {start}; remove the file: what it held is computed again when needed"
            )
        blocks.append(np.frombuffer(body, dtype=RECORD))
        start += _HEADER.size + len(body)
    return np.concatenate(blocks)
