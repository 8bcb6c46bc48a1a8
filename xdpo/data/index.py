"""Parquet files and tars read in place: an index of what lies where, made once for a set of files.

The index holds the columns without images, each image's size and, for tars, where it begins; a million pairs take some
200 MB. It lies in the `datasets` cache (HF_DATASETS_CACHE), mapped into memory, and is made anew when a file changes.
Making it reads parquet files whole, since an image's size stands beside the image, and of tars the headers and texts.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xdpo.data import identity
from xdpo.data.columns import IMAGE, IMAGE_COLUMNS, Columns, DataError
from xdpo.data.identity import file_states, image_sha256, sampled_rows
from xdpo.data.rows import (
    BAR_AFTER,
    BATCH_ROWS,
    BUFFER_BYTES,
    ParquetImages,
    ParquetPart,
    Rows,
    TarImages,
    TarPart,
    read_member,
    sides_of,
    sides_of_cell,
    sizes_of,
)
from xdpo.data.shards import Alike, first_line
from xdpo.data.table import check_images
from xdpo.files import StorageError, reading, replacing, storage_fault, writing
from xdpo.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

VERSION = 1  # of the index's layout
SIDES = ("width_0", "height_0", "width_1", "height_1")
PLACES = (  # columns of the index that are no columns of the source
    *("size_0", "size_1", "offset_0", "offset_1", *SIDES),
    *("row_0", "row_1", "place_0", "place_1"),  # of ranked images
)
TEXT_MEMBERS = ("txt", "text", "transcript", "cls", "cls2", "index", "inx", "id", "json", "jsn")
INDEXED_AT_ONCE = 4  # files, on as many cores
MOST_GROUP_BYTES = 32 * 2**20
"""The largest row group, of the images of one side, from which single images are read in place at random."""

Digests = list[dict[str, str]]  # for each side: row → hexadecimal SHA-256 of its image


class Measured(NamedTuple):
    """Of a file's images, by side: their sizes, (rows,) int64 each, and the digests of the rows that are sampled.

    sides: widths and heights in pixels, (rows, 2) int64 for each side; none where they were not asked for.
    """

    sizes: list[np.ndarray]
    digests: Digests
    sides: Sequence[np.ndarray] = ()


# --- parquet -------------------------------------------------------------------------------------------


def own_image_columns(group: Alike) -> tuple[str, str]:
    """The names that files of one kind give to the two images. Raises DataError where they hold no images."""
    types = {group.names[field.name]: field.type for field in group.features.arrow_schema}
    check_images({column: types[column] for column in IMAGE_COLUMNS}, group.files[0])
    own = {column: name for name, column in group.names.items()}
    return own["jpg_0"], own["jpg_1"]


def parquet_rows_in_place(
    groups: Sequence[Alike], columns: Columns, num_proc: int | None, *, with_sides: bool = False
) -> Rows:
    """The rows of parquet files. num_proc: threads that index files. with_sides: whether images' sides are known.

    Raises DataError for a file that can't be read."""
    import pyarrow as pa

    parts, files = [], []
    for group in groups:
        own = own_image_columns(group)
        for file in group.files:
            parts.append(ParquetPart(file, group_rows(open_parquet(file)), own))
            files.append((file, group))
    ends = np.cumsum([sum(part.groups) for part in parts]).tolist()

    def make() -> "tuple[pa.Table, list[int]]":
        sampled = sampled_rows(ends[-1])

        def of_part(number: int) -> tuple[pa.Table, Measured]:
            file, group = files[number]
            with named(file, "parquet", len(files)):
                texts = parquet_texts(file, group)
                measured = measure_parquet(parts[number], within(sampled, ends, number), with_sides=with_sides)
            return texts, measured

        indexed = each(of_part, len(parts), num_proc, "index")
        table = pa.concat_tables([texts for texts, _ in indexed], promote_options="default")
        return with_sizes(table, [measured for _, measured in indexed]), ends

    layout = str([group.features for _, group in files]) + columns.key + with_sides * " sides"
    index, digests, _ = opened([part.path for part in parts], layout, make)
    return Rows(texts_of(index), ParquetImages(index, digests, parts))


def largest_group(files: Iterable[Alike]) -> int:
    """Bytes, uncompressed, of the images of one side in the largest row group of parquet files."""
    largest = 0
    for group in files:
        own = {column: name for name, column in group.names.items()}
        for file in group.files:
            metadata = open_parquet(file).metadata
            for number in range(metadata.num_row_groups):
                columns = [metadata.row_group(number).column(place) for place in range(metadata.num_columns)]
                for side in own.keys() & {*IMAGE_COLUMNS, IMAGE}:
                    sizes = [
                        column.total_uncompressed_size
                        for column in columns
                        if f"{column.path_in_schema}.".startswith(f"{own[side]}.")
                    ]
                    largest = max(largest, sum(sizes))
    return largest


def parquet_texts(file: str, group: Alike) -> "pa.Table":
    """The columns without images of a parquet file, by canonical names."""
    import pyarrow as pa
    from datasets.table import table_cast

    names = {name: column for name, column in group.names.items() if column not in (*IMAGE_COLUMNS, IMAGE)}
    schema = pa.schema([field for field in group.features.arrow_schema if field.name in names])
    # Casts what another file of the data set has as another type; `alike` has seen to it that all can be cast.
    table = table_cast(open_parquet(file).read(columns=list(names), use_threads=False).select(schema.names), schema)
    return table.rename_columns([names[name] for name in schema.names])


def measure_parquet(part: ParquetPart, sampled: Mapping[int, int], *, with_sides: bool = False) -> Measured:
    """Read all images of a parquet file. sampled: row within it → row of the data set."""
    sizes: list[np.ndarray] = []
    sides: list[np.ndarray] = []
    digests: Digests = [{}, {}]
    for side, name in enumerate(part.names):
        found, row = [np.empty(0, np.int64)], 0
        pixels: list[tuple[int, int]] = []
        for batch in open_parquet(part.path).iter_batches(BATCH_ROWS, columns=[name], use_threads=False):
            cells = batch.column(0)
            found.append(sizes_of(cells))
            for place in range(len(cells)):
                if row + place in sampled and found[-1][place] >= 0:  # a file elsewhere may change
                    digests[side][str(sampled[row + place])] = image_sha256(cells[place].as_py())
            row += len(cells)
            if with_sides:
                pixels += map(sides_of_cell, cells.to_pylist())
        sizes.append(np.concatenate(found))
        if with_sides:
            sides.append(np.array(pixels, np.int64).reshape(-1, 2))
    return Measured(sizes, digests, sides)


def open_parquet(file: Any) -> "pq.ParquetFile":
    import pyarrow.parquet as pq

    return pq.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES)


def group_rows(file: "pq.ParquetFile") -> tuple[int, ...]:
    """The rows of each row group."""
    return tuple(file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups))


# --- tars ----------------------------------------------------------------------------------------------


def tar_rows_in_place(
    files: Sequence[str], columns: Columns, num_proc: int | None, *, with_sides: bool = False
) -> Rows | None:
    """The rows of tars; None for tars that must be unpacked. num_proc, with_sides: as for parquet_rows_in_place.

    Raises DataError for a tar that can't be read.
    """
    import pyarrow as pa

    if (names := names_in_place(files, columns)) is None:
        return None
    own = {column: name for name, column in names.items()}

    def make() -> "tuple[pa.Table, list[int]]":
        def of_part(number: int) -> "pa.Table":
            with named(files[number], "webdataset", len(files)):
                return tar_table(files[number], names, with_sides=with_sides)

        tables = each(of_part, len(files), num_proc, "index")
        ends = np.cumsum([len(table) for table in tables]).tolist()
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(f"the tars from {files[0]} on hold different types: {first_line(error)}") from error
        digests: Digests = [{}, {}]
        for row in sampled_rows(ends[-1]).tolist():
            number = int(np.searchsorted(ends, row, side="right"))
            for side in (0, 1):
                offset, size = (table.column(f"{what}_{side}")[row].as_py() for what in ("offset", "size"))
                if size >= 0:
                    digests[side][str(row)] = image_sha256(read_member(files[number], offset, size))
        return with_digests(table, digests), ends

    index, digests, ends = opened(files, str(names) + columns.key + with_sides * " sides", make)
    parts = [TarPart(file, end) for file, end in zip(files, ends, strict=True)]
    return Rows(texts_of(index), TarImages(index, digests, parts, (own["jpg_0"], own["jpg_1"])))


def names_in_place(files: Sequence[str], columns: Columns) -> dict[str, str] | None:
    """Member name → column, for tars that can be read in place; None for compressed ones and for rare formats."""
    with named(files[0], "webdataset", len(files)):
        names = _member_names(files[0], columns)
    return names if all(map(_is_plain, files)) else None


def tar_table(file: str, names: Mapping[str, str], *, with_sides: bool = False) -> "pa.Table":
    """The samples of a tar: columns without images, the key, and size and offset of both images.

    names: member name behind the key → column. Raises ValueError for a sample that has a member twice.
    """
    import pyarrow as pa
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    texts = [column for column in names.values() if column not in IMAGE_COLUMNS]
    columns: dict[str, list] = {name: [] for name in (*texts, "__key__")}
    whats = ("size", "offset", *(("width", "height") if with_sides else ()))
    places: dict[str, list[int]] = {f"{what}_{side}": [] for what in whats for side in (0, 1)}
    with tarfile.open(file, "r:") as tar:
        for key, members in _samples(tar):
            columns["__key__"].append(key)
            found = {column: members[name] for name, column in names.items() if name in members}
            for column in texts:
                opened = tar.extractfile(found[column]) if column in found else None
                if opened is None:
                    columns[column].append(None)
                else:
                    columns[column].append(WebDataset.DECODERS[_ending(found[column].name)](opened.read()))
            for side, column in enumerate(IMAGE_COLUMNS):
                places[f"size_{side}"].append(found[column].size if column in found else -1)
                places[f"offset_{side}"].append(found[column].offset_data if column in found else -1)
                if with_sides:
                    opened = tar.extractfile(found[column]) if column in found else None
                    width, height = (0, 0) if opened is None else sides_of(opened)
                    places[f"width_{side}"].append(width)
                    places[f"height_{side}"].append(height)
        tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header for the end, which is a block of zeros
        end = tar.fileobj.read(tarfile.BLOCKSIZE)
        if end.strip(b"\0"):
            raise tarfile.ReadError(f"the header at byte {tar.offset:,} is damaged; download the tar again")
        if not end:
            raise tarfile.ReadError(
                "it ends without the blocks of zeros that close a tar, as one that was cut short does. Download it "
                "again or, if its writer left them out, add them: truncate -s +1024 FILE"
            )
    whole_numbers = {name: pa.array(values, pa.int64()) for name, values in places.items()}
    return pa.table({name: pa.array(values) for name, values in columns.items()} | whole_numbers)


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, members by their names behind the key) of consecutive files of one key, as WebDataset has them."""
    from datasets.packaged_modules.webdataset.webdataset import base_plus_ext

    current = ""
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        key, name = base_plus_ext(member.name)
        if not member.isreg() or key is None or member.name.rpartition("/")[2].startswith((".", "__")):
            continue
        if members and key != current:
            yield current, members
            members = {}
        if name in members:
            raise ValueError(f"the sample {key} has two members {name}")
        current, members[name] = key, member
        tar.members = []  # type: ignore[attr-defined]  # else it keeps every header in memory
    if members:
        yield current, members


def _member_names(file: str, columns: Columns) -> dict[str, str] | None:
    """Member name → column of the first tar's samples; None where a member is in a format that is not read in place.

    Raises ValueError where its first samples differ.
    """
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    with tarfile.open(file) as tar:
        first = [set(members) for _, members in islice(_samples(tar), WebDataset.NUM_EXAMPLES_FOR_FEATURES_INFERENCE)]
    if any(names != first[0] for names in first):
        raise ValueError("its first samples have different members; pack all samples with the same member names")
    columns.require(sorted(first[0]), file)
    names = {name: column for name, column in columns.names(sorted(first[0])).items() if column != "__key__"}
    for name, column in names.items():
        if _ending(name) not in (WebDataset.IMAGE_EXTENSIONS if column in IMAGE_COLUMNS else TEXT_MEMBERS):
            return None
    return names


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _is_plain(file: str) -> bool:
    """Whether a tar is not compressed."""
    try:
        with tarfile.open(file, "r:"):
            return True
    except tarfile.ReadError:
        return False


# --- the index -----------------------------------------------------------------------------------------


def opened(
    files: Sequence[str], layout: str, make: "Callable[[], tuple[pa.Table, Sequence[int]]]"
) -> "tuple[Dataset, Digests, list[int]]":
    """The index of some files, made by `make` unless it is there: its table, its digests, the row where each file ends.

    layout: what else decides the index.
    """
    import pyarrow as pa
    from datasets import Dataset
    from datasets.config import HF_DATASETS_CACHE

    states = [[os.path.abspath(file), *file_states([file])[file]] for file in files]
    key = hashlib.sha256(json.dumps([VERSION, identity.SAMPLED, layout, states]).encode()).hexdigest()[:32]
    path = Path(HF_DATASETS_CACHE) / "xdpo" / f"{key}.arrow"
    if not path.is_file():
        table, ends = make()
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"ends": json.dumps(list(ends))})
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table.combine_chunks())
    with reading(path), pa.memory_map(str(path)) as file:
        notes = pa.ipc.open_stream(file).schema.metadata
        return Dataset.from_file(str(path)), json.loads(notes[b"digests"]), json.loads(notes[b"ends"])


def with_sizes(table: "pa.Table", measured: Sequence[Measured]) -> "pa.Table":
    """A table of rows with the sizes of their images, and the digests of some."""
    import pyarrow as pa

    digests: Digests = [{}, {}]
    for side in (0, 1):
        sizes = np.concatenate([of_file.sizes[side] for of_file in measured])
        table = table.append_column(f"size_{side}", pa.array(sizes))
        for place, what in enumerate(("width", "height") if measured[0].sides else ()):
            pixels = np.concatenate([of_file.sides[side][:, place] for of_file in measured])
            table = table.append_column(f"{what}_{side}", pa.array(pixels))
        for of_file in measured:
            digests[side] |= of_file.digests[side]
    return with_digests(table, digests)


def with_digests(table: "pa.Table", digests: Digests) -> "pa.Table":
    return table.replace_schema_metadata({b"digests": json.dumps(digests)})


def texts_of(index: "Dataset") -> "Dataset":
    return index.select_columns([name for name in index.column_names if name not in PLACES])


def within(sampled: np.ndarray, ends: Sequence[int], number: int) -> dict[int, int]:
    """Rows of a data set that lie in its file `number`: row within the file → row of the data set."""
    start = ends[number - 1] if number else 0
    return {row - start: row for row in sampled.tolist() if start <= row < ends[number]}


def each(of_part: Callable[[int], Any], count: int, num_proc: int | None, what: str) -> list[Any]:
    """The result for each number, in order, from num_proc threads, None: some; the first error ends it.

    what: is done, for the progress bar that is shown where it takes long.
    """
    with (
        ThreadPoolExecutor(num_proc or min(count, os.cpu_count() or 1, INDEXED_AT_ONCE) or 1) as pool,
        Progress(total=count, desc=what, unit="file", delay=BAR_AFTER) as bar,
    ):
        results = []
        try:
            for result in pool.map(of_part, range(count)):
                results.append(result)
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return results


@contextmanager
def named(file: str, kind: str, count: int) -> Iterator[None]:
    """Turn whatever is raised in a block that reads a file into a DataError, or a StorageError, that names it."""
    try:
        yield
    except (DataError, StorageError):
        raise
    except Exception as error:  # pyarrow, tarfile and codecs have no error in common
        if isinstance(error, OSError) and error.errno is not None:  # pyarrow's of damaged files have no number
            raise StorageError(f"could not read {file}: {storage_fault(error, Path(file))}") from error
        raise DataError(f"cannot read {kind} data from {count} files, {file}: {first_line(error)}") from error
