"""Draw the embedded preference pairs: `python scripts/make_tiny_pairs.py` (seconds).

Two flawed renderings per caption and a simulated annotator's choice between them, written as parquet in the exact
schema of Pick-a-Pic v2. The train split holds no scene that `tinyprompts` asks for; the test split holds only
scenes that neither the base nor preference training has seen. A smaller train split is labelled by an annotator of
another taste (`--annotator warm`), for questions about over-optimisation.

`--rank SCORER …` writes nothing. It draws the test pairs, without ties, and says which share of the choices each scorer
agrees with, and the utility without its noise, which no scorer can be expected to beat. More pairs are narrower
intervals: `--test 5000 --rank runs/tiny/reward/reward_model tiny_reward`.
"""

import argparse
import io
import os
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

from xdpo.files import replacing
from xdpo.paths import user_path
from xdpo.scorers.interface import Scorer
from xdpo.scorers.loading import load_scorer
from xdpo.scores.statistics import bootstrap_interval, wilson_interval
from xdpo.tiny import world
from xdpo.tiny.annotator import ANNOTATORS, Annotator, random_flaws, render

MISALIGNED_SHARE, SPOILT_SHARE = 0.35, 0.6  # of the images
SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)


def jpeg(pixels: np.ndarray) -> bytes:
    """JPEG bytes at quality 85 without chroma subsampling, which would smear colours over the edges of shapes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85, subsampling=0, optimize=True)
    return buffer.getvalue()


def held_out_scene(rng: np.random.Generator) -> world.Scene:
    """A random scene that only tests may use."""
    while not world.is_held_out(scene := world.random_scene(rng)):
        pass
    return scene


def draw_pairs(
    count: int, seed: int, draw_scene: Callable[[np.random.Generator], world.Scene], annotator: Annotator
) -> tuple[list[dict], np.ndarray, float]:
    """`count` rows of the schema, their first image's utility minus the second's (count,), and how choices repeat.

    The last is the share of choices that go against the same annotator's second choice.
    """
    rng, again = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    rows, gaps, changed, chosen = [], np.empty(count), 0, 0
    for index in range(count):
        scene = draw_scene(rng)
        first, second = (render(scene, rng, random_flaws(rng, MISALIGNED_SHARE, SPOILT_SHARE)) for _ in range(2))
        gaps[index] = annotator.utility_of(first) - annotator.utility_of(second)
        label = annotator.choose(first, second, rng)
        if label != 0.5:
            chosen += 1
            changed += label != annotator.choose(first, second, again)
        uids = [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(2)]
        rows.append(
            {
                "are_different": True,
                "best_image_uid": {1.0: uids[0], 0.0: uids[1], 0.5: "tie"}[label],
                "caption": world.caption(scene, int(rng.integers(3))),
                "created_at": datetime(2025, 7, 23, tzinfo=UTC).replace(tzinfo=None),
                "has_label": True,
                "image_0_uid": uids[0],
                "image_0_url": "",
                "image_1_uid": uids[1],
                "image_1_url": "",
                "jpg_0": jpeg(first.pixels),
                "jpg_1": jpeg(second.pixels),
                "label_0": label,
                "label_1": 1 - label,
                "model_0": "drawn",
                "model_1": "drawn",
                "ranking_id": seed * 1_000_000 + index,
                "user_id": 0,
                "num_example_per_prompt": 1,
                "__index_level_0__": index,
            }
        )
    return rows, gaps, changed / max(chosen, 1)


def agreement(gaps: np.ndarray, rows: Sequence[dict]) -> np.ndarray:
    """1 for each choice that gaps of first − second agree with, 0 for others, without ties: (choices,)."""
    labels = np.array([row["label_0"] for row in rows])
    return ((gaps > 0) == (labels == 1.0))[labels != 0.5].astype(np.float64)


def rank(rows: Sequence[dict], gaps: np.ndarray, scorers: Sequence[Scorer]) -> None:
    """Print how often the utility and each scorer agree with the choices, with 95 % intervals."""
    ceiling = agreement(gaps, rows)
    low, high = wilson_interval(ceiling.sum(), len(ceiling))
    print(f"{len(ceiling)} choices; with the noiseless utility agree {ceiling.mean():.1%} [{low:.1%}, {high:.1%}]")
    for scorer in scorers:
        captions = [row["caption"] for row in rows]
        first, second = (
            np.array(scorer.score([Image.open(io.BytesIO(row[image])) for row in rows], captions))
            for image in ("jpg_0", "jpg_1")
        )
        right = agreement(first - second, rows)
        low, high = wilson_interval(right.sum(), len(right))
        worst, best = bootstrap_interval(right - ceiling)
        print(
            f"{scorer.name} {right.mean():.1%} [{low:.1%}, {high:.1%}], minus the utility's "
            f"{(right - ceiling).mean():+.1%} [{worst:+.1%}, {best:+.1%}]"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=user_path, default=Path("assets/tiny/pairs"))
    parser.add_argument("--train", type=int, default=3_000, help="rows of the train split")
    parser.add_argument("--test", type=int, default=300, help="rows of the test split")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--annotator", choices=ANNOTATORS, default="reader", help="who chooses")
    parser.add_argument("--rank", nargs="+", metavar="SCORER", help="measure scorers on the test pairs instead")
    options = parser.parse_args()
    annotator = ANNOTATORS[options.annotator]
    splits = {
        "train": (options.train, options.seed, world.training_scene),
        "test": (options.test, options.seed + 1, held_out_scene),
    }
    if options.rank:
        try:
            scorers = [load_scorer(name) for name in options.rank]
        except ValueError as error:
            parser.error(str(error))
        rows, gaps, _ = draw_pairs(*splits["test"], annotator)
        return rank(rows, gaps, scorers)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (count, seed, draw_scene) in splits.items():
        rows, gaps, changed = draw_pairs(count, seed, draw_scene, annotator)
        path = options.out / f"{name}.parquet"
        with replacing(path, "wb") as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, compression="zstd")
        ties, against = sum(row["label_0"] == 0.5 for row in rows), 1 - agreement(gaps, rows).mean()
        print(
            f"{path}: {count} pairs, {ties} ties, {against:.1%} of choices against the noiseless utility, "
            f"{changed:.1%} against a second choice of the same annotator, {path.stat().st_size / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    main()
