"""The rows of a source: columns without images at hand, images read where they lie.

An image is a cell: its encoded file as bytes, a path, a dictionary of both (`bytes`, `path`), or None.
"""

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np

from xdpo.data.columns import IMAGE_COLUMNS
from xdpo.files import STORAGE_ERRORS, StorageError, reading, storage_fault
from xdpo.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

BATCH_ROWS = 32  # decoded at once from a parquet file: some 6 MB of a column of images
BUFFER_BYTES = 2**20  # read at once from a parquet file
BAR_AFTER = 5.0  # seconds


class Images(Protocol):
    """The images of all rows of a source, two a row."""

    def cell(self, row: int, side: int) -> Any: ...

    def cells(self, side: int, rows: Iterable[int]) -> Iterator[Any]:
        """The cells of one side at some rows, which ascend."""
        ...

    def sizes(self, side: int, end: int | None = None) -> np.ndarray:
        """(rows,) int64: bytes of each image of a side, −1 where the source holds none, or a path alone.

        end: of the rows before this one alone.
        """
        ...

    def sides(self, side: int) -> np.ndarray:
        """(rows, 2) int64: width and height of each image of a side, 0 where they can't be read. Raises DataError."""
        ...

    def recorded_digest(self, side: int, row: int) -> str | None:
        """Hexadecimal SHA-256 of an image's bytes, where it was taken when the source was indexed."""
        ...


@dataclass(frozen=True, eq=False)
class Rows:
    """All rows of a source, unfiltered. texts: the columns without images, mapped into memory."""

    texts: "Dataset"
    images: Images

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def column_names(self) -> list[str]:
        return [*self.texts.column_names, *IMAGE_COLUMNS]

    def __getitem__(self, row: int) -> dict[str, Any]:
        """A row with its two images."""
        return self.texts[row] | {name: self.images.cell(row, side) for side, name in enumerate(IMAGE_COLUMNS)}


class ArrowImages:
    """Images in the Arrow table of a data set that `datasets` made."""

    def __init__(self, dataset: "Dataset"):
        self._dataset = dataset

    def cell(self, row: int, side: int) -> Any:
        return self._sides[side][row][IMAGE_COLUMNS[side]]

    def cells(self, side: int, rows: Iterable[int]) -> Iterator[Any]:
        column = self._column(side)
        return (column[int(row)].as_py() for row in rows)

    def sizes(self, side: int, end: int | None = None) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int64), *map(sizes_of, self._column(side).chunks)])[:end]

    def sides(self, side: int) -> np.ndarray:
        """Reads the headers of all images, at each call."""
        cells = self.cells(side, range(len(self._dataset)))
        with Progress(cells, total=len(self._dataset), desc=f"sizes of {IMAGE_COLUMNS[side]}", delay=BAR_AFTER) as bar:
            return np.array([sides_of_cell(cell) for cell in bar], np.int64).reshape(-1, 2)

    def recorded_digest(self, side: int, row: int) -> str | None:
        return None

    def _column(self, side: int) -> "pa.ChunkedArray":
        return self._dataset.data.column(IMAGE_COLUMNS[side])

    @cached_property
    def _sides(self) -> "list[Dataset]":
        """One column each. Cached: selecting columns of a large source takes as long as a step."""
        return [self._dataset.select_columns([name]) for name in IMAGE_COLUMNS]

    def __getstate__(self) -> dict[str, Any]:
        return {"_dataset": self._dataset}


def is_list(type: "pa.DataType") -> bool:
    """Whether a pyarrow type holds lists."""
    import pyarrow.types as t

    return t.is_list(type) or t.is_large_list(type) or t.is_fixed_size_list(type)


def sizes_of(images: "pa.Array") -> np.ndarray:
    """Bytes of each image of an Arrow array, int64, −1 where it holds none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    content = pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images
    if pa.types.is_dictionary(content.type):
        content = content.dictionary_decode()
    if pa.types.is_fixed_size_binary(content.type) or pa.types.is_binary_view(content.type):
        content = content.cast(pa.large_binary())
    if not (pa.types.is_binary(content.type) or pa.types.is_large_binary(content.type)):
        return np.full(len(content), -1)  # paths, or nothing at all
    return pc.fill_null(pc.binary_length(content), -1).to_numpy(zero_copy_only=False).astype(np.int64)


def sides_of_cell(cell: Any) -> tuple[int, int]:
    """Width and height of a cell's image."""
    if isinstance(cell, dict):
        cell = cell["path"] if cell["bytes"] is None else cell["bytes"]
    return (0, 0) if cell is None else sides_of(io.BytesIO(cell) if isinstance(cell, bytes) else cell)


def sides_of(file: "IO[bytes] | str") -> tuple[int, int]:
    """Width and height of an image file by its header, as it is stored; 0 where it is no image.

    Raises StorageError where the storage fails, which says nothing about the image.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.size
    except MemoryError:
        raise
    except Exception as error:  # decoders are many, and what they raise on damage has nothing in common
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            path = Path(str(getattr(file, "name", file)))
            raise StorageError(f"could not read {path}: {storage_fault(error, path)}") from error
        return 0, 0


class _IndexedImages:
    """Images in files that were indexed: their sizes, and the digests of some, are in the index, and sides if asked."""

    def __init__(self, index: "Dataset", digests: Sequence[Mapping[str, str]]):
        self._index, self._digests = index, digests

    def sizes(self, side: int, end: int | None = None) -> np.ndarray:
        return self._column(f"size_{side}")[:end]

    def sides(self, side: int) -> np.ndarray:
        return np.stack([self._column(f"{what}_{side}") for what in ("width", "height")], axis=1)

    def recorded_digest(self, side: int, row: int) -> str | None:
        return self._digests[side].get(str(row))

    def cells(self, side: int, rows: Iterable[int]) -> Iterator[Any]:
        return (self.cell(int(row), side) for row in rows)

    def cell(self, row: int, side: int) -> Any:
        raise NotImplementedError

    def _column(self, name: str) -> np.ndarray:
        return self._index.data.column(name).to_numpy()


@dataclass(frozen=True)
class TarPart:
    """A tar, whose samples end before `end` of the data set's rows."""

    path: str
    end: int


class TarImages(_IndexedImages):
    """Images in tars, read from where their members begin. No file stays open.

    names: of the image members behind the key, such as `jpg_0.jpg`.
    """

    def __init__(
        self,
        index: "Dataset",
        digests: Sequence[Mapping[str, str]],
        parts: Sequence[TarPart],
        names: tuple[str, str],
    ):
        super().__init__(index, digests)
        self._parts, self._names = parts, names
        self._ends = np.array([part.end for part in parts])

    def cell(self, row: int, side: int) -> Any:
        place = self._places[row]
        size = place[f"size_{side}"]
        if size < 0:
            return None
        part = self._parts[int(np.searchsorted(self._ends, row, side="right"))]
        content = read_member(part.path, place[f"offset_{side}"], size)
        return {"bytes": content, "path": f"{place['__key__']}.{self._names[side]}"}

    @cached_property
    def _places(self) -> "Dataset":
        return self._index.select_columns(["__key__", "size_0", "size_1", "offset_0", "offset_1"])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_places"}


def read_member(path: str, offset: int, size: int) -> bytes:
    """The bytes of a tar's member. Raises StorageError, also where the tar is shorter than when it was indexed."""
    with reading(path), open(path, "rb", buffering=0) as file:
        file.seek(offset)
        content = b""
        while len(content) < size and (piece := file.read(size - len(content))):
            content += piece
    if len(content) < size:
        raise StorageError(_shorter(path))
    return content


def _shorter(path: str) -> str:
    return f"{path} is shorter than it was; leave the files alone while they are read, and start again"


@dataclass(frozen=True)
class ParquetPart:
    """A parquet file with its row groups' rows, and its own names of the two columns of images."""

    path: str
    groups: tuple[int, ...]
    names: tuple[str, str]


class ParquetImages(_IndexedImages):
    """Images in parquet files. Each side is read forwards from where it was, or from the start of a row group.

    So reading in order costs one pass, and one image at random half a row group of its column on average. Each process
    has at most two files open.
    """

    def __init__(self, index: "Dataset", digests: Sequence[Mapping[str, str]], parts: Sequence[ParquetPart]):
        super().__init__(index, digests)
        self._parts = parts
        self._places = [(number, group) for number, part in enumerate(parts) for group in range(len(part.groups))]
        self._ends = np.cumsum([rows for part in parts for rows in part.groups])
        self._readers: dict[int, _ColumnReader] = {}

    def cell(self, row: int, side: int) -> Any:
        place = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[place - 1]) if place else 0
        reader = self._readers.get(side)
        # A process forked from this one must not go on with its reader: they would share its state.
        if reader is None or not reader.reaches(place, row - start):
            number, group = self._places[place]
            part = self._parts[number]
            reader = self._readers[side] = _ColumnReader(part.path, group, part.names[side], place, reader)
        return reader.cell(row - start)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}


class RankedImages(_IndexedImages):
    """Images of pairs that were made of ranked images in parquet files.

    The index has the row of each among all rows of the files and, where a row holds a list, its place in that.
    """

    def __init__(self, index: "Dataset", digests: Sequence[Mapping[str, str]], parts: Sequence[ParquetPart]):
        super().__init__(index, digests)
        self._images = ParquetImages(index, digests, parts)

    def cell(self, row: int, side: int) -> Any:
        ranked_row, place = (self._index.data.column(f"{what}_{side}")[row].as_py() for what in ("row", "place"))
        cell = self._images.cell(ranked_row, side)
        return cell[place] if isinstance(cell, list) else cell


class _ColumnReader:
    """A column of a row group, read forwards in batches. place: the row group's number in the data set.

    before: the reader that this one replaces, whose footer need not be read again where the file is the same.
    """

    footer: "pq.FileMetaData"

    def __init__(self, path: str, group: int, column: str, place: int, before: "_ColumnReader | None"):
        import pyarrow.parquet as pq

        self._path, self._place, self._pid = path, place, os.getpid()
        self._start, self._batch = 0, None
        known = before.footer if before is not None and before._path == path else None
        with reading(path):
            # One thread, and nothing read ahead: no state that a fork would cut in two.
            file = pq.ParquetFile(path, metadata=known, pre_buffer=False, buffer_size=BUFFER_BYTES)
        self.footer = file.metadata
        self._batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False)

    def reaches(self, place: int, row: int) -> bool:
        return (place, os.getpid()) == (self._place, self._pid) and row >= self._start

    def cell(self, row: int) -> Any:
        """The cell of a row of the row group, which is not before the batch at hand."""
        while self._batch is None or row >= self._start + len(self._batch):
            self._start += 0 if self._batch is None else len(self._batch)
            with reading(self._path):
                batch = next(self._batches, None)
            if batch is None:
                raise StorageError(_shorter(self._path))
            self._batch = batch.column(0)
        return self._batch[row - self._start].as_py()
