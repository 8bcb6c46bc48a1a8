"""What is encoded into a cache of examples: its distinct images and captions, read, encoded and kept shard by shard."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from xdpo.batch import Tokens
from xdpo.cache import CacheError, ExamplePlan, Shards
from xdpo.cache.examples import LATENTS, SIZES
from xdpo.config import Config
from xdpo.data import PairTable
from xdpo.data.examples import Tokenize
from xdpo.data.images import UnreadableImageError, decode_rgb, size_and_crop, square_pixels
from xdpo.data.remote import RemoteError
from xdpo.data.streaming import StreamedImages
from xdpo.families import PipelineParts


class _Images(Dataset):
    """Pixels of the distinct images, (orientations, 3, R, R) each, and their sizes, (orientations, 4)."""

    def __init__(self, table: PairTable, rows: np.ndarray, sides: np.ndarray, resolution: int, orientations: int):
        self.images, self.rows, self.sides = table.dataset.images, rows, sides
        self.resolution, self.orientations = resolution, orientations

    def __getitem__(self, record: int) -> dict[str, Any]:
        readable, flips = True, range(self.orientations)
        try:
            image = decode_rgb(self.images.cell(int(self.rows[record]), int(self.sides[record])))
            pixels = torch.stack([square_pixels(image, self.resolution, flip=bool(flip)) for flip in flips])
            sizes = torch.stack([size_and_crop(image, self.resolution, flip=bool(flip)) for flip in flips])
        except UnreadableImageError:
            readable, pixels = False, torch.zeros(self.orientations, 3, self.resolution, self.resolution)
            sizes = torch.zeros(self.orientations, 4)
        return {"record": record, "readable": readable, "pixel_values": pixels, SIZES: sizes}


class _Captions(Dataset):
    """Token ids of the distinct captions, (L,) each."""

    def __init__(self, folder: Path, tokenize: Tokenize):
        import pyarrow.parquet as pq

        self.captions, self.tokenize = pq.read_table(folder / "prompts.parquet")["caption"].combine_chunks(), tokenize

    def __getitem__(self, record: int) -> dict[str, Any]:
        return {"record": record, "readable": True, "tokens": self.tokenize(self.captions[record].as_py())[0]}


@dataclass(frozen=True)
class _Copies:
    """Which copies of remote files are needed, while their images are encoded into shards.

    rows: of each record, ascending. shards: of each encoding, of the same records and equally many. keep: whether
    copies stay when they aren't needed any more.
    """

    images: StreamedImages
    rows: np.ndarray
    shards: Sequence[Shards]
    keep: bool
    failures: dict[int, RemoteError] = field(default_factory=dict)  # by file; not tried twice in one start

    def bring(self, record_ids: list[int]) -> None:
        """Have the files of some records here, and fetch the next ones in the background. Raises RemoteError."""
        numbers = sorted({self.images.file_of(row) for row in self.rows[record_ids].tolist()})
        for number in numbers:
            if number in self.failures:
                raise self.failures[number]
            try:
                self.images.bring([number])
            except RemoteError as error:
                self.failures[number] = error
                raise
        self.images.fetch_ahead(numbers[-1], self.is_needed)

    def is_needed(self, number: int) -> bool:
        """Whether a shard that isn't finished has an image of a file."""
        file = self.images.files[number]
        first, end = np.searchsorted(self.rows, [file.start, file.end]).tolist()
        per_shard = self.shards[0].per_shard
        numbers = range(first // per_shard, -(-end // per_shard)) if end > first else range(0)
        return not all(shards.is_finished(number) for shards in self.shards for number in numbers)

    def let_go(self) -> None:
        if not self.keep:
            self.images.let_go(self.is_needed)


@dataclass(frozen=True)
class Kind:
    """What is encoded at once, images or captions: the shards of each encoding, the data, the encoder, its batch size.

    The shards are those of the same records, and equally many.
    """

    name: str
    shards: Mapping[str, Shards]
    records: Dataset
    encode: Callable[[dict[str, Any]], dict[str, np.ndarray]]
    batch_size: int
    copies: _Copies | None = None  # of remote files

    def bring(self, record_ids: list[int]) -> None:
        """Have what some records are encoded from at hand. Raises RemoteError."""
        if self.copies is not None:
            self.copies.bring(record_ids)

    def let_go(self) -> None:
        """Let go what is not needed any more."""
        if self.copies is not None:
            self.copies.let_go()

    @property
    def count(self) -> int:
        return self._any.count

    @property
    def num_bytes(self) -> int:
        return sum(shards.num_bytes for shards in self.shards.values())

    @property
    def _any(self) -> Shards:
        return next(iter(self.shards.values()))

    def records_of(self, shard: int) -> range:
        return self._any.records_of(shard)

    def unfinished(self) -> list[int]:
        """The numbers at which a shard is missing."""
        numbers = range(len(self._any))
        return [number for number in numbers if not all(kind.is_finished(number) for kind in self.shards.values())]

    def encoded(
        self, record_ids: list[int], num_workers: int = 0
    ) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]:
        """Encodings of some records, batch by batch, each with `record` and `readable` of its rows."""
        batches = [record_ids[start : start + self.batch_size] for start in range(0, len(record_ids), self.batch_size)]
        # The last batch is filled up, because rounding depends on the batch's shape.
        full = [batch + batch[-1:] * (self.batch_size - len(batch)) for batch in batches]
        loader = DataLoader(self.records, batch_sampler=full, num_workers=num_workers, generator=torch.Generator())
        for batch, records in zip(loader, batches, strict=True):
            rows = slice(len(records))
            encoded = {name: values[rows] for name, values in self.encode(batch).items()}
            yield encoded, {"record": records, "readable": batch["readable"][rows].tolist()}


def kinds_of(
    folder: Path,
    table: PairTable,
    plan: ExamplePlan,
    parts: PipelineParts,
    settings: Config,
    accelerator: Accelerator,
) -> list[Kind]:
    """Images, then captions. The encoders are moved to the accelerator's device."""
    import pyarrow.parquet as pq

    for module in parts.encoders:
        module.to(accelerator.device)
    names = pq.read_table(folder / "images.parquet")
    rows, sides = names["row"].to_numpy(), names["side"].to_numpy()
    orientations, pairs_at_once = plan.latent_shape[0], settings.train.micro_batch_pairs
    images = _Images(table, rows, sides, settings.data.resolution, orientations)
    captions = _Captions(folder, parts.tokenize)
    images_at_once = max(1, 2 * pairs_at_once // orientations)
    shards, copies = plan.images(folder), None
    if isinstance(table.dataset.images, StreamedImages):
        copies = _Copies(table.dataset.images, rows, tuple(shards.values()), settings.cache.keep_source)
    return [
        Kind(
            "latents",
            shards,
            images,
            lambda batch: _encode_images(parts, batch, plan, accelerator),
            images_at_once,
            copies,
        ),
        Kind(
            "text",
            plan.conditioning(folder),
            captions,
            lambda batch: _encode_captions(parts, batch, accelerator),
            pairs_at_once,
        ),
    ]


def _encode_images(
    parts: PipelineParts, batch: dict, plan: ExamplePlan, accelerator: Accelerator
) -> dict[str, np.ndarray]:
    """Latents (N, orientations, moments, C, h, w) and, where the plan has them, sizes (N, orientations, 4), float32."""
    pixels = batch["pixel_values"]
    with accelerator.autocast():
        moments = parts.encode_images(pixels.flatten(0, 1).to(accelerator.device))
    present = [moment for moment in (moments.means, moments.stds) if moment is not None]
    latents = torch.stack(present[: plan.latent_shape[1]], dim=1).cpu()
    if not torch.isfinite(latents).all():
        raise CacheError(
            f"the autoencoder gives latents that are not finite for image records {batch['record'].tolist()}; "
            "set compute.precision to bf16 or fp32"
        )
    sizes = {SIZES: batch[SIZES].numpy()} if plan.has_sizes else {}
    return {LATENTS: latents.unflatten(0, pixels.shape[:2]).numpy(), **sizes}


def _encode_captions(parts: PipelineParts, batch: dict, accelerator: Accelerator) -> dict[str, np.ndarray]:
    """(N, 1, …) float32 for each entry."""
    with accelerator.autocast():
        tokens = Tokens({name: ids.to(accelerator.device) for name, ids in batch["tokens"].items()})
        conditioning = parts.encode_captions(tokens)
    return {name: values.float().cpu().unsqueeze(1).numpy() for name, values in conditioning.items()}
