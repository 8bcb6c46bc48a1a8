"""The table of usable pairs: which rows are dropped and why, and which image is the chosen one.

The columns have the names of data.columns. Pairs are oriented here, once; every other module says chosen and rejected.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from xdpo.data.columns import ID_COLUMNS, IMAGE_COLUMNS, SCORE_COLUMNS, VOTE_COLUMNS, Columns, DataError
from xdpo.data.filters import Filters
from xdpo.data.identity import bytes_of, image_digest
from xdpo.data.rows import ArrowImages, Rows, is_list

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


ROWS_AT_ONCE = 100_000  # as Python's objects, which take more memory than columns


@dataclass(frozen=True)
class PairCounts:
    """How many rows of a source were kept, or dropped and why. Each row counts once: `rows` is the sum of the rest."""

    rows: int
    unlabelled: int  # has_label is False, or a label is missing
    without_caption: int
    identical: int  # are_different is False: the same image twice, whose gradient is zero
    ties: int
    beyond_max_pairs: int
    kept: int
    denied_caption: int = 0  # here and below: see data.filters
    out_of_bounds: int = 0
    too_small: int = 0
    too_long: int = 0
    held_out_caption: int = 0

    def by_name(self) -> dict[str, int]:
        """Each count, but for those of filters that left nothing out."""
        counts = asdict(self)
        filtered = {field.name for field in fields(self) if field.default == 0}
        return {name: count for name, count in counts.items() if count or name not in filtered}

    def __str__(self) -> str:
        counts = self.by_name()
        last = {name: counts.pop(name) for name in ("beyond_max_pairs", "kept")}
        return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in (counts | last).items())


@dataclass(frozen=True, eq=False)
class PairTable:
    """The usable pairs of a source, addressed by index 0 … len − 1 in the order of the source.

    dataset: the source's rows, unfiltered; `rows[index]` (int64) is the row of a usable pair in it and
    `chosen_side[index]` (uint8) is 0 where image 0 is the chosen one, 1 where image 1 is. Ties are pairs only where
    they were asked for: `tied[index]` says so, and image 0 then stands first.
    """

    dataset: Rows
    rows: np.ndarray
    chosen_side: np.ndarray
    counts: PairCounts
    tied: np.ndarray  # (N,) bool

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def end(self) -> int:
        """The row before which all of the source lies that matters: what follows the last pair of max_pairs doesn't."""
        return int(self.rows[-1]) + 1 if self.counts.beyond_max_pairs else len(self.dataset)

    def pair_id(self, row: int) -> str:
        """Name of the pair at a row of the source, without reading its images."""
        return pair_id(self.dataset.texts[row], row)

    def caption(self, index: int) -> str:
        """A pair's caption, without reading its images."""
        return self.dataset.texts[int(self.rows[index])]["caption"]

    def captions(self) -> list[str]:
        """The captions of all pairs."""
        return self.columns("caption")["caption"]

    def images_of(self, index: int) -> tuple[bytes, bytes]:
        """The encoded files of a pair's images, chosen first."""
        row = int(self.rows[index])
        one, other = (bytes_of(self.dataset.images.cell(row, side)) for side in (0, 1))
        return (other, one) if self.chosen_side[index] else (one, other)

    def columns(self, *names: str) -> dict[str, list]:
        """Columns without images of the usable pairs, in their order; names that the source lacks are left out."""
        present = self._present(names)
        return self._arrow(present).to_pydict() if present else {}

    def image_names(self) -> tuple[np.ndarray, np.ndarray]:
        """Names of each pair's chosen and rejected image: its uid, else a number, different for each row and side."""
        uids = self.columns("image_0_uid", "image_1_uid")
        if len(uids) == 2 and not any(None in column for column in uids.values()):
            names = np.stack([np.array(uids[f"image_{side}_uid"], dtype=str) for side in (0, 1)])
        else:
            names = np.stack([2 * self.rows, 2 * self.rows + 1])
        chosen, rejected = self.oriented(names)
        return chosen, rejected

    def misnamed(self) -> int:
        """How many images have another size than the first one of their name, which a cache of examples has for both.

        Only names that the source gives, and images whose sizes it tells.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        uids = self._present(["image_0_uid", "image_1_uid"])
        if len(uids) < 2:
            return 0
        columns = [self._arrow([name]).column(0).cast(pa.string()) for name in uids]
        names = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
        names = pc.if_else(pc.equal(names, ""), pa.scalar(None, pa.string()), names)  # an empty name is none
        codes = names.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy().reshape(2, -1).T.ravel()
        sizes = np.stack([self.dataset.images.sizes(side, self.end)[self.rows] for side in (0, 1)]).T.ravel()
        known = (codes >= 0) & (sizes >= 0)
        _, first, places = np.unique(codes[known], return_index=True, return_inverse=True)
        return int((sizes[known] != sizes[known][first][places]).sum())

    @property
    def scores(self) -> np.ndarray | None:
        """(2, N) float64, of each pair's chosen and rejected image; NaN where missing, None without score columns.

        Raises DataError for a column that doesn't hold numbers.
        """
        if len(self._present(SCORE_COLUMNS)) < 2:
            return None
        table = self.dataset.texts.select_columns(list(SCORE_COLUMNS)).with_format("arrow")[:]
        # Of all rows, so that an error names the row.
        scores = np.stack([_numbers(table, name, "the pairs") for name in SCORE_COLUMNS])
        return self.oriented(scores[:, self.rows])

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of a SHA-256 of the pairs in their order: names, captions, images, which is chosen."""
        digest = hashlib.sha256(self.rows.astype("<i8").tobytes() + self.chosen_side.tobytes())
        if self.tied.any():
            digest.update(self.tied.tobytes())
        digest.update(image_digest(self.dataset.images, len(self.dataset), self.end).encode())
        for name in self._present(("caption", *ID_COLUMNS)):
            digest.update(name.encode())
            column = self._arrow([name]).column(0)
            for start in range(0, len(column), ROWS_AT_ONCE):
                values = column.slice(start, ROWS_AT_ONCE).to_pylist()
                digest.update("\0".join(["", *map(str, values)]).encode())
        return digest.hexdigest()[:16]

    def oriented(self, sides: np.ndarray) -> np.ndarray:
        """(2, N), image 0 first → (2, N), chosen first."""
        pairs = np.arange(len(self))
        return np.stack([sides[self.chosen_side, pairs], sides[1 - self.chosen_side, pairs]])

    def _arrow(self, names: Iterable[str]) -> "pa.Table":
        """Columns of the usable pairs as an Arrow table."""
        return self.dataset.texts.select_columns(list(names)).with_format("arrow")[:].take(self.rows)

    def _present(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.dataset.texts.column_names]


def pair_id(example: dict[str, Any], row: int) -> str:
    """The ranking's id, else the two images' uids, else the key within a tar, else the row number."""
    if example.get("ranking_id") is not None:
        return str(example["ranking_id"])
    if example.get("image_0_uid") and example.get("image_1_uid"):
        return f"{example['image_0_uid']}/{example['image_1_uid']}"
    return str(example.get("__key__") or row)


def with_canonical_columns(dataset: "Dataset", columns: Columns, where: str) -> "Dataset":
    """Rename columns to Pick-a-Pic's, keep images encoded, drop unused columns."""
    from datasets import Image

    columns.require(dataset.column_names, where)
    names = columns.names(dataset.column_names)
    dataset = dataset.select_columns(list(names)).rename_columns(names)
    check_images({column: dataset.data.schema.field(column).type for column in IMAGE_COLUMNS}, where)
    for column in IMAGE_COLUMNS:
        if isinstance(dataset.features[column], Image):
            dataset = dataset.cast_column(column, Image(decode=False))
    return dataset


def in_arrow(dataset: "Dataset") -> Rows:
    """The rows of a data set with canonical columns."""
    texts = [name for name in dataset.column_names if name not in IMAGE_COLUMNS]
    return Rows(dataset.select_columns(texts), ArrowImages(dataset.select_columns(list(IMAGE_COLUMNS))))


def check_images(types: Mapping[str, Any], where: str) -> None:
    """Raise DataError for a column whose pyarrow type holds neither images nor their paths, nor both in a struct."""
    for name, type in types.items():
        if kind_of(type) != "text" and (is_list(type) or not holds_images(type)):
            raise DataError(
                f"{where}: column {name} must hold images, as encoded bytes, as paths, or as a struct of bytes and "
                f"path; it holds {type}"
            )


def holds_images(type: "pa.DataType") -> bool:
    """Whether a pyarrow type holds encoded images, alone, in a struct of bytes and path, or in lists of either."""
    import pyarrow.types as t

    if is_list(type):
        return holds_images(type.value_type)
    fields = {type.field(place).name for place in range(type.num_fields)} if t.is_struct(type) else set()
    return kind_of(type) == "bytes" or fields >= {"bytes", "path"}


def kind_of(type: "pa.DataType") -> str:
    """The kind of a pyarrow type: text, number, flag, bytes, nothing, or its name where it is none of these."""
    import pyarrow.types as t

    kinds = {
        "text": (t.is_string, t.is_large_string, t.is_string_view),
        "number": (t.is_integer, t.is_floating, t.is_decimal),
        "flag": (t.is_boolean,),
        "bytes": (t.is_binary, t.is_large_binary, t.is_binary_view, t.is_fixed_size_binary),
        "nothing": (t.is_null,),
    }
    if t.is_dictionary(type):
        type = type.value_type
    return next((kind for kind, tests in kinds.items() if any(test(type) for test in tests)), str(type))


def usable_pairs(
    dataset: Rows,
    max_pairs: int | None,
    columns: Columns,
    where: str,
    filters: Filters | None = None,
    *,
    keep_ties: bool = False,
) -> PairTable:
    """Filter and orient by the label columns alone: a million rows take about a second and no image is read."""
    table = dataset.texts.with_format("arrow")[:]
    _check_texts(table, where)
    label_0, label_1 = labels_of(table, columns, where)
    labelled = _flags(table, "has_label") & ~np.isnan(label_0) & ~np.isnan(label_1)
    tie = label_0 == label_1
    decided = ((label_0 == 1) & (label_1 == 0)) | ((label_0 == 0) & (label_1 == 1))
    invalid = np.flatnonzero(labelled & ~tie & ~decided)
    if len(invalid):
        shown = ", ".join(f"row {row}: {label_0[row]:g}/{label_1[row]:g}" for row in invalid[:10])
        raise DataError(
            f"{where}: label_0/label_1 must be 1/0, 0/1 or 0.5/0.5, got others in {len(invalid)} rows ({shown})"
        )

    captioned = ~table.column("caption").is_null().to_numpy()
    different = _flags(table, "are_different")
    # A row counts once: each filter sees only what the ones before it let through.
    passing = {"unlabelled": labelled, "without_caption": captioned, "identical": different, "ties": ~tie | keep_ties}
    if filters is not None:
        passing |= filters.passing(table, lambda name: _numbers(table, name, where), dataset.images)
    remaining = np.ones(len(label_0), dtype=bool)
    dropped = {}
    for reason, passes in passing.items():
        dropped[reason] = int((remaining & ~passes).sum())
        remaining &= passes
    rows = np.flatnonzero(remaining)
    kept = rows[:max_pairs]
    counts = PairCounts(rows=len(label_0), **dropped, beyond_max_pairs=len(rows) - len(kept), kept=len(kept))
    if not len(kept):
        raise DataError(f"no usable pair in {where}: {counts}")
    return PairTable(dataset, kept, (label_0[kept] == 0).astype(np.uint8), counts, tie[kept])


def labels_of(table: "pa.Table", columns: Columns, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The labels of both images of some rows by canonical names, float64, NaN where they are missing.

    Raises DataError for a column that doesn't hold numbers.
    """
    if columns.are_oriented:
        return np.ones(len(table)), np.zeros(len(table))
    if set(VOTE_COLUMNS) <= set(table.column_names):
        one, other = (_numbers(table, name, where) for name in VOTE_COLUMNS)
        label_0 = np.where(np.isnan(one) | np.isnan(other), np.nan, (np.sign(one - other) + 1) / 2)
        return label_0, 1 - label_0
    label_0 = _numbers(table, "label_0", where)
    return label_0, _numbers(table, "label_1", where) if "label_1" in table.column_names else 1 - label_0


def _numbers(table: "pa.Table", name: str, where: str) -> np.ndarray:
    """A column as float64, missing values as NaN. WebDataset and CSV carry labels and scores as text."""
    import pyarrow.types as t

    if kind_of(type := table.column(name).type) not in ("number", "flag", "text", "bytes", "nothing"):
        raise DataError(f"{where}: column {name} must hold numbers, it holds {type}")
    if t.is_integer(type) or t.is_floating(type):
        return table.column(name).cast("float64", safe=False).to_numpy()
    values = ["nan" if value is None or value == "" else value for value in table.column(name).to_pylist()]
    try:
        return np.array(values, dtype=object).astype(np.float64)
    except (ValueError, TypeError):
        row, value = next((row, value) for row, value in enumerate(values) if not _is_number(value))
        raise DataError(f"{where}: column {name} must hold numbers, got {value!r:.80} in row {row}") from None


def _is_number(value: Any) -> bool:
    try:
        float(value)
        return True
    except (ValueError, TypeError):
        return False


def _check_texts(table: "pa.Table", where: str) -> None:
    """Raise DataError for captions that are no text, and for text that isn't UTF-8, which Arrow doesn't check."""
    import pyarrow as pa

    caption = table.column("caption").type
    if kind_of(caption) not in ("text", "nothing"):
        raise DataError(f"{where}: column caption must hold text, it holds {caption}")
    for name in table.column_names:
        if kind_of(table.column(name).type) == "text":
            try:
                table.column(name).validate(full=True)
            except pa.ArrowInvalid:
                raise DataError(
                    f"{where}: column {name} holds text that isn't UTF-8 {_first_bad(table, name)}"
                ) from None


def _first_bad(table: "pa.Table", name: str) -> str:
    for row, cell in enumerate(table.column(name)):
        try:
            cell.as_py()
        except UnicodeDecodeError as error:
            return f"in row {row}: {error.object[:40]!r}"
    return ""


def _flags(table: "pa.Table", name: str) -> np.ndarray:
    """A column as booleans; missing values and columns count as True."""
    if name not in table.column_names:
        return np.ones(table.num_rows, dtype=bool)
    if kind_of(table.column(name).type) == "flag":
        return table.column(name).cast("bool").fill_null(True).to_numpy()
    return np.array(
        [str(value).strip().lower() not in ("false", "0", "0.0") for value in table.column(name).to_pylist()]
    )
