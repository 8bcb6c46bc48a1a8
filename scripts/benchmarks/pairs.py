"""Preference pairs for measurements, in each supported layout; images are about as hard to decode as photographs."""

import csv
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

WORDS = ("a", "photo", "of", "cat", "dog", "castle", "red", "blue", "moon", "robot", "on", "the", "beach")


class Pair(NamedTuple):
    number: int
    images: tuple[bytes, bytes]  # JPEG, the first one preferred
    caption: str


def make_image(rng: np.random.Generator, side: int) -> Image.Image:
    """A square image, smooth with some noise."""
    rows, columns = np.mgrid[0:side, 0:side] / side
    waves = [np.sin(2 * np.pi * (rng.uniform(0.5, 4) * rows + rng.uniform(0.5, 4) * columns)) for _ in range(3)]
    pixels = 127.5 + 100 * np.stack(waves, -1) + rng.normal(0, 6, (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_caption(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, 10))


def make_pairs(count: int, side: int) -> list[Pair]:
    """Pairs of images of `side` pixels; no two images and hardly any captions are equal."""
    rng = np.random.default_rng(0)
    return [
        Pair(number, (_jpeg(make_image(rng, side)), _jpeg(make_image(rng, side))), make_caption(rng))
        for number in range(count)
    ]


def write_parquet(folder: Path, pairs: list[Pair]) -> str:
    """One file in Pick-a-Pic's columns. Returns what `data.path` should be."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "jpg_0": pair.images[0],
            "jpg_1": pair.images[1],
            "label_0": 1.0,
            "label_1": 0.0,
            "caption": pair.caption,
            "ranking_id": pair.number,
            "image_0_uid": f"{pair.number}-0",
            "image_1_uid": f"{pair.number}-1",
        }
        for pair in pairs
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=100)
    return str(folder / "train.parquet")


def write_folder(folder: Path, pairs: list[Pair]) -> str:
    """Image files and pairs.csv. Returns what `data.path` should be."""
    folder.mkdir(parents=True)
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        listing = csv.writer(file)
        listing.writerow(("chosen", "rejected", "caption"))
        for pair in pairs:
            names = [f"{pair.number:06d}_{side}.jpg" for side in (0, 1)]
            for name, content in zip(names, pair.images, strict=True):
                (folder / name).write_bytes(content)
            listing.writerow((*names, pair.caption))
    return str(folder)


def write_webdataset(folder: Path, pairs: list[Pair]) -> str:
    """One tar. Returns what `data.path` should be."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "train-000.tar", "w") as tar:
        for pair in pairs:
            for ending, content in _members(pair):
                member = tarfile.TarInfo(f"{pair.number:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(folder / "train-000.tar")


WRITERS: dict[str, Callable[[Path, list[Pair]], str]] = {
    "parquet": write_parquet,
    "folder": write_folder,
    "webdataset": write_webdataset,
}
"""By the name that `data.source` has for it."""


def _members(pair: Pair) -> Iterator[tuple[str, bytes]]:
    yield "jpg_0.jpg", pair.images[0]
    yield "jpg_1.jpg", pair.images[1]
    yield "label_0.txt", b"1"
    yield "label_1.txt", b"0"
    yield "caption.txt", pair.caption.encode()


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
