"""Equal records in numbered, memory-mapped .npy files, with a checksum for every part of a record.

A shard is written aside, flushed and renamed; its checksums, written after it, say that it is finished. So a kill
loses the shard in work and no other, and a flipped byte is met by whoever reads its record, not by the model.
"""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np


class CacheError(ValueError):
    """A cache can't be used or written; the message names the file and says what to do."""


class Shards:
    """`count` records of `shape` in the files `{name}_00000.npy`, `{name}_00001.npy`, … of a folder.

    shape: (parts, …). A part is what is read at once and has a checksum of its own, as the two orientations of an
    image. `per_shard` records make a file. Opening touches no file, and each process maps files as it meets them.
    """

    def __init__(self, folder: Path, name: str, *, count: int, shape: tuple[int, ...], dtype: str, per_shard: int):
        self.folder, self.name = folder, name
        self.count, self.shape, self.dtype, self.per_shard = count, tuple(shape), np.dtype(dtype), per_shard
        self._maps: dict[int, np.ndarray] = {}
        self._checksums: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Number of shards."""
        return -(-self.count // self.per_shard)

    def records_of(self, shard: int) -> range:
        """The records that a shard holds."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.count))

    def path(self, shard: int) -> Path:
        return self.folder / f"{self.name}_{shard:05d}.npy"

    def checksum_path(self, shard: int) -> Path:
        return self.path(shard).with_suffix(".json")

    def is_finished(self, shard: int) -> bool:
        return self.checksum_path(shard).is_file()

    @property
    def num_bytes(self) -> int:
        """Size of all records."""
        return self.count * int(np.prod(self.shape)) * self.dtype.itemsize

    def write(self, shard: int, records: np.ndarray, unreadable: Iterable[int] = ()) -> None:
        """Write a whole shard, then its checksums. `unreadable` are the records whose source could not be read."""
        expected = (len(self.records_of(shard)), *self.shape)
        assert records.shape == expected, f"shard {shard} of {self.name} needs {expected}, got {records.shape}"
        records = np.ascontiguousarray(records, dtype=self.dtype)
        checksums = [[zlib.crc32(part) for part in record] for record in records]
        with replacing(self.path(shard), "wb") as file:
            np.save(file, records)
        with replacing(self.checksum_path(shard)) as file:
            json.dump({"crc32": checksums, "unreadable": sorted(unreadable)}, file)

    def unreadable(self) -> list[int]:
        """The records, in all shards, whose source could not be read; they hold zeros."""
        return [record for shard in range(len(self)) for record in _read_json(self.checksum_path(shard))["unreadable"]]

    def check_files(self) -> None:
        """Raise CacheError, naming the file, for a shard that is missing or has the wrong size. Reads headers only."""
        for shard in range(len(self)):
            self._map(shard)

    def read(self, record: int, part: int = 0) -> np.ndarray:
        """A part of a record, of `shape[1:]`, checked against its checksum. Raises CacheError for damage."""
        shard, place = divmod(record, self.per_shard)
        values = self._map(shard)[place, part]
        if shard not in self._checksums:
            self._checksums[shard] = np.array(_read_json(self.checksum_path(shard))["crc32"], dtype=np.uint32)
        if zlib.crc32(values) != self._checksums[shard][place, part]:
            raise CacheError(
                f"{self.path(shard)} is damaged: record {record} differs from its checksum; {self._remedy(shard)}"
            )
        return values

    def verify(self, progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> None:
        """Read every record. Raises CacheError at the first that is damaged."""
        for shard in progress(range(len(self))):
            for record in self.records_of(shard):
                for part in range(self.shape[0]):
                    self.read(record, part)

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            path, expected = self.path(shard), (len(self.records_of(shard)), *self.shape)
            remedy = self._remedy(shard)
            try:
                found = np.load(path, mmap_mode="r", allow_pickle=False)
            except FileNotFoundError:
                raise CacheError(f"{path} is missing; {remedy}") from None
            except (OSError, ValueError) as error:
                raise CacheError(f"{path} is cut or damaged ({error}); {remedy}") from None
            if found.shape != expected or found.dtype != self.dtype:
                raise CacheError(
                    f"{path} holds {found.shape} {found.dtype}, expected {expected} {self.dtype}; {remedy}"
                )
            self._maps[shard] = found
        return self._maps[shard]

    def _remedy(self, shard: int) -> str:
        return f"remove {self.checksum_path(shard).name} beside it and build again: only this shard is made anew"

    def __getstate__(self) -> dict:
        """Without the maps: pickling one (a worker that is spawned) would copy the file."""
        return self.__dict__ | {"_maps": {}, "_checksums": {}}


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a file to write aside; when all of it is on the disk it takes the place of `path`.

    Raises CacheError when it can't be written, with what is free on the disk where that is the reason.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with aside.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        full = error.errno == errno.ENOSPC
        free = f"The disk is full ({shutil.disk_usage(path.parent).free / 1e9:.2f} GB free); make room" if full else ""
        raise CacheError(
            f"could not write {path}: {error}. {free or 'Check that the folder is writable'}"
            " and run the same command again; finished shards are kept"
        ) from error


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CacheError(f"{path} is missing: the cache isn't finished; build it again") from None
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} is damaged ({error}); remove it and build the cache again") from None
