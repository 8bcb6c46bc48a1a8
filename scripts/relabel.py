"""AI feedback: relabel preference pairs with a scorer, into new parquet files.

    python scripts/relabel.py --data 'pickapic/train-*.parquet' --scorer pickscore --output relabelled
    python train_xdpo.py --config configs/xdpo_sd15.yaml data.source=parquet data.path='relabelled/*.parquet'

The image with the higher score becomes the preferred one of its pair (Diffusion-DPO's AI feedback, Section 5.3). The
new files have Pick-a-Pic's columns, whatever the first ones have (--columns), and all further columns. New ones are
score_0 and score_1, which loss.margin_weight uses, and human_label_0 and human_label_1, the earlier labels.
Scores that differ by at most --tie-threshold are a tie, and so is a pair with an unreadable image; training leaves ties
out. The same command resumes: a file is whole or absent. `accelerate launch scripts/relabel.py …` shares the files out
to several GPUs.
"""

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState

from xdpo import ending, processes
from xdpo.arguments import positive
from xdpo.config import ConfigError, load_config
from xdpo.data.columns import IMAGE_COLUMNS, VOTE_COLUMNS, Columns
from xdpo.data.images import UnreadableImageError, decode_rgb
from xdpo.data.table import check_images, kind_of, labels_of
from xdpo.files import check_writable, only_run, reading, replacing
from xdpo.paths import expanded, matching, user_path
from xdpo.progress import Progress
from xdpo.scorers.interface import Scorer
from xdpo.scorers.loading import load_scorer, scorer_version
from xdpo.scores.scoring import choose_device
from xdpo.tables import parquet_rows, parquet_schema

BASE_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "base.yaml"
ROWS_AT_ONCE = 64


def main(arguments: list[str] | None = None) -> int:
    """Relabel every file that isn't there yet. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="parquet files or globs")
    parser.add_argument("--columns", metavar="MAPPING", help="as data.columns, such as '{jpg_0: left, jpg_1: right}'")
    parser.add_argument(
        "--scorer", type=expanded, required=True, help="as for evaluate.py: pickscore, hpsv2, …, or file.py:Class"
    )
    parser.add_argument("--output", type=user_path, required=True, help="folder of the new files, under the same names")
    parser.add_argument("--tie-threshold", type=float, default=0.0, help="scores this close are a tie (default: 0)")
    parser.add_argument("--batch-size", type=positive, default=16, help="images scored at once (default: 16)")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--weights", type=user_path, help="folder of the scorer's weights, for machines without a hub")
    options = parser.parse_args(arguments)
    try:
        check_writable(options.output, "--output")
        columns = columns_of(options.columns)
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=processes.COLLECTIVE_TIMEOUT)
        processes.connect()
        with ending.together():
            relabel_missing(options, columns, state)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def columns_of(mapping: str | None) -> Columns:
    """The columns that a mapping names, as data.columns does. Raises ValueError."""
    try:
        settings = load_config(BASE_CONFIG, [f"data.columns={mapping or 'null'}"])
    except ConfigError as error:
        raise ValueError(f"--columns, which is read as data.columns: {error}") from None
    columns = Columns(settings.data.columns or {})
    if columns.are_ranked:
        raise ValueError("--columns names image, and relabelling needs pairs: ranked images have an order already")
    return columns


def relabel_missing(options: argparse.Namespace, columns: Columns, state: PartialState) -> None:
    """Relabel every file that isn't there yet. Every process calls it and makes its share of the files."""
    files = processes.agree(input_files(options.data, options.output, columns) if state.is_main_process else None)
    with processes.one_first(state.is_main_process):  # it downloads, the others find the files
        version = scorer_version(options.scorer, options.weights)
    processes.refuse_differences({options.scorer: version}, "Give every machine the same files")
    with only_run([options.output], "relabel.py", is_main=state.is_main_process):
        todo: dict[Path, dict] = {}
        if state.is_main_process:
            made_by = {file: origin(file, version, options.tie_threshold, columns) for file in files}
            todo = {file: by for file, by in made_by.items() if not is_done(options.output / file.name, by)}
        todo = processes.agree(todo)
        counts: Counter[str] = Counter()
        if todo:
            device = choose_device(options.device, state.device)
            scorer = load_scorer(options.scorer, device, options.weights)
            order = list(todo)
            with Progress(desc="relabel", total=len(todo), unit="file", disable=not state.is_main_process) as progress:
                for number in processes.deal("files", range(len(order))):
                    file = order[number]
                    try:
                        target, by = options.output / file.name, todo[file]
                        counts += relabel(file, target, columns, scorer, by, options.batch_size)
                    except (pa.ArrowException, UnicodeDecodeError) as error:
                        raise ValueError(f"{file} can't be read: {error}") from error
                    progress.update(number + 1 - progress.n)  # earlier ones are another process's, or done
                progress.update(len(order) - progress.n)
        counts = sum(processes.gather(counts), Counter())
    if state.is_main_process:
        print(f"{len(files)} files in {options.output}, {len(todo)} of them made now")
        for name in ("chosen by score", "tie", "unreadable", "agrees with the label", "contradicts the label"):
            if todo:
                print(f"  {name}: {counts[name]:,}")


def input_files(patterns: list[str], output: Path, columns: Columns) -> list[Path]:
    """The files with rows that the patterns match, checked by their footers. Raises ValueError before any is read."""
    matches = {pattern: matching(pattern) for pattern in patterns}
    if empty := [pattern for pattern in patterns if not matches[pattern]]:
        raise ValueError(f"--data: no file matches {', '.join(empty)}")
    files = list(dict.fromkeys(file for pattern in patterns for file in matches[pattern]))
    if twice := [name for name, count in Counter(file.name for file in files).items() if count > 1]:
        raise ValueError(
            f"--data: several files are called {twice[0]}; relabel each folder into an --output of its own"
        )
    for file in files:
        if file.resolve().parent == output.resolve():
            raise ValueError(
                f"--output {output} is the folder of {file.name}; choose another, labels are not overwritten"
            )
        schema = parquet_schema(file)
        unlabelled = [name for name in columns.required if name != "label_0"]
        columns.require(schema.names, str(file), unlabelled)
        own = {column: name for name, column in columns.names(schema.names).items()}
        if repeated := [name for name, count in Counter(schema.names).items() if count > 1]:
            raise ValueError(f"{file} has several columns called {repeated[0]!r}; remove all but one")
        if kind_of(schema.field(own["caption"]).type) not in ("text", "nothing"):
            raise ValueError(
                f"{file}: column {own['caption']} must hold text, it holds {schema.field(own['caption']).type}"
            )
        check_images({own[name]: schema.field(own[name]).type for name in IMAGE_COLUMNS}, str(file))
    if not (filled := [file for file in files if parquet_rows(file)]):
        raise ValueError(f"--data: no file has any row, {files[0]} for one")
    return filled


def origin(file: Path, scorer: str, tie_threshold: float, columns: Columns) -> dict:
    """What decides the labels of a file's pairs, as it is written into the new file."""
    return {
        "scorer": scorer,
        "tie_threshold": tie_threshold,
        "mapping": columns.key,
        "source": footer_sha256(file),
    }


def footer_sha256(file: Path) -> str:
    """Tells a parquet file from an edited one: its footer has the sizes of all columns' pieces, and text's extremes."""
    with reading(file), file.open("rb") as opened:
        opened.seek(-8, os.SEEK_END)
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(opened.read(length)).hexdigest()


def is_done(path: Path, made_by: dict) -> bool:
    """Whether a file exists already. Raises ValueError if it was made by or from something else."""
    if not path.exists():
        return False
    metadata = parquet_schema(path).metadata or {}
    expected = {name: str(value).encode() for name, value in made_by.items()}
    other = [name for name, value in expected.items() if metadata.get(name.encode(), b"") != value]
    if other:
        named = " and ".join(other).replace("_", "-")
        raise ValueError(f"{path} was made with another {named}; choose another --output, or remove it")
    return True


def relabel(
    source: Path, target: Path, columns: Columns, scorer: Scorer, made_by: dict, batch_size: int
) -> Counter[str]:
    """Write one file's pairs with new labels, whole or not at all. Returns counts of the outcomes."""
    counts: Counter[str] = Counter()
    with replacing(target, "wb") as file:
        writer = None
        for table in _tables(source):
            table = with_canonical_names(table, columns, source)
            scores = score_pairs(table, scorer, batch_size)
            labels = new_labels(scores, made_by["tie_threshold"])
            counts += count(table, scores, labels)
            table = with_new_labels(table, scores, labels)
            metadata = {name.encode(): str(value).encode() for name, value in made_by.items()}
            table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
        assert writer is not None, "input_files leaves out files without rows"
        writer.close()
    return counts


def _tables(source: Path) -> Iterator[pa.Table]:
    """A file's rows in batches. Raises StorageError where they can't be read."""
    with reading(source):
        for batch in pq.ParquetFile(source).iter_batches(batch_size=ROWS_AT_ONCE):
            yield pa.Table.from_batches([batch])


def with_canonical_names(table: pa.Table, columns: Columns, source: Path) -> pa.Table:
    """The pairs with Pick-a-Pic's columns, and labels where votes or the images' columns say which is preferred."""
    names = columns.names(table.column_names)
    kept = [name for name in table.column_names if name in names or name not in names.values()]
    table = table.select(kept).rename_columns([names.get(name, name) for name in kept])
    if columns.are_oriented or VOTE_COLUMNS[0] in columns.given:
        for side, labels in enumerate(labels_of(table, columns, str(source))):
            table = with_column(table, f"label_{side}", pa.array(labels, from_pandas=True))
    return table


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """A table with a column at its end, in place of one of that name."""
    return (table.drop_columns([name]) if name in table.column_names else table).append_column(name, values)


def with_new_labels(table: pa.Table, scores: np.ndarray, labels: np.ndarray) -> pa.Table:
    """The pairs with these labels and scores instead of their own; the first labels are kept as human_label."""
    for side in (0, 1):
        if f"label_{side}" in table.column_names and f"human_label_{side}" not in table.column_names:
            table = table.append_column(f"human_label_{side}", table.column(f"label_{side}"))
        for name, values in ((f"label_{side}", labels), (f"score_{side}", scores)):
            table = with_column(table, name, pa.array(values[:, side]))
    if "has_label" in table.column_names:  # what had none has one now
        column = table.column_names.index("has_label")
        table = table.set_column(column, "has_label", pa.array(np.ones(len(table), dtype=bool)))
    return table


def score_pairs(table: pa.Table, scorer: Scorer, batch_size: int) -> np.ndarray:
    """Scores (rows, 2) float64; NaN for a pair without caption or with an image that can't be read."""
    scores = np.full((len(table), 2), np.nan)
    cells, images, captions = [], [], []
    for row, side, image, caption in _readable(table):
        cells.append((row, side))
        images.append(image)
        captions.append(caption)
    for cell, score in zip(cells, scorer.score(images, captions, batch_size), strict=True):
        scores[cell] = score
    scores[np.isnan(scores).any(axis=1)] = np.nan
    return scores


def _readable(table: pa.Table) -> Iterator[tuple]:
    for row, record in enumerate(table.select([*IMAGE_COLUMNS, "caption"]).to_pylist()):
        for side in (0, 1):
            try:
                if record["caption"] is not None:
                    yield row, side, decode_rgb(record[f"jpg_{side}"]), record["caption"]
            except UnreadableImageError:
                continue


def new_labels(scores: np.ndarray, tie_threshold: float) -> np.ndarray:
    """Labels (rows, 2): 1 for the image with the higher score, 0 for the other; ½ each for a tie or missing scores."""
    gap = scores[:, 0] - scores[:, 1]
    first = np.where(np.isnan(gap) | (np.abs(gap) <= tie_threshold), 0.5, (gap > 0).astype(float))
    return np.stack([first, 1 - first], axis=1)


def count(table: pa.Table, scores: np.ndarray, labels: np.ndarray) -> Counter:
    unreadable, decided = np.isnan(scores).any(axis=1), labels[:, 0] != 0.5
    counts = {"unreadable": unreadable, "tie": ~decided & ~unreadable, "chosen by score": decided}
    before = next((name for name in ("human_label_0", "label_0") if name in table.column_names), None)
    if before is not None:
        human = np.array([as_number(value) for value in table.column(before).to_pylist()])
        counts["agrees with the label"] = decided & (human == labels[:, 0])
        counts["contradicts the label"] = decided & (human == 1 - labels[:, 0])
    return Counter({name: int(rows.sum()) for name, rows in counts.items()})


def as_number(value: Any) -> float:
    """A label as a number; NaN where it is missing or not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return np.nan


if __name__ == "__main__":
    sys.exit(main())
