"""One schema for the files of a data set, which may differ from one another, and the file that is at fault.

Only the columns that are used count. Others may be missing or of any type; optional ones may be missing.
"""

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdpo.data.columns import FLAG_COLUMNS, ID_COLUMNS, NUMBER_COLUMNS, Columns, DataError
from xdpo.data.table import kind_of
from xdpo.files import lfs_pointer
from xdpo.tables import parquet_rows, parquet_schema

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features


@dataclass(frozen=True)
class Alike:
    """Consecutive parquet files whose columns have the same names, and the types to read them as."""

    files: list[str]
    features: "Features"  # by the files' own names
    names: Mapping[str, str]  # the files' own name of a column → its canonical name


def alike(files: Sequence[str], columns: Columns) -> list[Alike]:
    """Parquet files in groups that can be read together; each canonical column has one type in all of them.

    Files without a row are left out. Raises DataError for a file that can't be read, lacks a required column, or has
    one of a type that doesn't go with the others', and where no file has a row.
    """
    from datasets import Features

    first, files = files[0], [file for file in files if parquet_rows(Path(file))]  # Spark leaves empty ones
    if not files:
        raise DataError(f"no parquet file has any row, {first} for one")
    schemas = {file: parquet_schema(Path(file)) for file in files}  # footers only: no row is read
    names = {file: _names_of(schema.names, columns, file) for file, schema in schemas.items()}
    features = {}
    for column in dict.fromkeys(column for names_of in names.values() for column in names_of):
        types = {file: schemas[file].field(named[column]).type for file, named in names.items() if column in named}
        features[column] = _feature(column, _common_type(column, types, columns), schemas, names)
    groups = []
    for _, group in groupby(files, key=lambda file: names[file]):
        together = list(group)
        names_of = names[together[0]]
        own = Features({name: features[column] for column, name in names_of.items()})
        groups.append(Alike(together, own, {name: column for column, name in names_of.items()}))
    return groups


def _names_of(own: list[str], columns: Columns, file: str) -> dict[str, str]:
    """Canonical column → the file's name of it. Raises DataError for a required one that is missing or there twice."""
    columns.require(own, file)
    canonical = columns.names(own)
    if twice := [name for name in canonical if own.count(name) > 1]:
        raise DataError(f"{file} has several columns called {twice[0]!r}; remove all but one")
    return {column: name for name, column in canonical.items()}


def _common_type(column: str, types: "Mapping[str, pa.DataType]", columns: Columns) -> "pa.DataType":
    """The pyarrow type that a column is read as. Raises DataError naming the first file whose type doesn't fit."""
    import pyarrow as pa

    kinds = {file: kind_of(type) for file, type in types.items()}
    filled = {file: kind for file, kind in kinds.items() if kind != "nothing"}
    if column == "caption":
        for file, kind in filled.items():
            if kind != "text":
                raise DataError(f"{file}: column {column} must hold text, it holds {types[file]}")
    distinct, holds = {types[file] for file in filled or kinds}, set(filled.values())
    if holds == {"text"}:  # also dictionaries and views, which `datasets` does not take
        return pa.large_string() if pa.large_string() in distinct else pa.string()
    if holds == {"bytes"}:
        return pa.large_binary() if pa.large_binary() in distinct else pa.binary()
    if len(distinct) == 1:
        return distinct.pop()
    if column in (*ID_COLUMNS, *FLAG_COLUMNS) and holds <= {"text", "number", "flag"}:
        return pa.string()
    if column in (*NUMBER_COLUMNS, *columns.numbers) and holds <= {"number", "flag"}:
        return pa.float64()
    if column in (*NUMBER_COLUMNS, *columns.numbers) and holds <= {"text", "number"}:  # numbers may be written as text
        return pa.string()
    first, *rest = filled
    other = next(file for file in rest if types[file] != types[first])
    raise DataError(
        f"{other}: column {column} holds {types[other]}, but {types[first]} in {first}; write both with the same type"
    )


def _feature(
    column: str,
    type: "pa.DataType",
    schemas: "Mapping[str, pa.Schema]",
    names: Mapping[str, Mapping[str, str]],
) -> Any:
    """A type as a feature of `datasets`: an image, where a file with that type declares its column to be one."""
    import pyarrow as pa
    from datasets import Features

    name, metadata = column, None
    for file, names_of in names.items():
        if column in names_of and schemas[file].field(names_of[column]).type == type:
            name, metadata = names_of[column], schemas[file].metadata
            break
    return Features.from_arrow_schema(pa.schema([(name, type)], metadata=metadata))[name]


def with_members(files: Sequence[str], columns: Columns) -> list[str]:
    """The tars that hold samples. Their members must be called alike, since the first tar decides what is read.

    Raises DataError naming the tar that has other members, several for one column, or that is none.
    """
    first: dict[str, str] = {}
    filled = []
    for file in files:
        if members := members_of(file, columns):
            filled.append(file)
            refuse_other_members(first, members, columns, file, files[0])
    if not filled:
        raise DataError(f"no tar holds a sample, {files[0]} for one")
    return filled


def members_of(file: str, columns: Columns) -> dict[str, str]:
    """Column → member of a tar's first sample; none in a tar without samples.

    Raises DataError for a file that is no readable tar, and for several members of one column.
    """
    try:
        names = _first_sample(file)
    except (tarfile.TarError, OSError, EOFError) as error:
        with open(file, "rb") as opened:
            fault = lfs_pointer(opened.read(40)) or first_line(error)
        raise DataError(f"{file} is not a readable tar: {fault}") from error
    by_column = {column: name for name, column in columns.names(names).items()}
    for column, name in by_column.items():
        if len(clash := [other for other in names if other.split(".")[0] == name.split(".")[0]]) > 1:
            raise DataError(f"{file}: its samples hold {' and '.join(clash)}, and {column} can be but one; keep one")
    return by_column


def refuse_other_members(
    first: dict[str, str], members: Mapping[str, str], columns: Columns, file: str, first_file: str
) -> None:
    """Raise DataError where required members have other names than before. `first` learns those that are new."""
    for column in set(columns.required) & set(members):
        expected = first.setdefault(column, members[column])
        if members[column] != expected:
            raise DataError(
                f"{file}: its samples hold {members[column]}, but {expected} in {first_file}; pack all tars with "
                "the same member names"
            )


def _first_sample(file: str) -> list[str]:
    """The member names of a tar's first sample without their key: `jpg_0.jpg`, `caption.txt`, …"""
    key, names = None, []
    with tarfile.open(file) as tar:
        if isinstance(tar.fileobj, io.BufferedReader) and os.path.getsize(file) % tarfile.BLOCKSIZE:  # not compressed
            raise tarfile.ReadError(f"it ends within a block of {tarfile.BLOCKSIZE} bytes; it was cut short")
        for folder, base, name in _members(tar):
            key = key or (folder, base)
            if (folder, base) != key:
                break
            names.append(name)
    return names


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, str]]:
    """(folder, key, rest of the name) of the files whose names begin with a key, which a Mac's `._…` don't."""
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        base, dot, rest = name.partition(".")
        if member.isfile() and base and dot:
            yield folder, base, rest


def file_at_fault(files: Iterable[str], read: Callable[[str], None]) -> str | None:
    """The first file that `read` fails on, with the error; None where it fails on none. Reads all files before it."""
    for file in files:
        try:
            read(file)
        except Exception as error:  # pyarrow, tarfile and codecs have no error in common
            return f"{file}: {first_line(error)}"
    return None


def read_parquet(file: str, columns: Sequence[str]) -> None:
    import pyarrow.parquet as pq

    for _ in pq.ParquetFile(file).iter_batches(columns=list(columns)):
        pass


def read_tar(file: str) -> None:
    with tarfile.open(file) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None and member.name.endswith(".txt") and not Path(member.name).name.startswith("."):
                content.read().decode()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
