"""Pairs of ranked images: every two images of one caption or, where a column names it, of one group.

A row of the source has an image with its rank or votes, or lists of images and of their ranks or votes, which are a
group of their own. Images in parquet files are read in place (see index).
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xdpo.data.columns import Columns, DataError, listed
from xdpo.data.identity import image_sha256, sampled_rows
from xdpo.data.index import (
    Digests,
    each,
    group_rows,
    named,
    open_parquet,
    opened,
    parquet_texts,
    texts_of,
    with_digests,
)
from xdpo.data.rows import BATCH_ROWS, ParquetPart, RankedImages, Rows, is_list, sides_of_cell, sizes_of
from xdpo.data.shards import Alike
from xdpo.data.table import check_images

if TYPE_CHECKING:
    import pyarrow as pa


class Ranked(NamedTuple):
    """One of the images of a caption; the more votes, the better."""

    image: Any
    votes: float | None
    caption: str | None


def ranked_pairs(
    columns: Columns,
    images: Sequence[Any],
    numbers: Sequence[Any],
    captions: Sequence[str | None],
    groups: Sequence[Any],
    where: Callable[[int], str],
) -> list[tuple[Ranked, Ranked]]:
    """All pairs of some rows, by their columns.

    images, numbers: an image and its rank or votes, or a list of either, for each row. where: names a row's numbers.
    Raises DataError for numbers that are none, or not as many as the images, and for columns that filters read.
    """
    if columns.numbers:
        raise DataError(
            f"filter.columns: {listed(columns.numbers)} can't be read of ranked images, of which pairs are made"
        )
    sign = -1 if columns.order == "rank" else 1  # the lowest rank is the best
    together: dict[Any, list[Ranked]] = {}
    for row, (files, values, caption, group) in enumerate(zip(images, numbers, captions, groups, strict=True)):
        is_group = isinstance(files, list)
        files, values = (files, [] if values is None else values) if is_group else ([files], [values])
        key = row if is_group or caption is None else (str(group), caption)  # without a caption none belong together
        if not isinstance(values, list) or len(values) != len(files):
            raise DataError(f"{where(row)} must hold {len(files)} numbers, one for each of {columns.given['image']}")
        for file, value in zip(files, values, strict=True):
            votes = _number(value, where, row)
            ranked = Ranked(file, None if votes is None else sign * votes, caption)
            together.setdefault(key, []).append(ranked)
    return [pair for group in together.values() for pair in combinations(group, 2)]


def _number(cell: Any, where: Callable[[int], str], row: int) -> float | None:
    try:
        return None if cell is None or cell == "" else float(cell)
    except (ValueError, TypeError):
        raise DataError(f"{where(row)} must hold numbers, got {cell!r:.60}") from None


class _Measured(NamedTuple):
    """The images of a parquet file. counts: of each row's list, (rows,) int64; None where rows have one image each.

    sizes: of all images, (images,) int64; sides: (images, 2) int64, empty where they were not asked for.
    """

    counts: np.ndarray | None
    sizes: np.ndarray
    sides: np.ndarray


def ranked_rows_in_place(
    groups: Sequence[Alike], columns: Columns, num_proc: int | None, *, with_sides: bool = False
) -> Rows:
    """The pairs of the ranked images in parquet files. num_proc, with_sides: as for index.parquet_rows_in_place.

    Raises DataError for a file that can't be read, and as ranked_pairs does.
    """
    files: list[tuple[str, Alike]] = []
    parts: list[ParquetPart] = []
    for group in groups:
        name = next(name for name, column in group.names.items() if column == "image")
        type = group.features.arrow_schema.field(name).type
        check_images({name: type.value_type if is_list(type) else type}, group.files[0])
        for file in group.files:
            files.append((file, group))
            parts.append(ParquetPart(file, group_rows(open_parquet(file)), (name, name)))

    def make() -> "tuple[pa.Table, list[int]]":
        def of_part(number: int) -> "tuple[pa.Table, _Measured]":
            file, group = files[number]
            with named(file, "parquet", len(files)):
                return parquet_texts(file, group), _measure(parts[number], with_sides=with_sides)

        table = _table([file for file, _ in files], each(of_part, len(parts), num_proc, "index"), columns)
        return with_digests(table, _digests(table, parts)), [len(table)]

    layout = str([group.features for _, group in files]) + columns.key + with_sides * " sides"
    index, digests, _ = opened([part.path for part in parts], layout, make)
    return Rows(texts_of(index), RankedImages(index, digests, parts))


def _measure(part: ParquetPart, *, with_sides: bool) -> _Measured:
    import pyarrow.compute as pc

    counts, sizes, sides = [], [np.empty(0, np.int64)], [np.empty((0, 2), np.int64)]
    for batch in open_parquet(part.path).iter_batches(BATCH_ROWS, columns=[part.names[0]], use_threads=False):
        cells = batch.column(0)
        if is_list(cells.type):
            counts.append(pc.fill_null(pc.list_value_length(cells), 0).to_numpy(zero_copy_only=False))
            cells = cells.flatten()  # which leaves out null lists
        sizes.append(sizes_of(cells))
        if with_sides:
            sides.append(np.array([sides_of_cell(cell) for cell in cells.to_pylist()], np.int64).reshape(-1, 2))
    return _Measured(np.concatenate(counts) if counts else None, np.concatenate(sizes), np.concatenate(sides))


def _table(files: Sequence[str], contents: "Sequence[tuple[pa.Table, _Measured]]", columns: Columns) -> "pa.Table":
    """The pairs of all files: their columns, and where their images are."""
    import pyarrow as pa

    # Of each row: (row, its place in the row's list, number among all images), or a list of these.
    images: list[Any] = []
    names: dict[str, list[Any]] = {column: [] for column in (columns.order, "caption", "group")}
    rows: list[tuple[str, int]] = []
    seen = 0
    for file, (texts, measured) in zip(files, contents, strict=True):
        for row in range(len(texts)):
            number, count = len(images), 1 if measured.counts is None else int(measured.counts[row])
            these = [(number, place, seen + place) for place in range(count)]
            images.append(these[0] if measured.counts is None else these)
            seen += count
            rows.append((file, row))
        for column, values in names.items():
            there = column if column in texts.column_names else "caption"
            values += texts.column(there).to_pylist()

    def where(row: int) -> str:
        file, number = rows[row]
        return f"{file} row {number}: column {columns.given[columns.order]}"

    pairs = ranked_pairs(columns, images, names[columns.order], names["caption"], names["group"], where)
    sizes, sides = (
        np.concatenate([getattr(measured, name) for _, measured in contents]) for name in ("sizes", "sides")
    )
    content = {"caption": pa.array([one.caption for one, _ in pairs], pa.string())}
    for side in (0, 1):
        placed = np.array([pair[side].image for pair in pairs], np.int64).reshape(-1, 3)
        content[f"votes_{side}"] = pa.array([pair[side].votes for pair in pairs], pa.float64())
        uids = [f"{row}/{place}" for row, place, _ in placed.tolist()]  # an image that recurs is encoded once
        content[f"image_{side}_uid"] = pa.array(uids, pa.string())
        content |= {f"{what}_{side}": pa.array(placed[:, n]) for n, what in enumerate(("row", "place"))}
        content[f"size_{side}"] = pa.array(sizes[placed[:, 2]])
        for n, what in enumerate(("width", "height") if len(sides) else ()):
            content[f"{what}_{side}"] = pa.array(sides[placed[:, 2], n])
    return pa.table(content)


def _digests(table: "pa.Table", parts: Sequence[ParquetPart]) -> Digests:
    from datasets import Dataset

    images = RankedImages(Dataset(table), ({}, {}), parts)
    digests: Digests = [{}, {}]
    for side in (0, 1):
        for row in sampled_rows(len(table)).tolist():
            if table.column(f"size_{side}")[row].as_py() >= 0:  # a file elsewhere may change
                digests[side][str(row)] = image_sha256(images.cell(row, side))
    return digests
