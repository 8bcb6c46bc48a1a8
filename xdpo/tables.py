"""Reads users' tables and texts: CSV, TSV, JSONL, JSON, parquet columns. Every error names the file and the line.

Text is UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one. Lines may end as on Linux, Windows or a
Mac. Nothing is guessed: a row that isn't as wide as the header is an error, and so is a quotation mark that swallows
rows.
"""

import codecs
import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

from xdpo.files import StorageError, lfs_pointer, storage_fault

if TYPE_CHECKING:
    import pyarrow as pa

Content = TypeVar("Content")

_MARKS = {  # UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}


class TableError(ValueError):
    """A file is not a valid table or text. The message names file and line, and says what to do."""


@dataclass(frozen=True)
class Table:
    """Rows of a file. Row i begins at `numbers[i]`: a line of a text, counted from 1, or a row of a parquet file.

    A row of a JSONL file may lack columns. Using a column whose name the header repeats raises TableError.
    """

    path: Path
    names: Sequence[str]
    numbers: Sequence[int]
    rows: Sequence[Mapping[str, Any]]
    unit: str = "line"

    def texts(self, name: str) -> list[str | None]:
        """A column of text; None where a cell is missing. Raises TableError as `as_text` does."""
        self._check(name)
        return self._as_texts(name, [row.get(name) for row in self.rows])

    def scalars(self, name: str) -> list[str | None]:
        """A column of texts, numbers and booleans, all as text; None where a cell is missing. Raises TableError."""
        self._check(name)
        return self._as_texts(name, [scalar(row.get(name)) for row in self.rows])

    def floats(self, name: str) -> list[float | None]:
        """A column of numbers, also of numbers in text; None where a cell is missing or empty. Raises TableError."""
        self._check(name)
        numbers: list[float | None] = []
        for row, cells in enumerate(self.rows):
            cell = cells.get(name)
            try:
                numbers.append(None if cell is None or cell == "" else float(cell))
            except (ValueError, TypeError, OverflowError):
                raise TableError(f"{self.where(row, name)} must hold numbers, got {_shown(cell)}") from None
        return numbers

    def _as_texts(self, name: str, values: list[Any]) -> list[str | None]:
        return [
            value if _is_plain(value) else as_text(value, self.where(row, name)) for row, value in enumerate(values)
        ]

    def where(self, row: int, name: str) -> str:
        """A cell's name in messages: `pairs.csv line 3: column caption`."""
        return f"{self.path} {self.unit} {self.numbers[row]}: column {name}"

    def _check(self, name: str) -> None:
        if list(self.names).count(name) > 1:
            raise TableError(f"{self.path} has several columns called {name!r}; rename or remove all but one")


@overload
def as_text(value: str, where: str) -> str: ...
@overload
def as_text(value: Any, where: str) -> str | None: ...
def as_text(value: Any, where: str) -> str | None:
    """A value as text; None where it is missing, which null and NaN mean.

    Raises TableError for other types, for NUL, and for halves of surrogate pairs, which files and tokenizers refuse.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        quoting = "; a number that is meant as text needs quotation marks" if isinstance(value, int | float) else ""
        raise TableError(f"{where} must hold text, got {_shown(value)}{quoting}")
    if "\0" in value:
        raise TableError(f"{where} holds the character NUL ({_shown(value)}); remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TableError(
            f"{where} holds half a character, {value[error.start]!r} at place {error.start} ({_shown(value)}): "
            "what wrote the file cut a surrogate pair; write the text anew, as UTF-8"
        ) from None
    return value


def _is_plain(value: Any) -> bool:
    """Whether a value is text that needs no further check, as most cells are."""
    return isinstance(value, str) and value.isascii() and "\0" not in value


def scalar(value: Any) -> Any:
    """A number or boolean as text; anything else, and NaN, as it is."""
    is_missing = isinstance(value, float) and math.isnan(value)
    return str(value) if isinstance(value, int | float) and not is_missing else value


# --- texts ---------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """A whole text, its lines ended by "\\n". Raises TableError for what is not text, and StorageError."""
    return re.sub(r"\r\n?", "\n", "".join(_lines(path)))


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises TableError, also for a key that an object has twice."""
    return _parsed(read_text(path), path)


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line that isn't empty. Raises TableError."""
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            hint = "; a .jsonl file has one whole object on each line" if line.strip() in ("[", "{") else ""
            yield number, _parsed(line, path, number, hint)


def _parsed(text: str, path: Path, line: int | None = None, hint: str = "") -> Any:
    """The value of a JSON text: a whole file's, or that of its line `line`."""
    where = f"{path}" if line is None else f"{path} line {line}"
    try:
        return json.loads(text, object_pairs_hook=_once)
    except TableError as error:
        raise TableError(f"{where}: {error}") from None
    except json.JSONDecodeError as error:
        where = f"{path} line {line or error.lineno}"
        raise TableError(f"{where} is not JSON: {error.msg} at column {error.colno}{hint}") from None
    except (ValueError, RecursionError) as error:  # digits beyond Python's limit; nested beyond its stack
        raise TableError(f"{where} is not JSON that can be read: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise TableError(f"an object has the key {twice!r} more than once; remove all but one")
    return members


def _lines(path: Path) -> Iterator[str]:
    """The lines with their line ends. U+2028 and similar characters don't end a line."""
    encoding = "utf-8"
    try:
        with path.open("rb") as file:
            start = file.read(40)
        if pointer := lfs_pointer(start):
            raise TableError(f"could not read {path}: {pointer}")
        encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
        with path.open(encoding=encoding, newline="") as file:
            for number, line in enumerate(file, start=1):
                if "\0" in line:
                    raise TableError(
                        f"{path} line {number} holds a NUL byte, as UTF-16 without its byte order mark has many, and a "
                        "damaged file has some; save it as UTF-8"
                    )
                yield line
    except UnicodeDecodeError:
        raise _not_text(path, encoding) from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise TableError(f"could not read {path}: {error.strerror}") from error
    except OSError as error:
        raise StorageError(f"could not read {path}: {storage_fault(error, path)}") from error


def _not_text(path: Path, encoding: str) -> TableError:
    content = path.read_bytes()
    try:
        content.decode("utf-8" if encoding == "utf-8-sig" else encoding)  # the other one counts without the mark
    except UnicodeDecodeError as error:
        line = len(re.findall(r"\r\n?|\n", content[: error.start].decode(encoding, "ignore"))) + 1
        name = encoding.removesuffix("-sig").upper()
        fault = f"{path} line {line}: byte {error.start} (0x{content[error.start]:02x}) is no {name} text"
    else:
        fault = f"{path} changed while it was read"
    return TableError(
        f"{fault}. Save the file as UTF-8 (in Excel “CSV UTF-8”), or convert it; if it comes from Windows: "
        f"iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
    )


# --- tables --------------------------------------------------------------------------------------------


def read_table(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Table:
    """Read a table by its suffix: .csv with quoting, .tsv without, .jsonl of objects, .json of a list of them, or
    .parquet's wanted columns.

    Raises TableError for a file that is not such a table.
    """
    match path.suffix.lower():
        case ".csv":
            return _read_delimited(path, delimiter=",", is_quoted=True)
        case ".tsv":  # its quotation marks are text, as in PartiPrompts
            return _read_delimited(path, delimiter="\t", is_quoted=False)
        case ".jsonl":
            return _read_objects(path, read_json_lines(path))
        case ".json":
            content = read_json(path)
            if not isinstance(content, list):
                raise TableError(f"{path} must hold a list of objects, got {_shown(content)}")
            return _read_objects(path, enumerate(content, start=1), unit="entry")
    return _read_parquet(path, wanted)


def _read_objects(path: Path, objects: Iterable[tuple[int, Any]], unit: str = "line") -> Table:
    numbers, rows = [], []
    for number, row in objects:
        if not isinstance(row, dict):
            raise TableError(f"{path} {unit} {number} must be an object with its columns' names, got {_shown(row)}")
        numbers.append(number)
        rows.append(row)
    return Table(path, list(dict.fromkeys(name for row in rows for name in row)), numbers, rows, unit)


class _Record(NamedTuple):
    """A row of cells, and its lines in the file where it has several."""

    number: int
    cells: list[str]
    lines: list[str]


def _read_delimited(path: Path, delimiter: str, is_quoted: bool) -> Table:
    records = [record for record in _records(path, delimiter, is_quoted) if record.cells]
    if not records:
        return Table(path, [], [], [])
    header, *records = records
    width, names = len(header.cells), ", ".join(header.cells)
    if names.lower().startswith("sep="):
        raise TableError(f"{path}: its first line is Excel's {header.cells[0]!r}; remove that line")
    other = next((sign for sign in _DELIMITERS if sign in names and sign != delimiter), None)
    if width == 1 and other is not None:
        raise TableError(
            f"{path}: its columns are parted by {_DELIMITERS[other]} ({names:.80}), as Excel writes CSV in many "
            f"languages; save it as UTF-8 with {_DELIMITERS[delimiter]}"
        )
    for record in records:
        if len(record.cells) != width:
            hint = "no cell of a .tsv can hold tabs or line breaks"
            if delimiter == ",":
                hint = (
                    "a cell with commas or line breaks in it needs quotation marks around it, as CSV libraries and "
                    "Excel's “CSV UTF-8” write them"
                )
            raise TableError(
                f"{path} {_span(record.number, len(record.lines))} has {len(record.cells)} columns, the header "
                f"{width} ({names:.200}); {hint}"
            )
    _refuse_merged(path, records, width, delimiter)
    rows = [dict(zip(header.cells, record.cells, strict=True)) for record in records]
    return Table(path, header.cells, [record.number for record in records], rows)


def _records(path: Path, delimiter: str, is_quoted: bool) -> Iterator[_Record]:
    lines: list[str] = []

    def remembered() -> Iterator[str]:
        for line in _lines(path):
            lines.append(line)
            yield line

    reader = csv.reader(
        remembered(), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE, strict=True
    )
    while True:
        number = reader.line_num + 1
        lines.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            span = _span(number, reader.line_num - number + 1)
            raise TableError(
                f"{path} {span}: a cell begins with a quotation mark that does not close it ({error}); write the "
                'marks inside a cell twice: "a ""small"" cat"'
            ) from None
        yield _Record(number, cells, list(lines) if len(lines) > 1 else [])


def _refuse_merged(path: Path, records: Sequence[_Record], width: int, delimiter: str) -> None:
    """Raise TableError for a quotation mark that merges several rows into one.

    Such a row is recognised by its lines: read without quoting, each of them has all the columns, and its cells without
    quotation marks resemble those of other rows.
    """
    several = [record for record in records if record.lines]
    if not several or width == 1:
        return
    usual = [{_likeness(record.cells[column]) for record in records if not record.lines} for column in range(width)]
    for record in several:
        split = list(csv.reader((line.rstrip("\r\n") for line in record.lines), delimiter=delimiter, quoting=3))
        if any(len(cells) != width for cells in split):
            continue
        others = [column for column in range(width) if not any('"' in cells[column] for cells in split)]
        first, *rest = split
        alike = [
            _likeness(cells[column]) in usual[column] | {_likeness(first[column])}
            for cells in rest
            for column in others
        ]
        if alike and all(alike):
            raise TableError(
                f"{path} {_span(record.number, len(split))}: a cell begins with a quotation mark that closes in a "
                'later row, which makes one row of all; write the marks inside a cell twice: "a ""small"" cat"'
            )


def _likeness(cell: str) -> str:
    """What cells of a column have in common: that they are numbers, the suffix of file names, else the text itself."""
    try:
        float(cell)
        return "a number"
    except ValueError:
        return Path(cell).suffix.lower() or cell


def _span(first: int, count: int) -> str:
    return f"line {first}" if count <= 1 else f"lines {first} to {first + count - 1}"


# --- parquet -------------------------------------------------------------------------------------------


def parquet_schema(path: Path) -> "pa.Schema":
    """The pyarrow schema in a parquet file's footer. Raises TableError for another file."""
    import pyarrow.parquet as pq

    return _from_parquet(path, lambda: pq.read_schema(path))


def parquet_rows(path: Path) -> int:
    """How many rows a parquet file has, by its footer. Raises TableError where it is none."""
    import pyarrow.parquet as pq

    return _from_parquet(path, lambda: pq.read_metadata(path).num_rows)


def _read_parquet(path: Path, wanted: Callable[[str], bool]) -> Table:
    import pyarrow.parquet as pq

    names = parquet_schema(path).names
    chosen = [name for name in names if wanted(name)]
    rows = _from_parquet(path, lambda: pq.ParquetFile(path).read(columns=list(dict.fromkeys(chosen))).to_pylist())
    return Table(path, names, range(len(rows)), rows, unit="row")


def _from_parquet(path: Path, read: Callable[[], Content]) -> Content:
    import pyarrow as pa

    try:
        return read()
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TableError(f"{path} is not a readable parquet file: {_pointer(path) or first}") from error


def _pointer(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return lfs_pointer(file.read(40))
    except OSError:
        return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
