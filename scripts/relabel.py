"""AI feedback: relabel preference pairs with a scorer, into new parquet files in the same columns.

    python scripts/relabel.py --data 'pickapic/train-*.parquet' --scorer pickscore --output relabelled
    python train_xdpo.py --config configs/xdpo_sd15.yaml data.source=parquet data.path='relabelled/*.parquet'

Of each pair the image with the higher score becomes the preferred one (Diffusion-DPO's AI feedback, Section 5.3). New
columns: score_0 and score_1, from which loss.margin_weight weights the pairs where it is asked for, and the labels that
were there as human_label_0 and human_label_1. Scores that differ by no more than --tie-threshold are a tie, which
training leaves out; so is a pair whose images cannot both be read. The same command goes on where it was interrupted: a
file is whole or absent.
"""

import argparse
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from xdpo.data.images import UnreadableImageError, decode_rgb
from xdpo.files import reading, replacing
from xdpo.scorers import Scorer, load_scorer, scorer_version

NEEDED = ("jpg_0", "jpg_1", "caption")
ROWS_AT_ONCE = 64


def main(arguments: list[str] | None = None) -> int:
    """Relabel every file that isn't there yet. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="parquet files or globs")
    parser.add_argument("--scorer", required=True, help="as for evaluate.py: pickscore, hpsv2, …, or file.py:Class")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new files, under the same names")
    parser.add_argument("--tie-threshold", type=float, default=0.0, help="scores this close are a tie (default: 0)")
    parser.add_argument("--batch-size", type=int, default=16, help="images scored at once (default: 16)")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--weights", type=Path, help="folder of the scorer's weights, for machines without a hub")
    options = parser.parse_args(arguments)
    try:
        files = input_files(options.data, options.output)
        made_by = {"scorer": scorer_version(options.scorer, options.weights), "tie_threshold": options.tie_threshold}
        todo = [file for file in files if not is_done(options.output / file.name, made_by)]
        counts: Counter[str] = Counter()
        if todo:
            options.output.mkdir(parents=True, exist_ok=True)
            device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
            scorer = load_scorer(options.scorer, device, options.weights)
            for file in tqdm(todo, desc="relabel", unit="file"):
                counts += relabel(file, options.output / file.name, scorer, made_by, options.batch_size)
        print(f"{len(files)} files in {options.output}, {len(todo)} of them made now")
        for name in ("chosen by score", "tie", "unreadable", "agrees with the label", "contradicts the label"):
            if todo:
                print(f"  {name}: {counts[name]:,}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def input_files(patterns: list[str], output: Path) -> list[Path]:
    """The files meant, checked by their footers. Raises ValueError naming what is wrong, before any is read."""
    files = [Path(name) for pattern in patterns for name in sorted(glob.glob(os.path.expanduser(pattern)))]
    if not files:
        raise ValueError(f"--data: no file matches {', '.join(patterns)}")
    if twice := [name for name, count in Counter(file.name for file in files).items() if count > 1]:
        raise ValueError(
            f"--data: several files are called {twice[0]}; relabel each folder into an --output of its own"
        )
    for file in files:
        if file.resolve().parent == output.resolve():
            raise ValueError(
                f"--output {output} is the folder of {file.name}; choose another, labels are not overwritten"
            )
        try:
            columns = pq.read_schema(file).names
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file} is not a readable parquet file: {error}") from error
        if missing := [name for name in NEEDED if name not in columns]:
            raise ValueError(
                f"{file} lacks the columns {', '.join(missing)}: relabelling needs {', '.join(NEEDED)}; "
                f"it has {', '.join(columns)}"
            )
    return files


def is_done(path: Path, made_by: dict) -> bool:
    """Whether a file is there already. Raises ValueError where another scorer or threshold made it."""
    if not path.exists():
        return False
    found = pq.read_schema(path).metadata or {}
    wanted = {name.encode(): str(value).encode() for name, value in made_by.items()}
    if any(found.get(name) != value for name, value in wanted.items()):
        raise ValueError(f"{path} was made by another scorer or --tie-threshold; choose another --output")
    return True


def relabel(source: Path, target: Path, scorer: Scorer, made_by: dict, batch_size: int) -> Counter:
    """Write one file's pairs with new labels, whole or not at all; returns what became of them."""
    counts: Counter[str] = Counter()
    with replacing(target, "wb") as file:
        writer = None
        for table in _tables(source):
            scores = score_pairs(table, scorer, batch_size)
            labels = new_labels(scores, made_by["tie_threshold"])
            counts += count(table, scores, labels)
            for side in (0, 1):
                if f"label_{side}" in table.column_names:
                    place = table.column_names.index(f"label_{side}")
                    table = table.append_column(f"human_label_{side}", table.column(place)).remove_column(place)
                table = table.append_column(f"label_{side}", pa.array(labels[:, side]))
                table = table.append_column(f"score_{side}", pa.array(scores[:, side]))
            if "has_label" in table.column_names:  # what had none has one now
                place = table.column_names.index("has_label")
                table = table.set_column(place, "has_label", pa.array(np.ones(len(table), dtype=bool)))
            metadata = {name: str(value) for name, value in made_by.items()}
            table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
        if writer is None:
            raise ValueError(f"{source} has no rows")
        writer.close()
    return counts


def _tables(source: Path) -> Iterator[pa.Table]:
    """A file's rows, some at a time. Raises StorageError where they can't be read."""
    with reading(source):
        for batch in pq.ParquetFile(source).iter_batches(batch_size=ROWS_AT_ONCE):
            yield pa.Table.from_batches([batch])


def score_pairs(table: pa.Table, scorer: Scorer, batch_size: int) -> np.ndarray:
    """(rows, 2) float64; NaN for a pair without caption or with an image that can't be read."""
    scores = np.full((len(table), 2), np.nan)
    places, images, captions = [], [], []
    for row, side, image, caption in _readable(table):
        places.append((row, side))
        images.append(image)
        captions.append(caption)
    for place, score in zip(places, scorer.score(images, captions, batch_size), strict=True):
        scores[place] = score
    scores[np.isnan(scores).any(axis=1)] = np.nan
    return scores


def _readable(table: pa.Table) -> Iterator[tuple]:
    for row, record in enumerate(table.select(list(NEEDED)).to_pylist()):
        for side in (0, 1):
            try:
                if record["caption"] is not None:
                    yield row, side, decode_rgb(record[f"jpg_{side}"]), record["caption"]
            except UnreadableImageError:
                continue


def new_labels(scores: np.ndarray, tie_threshold: float) -> np.ndarray:
    """(rows, 2): 1 and 0 for the image that scores more and the other; ½ each for a tie or missing scores."""
    gap = scores[:, 0] - scores[:, 1]
    first = np.where(np.isnan(gap) | (np.abs(gap) <= tie_threshold), 0.5, (gap > 0).astype(float))
    return np.stack([first, 1 - first], axis=1)


def count(table: pa.Table, scores: np.ndarray, labels: np.ndarray) -> Counter:
    unreadable, decided = np.isnan(scores).any(axis=1), labels[:, 0] != 0.5
    counts = {"unreadable": unreadable, "tie": ~decided & ~unreadable, "chosen by score": decided}
    if "label_0" in table.column_names:
        human = table.column("label_0").to_numpy().astype(float)
        counts["agrees with the label"] = decided & (human == labels[:, 0])
        counts["contradicts the label"] = decided & (human == 1 - labels[:, 0])
    return Counter({name: int(rows.sum()) for name, rows in counts.items()})


if __name__ == "__main__":
    sys.exit(main())
