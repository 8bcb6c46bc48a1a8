"""Features of images, computed once for each image and network, and kept beside the scores.

```
OUTPUT/features.npz            of CLIP; features_dinov2.npz of DINOv2: version, checksums of images, vectors
       features.parts/*.npz    what a run has embedded so far, by each process its own; merged at the end
```

Each file is written whole, so a kill at any moment loses only the features since the last part.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
import torch

from xdpo import processes
from xdpo.files import reading, replacing, writing
from xdpo.images.reading import Picture
from xdpo.scorers import DEFAULT_EMBEDDER
from xdpo.scorers.loading import embedder_version, load_embedder
from xdpo.scores.scoring import SAVE_SECONDS, Undecodable, default_workers, missing_batches, prepared_batches

Features = dict[str, np.ndarray]  # checksum of an image → its unit vector (D,) float32


def image_features(
    pictures: Sequence[Picture],
    folder: Path,
    *,
    embedder: str,
    device: torch.device,
    batch_size: int,
    workers: int | None = None,
    weights: Path | None = None,
) -> Features:
    """The features of every picture that can be decoded, by checksum. They are kept in `folder`.

    Every process calls it and gets the result. Each writes parts while it embeds; the first one reads and merges them.
    Raises ValueError for weights that are missing, and for features that can't be read, StorageError where none can be
    written.
    """
    files = FeatureFiles(folder, embedder, embedder_version(embedder, weights))
    is_first = processes.rank() == 0
    known = processes.agree(files.read() if is_first else {})
    batches = missing_batches({str(p.sha256): p for p in pictures}, known, batch_size)
    if is_first:
        print(f"features: {len(pictures):,} images, {sum(map(len, batches)):,} of them to embed")
    if batches:
        workers = default_workers(device) if workers is None else workers
        for share in processes.gather(_embed(files, batches, embedder, device, workers, weights)):
            known |= share
    known = dict(sorted(known.items()))
    if is_first:
        files.close(known, is_new=bool(batches))
    return {str(p.sha256): known[str(p.sha256)] for p in pictures if p.sha256 in known}


def _embed(
    files: "FeatureFiles",
    batches: Sequence[Sequence[Picture]],
    embedder: str,
    device: torch.device,
    workers: int,
    weights: Path | None,
) -> Features:
    """The features of this process's share, which are in parts too."""
    preprocess, embed = load_embedder(embedder, device, weights)
    found: Features = {}
    unsaved: Features = {}
    saved = time.monotonic()
    try:
        for batch in prepared_batches("features", preprocess, batches, workers):
            good = [(str(picture.sha256), item) for picture, item in batch if not isinstance(item, Undecodable)]
            if good:
                vectors = embed([item for _, item in good]).numpy()
                unsaved.update(zip((sha256 for sha256, _ in good), vectors, strict=True))
            if time.monotonic() - saved > SAVE_SECONDS:
                files.write_part(unsaved)
                found |= unsaved
                unsaved, saved = {}, time.monotonic()
    finally:
        files.write_part(unsaved)
    return found | unsaved


class FeatureFiles:
    """The files of one embedder's features in a folder. Who merges them has the folder's lock."""

    def __init__(self, folder: Path, embedder: str, version: str):
        name = "features" if embedder == DEFAULT_EMBEDDER else f"features_{embedder}"
        self.path, self.parts, self.version = folder / f"{name}.npz", folder / f"{name}.parts", version

    def read(self) -> Features:
        """The features of this version in all files. Raises ValueError for a file that can't be read."""
        return {sha256: vector for path in self._written() for sha256, vector in self._read(path).items()}

    def write_part(self, features: Mapping[str, np.ndarray]) -> None:
        """Write features as one more file. Raises StorageError."""
        if features:
            with writing(self.parts):
                self.parts.mkdir(parents=True, exist_ok=True)
            self._write(self.parts / f"{uuid4().hex}.npz", features)

    def close(self, features: Mapping[str, np.ndarray], *, is_new: bool) -> None:
        """Merge everything into one file, unless that has all already, and remove the parts. Raises StorageError."""
        parts = list(self.parts.glob("*")) if self.parts.is_dir() else []
        if features and (is_new or parts):
            self._write(self.path, features)
        for part in parts:
            part.unlink()
        if self.parts.is_dir():
            self.parts.rmdir()

    def _written(self) -> Iterator[Path]:
        yield from (path for path in (self.path, *sorted(self.parts.glob("*.npz"))) if path.is_file())

    def _write(self, path: Path, features: Mapping[str, np.ndarray]) -> None:
        with replacing(path, "wb") as file:
            checksums, vectors = np.array(list(features)), np.stack(list(features.values()))
            np.savez(file, version=self.version, sha256=checksums, features=vectors)

    def _read(self, path: Path) -> Features:
        try:
            with reading(path), np.load(path, allow_pickle=False) as saved:
                if str(saved["version"]) != self.version:
                    return {}
                return dict(zip(saved["sha256"].tolist(), saved["features"], strict=True))
        except (ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"{path} can't be read ({error}); remove it: its features are then computed anew"
            ) from None
