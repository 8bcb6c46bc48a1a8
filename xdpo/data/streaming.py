"""Rows of remote files, for encoding: columns without images first, then images file by file, each then let go.

Everything lies in a folder that all processes share:

```
FOLDER/
  00007.parquet   file 7 without its images: the first pass reads nothing else of a parquet file, but all of a tar
  00007.shard     a copy of the file, while its images are needed
  00007.npz       sizes of its images, and digests of those that the fingerprint samples
```

Each of these appears whole or not at all, so that a killed process loses only what it was fetching.
"""

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xdpo.data.columns import IMAGE_COLUMNS, Columns, DataError
from xdpo.data.identity import image_sha256, sampled_rows
from xdpo.data.index import (
    Measured,
    each,
    group_rows,
    measure_parquet,
    names_in_place,
    own_image_columns,
    parquet_texts,
    tar_table,
    texts_of,
    within,
)
from xdpo.data.remote import Remote, RemoteError, RemoteFile, State
from xdpo.data.rows import ParquetImages, ParquetPart, Rows, TarImages, TarPart
from xdpo.data.shards import alike, first_line, members_of, refuse_other_members
from xdpo.data.table import kind_of
from xdpo.files import StorageError, one_at_a_time, reading, replacing, writing
from xdpo.tables import TableError

if TYPE_CHECKING:
    import pyarrow as pa

READ_AT_ONCE = 8  # parquet files whose columns without images are read at once
FETCHED_AT_ONCE = 2  # tars that are fetched at once in the first pass
AHEAD = 2  # files that a process fetches before it needs them
MOST_FAILURES = 10  # files that fail in one process until it tries no others: the network is down, and not a file
NOTES = b"xdpo"  # in the metadata of a file without its images


@dataclass(frozen=True)
class Streamed:
    """A remote file in a folder of copies. Its rows are those from `start` to before `end` of the data set."""

    url: str
    state: State
    place: Path  # of what is kept of it, without an ending
    start: int
    end: int

    @property
    def copy(self) -> Path:
        return self.place.with_suffix(".shard")

    @property
    def measured(self) -> Path:
        return self.place.with_suffix(".npz")


class StreamedImages:
    """Images of remote files, read from copies, which `bring` fetches.

    images: reads the copies as if all were there. measure: of a copy, by the number of its file.
    """

    def __init__(
        self,
        files: Sequence[Streamed],
        images: ParquetImages | TarImages,
        measure: Callable[[int], Measured],
    ):
        self.files, self._images, self._measure = files, images, measure
        self._ends = np.array([file.end for file in files])
        self._threads: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._ahead: threading.Thread | None = None

    @property
    def begun_as(self) -> str:
        """Names the files in their states. The images are known only when all of them were read."""
        states = json.dumps([[file.url, *asdict(file.state).values()] for file in self.files])
        return f"begun from {hashlib.sha256(states.encode()).hexdigest()[:16]}"

    def cell(self, row: int, side: int) -> Any:
        return self._images.cell(row, side)

    def cells(self, side: int, rows: Iterable[int]) -> Iterator[Any]:
        return self._images.cells(side, rows)

    def sizes(self, side: int, end: int | None = None) -> np.ndarray:
        needed = [self.files[number] for number in self.before(end)]
        sizes = np.concatenate([self._of_measured(file, f"sizes_{side}") for file in needed])[:end]
        if (sizes < 0).all():
            raise DataError(f"{self.files[0].url} and the others hold no images in {IMAGE_COLUMNS[side]}")
        return sizes

    def sides(self, side: int) -> np.ndarray:
        raise DataError(
            "filter.min_side and filter.max_aspect need the sizes of all images, which remote files "
            f"({self.files[0].url} for one) don't tell before they are fetched; set both to null, or download the files"
        )

    def recorded_digest(self, side: int, row: int) -> str | None:
        file = self.files[self.file_of(row)]
        return json.loads(str(self._of_measured(file, "digests")))[side].get(str(row)) or image_sha256(None)

    def file_of(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row, side="right"))

    def before(self, end: int | None) -> range:
        """The numbers of the files with rows before one."""
        return range(len(self.files) if end is None else self.file_of(end - 1) + 1)

    def is_measured(self, number: int) -> bool:
        return self.files[number].measured.is_file()

    def bring(self, numbers: Iterable[int]) -> None:
        """Have copies of files here, and measure their images. Raises RemoteError naming a file that can't be had."""
        for number in numbers:
            file = self.files[number]
            self._fetch(number, lambda: True)
            if self.is_measured(number):
                continue
            try:
                measured = self._measure(number)
                if len(measured.sizes[0]) != file.end - file.start:
                    raise DataError(f"it has {len(measured.sizes[0])} rows, not {file.end - file.start}")
            except StorageError:
                raise
            except Exception as error:  # pyarrow has no error in common
                file.copy.unlink(missing_ok=True)
                raise RemoteError(f"{file.url}: its copy can't be read: {first_line(error)}") from error
            with replacing(file.measured, "wb") as opened:
                one, other = measured.sizes
                np.savez(opened, sizes_0=one, sizes_1=other, digests=json.dumps(measured.digests))

    def fetch_ahead(self, after: int, is_needed: Callable[[int], bool]) -> None:
        """Fetch the files that are needed next, behind file `after`, in the background, while others are encoded.

        What fails is tried again when its turn comes. The thread touches nothing but sockets and files, since loading
        processes are forked beside it.
        """
        if self._ahead is not None and self._ahead.is_alive():
            return

        def fetch() -> None:
            for number in range(after + 1, min(after + 1 + AHEAD, len(self.files))):
                try:
                    self._fetch(number, partial(is_needed, number))
                except (RemoteError, StorageError):
                    return

        self._ahead = threading.Thread(target=fetch, daemon=True)
        self._ahead.start()

    def wait(self) -> None:
        """Wait for what is fetched in the background."""
        if self._ahead is not None:
            self._ahead.join()

    def let_go(self, is_needed: Callable[[int], bool]) -> None:
        """Remove the copies of files that are measured and not needed any more."""
        for number, file in enumerate(self.files):
            if file.copy.is_file() and self.is_measured(number) and not is_needed(number):
                file.copy.unlink(missing_ok=True)

    def _fetch(self, number: int, is_needed: Callable[[], bool]) -> None:
        file = self.files[number]
        if file.copy.is_file():
            return
        with self._threads[number], one_at_a_time(file.place.with_suffix(".lock")):
            if not file.copy.is_file() and is_needed():
                fetch(Remote(file.url, file.state), file.copy)

    def _of_measured(self, file: Streamed, name: str) -> np.ndarray:
        with reading(file.measured), np.load(file.measured) as content:
            return content[name]

    def __getstate__(self) -> dict[str, Any]:
        """For a loading process, which reads copies and fetches none."""
        return self.__dict__ | {"_measure": None, "_threads": defaultdict(threading.Lock), "_ahead": None}


def fetch(remote: Remote, path: Path) -> None:
    """Copy a remote file to a path."""
    with replacing(path, "wb") as opened:
        remote.fetch(opened)


def stream_parquet(urls: Sequence[str], columns: Columns, folder: Path) -> Rows:
    """The rows of remote parquet files. folder: keeps what is read of them; a later call finds it.

    Raises RemoteError, naming all files that could not be read; DataError where their columns don't fit.
    """
    import pyarrow as pa
    from datasets import Dataset

    _first_pass(urls, columns, folder, partial(_keep_parquet, columns), READ_AT_ONCE)
    with _named_instead([(str(_kept(folder, number)), url) for number, url in enumerate(urls)]):
        groups = alike([str(_kept(folder, number)) for number in range(len(urls))], columns)
        files: list[Streamed] = []
        tables, parts = [], []
        for group in groups:
            own = own_image_columns(group)
            for kept in group.files:
                tables.append(parquet_texts(kept, group))
                files.append(_streamed(Path(kept), files, len(tables[-1])))
                copy = str(files[-1].copy)
                parts.append(ParquetPart(copy, tuple(_notes(Path(kept))["groups"]), own))
    sampled, ends = sampled_rows(files[-1].end), [file.end for file in files]
    images = ParquetImages(None, (), parts)

    def measure(number: int) -> Measured:
        return measure_parquet(parts[number], within(sampled, ends, number))

    texts = Dataset(pa.concat_tables(tables, promote_options="default"))
    return Rows(texts, StreamedImages(files, images, measure))


def _keep_parquet(columns: Columns, url: str, kept: Path) -> None:
    """Write a parquet file without its images: their columns are there, and empty."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    remote = Remote(url)
    file = pq.ParquetFile(pa.PythonFile(RemoteFile(remote), "r"), pre_buffer=True)
    schema = file.schema_arrow
    columns.require(schema.names, url)
    names = columns.names(schema.names)
    for name, column in names.items():
        if column in IMAGE_COLUMNS and kind_of(schema.field(name).type) == "text":
            raise DataError(f"{url}: column {name} holds paths, which say nothing on another machine; it needs images")
    texts = file.read(columns=[name for name, column in names.items() if column not in IMAGE_COLUMNS])
    content = {
        name: pa.nulls(len(texts), schema.field(name).type) if column in IMAGE_COLUMNS else texts.column(name)
        for name, column in names.items()
    }
    notes = {"url": url, "state": asdict(remote.state), "groups": group_rows(file), "columns": columns.key}
    metadata = (schema.metadata or {}) | {NOTES: json.dumps(notes)}
    _write(pa.table(content).replace_schema_metadata(metadata), kept)


def stream_tars(urls: Sequence[str], columns: Columns, folder: Path, *, keep_source: bool) -> Rows:
    """The rows of remote tars, as stream_parquet. The first pass reads all of them; keep_source keeps the copies."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    first: dict[str, Any] = {}  # names: member → column of the tars' samples; required: column → member; url

    def keep_tar(url: str, kept: Path) -> None:
        remote, copy = Remote(url), kept.with_suffix(".shard")
        fetch(remote, copy)
        with _named_instead([(str(copy), url)]):
            members = members_of(str(copy), columns)
            if members and not first:
                names = names_in_place([str(copy)], columns)
                if names is None:
                    raise DataError(
                        f"{url} is compressed, or has members in rare formats; download the tars and name them"
                    )
                first.update(names=names, required={}, url=url)
            if members:
                refuse_other_members(first["required"], members, columns, url, first["url"])
            table = tar_table(str(copy), first["names"]) if members else pa.table({})
        notes = {"url": url, "state": asdict(remote.state), "first": first, "columns": columns.key}
        _write(table.replace_schema_metadata({NOTES: json.dumps(notes)}), kept)
        if not keep_source:
            copy.unlink(missing_ok=True)

    for count in range(1, len(urls) + 1):  # up to the first that isn't empty, which decides what is read
        _first_pass(urls[:count], columns, folder, keep_tar, 1)
        first.update(_notes(_kept(folder, count - 1))["first"])
        if first:
            break
    else:
        raise DataError(f"no tar holds a sample, {urls[0]} for one")
    _first_pass(urls, columns, folder, keep_tar, FETCHED_AT_ONCE)
    files: list[Streamed] = []
    tables, parts = [], []
    for number in range(len(urls)):
        table = pq.read_table(_kept(folder, number)).replace_schema_metadata(None)
        if len(table):
            tables.append(table)
            files.append(_streamed(_kept(folder, number), files, len(table)))
            parts.append(TarPart(str(files[-1].copy), files[-1].end))
    rows = Dataset(pa.concat_tables(tables, promote_options="permissive"))
    own = {column: name for name, column in first["names"].items()}
    images = TarImages(rows, ({}, {}), parts, (own["jpg_0"], own["jpg_1"]))
    sampled, ends = sampled_rows(len(rows)), [file.end for file in files]

    def measure(number: int) -> Measured:
        rows_here = within(sampled, ends, number).values()
        digests = [{str(row): image_sha256(images.cell(row, side)) for row in rows_here} for side in (0, 1)]
        return Measured([images.sizes(side)[files[number].start : files[number].end] for side in (0, 1)], digests)

    return Rows(texts_of(rows), StreamedImages(files, images, measure))


def _write(table: "pa.Table", kept: Path) -> None:
    import pyarrow.parquet as pq

    with replacing(kept, "wb") as opened:
        pq.write_table(table, opened)


def _first_pass(
    urls: Sequence[str], columns: Columns, folder: Path, keep: Callable[[str, Path], None], at_once: int
) -> None:
    """Keep what is needed first of every file that isn't kept yet. Raises RemoteError after all were tried."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)

    missing = [number for number, url in enumerate(urls) if not _is_kept(_kept(folder, number), url, columns)]
    failures: list[str] = []

    def of_file(place: int) -> None:
        number = missing[place]
        if len(failures) >= MOST_FAILURES:
            return
        try:
            keep(urls[number], _kept(folder, number))
        except RemoteError as error:
            failures.append(str(error))
        except (DataError, StorageError):
            raise
        except Exception as error:  # pyarrow and tarfile have no error in common
            failures.append(f"{urls[number]}: {first_line(error)}")

    each(of_file, len(missing), at_once, "captions and labels")
    if failures:
        raise not_all_read(failures, len(urls))


def not_all_read(failures: Sequence[str], count: int) -> RemoteError:
    """The error of files that could not be read."""
    shown = "\n  ".join(failures[:MOST_FAILURES])
    return RemoteError(
        f"{len(failures)} of {count} files could not be read:\n  {shown}\n"
        "What others gave is kept. The same command tries these again, and does nothing twice"
    )


def _kept(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.parquet"


def _is_kept(kept: Path, url: str, columns: Columns) -> bool:
    if not kept.is_file():
        return False
    notes = _notes(kept)
    return (notes["url"], notes.get("columns", "")) == (url, columns.key)


def _notes(kept: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    with reading(kept):
        return json.loads(pq.read_schema(kept).metadata[NOTES])


def _streamed(kept: Path, before: Sequence[Streamed], rows: int) -> Streamed:
    notes, start = _notes(kept), before[-1].end if before else 0
    return Streamed(notes["url"], State(**notes["state"]), kept.with_suffix(""), start, start + rows)


@contextmanager
def _named_instead(names: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Have errors in a block name remote files instead of what is kept of them."""
    try:
        yield
    except (DataError, TableError) as error:
        text = str(error)
        for kept, url in names:
            text = text.replace(kept, url)
        raise DataError(text) from error
