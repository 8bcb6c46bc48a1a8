"""Where preference pairs come from: a hub data set, parquet files, tars in WebDataset layout, a plain folder.

Rows are memory-mapped Arrow (the `datasets` library), so a table larger than memory costs no memory. Parquet files
and tars are converted on first use into the `datasets` cache (HF_DATASETS_CACHE), about as large again as the files.
"""

import csv
import glob
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdpo.data.table import (
    SCORE_COLUMNS,
    DataError,
    PairTable,
    listed,
    require_columns,
    usable_pairs,
    with_house_columns,
)

if TYPE_CHECKING:
    from datasets import Dataset

HUB_HELP = """\
Known public copies of Pick-a-Pic v2 (yuvalkirstain/pickapic_v2 itself has been gone since 2025):
  data.path=liuhuohuo2/pick-a-pic-v2
  data.path=sayakpaul/pickapic_v2_webdataset   (tars)
Or use local data, which also needs no network (the hub is asked for its list of files at every start):
  data.source=parquet    data.path=FOLDER or 'FOLDER/train-*.parquet'
  data.source=webdataset data.path='FOLDER/*.tar'
  data.source=folder     data.path=FOLDER   (pairs.csv or pairs.jsonl, and the images)"""


def load_pairs(
    config: Any,
    *,
    path: str | list[str] | None = None,
    split: str | None = None,
    max_pairs: int | None = None,
    num_proc: int | None = None,
) -> PairTable:
    """Load the pairs that the `data` section of a config describes.

    config: needs source, path, revision, split, max_pairs. `path`, `split` and `max_pairs`, where given, take the
    place of the config's (for held-out pairs). Ties, unlabelled rows, rows without a caption and pairs of identical
    images are dropped and counted; max_pairs then keeps the first so many. A split chooses files of a hub data set, or
    within a folder (`train.parquet`, `train-*.parquet`, `train/*.parquet`); files named outright are all used.
    num_proc: processes that convert files, where they aren't converted yet; it changes neither rows nor their order.

    Raises DataError: nothing at that path, columns missing, labels that are none, no pair left, or no such source.
    """
    loaders = {"hub": _load_hub, "parquet": _load_parquet, "webdataset": _load_webdataset, "folder": _load_folder}
    if config.source not in loaders:
        raise DataError(f"unknown data.source {config.source!r}; choose from {', '.join(loaders)}")
    paths = _paths(config, path)
    where = f"{config.source} data at {', '.join(paths)}"
    dataset = loaders[config.source](paths, split or config.split, config.revision, num_proc)
    dataset = with_house_columns(dataset, where)
    return usable_pairs(dataset, config.max_pairs if max_pairs is None else max_pairs, where)


def files_to_convert(config: Any, *, path: str | list[str] | None = None, split: str | None = None) -> list[str]:
    """Paths or URLs of the files that `load_pairs` would fetch and convert; none of a folder, read where it lies.

    Raises DataError where there are none.
    """
    paths, split = _paths(config, path), split or config.split
    match config.source:
        case "hub":
            return _hub_files(_only(paths, "hub"), split, config.revision)
        case "parquet":
            return _matching_files(paths, ".parquet", split)
        case "webdataset":
            return _matching_files(paths, ".tar", split)
    return []


def _paths(config: Any, path: str | list[str] | None) -> list[str]:
    given = config.path if path is None else path
    paths = [given] if isinstance(given, str) else list(given)
    if not paths:
        raise DataError(f"data.path is empty; name what data.source={config.source} should read")
    return paths


# Sources: (paths, split, revision, num_proc) → a Dataset with whatever columns the source has.


def _load_hub(paths: list[str], split: str, revision: str | None, num_proc: int | None) -> "Dataset":
    from datasets import load_dataset

    name = _only(paths, "hub")
    files = _hub_files(name, split, revision)
    try:
        # Naming the files keeps `datasets` from fetching every split; the card's totals then cannot be verified.
        return load_dataset(
            name,
            revision=revision,
            data_files={split: files},
            split=split,
            verification_mode="no_checks",
            num_proc=num_proc,
        )
    except Exception as error:
        raise DataError(
            f"cannot load split {split!r} of the hub data set {name!r}: {_first_line(error)}\n{HUB_HELP}"
        ) from error


def _hub_files(name: str, split: str, revision: str | None) -> list[str]:
    """URLs of a split's files. Raises DataError where there are none, or the data set's card lacks a column."""
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(name, revision=revision)
    except Exception as error:  # offline, 404, gated, no such revision: whatever the libraries below raise
        raise DataError(f"cannot load the hub data set {name!r}: {_first_line(error)}\n{HUB_HELP}") from error
    files = builder.config.data_files or {}
    if split not in files:
        raise DataError(f"the hub data set {name!r} has no split {split!r}; choose from {', '.join(files) or 'none'}")
    if builder.info.features:  # known from the data set's card: say so before hundreds of gigabytes arrive
        require_columns(list(builder.info.features), f"the hub data set {name!r}")
    return [str(file) for file in files[split]]


def _load_parquet(paths: list[str], split: str, revision: str | None, num_proc: int | None) -> "Dataset":
    import pyarrow.parquet

    files = _matching_files(paths, ".parquet", split)
    for file in files:  # footers only: a wrong file is named before any conversion
        try:
            columns = pyarrow.parquet.read_schema(file).names
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is not a readable parquet file: {_first_line(error)}") from error
        require_columns(columns, file)
    return _load_files("parquet", files, split, num_proc)


def _load_webdataset(paths: list[str], split: str, revision: str | None, num_proc: int | None) -> "Dataset":
    return _load_files("webdataset", _matching_files(paths, ".tar", split), split, num_proc)


def _load_files(builder: str, files: list[str], split: str, num_proc: int | None) -> "Dataset":
    from datasets import load_dataset

    try:
        return load_dataset(builder, data_files={split: files}, split=split, num_proc=num_proc)
    except Exception as error:  # pyarrow, tarfile and datasets have no error in common
        cause = error.__cause__ or error
        raise DataError(
            f"cannot read {builder} data from {len(files)} files, first {files[0]}: {_first_line(cause)}"
        ) from error


def _load_folder(paths: list[str], split: str, revision: str | None, num_proc: int | None) -> "Dataset":
    """Pairs of FOLDER/SPLIT/pairs.* if there is one, else of FOLDER/pairs.*, in the columns of Pick-a-Pic."""
    from datasets import Dataset

    folder = Path(_only(paths, "folder")).expanduser()
    candidates = [parent / name for parent in (folder / split, folder) for name in ("pairs.csv", "pairs.jsonl")]
    listing = next((file for file in candidates if file.is_file()), None)
    if listing is None:
        raise DataError(f"{folder} holds no pairs.csv or pairs.jsonl (nor does its sub-folder {split!r})")
    rows = _read_jsonl(listing) if listing.suffix == ".jsonl" else _read_csv(listing)
    if not rows:
        raise DataError(f"{listing} lists no pairs")
    by_choice, by_label = ("chosen", "rejected", "caption"), ("image_0", "image_1", "label_0", "caption")
    columns = by_choice if set(by_choice) <= set(rows[0]) else by_label
    if not set(columns) <= set(rows[0]):
        raise DataError(
            f"{listing} has the columns {listed(rows[0])}; it needs {listed(by_choice)} or {listed(by_label)}"
        )

    def cells(name: str) -> list[str | None]:
        return [None if row.get(name) is None else str(row[name]) for row in rows]

    def files(name: str) -> list[str]:
        return [str(listing.parent / (cell or "")) for cell in cells(name)]

    table = {"jpg_0": files(columns[0]), "jpg_1": files(columns[1]), "caption": cells("caption")}
    optional = {"has_label": "has_label", "ranking_id": "ranking_id"}
    if columns is by_choice:
        table["label_0"] = ["1"] * len(rows)
        optional |= {"score_0": "score_chosen", "score_1": "score_rejected"}
    else:
        optional |= {name: name for name in ("label_0", "label_1", *SCORE_COLUMNS)}
    table |= {name: cells(column) for name, column in optional.items() if column in rows[0]}
    return Dataset.from_dict(table)


def _only(paths: list[str], source: str) -> str:
    if len(paths) != 1:
        raise DataError(f"data.source={source} takes one data.path, got {len(paths)}: {listed(paths)}")
    return paths[0]


def _read_csv(file: Path) -> list[dict[str, Any]]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        return list(csv.DictReader(lines))


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    rows = []
    with file.open(encoding="utf-8-sig") as lines:  # not str.splitlines(): a caption may hold U+2028
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{file} line {number} must be an object, got {line.strip():.60}")
            rows.append(row)
    return rows


def _matching_files(paths: list[str], suffix: str, split: str) -> list[str]:
    """Files that paths, globs and folders stand for, in order, each once; every one of `paths` must match some."""
    files: list[str] = []
    for path in paths:
        expanded = Path(path).expanduser()
        if expanded.is_file():
            found = [str(expanded)]
        elif expanded.is_dir():
            inside = sorted(expanded.rglob(f"*{suffix}"))
            found = [str(file) for file in inside if split in (file.parent.name, _split_of(file))]
            if inside and not found:
                named = sorted({_split_of(file) for file in inside})[:10]
                raise DataError(
                    f"folder {path} has no {suffix} file of split {split!r} (found {listed(named)}); "
                    f"set the split, or name the files: '{path}/*{suffix}'"
                )
        else:
            found = [file for file in sorted(glob.glob(str(expanded), recursive=True)) if Path(file).is_file()]
        if not found:
            raise DataError(f"no {suffix} file matches {path!r} (seen from {Path.cwd()}); check data.path")
        files += found
    return list(dict.fromkeys(files))


def _split_of(file: Path) -> str:
    """`train` of `train.parquet` and of `train-00003-of-00645.parquet`."""
    return re.split(r"[-.]", file.name)[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
