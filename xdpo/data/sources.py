"""Where preference pairs come from: a hub data set, parquet files, tars in WebDataset layout, a plain folder.

Parquet files and tars are read where they lie (`index`). Three kinds of files are first converted into memory-mapped
Arrow by the `datasets` library, in its cache (HF_DATASETS_CACHE), about as large again as the files: a hub data set's;
tars that are compressed; and parquet files with large row groups, if pairs are read from them in random order.
"""

import errno
import glob
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdpo import processes
from xdpo.config import DataConfig
from xdpo.data.columns import IMAGE, Columns, DataError, listed
from xdpo.data.filters import Filters
from xdpo.data.folder import file_of_folder, read_folder
from xdpo.data.index import MOST_GROUP_BYTES, largest_group, names_in_place, parquet_rows_in_place, tar_rows_in_place
from xdpo.data.ranked import ranked_rows_in_place
from xdpo.data.remote import is_remote
from xdpo.data.rows import Rows
from xdpo.data.shards import alike, file_at_fault, first_line, read_parquet, read_tar, with_members
from xdpo.data.table import PairTable, in_arrow, usable_pairs, with_canonical_columns
from xdpo.files import storage_fault
from xdpo.paths import matching, user_path
from xdpo.tables import TableError

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


_TOO_LARGE = (
    f"a row group holds more than {MOST_GROUP_BYTES / 1e6:.0f} MB of images, too many to read pairs from it in random "
    "order. So `datasets` makes a copy as large as the files in HF_DATASETS_CACHE. None is needed with cache.examples, "
    "nor for files with smaller row groups: docs/performance.md"
)


def load_pairs(
    data_config: DataConfig,
    *,
    filters: Filters | None = None,
    in_order: bool = False,
    streamed_into: Path | None = None,
    keep_source: bool = False,
    num_proc: int | None = None,
    keep_ties: bool = False,
) -> PairTable:
    """Load the pairs that the `data` section of a config describes.

    Ties, unlabelled rows, rows without a caption, pairs of identical images and what `filters` leave out are dropped
    and counted, ties only without keep_ties; then the first max_pairs are kept. A split selects files of a hub data
    set, or within a folder (`train.parquet`, `train-*.parquet`, `train/*.parquet`); files that are named themselves are
    all used.
    in_order: whether images will be read in the order of their rows, as for caches and held-out pairs. num_proc:
    processes that index or convert files on their first use. Neither changes rows or their order.
    streamed_into: a folder into which remote files are read one by one (data.streaming), while their images are used.
    keep_source: whether their copies stay there.

    Raises DataError: nothing at that path, columns missing, invalid labels, no pair left, or an unknown source.
    """
    loaders = {"hub": _load_hub, "parquet": _load_parquet, "webdataset": _load_webdataset, "folder": _load_folder}
    if data_config.source not in loaders:
        raise DataError(f"unknown data.source {data_config.source!r}; choose from {', '.join(loaders)}")
    paths = _paths(data_config)
    where = f"{data_config.source} data at {', '.join(paths)}"
    filters = filters or Filters()
    columns, with_sides = Columns(data_config.columns or {}, filters.columns), filters.config.needs_sides
    if columns.are_ranked and (data_config.source not in ("folder", "parquet") or any(map(is_remote, paths))):
        raise DataError(
            f"ranked images ({IMAGE}: {columns.given[IMAGE]}) are read from parquet files on this machine or, with "
            f"data.source=folder, from a list of their files, and not from {where}; docs/data.md has examples"
        )
    names = list(columns.given.values())
    if data_config.source != "folder" and (twice := [name for name in names if names.count(name) > 1]):
        raise DataError(f"data.columns names the column {twice[0]} twice; a column of {where} stands for one thing")
    how = _Reading(data_config.split, data_config.revision, columns, with_sides, in_order, num_proc)
    try:
        _ = filters.phrases  # a file that can't be read is found before all others are
        rows = _streamed(data_config, paths, columns, streamed_into, keep_source) or loaders[data_config.source](
            paths, how
        )
    except TableError as error:
        raise DataError(str(error)) from error
    if not isinstance(rows, Rows):
        rows = in_arrow(with_canonical_columns(rows, columns, where))
    return usable_pairs(rows, data_config.max_pairs, columns, where, filters, keep_ties=keep_ties)


def _streamed(
    data_config: DataConfig,
    paths: list[str],
    columns: Columns,
    folder: Path | None,
    keep_source: bool,
) -> Rows | None:
    """The rows of remote files, read file by file into a folder; None where the source isn't read so."""
    from xdpo.data.streaming import stream_parquet, stream_tars

    if data_config.source == "folder" or (data_config.source == "hub" and folder is None):
        return None
    if data_config.source == "hub":
        paths = source_files(data_config)
    remote = [path for path in paths if is_remote(path)]
    if not remote:
        return None
    if len(remote) < len(paths):
        raise DataError(f"data.path mixes files here with remote ones ({remote[0]} for one); name either")
    if folder is None:
        raise DataError(
            f"{remote[0]} is remote: such files are read once, into a cache. Set cache.examples, or download the files"
        )
    if all(path.endswith(".parquet") for path in paths):
        return stream_parquet(paths, columns, folder)
    if all(path.endswith(".tar") for path in paths):
        return stream_tars(paths, columns, folder, keep_source=keep_source)
    if data_config.source == "hub":
        return None  # JSON or the like
    raise DataError(f"remote files must end in .parquet or in .tar, all alike; data.path has {listed(paths[:3])}")


def source_files(data_config: DataConfig) -> list[str]:
    """Paths or URLs of the files that `load_pairs` would read; none for a folder. Raises DataError where none match."""
    paths, split = _paths(data_config), data_config.split
    match data_config.source:
        case "hub":
            return _hub_files(_only(paths, "hub"), split, data_config.revision, Columns(data_config.columns or {}))
        case "parquet":
            return _matching_files(paths, ".parquet", split)
        case "webdataset":
            return _matching_files(paths, ".tar", split)
    return []


def is_converted(data_config: DataConfig, files: list[str], *, in_order: bool) -> bool:
    """Whether `load_pairs` has `datasets` make a copy of these files. in_order: as for load_pairs."""
    match data_config.source:
        case "hub":
            return True
        case "parquet":
            columns = Columns(data_config.columns or {})
            if in_order or columns.are_ranked:
                return False
            return largest_group(alike(files, columns)) > MOST_GROUP_BYTES
        case "webdataset":
            return names_in_place(files, Columns(data_config.columns or {})) is None
    return False


def local_files(data_config: DataConfig) -> list[str]:
    """This machine's files that `load_pairs` would read; for a folder its listing, for a hub data set none."""
    if data_config.source == "folder":
        folder, columns = _only(_paths(data_config), "folder"), Columns(data_config.columns or {})
        return [str(file_of_folder(folder, data_config.split, columns).absolute())]
    files = [] if data_config.source == "hub" else source_files(data_config)
    return [os.path.abspath(file) for file in files if not is_remote(file)]


def _paths(data_config: DataConfig) -> list[str]:
    paths = [data_config.path] if isinstance(data_config.path, str) else list(data_config.path)
    if not paths:
        raise DataError(f"data.path is empty; name what data.source={data_config.source} should read")
    return paths


@dataclass(frozen=True)
class _Reading:
    """How a source's files are read; with_sides: with the sizes of all images in pixels. See load_pairs."""

    split: str
    revision: str | None
    columns: Columns
    with_sides: bool
    in_order: bool
    num_proc: int | None


# Sources: (paths, how) → Rows, or a Dataset with the source's own columns.


def _load_hub(paths: list[str], how: _Reading) -> "Dataset":
    from datasets import load_dataset

    name = _only(paths, "hub")
    files = _hub_files(name, how.split, how.revision, how.columns)
    try:
        # Naming the files keeps `datasets` from fetching every split; the card's totals then cannot be verified.
        return load_dataset(
            name,
            revision=how.revision,
            data_files={how.split: files},
            split=how.split,
            verification_mode="no_checks",
            num_proc=how.num_proc,
        )
    except Exception as error:
        _refuse_bad_cache(error.__cause__ or error, f"split {how.split!r} of the hub data set {name!r}")
        raise DataError(
            f"cannot load split {how.split!r} of the hub data set {name!r}: {first_line(error)}\n{HUB_HELP}"
        ) from error


def _hub_files(name: str, split: str, revision: str | None, columns: Columns) -> list[str]:
    """URLs of a split's files. Raises DataError where there are none, or the data set's card lacks a column."""
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(name, revision=revision)
    except Exception as error:  # offline, 404, gated, no such revision: whatever the libraries below raise
        raise DataError(f"cannot load the hub data set {name!r}: {first_line(error)}\n{HUB_HELP}") from error
    files = builder.config.data_files or {}
    if split not in files:
        raise DataError(f"the hub data set {name!r} has no split {split!r}; choose from {', '.join(files) or 'none'}")
    if builder.info.features:  # known from the data set's card: say so before hundreds of gigabytes arrive
        columns.require(list(builder.info.features), f"the hub data set {name!r}")
    return [str(file) for file in files[split]]


def _load_parquet(paths: list[str], how: _Reading) -> Rows:
    from datasets import concatenate_datasets

    groups = alike(_matching_files(paths, ".parquet", how.split), how.columns)
    if how.columns.are_ranked:
        if not how.in_order and largest_group(groups) > MOST_GROUP_BYTES:
            raise DataError(
                f"{groups[0].files[0]} and the others: a row group holds more than {MOST_GROUP_BYTES / 1e6:.0f} MB of "
                "ranked images, too many to read pairs from it in random order. Set cache.examples, or write the files "
                "with smaller row groups"
            )
        return ranked_rows_in_place(groups, how.columns, how.num_proc, with_sides=how.with_sides)
    if how.in_order or largest_group(groups) <= MOST_GROUP_BYTES:
        return parquet_rows_in_place(groups, how.columns, how.num_proc, with_sides=how.with_sides)
    if processes.rank() == 0:
        print(f"note: {_TOO_LARGE}", file=sys.stderr)
    parts = []
    for group in groups:
        own = list(group.features)
        read = partial(read_parquet, columns=own)
        dataset = _load_files(
            "parquet", group.files, how.split, read, columns=own, features=group.features, num_proc=how.num_proc
        )
        parts.append(with_canonical_columns(dataset, how.columns, group.files[0]))
    return in_arrow(parts[0] if len(parts) == 1 else concatenate_datasets(parts))


def _load_webdataset(paths: list[str], how: _Reading) -> "Dataset | Rows":
    files = with_members(_matching_files(paths, ".tar", how.split), how.columns)
    rows = tar_rows_in_place(files, how.columns, how.num_proc, with_sides=how.with_sides)
    return _load_files("webdataset", files, how.split, read_tar, num_proc=how.num_proc) if rows is None else rows


def _load_files(builder: str, files: list[str], split: str, read: Callable[[str], None], **settings: Any) -> "Dataset":
    """A packaged builder's data set of some files. `read` reads one file, to find the damaged one."""
    from datasets import load_dataset

    names = [glob.escape(file) for file in files]  # `datasets` takes them for globs
    try:
        return load_dataset(builder, data_files={split: names}, split=split, **settings)
    except Exception as error:  # pyarrow, tarfile and datasets have no error in common
        cause = error.__cause__ or error
        _refuse_bad_cache(cause, f"{builder} data of {len(files)} files, first {files[0]},")
        is_storage = isinstance(cause, OSError) and cause.errno is not None
        at_fault = None if is_storage else file_at_fault(files, read)
        raise DataError(
            f"cannot read {builder} data from {len(files)} files, "
            + (at_fault or f"first {files[0]}: {first_line(cause)}")
        ) from error


def _refuse_bad_cache(cause: BaseException, data: str) -> None:
    """Raise DataError where `datasets` could not write what it converts `data` into, naming its folder."""
    if isinstance(cause, OSError) and cause.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
    ):
        from datasets.config import HF_DATASETS_CACHE

        place = Path(cause.filename or HF_DATASETS_CACHE)
        raise DataError(
            f"cannot convert {data} into the cache {HF_DATASETS_CACHE} (HF_DATASETS_CACHE names another): "
            f"{place}: {storage_fault(cause, place)}"
        ) from cause


def _load_folder(paths: list[str], how: _Reading) -> Rows:
    return in_arrow(read_folder(_only(paths, "folder"), how.split, how.columns))


def _only(paths: list[str], source: str) -> str:
    if len(paths) != 1:
        raise DataError(f"data.source={source} takes one data.path, got {len(paths)}: {listed(paths)}")
    return paths[0]


def _matching_files(paths: list[str], suffix: str, split: str) -> list[str]:
    """The files that paths, globs and folders match, in order, each once. Each of `paths` must match at least one."""
    files: list[str] = []
    for path in paths:
        if is_remote(path):
            files.append(path)
            continue
        folder = user_path(path)
        if folder.is_dir():
            inside = sorted(folder.rglob(f"*{suffix}"))
            matches = [str(file) for file in inside if split in (file.parent.name, _split_of(file))]
            if inside and not matches:
                named = sorted({_split_of(file) for file in inside})[:10]
                raise DataError(
                    f"folder {path} has no {suffix} file of split {split!r} (found {listed(named)}); "
                    f"set the split, or name the files: '{path}/*{suffix}'"
                )
            _refuse_two_shardings(matches)
        else:
            matches = [str(file) for file in matching(path) if file.is_file()]
        if not matches:
            raise DataError(f"no {suffix} file matches {path!r} (seen from {Path.cwd()}); check data.path")
        files += matches
    return list(dict.fromkeys(files))


def _refuse_two_shardings(files: list[str]) -> None:
    """Raise DataError for `train-00000-of-00002` beside `train-00000-of-00003`: the same pairs in files twice."""
    totals: dict[str, dict[str, str]] = {}
    for file in files:
        if match := re.fullmatch(r"(.*)-\d+-of-(\d+)(?:-[0-9a-f]+)?\.\w+", file):
            totals.setdefault(match[1], {}).setdefault(match[2], file)
    for by_total in totals.values():
        if len(by_total) > 1:
            one, other, *_ = by_total.values()
            raise DataError(
                f"{one} and {other} are of two sets of shards, which are likely to hold the same pairs; remove one "
                "set, or name the files as data.path"
            )


def _split_of(file: Path) -> str:
    """`train` of `train.parquet` and of `train-00003-of-00645.parquet`."""
    return re.split(r"[-.]", file.name)[0]
