"""Equal records in numbered .npy files, with a checksum for every part of a record.

A shard is written aside, flushed and renamed; its checksums are written after it and mark it as finished. So a kill
loses only the shard being written, and a corrupted record raises an error on reading and never reaches the model.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from xdpo.files import StorageError, reading, replacing


class CacheError(ValueError):
    """A cache that can't be used: of another run, unfinished or damaged. The message names the file and the remedy."""


class Shards:
    """`count` records of `shape` in the files `{name}_00000.npy`, `{name}_00001.npy`, … of a folder.

    shape: (parts, …). A part, such as one orientation of an image, is read at once and has its own checksum.
    per_shard: records in a file. The constructor touches no file, and no file stays open: a cache may have more files
    than a process may open. Failing storage raises StorageError and is never mistaken for damage.
    """

    def __init__(self, folder: Path, name: str, *, count: int, shape: tuple[int, ...], dtype: str, per_shard: int):
        self.folder, self.name = folder, name
        self.count, self.shape, self.dtype, self.per_shard = count, tuple(shape), np.dtype(dtype), per_shard
        self._prefix = str(folder / f"{name}_")
        self._part_bytes = int(np.prod(shape[1:])) * self.dtype.itemsize
        self._starts: dict[int, int] = {}  # of each checked shard: where its records start, after the header
        self._checksums: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Number of shards."""
        return -(-self.count // self.per_shard)

    def records_of(self, shard: int) -> range:
        """The records that a shard holds."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.count))

    def path(self, shard: int) -> Path:
        return Path(self._path(shard))

    def checksum_path(self, shard: int) -> Path:
        return self.path(shard).with_suffix(".json")

    def is_finished(self, shard: int) -> bool:
        with reading(self.checksum_path(shard)):
            return self.checksum_path(shard).is_file()

    @property
    def num_bytes(self) -> int:
        """Size of all records."""
        return self.count * self.shape[0] * self._part_bytes

    def write(self, shard: int, records: np.ndarray, unreadable: Iterable[int] = ()) -> None:
        """Write a whole shard, then its checksums. `unreadable` are the records whose source could not be read."""
        expected = (len(self.records_of(shard)), *self.shape)
        assert records.shape == expected, f"shard {shard} of {self.name} needs {expected}, got {records.shape}"
        records = np.ascontiguousarray(records, dtype=self.dtype)
        checksums = [[zlib.crc32(part.data) for part in record] for record in records]
        with replacing(self.path(shard), "wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(records))
            file.write(records.data)  # np.save's error for a full disk does not name the disk
        with replacing(self.checksum_path(shard)) as file:
            json.dump({"crc32": checksums, "unreadable": sorted(unreadable)}, file)

    def unreadable(self) -> list[int]:
        """The records, in all shards, whose source could not be read; they hold zeros."""
        return [record for shard in range(len(self)) for record in self._sums(shard)["unreadable"]]

    def check_files(self) -> None:
        """Raise CacheError, naming the file, for a shard that is missing or has the wrong size. Reads headers only."""
        for shard in range(len(self)):
            self._starts[shard] = self._checked_start(shard)

    def read(self, record: int, part: int = 0, out: np.ndarray | None = None) -> np.ndarray:
        """A part of a record, of `shape[1:]`, checked against its checksum; written into `out` where that is given.

        out: contiguous, of the same shape and dtype. Raises CacheError for damage.
        """
        values = np.empty(self.shape[1:], self.dtype) if out is None else out
        shard, slot = divmod(record, self.per_shard)
        if shard not in self._starts:
            self._starts[shard] = self._checked_start(shard)
        if shard not in self._checksums:
            self._checksums[shard] = np.array(self._sums(shard)["crc32"], dtype=np.uint32)
        self._fill(values, shard, slot * self.shape[0] + part)
        if zlib.crc32(values.data) != self._checksums[shard][slot, part]:
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

    def _fill(self, values: np.ndarray, shard: int, number: int) -> None:
        """Read the part with this number in a shard.

        Files are not mapped into memory: a mapping holds a descriptor, and if its storage fails the process dies of
        SIGBUS without a message. Opening the file each time costs microseconds.
        """
        path = self._path(shard)
        try:
            with reading(path), open(path, "rb", buffering=0) as file:
                file.seek(self._starts[shard] + number * self._part_bytes)
                view, size = values.data.cast("B"), 0
                while size < len(view) and (
                    got := file.readinto(view[size:])
                ):  # network storage may return fewer bytes
                    size += got
        except FileNotFoundError:
            raise self._missing(shard) from None
        if size < self._part_bytes:
            raise CacheError(f"{path} is cut or damaged (shorter than before); {self._remedy(shard)}")

    def _path(self, shard: int) -> str:
        """The path as text, because it is needed for every record: joining a Path takes as long as opening the file."""
        return f"{self._prefix}{shard:05d}.npy"

    def _checked_start(self, shard: int) -> int:
        """Where the records of a shard start in its file. Raises CacheError where its header or size is wrong."""
        path, expected = self.path(shard), (len(self.records_of(shard)), *self.shape)
        try:
            with reading(path), path.open("rb") as file:
                shape, dtype = _read_header(file)
                start, size = file.tell(), os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            raise self._missing(shard) from None
        except StorageError:
            raise
        except ValueError as error:
            raise CacheError(f"{path} is cut or damaged ({error}); {self._remedy(shard)}") from None
        if shape != expected or dtype != self.dtype:
            raise CacheError(f"{path} holds {shape} {dtype}, expected {expected} {self.dtype}; {self._remedy(shard)}")
        needed = start + expected[0] * self.shape[0] * self._part_bytes
        if size != needed:
            raise CacheError(f"{path} is cut or damaged ({size} bytes, not {needed}); {self._remedy(shard)}")
        return start

    def _sums(self, shard: int) -> dict[str, list]:
        return read_json(self.checksum_path(shard), "remove it and build the cache again")

    def _missing(self, shard: int) -> CacheError:
        return CacheError(f"{self.path(shard)} is missing; {self._remedy(shard)}")

    def _remedy(self, shard: int) -> str:
        return f"remove {self.checksum_path(shard).name} beside it and build again: only this shard is made anew"

    def __getstate__(self) -> dict[str, Any]:
        """Without the checksums: a spawned worker needs few of them, and reads those itself."""
        return self.__dict__ | {"_checksums": {}}


def read_json(path: Path, remedy: str) -> Any:
    """A cache's small JSON file. Raises CacheError for one that is missing or damaged; the message ends in `remedy`."""
    try:
        with reading(path):
            content = path.read_bytes()
    except FileNotFoundError:
        raise CacheError(f"{path} is missing: the cache isn't finished; build it again") from None
    try:
        return json.loads(content)
    except ValueError as error:
        raise CacheError(f"{path} is damaged ({error}); {remedy}") from None


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a .npy file, read up to its first number. Raises ValueError for any other file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype
