"""Pairs of image files: a list of pairs, a list of ranked images, or two folders of images with the same names.

A list is a CSV, JSONL, JSON or parquet file. Paths in it are relative to its folder.

```
FOLDER/pairs.csv                 chosen,rejected,caption     or     image_0,image_1,label_0,caption
FOLDER/{chosen,rejected}/*       with data.columns='{chosen: chosen, rejected: rejected}': two sub-folders; the caption
                                 of chosen/fox.png is in chosen/fox.txt, or in the sub-folder that stands for caption
```
"""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdpo.data.columns import IMAGE, ORIENTED, SCORE_COLUMNS, VOTE_COLUMNS, Columns, DataError, listed
from xdpo.data.ranked import ranked_pairs
from xdpo.data.table import holds_images
from xdpo.paths import expanded, user_path
from xdpo.tables import Table, as_text, parquet_schema, read_table, read_text

if TYPE_CHECKING:
    from datasets import Dataset

LISTS = (".csv", ".jsonl", ".json", ".parquet")
DEFAULT_NAMES = (
    *("chosen", "rejected", "image_0", "image_1", "label_0", "label_1", "caption", "has_label"),
    *("ranking_id", "score_chosen", "score_rejected", *SCORE_COLUMNS, "image_0_uid", "image_1_uid"),
)
"""Of a list's columns, where data.columns names no others."""


def read_folder(path: str, split: str, columns: Columns) -> "Dataset":
    """The pairs of FOLDER/SPLIT if it has some, else those of FOLDER, or of a list of files, by canonical names.

    Raises DataError or TableError.
    """
    import pyarrow as pa
    from datasets import Dataset, Features, Value

    if (folder := _folder_of_two(path, split, columns)) is not None:
        content = _pairs_of_two(folder, columns)
    else:
        listing = listing_of(path, split)
        read = {*DEFAULT_NAMES, *columns.given.values(), *columns.numbers}
        _refuse_images(listing, read)
        table = read_table(listing, lambda name: name in read)
        if not table.rows:
            raise DataError(f"{listing} lists no pairs")
        content = _ranked(table, columns) if columns.are_ranked else _listed_pairs(table, columns)
    numbers = ("label_0", "label_1", *VOTE_COLUMNS)
    features = Features({name: Value("float64" if name in numbers else "string") for name in content})
    return Dataset(pa.table(content, features.arrow_schema))  # not from_dict, which inspects each cell again


def _refuse_images(listing: Path, read: Collection[str]) -> None:
    """Raise DataError for a parquet file that holds images themselves, before they are in memory."""
    for field in parquet_schema(listing) if listing.suffix.lower() == ".parquet" else ():
        if field.name in read and holds_images(field.type):
            raise DataError(
                f"{listing}: column {field.name} holds images themselves, and data.source=folder reads lists of their "
                "files; read it with data.source=parquet"
            )


def listing_of(path: str, split: str) -> Path:
    """The file that lists a folder's pairs; it may be named itself."""
    folder = user_path(path)
    if folder.is_file() and folder.suffix.lower() in LISTS:
        return folder
    for parent in (folder / split, folder):
        found = [parent / name for name in ("pairs.csv", "pairs.jsonl") if (parent / name).is_file()]
        if len(found) > 1:
            raise DataError(f"{parent} holds both pairs.csv and pairs.jsonl; name the one that is meant as data.path")
        if found:
            return found[0]
    raise DataError(f"{folder} holds no pairs.csv or pairs.jsonl (nor does its sub-folder {split!r})")


def file_of_folder(path: str, split: str, columns: Columns) -> Path:
    """The file that lists the pairs, or the first chosen image: a file that is there while the pairs are."""
    if (folder := _folder_of_two(path, split, columns)) is not None:
        return next(iter(_images_of(folder / columns.given["chosen"]).values()))
    return listing_of(path, split)


# --- a list of pairs -----------------------------------------------------------------------------------


def _listed_pairs(table: Table, columns: Columns) -> dict[str, list[Any]]:
    given, listing = columns.given, table.path
    caption = given.get("caption", "caption")
    by_choice = [given.get(name, name) for name in ORIENTED]
    images = [given.get(f"jpg_{side}", f"image_{side}") for side in (0, 1)]
    labels = [given[name] for name in VOTE_COLUMNS if name in given] or [given.get("label_0", "label_0")]
    has_labels = bool({"jpg_0", "label_0", "votes_0"} & set(given))
    is_by_choice = columns.are_oriented or (not has_labels and {*by_choice, caption} <= set(table.names))
    needed = [*by_choice, caption] if is_by_choice else [*images, *labels, caption]
    if not set(needed) <= set(table.names):
        others = "" if given else f"{listed([*by_choice, caption])} or "
        raise DataError(f"{listing} has the columns {listed(table.names)}; it needs {others}{listed(needed)}")

    files = [table.texts(name) for name in needed[:2]]
    content: dict[str, list[Any]] = {
        "jpg_0": _paths(listing, files[0]),
        "jpg_1": _paths(listing, files[1]),
        "caption": table.texts(caption),
    }
    optional = {"has_label": "has_label", "ranking_id": "ranking_id"}
    if is_by_choice:
        content["label_0"] = [1.0] * len(table.rows)
        optional |= {"score_0": "score_chosen", "score_1": "score_rejected"}
    else:
        numbers = VOTE_COLUMNS if len(labels) == 2 else ("label_0", "label_1")
        content |= {
            name: table.floats(given.get(name, name)) for name in numbers if given.get(name, name) in table.names
        }
        optional |= {name: name for name in SCORE_COLUMNS}
    if given:  # an image that recurs is encoded once
        content |= {"image_0_uid": files[0], "image_1_uid": files[1]}
        optional |= {"image_0_uid": "image_0_uid", "image_1_uid": "image_1_uid"}
    optional |= {name: name for name in columns.numbers if name not in content | optional}
    named = {name: given.get(name, default) for name, default in optional.items()}
    content |= {name: table.scalars(column) for name, column in named.items() if column in table.names}
    if missing := [name for name in columns.numbers if name not in content]:
        raise DataError(f"{listing} has the columns {listed(table.names)}; filter.columns needs {listed(missing)}")
    return content


def _paths(listing: Path, files: Sequence[str | None]) -> list[str | None]:
    return [os.path.join(listing.parent, expanded(file)) if file else None for file in files]


# --- a list of ranked images ---------------------------------------------------------------------------


def _ranked(table: Table, columns: Columns) -> dict[str, list[Any]]:
    given = columns.given
    image, number, caption = given[IMAGE], given[columns.order], given.get("caption", "caption")
    group = given.get("group", caption)
    if missing := [name for name in (image, number, caption, group) if name not in table.names]:
        raise DataError(f"{table.path} lacks the columns {listed(missing)}; it has {listed(table.names)}")

    def files_of(row: int) -> Any:
        where, cell = table.where(row, image), table.rows[row].get(image)
        return [as_text(file, where) for file in cell] if isinstance(cell, list) else as_text(cell, where)

    numbers, groups = ([cells.get(name) for cells in table.rows] for name in (number, group))
    files = [files_of(row) for row in range(len(table.rows))]
    pairs = ranked_pairs(columns, files, numbers, table.texts(caption), groups, lambda row: table.where(row, number))
    names = [[pair[side].image for pair in pairs] for side in (0, 1)]
    return {
        "jpg_0": _paths(table.path, names[0]),
        "jpg_1": _paths(table.path, names[1]),
        "caption": [one.caption for one, _ in pairs],
        **{name: [pair[side].votes for pair in pairs] for side, name in enumerate(VOTE_COLUMNS)},
        "image_0_uid": names[0],  # an image that recurs is encoded once
        "image_1_uid": names[1],
    }


# --- two folders ---------------------------------------------------------------------------------------


def _folder_of_two(path: str, split: str, columns: Columns) -> Path | None:
    """The folder whose sub-folders hold chosen and rejected images; None where data.columns names no such folders."""
    if not columns.are_oriented:
        return None
    folder = user_path(path)
    names = [columns.given[name] for name in ORIENTED]
    return next((each for each in (folder / split, folder) if all((each / name).is_dir() for name in names)), None)


def _pairs_of_two(folder: Path, columns: Columns) -> dict[str, list[Any]]:
    if columns.numbers:
        raise DataError(f"filter.columns: {folder} holds images alone, and no {listed(columns.numbers)}")
    chosen, rejected = (_images_of(folder / columns.given[name]) for name in ORIENTED)
    if alone := sorted(chosen.keys() ^ rejected.keys()):
        raise DataError(
            f"{folder}: {len(alone)} images are in {columns.given['chosen']} or in {columns.given['rejected']} alone "
            f"({listed(alone[:5])}); a pair has the same name in both, whatever its suffix"
        )
    if not chosen:
        raise DataError(f"{folder / columns.given['chosen']} holds no images")
    texts = folder / columns.given.get("caption", columns.given["chosen"])
    captions = [read_text(file).strip() if (file := texts / f"{name}.txt").is_file() else None for name in chosen]
    return {
        "jpg_0": [str(file) for file in chosen.values()],
        "jpg_1": [str(rejected[name]) for name in chosen],
        "caption": captions,
        "label_0": [1.0] * len(chosen),
        "ranking_id": list(chosen),
    }


def _images_of(folder: Path) -> dict[str, Path]:
    """Image files of a folder and its sub-folders, by their paths in it without suffix, in order."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    return {str(file.relative_to(folder).with_suffix("")): file for file in files if file.suffix.lower() != ".txt"}
