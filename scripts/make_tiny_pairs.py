"""Draw the embedded preference pairs: `python scripts/make_tiny_pairs.py` (seconds).

Two flawed renderings per caption and a simulated annotator's choice between them, written as parquet in the exact
schema of Pick-a-Pic v2. The train split holds no scene that `tinyprompts` asks for; the test split holds only
scenes that neither the base nor preference training has seen. A smaller train split is labelled by an annotator of
another taste (`--annotator warm`), for questions about over-optimisation.
"""

import argparse
import io
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from xdpo.files import replacing
from xdpo.paths import user_path
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
) -> tuple[list[dict], float, float]:
    """`count` rows of the schema; the shares of choices against the noiseless utility, and against a second choice."""
    rng, again = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    rows, against, changed, chosen = [], 0, 0, 0
    for index in range(count):
        scene = draw_scene(rng)
        first, second = (render(scene, rng, random_flaws(rng, MISALIGNED_SHARE, SPOILT_SHARE)) for _ in range(2))
        label = annotator.choose(first, second, rng)
        if label != 0.5:
            chosen += 1
            against += (label == 1.0) != (annotator.utility_of(first) > annotator.utility_of(second))
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
    return rows, against / max(chosen, 1), changed / max(chosen, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=user_path, default=Path("assets/tiny/pairs"))
    parser.add_argument("--train", type=int, default=3_000, help="rows of the train split")
    parser.add_argument("--test", type=int, default=300, help="rows of the test split")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--annotator", choices=ANNOTATORS, default="reader", help="who chooses")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    splits = {"train": (options.train, world.training_scene), "test": (options.test, held_out_scene)}
    for number, (name, (count, draw_scene)) in enumerate(splits.items()):
        rows, against, changed = draw_pairs(count, options.seed + number, draw_scene, ANNOTATORS[options.annotator])
        path = options.out / f"{name}.parquet"
        with replacing(path, "wb") as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, compression="zstd")
        ties = sum(row["label_0"] == 0.5 for row in rows)
        print(
            f"{path}: {count} pairs, {ties} ties, {against:.1%} of choices against the noiseless utility, "
            f"{changed:.1%} against a second choice of the same annotator, {path.stat().st_size / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    main()
