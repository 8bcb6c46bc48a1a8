"""Encoded examples on disk: a latent distribution per distinct image, conditioning per distinct caption, the pairs.

```
FOLDER/
  plan.json            what the cache is made of and how large it is; written first
  pairs.parquet  images.parquet  prompts.parquet     the tables: which image and caption a pair has
  latents_00000.npy …  (images, orientations, moments, C, h, w)
  sizes_00000.npy …    (images, orientations, 4), of families that may be told them
  text_00000.npy …     (prompts, 1, L, D), and so on: a file for each entry of the family's Conditioning
  manifest.json        checksums of all the small files; written last: the cache is finished
```

Latents are the moments of the autoencoder's posterior, before its scaling factor; orientation 1 is the mirrored
image, moment 1 the standard deviation. Caption 0 is the empty one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from xdpo import noise
from xdpo.batch import Batch, Conditioning, LatentMoments, SingleItem
from xdpo.cache.shards import CacheError, Shards, read_json
from xdpo.config import DataConfig
from xdpo.files import file_sha256, reading, write_text

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_BYTES = 128 * 2**20
LATENTS, SIZES = "latents", "sizes"  # the images' shards; the others have the names of the conditioning's entries
PRECISION = "encoders' precision"  # in a plan's key
SOURCE = "source"  # folder of remote files that a cache is filled from; see data.streaming
TABLES = ("pairs.parquet", "images.parquet", "prompts.parquet")


@dataclass(frozen=True)
class ExamplePlan:
    """What a cache holds, fixed before the first image is encoded.

    key: everything that decides the content, by name; a run with another key must not use the cache.
    counts: as data.PairCounts. fingerprint: of the pairs, from data.PairTable; of remote files it is known at the end.
    """

    key: Mapping[str, Any]
    fingerprint: str
    counts: Mapping[str, int]
    num_pairs: int
    num_images: int
    num_prompts: int
    latent_shape: Sequence[int]  # (orientations, moments, C, h, w)
    conditioning_shapes: Mapping[str, Sequence[int]]  # of one caption, by the entries' names
    scaling_factor: float  # of the autoencoder
    dtype: str
    shift_factor: float = 0.0  # of the autoencoder; the default is for caches older than this field
    has_scores: bool = False  # in pairs.parquet; the default is for caches older than this field
    has_sizes: bool = False  # of each image; the default is for caches older than this field
    shard_bytes: int = SHARD_BYTES
    sources: Mapping[str, Sequence[int]] | None = None  # local file → size and time of change; None: unknown
    tables: Mapping[str, str] = field(default_factory=dict)  # file → SHA-256

    def images(self, folder: Path) -> dict[str, Shards]:
        """The shards of the images' latents, and of their sizes if there are any, as float32."""
        shapes = {LATENTS: self.latent_shape} | ({SIZES: (self.latent_shape[0], 4)} if self.has_sizes else {})
        return self._shards(folder, self.num_images, shapes)

    def latents(self, folder: Path) -> Shards:
        return self.images(folder)[LATENTS]

    def conditioning(self, folder: Path) -> dict[str, Shards]:
        """The shards of each entry. A shard of one number holds the same captions in all of them."""
        shapes = {name: (1, *shape) for name, shape in self.conditioning_shapes.items()}
        return self._shards(folder, self.num_prompts, shapes)

    def shards(self, folder: Path) -> list[Shards]:
        """All shards of the cache."""
        return [*self.images(folder).values(), *self.conditioning(folder).values()]

    def _shards(self, folder: Path, count: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, Shards]:
        dtypes = {name: "float32" if name == SIZES else self.dtype for name in shapes}
        record_bytes = sum(math.prod(shape) * np.dtype(dtypes[name]).itemsize for name, shape in shapes.items())
        per_shard = max(1, self.shard_bytes // record_bytes)
        return {
            name: Shards(folder, name, count=count, shape=tuple(shape), dtype=dtypes[name], per_shard=per_shard)
            for name, shape in shapes.items()
        }

    def save(self, folder: Path) -> None:
        fields = asdict(self)
        if not self.has_sizes:  # then the file is as it was before this field: the reference's key depends on its bytes
            del fields["has_sizes"]
        write_text(folder / "plan.json", json.dumps(fields, indent=2))

    @classmethod
    def load(cls, folder: Path) -> "ExamplePlan | None":
        """The plan in a folder, or None where there is none. Raises CacheError for a damaged one."""
        path, remedy = folder / "plan.json", f"remove {folder} and build the cache again"
        with reading(path):
            if not path.is_file():
                return None
        try:
            fields = dict(read_json(path, remedy))
            if "text_shape" in fields:  # from when a cache held one entry, of shape (1, L, D)
                fields["conditioning_shapes"] = {"text": fields.pop("text_shape")[1:]}
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise CacheError(f"{path} is damaged ({error}); {remedy}") from None

    def refuse_another(self, folder: Path, key: Mapping[str, Any]) -> None:
        """Raise CacheError, naming each difference, where a run's key isn't the cache's.

        The precision counts while a cache is being built, so that all of it has one; see `precision_note` for a
        finished one.
        """
        names = [name for name in {**self.key, **key} if self.key.get(name) != key.get(name)]
        if PRECISION in names and (PRECISION not in self.key or is_finished(folder)):
            names.remove(PRECISION)
        if names:
            lines = [f"{name}: {self.key.get(name)} in the cache, {key.get(name)} in this run" for name in names]
            raise CacheError(
                f"cache.examples: {folder} was made from something else:\n  " + "\n  ".join(lines) + "\n"
                "Set these as they were, or name another folder"
            )

    def precision_note(self, precision: str) -> str | None:
        """A sentence where a run would encode in another precision than the examples were encoded in, or None."""
        encoded_in = self.key.get(PRECISION, "a precision that was not noted")
        if encoded_in == precision:
            return None
        return f"the examples were encoded in {encoded_in}, this run would in {precision}: the rounding differs"


class ExampleCache:
    """A finished cache, opened for reading: a table of pairs (data.PairRows) and their encodings.

    Raises CacheError for one that is unfinished, damaged or of another key, naming file or difference; StorageError
    where it can't be read. Nothing is written, so its storage may be read-only.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]):
        plan = ExamplePlan.load(folder)
        if plan is None or not is_finished(folder):
            raise CacheError(f"cache.examples: {folder} holds no finished cache; run scripts/cache_examples.py")
        plan.refuse_another(folder, key)
        for name, checksum in _manifest(folder).items():
            with reading(folder / name):
                current = file_sha256(folder / name)
            if current != checksum:
                damaged = folder if name in (*TABLES, "plan.json") else folder / name
                raise CacheError(f"{folder / name} is damaged; remove {damaged} and build the cache again")
        self.folder, self.plan = folder, plan
        images, self.conditioning = plan.images(folder), plan.conditioning(folder)
        self.latents, self.sizes = images[LATENTS], images.get(SIZES)
        for shards in plan.shards(folder):
            shards.check_files()
        pairs = _read_table(folder / "pairs.parquet")
        self.rows, self._chosen, self._rejected, self._prompt = (
            pairs[name].to_numpy() for name in ("row", "chosen_image", "rejected_image", "prompt")
        )
        self._pair_ids = pairs["pair_id"].combine_chunks()
        self._truncated = _read_table(folder / "prompts.parquet")["truncated"].to_numpy()
        readable = np.ones(plan.num_images, dtype=bool)
        readable[self.latents.unreadable()] = False
        self._readable_images = readable
        self.readable = readable[self._chosen] & readable[self._rejected]
        if not self.readable.any():
            raise CacheError(f"{folder}: no pair has two readable images")

    def __len__(self) -> int:
        return self.plan.num_pairs

    @property
    def counts(self) -> SimpleNamespace:
        """How many of the source's rows were kept or dropped, with the attributes of data.PairCounts."""
        return SimpleNamespace(**self.plan.counts)

    @property
    def fingerprint(self) -> str:
        return self.plan.fingerprint

    @property
    def scores(self) -> np.ndarray | None:
        """(2, N) float64, of each pair's chosen and rejected image, NaN where missing; None where the data had none."""
        if not self.plan.has_scores:
            return None
        pairs = _read_table(self.folder / "pairs.parquet", columns=["chosen_score", "rejected_score"])
        return np.stack([column.to_numpy() for column in pairs.columns])

    def pair_id(self, row: int) -> str:
        """Name of the pair at a row of the source."""
        return self._pair_ids[int(np.searchsorted(self.rows, row))].as_py()

    def captions(self) -> list[str]:
        """The captions of all pairs."""
        return self._prompt_texts.take(self._prompt).to_pylist()

    def caption(self, index: int) -> str:
        """The caption of a pair."""
        return self._prompt_texts[int(self._prompt[index])].as_py()

    @cached_property
    def _prompt_texts(self) -> Any:
        """The captions of all prompts, as an Arrow column."""
        import pyarrow.parquet as pq

        return pq.read_table(self.folder / "prompts.parquet", columns=["caption"])["caption"]

    def images_of(self, index: int) -> tuple[bytes, bytes]:
        """The encodings of a pair's images, not mirrored, chosen first."""
        chosen, rejected = (self.latents.read(image)[0].tobytes() for image in self.records_of(index))
        return chosen, rejected

    def records_of(self, index: int) -> tuple[int, int]:
        """Records of a pair's chosen and rejected image."""
        return int(self._chosen[index]), int(self._rejected[index])

    def image_names(self) -> tuple[np.ndarray, np.ndarray]:
        """Records of all pairs' chosen and rejected images: equal where the image is the same."""
        return self._chosen, self._rejected

    def is_readable(self, image: int) -> bool:
        return bool(self._readable_images[image])

    def prompt_of(self, index: int) -> int:
        return int(self._prompt[index])

    def is_truncated(self, prompt: int) -> bool:
        """Whether the caption is longer than the text encoder's input."""
        return bool(self._truncated[prompt])


class CachedPairDataset(Dataset):
    """Batches of encoded examples by position, with the same interface as data.PairDataset.

    It gives the same pairs, flips and dropped captions at the same (seed, position). shuffle and augment are those of
    PairDataset.
    """

    def __init__(
        self,
        cache: ExampleCache,
        seed: int,
        data_config: DataConfig,
        *,
        shuffle: bool = True,
        augment: bool = True,
    ):
        self.table, self.seed, self.data_config, self.augment = cache, seed, data_config, augment
        self.order: noise.Order = noise.SampleOrder(seed, len(cache), shuffle)

    def __len__(self) -> int:
        """Pairs in an epoch; positions continue beyond it."""
        return len(self.table)

    def batch(self, positions: Sequence[int]) -> Batch:
        """One batch of B pairs, encoded, in the cache's dtype."""
        cache, plan = self.table, self.table.plan
        _, moments, *latent_shape = plan.latent_shape
        dtype = getattr(torch, np.dtype(plan.dtype).name)
        latents = torch.empty(2, len(positions), moments, *latent_shape, dtype=dtype)
        captions = Conditioning(
            {
                name: torch.empty(len(positions), *shards.shape[1:], dtype=dtype)
                for name, shards in cache.conditioning.items()
            }
        )
        latent_rows = latents.numpy()
        caption_rows = [(shards, captions[name].numpy()) for name, shards in cache.conditioning.items()]
        size_shards, sizes = cache.sizes, torch.empty(2, len(positions), 4)
        rows, truncated, unreadable = [], 0, []
        for slot, position in enumerate(positions):
            index = self.order[position]
            while not cache.readable[index]:  # ends, as ExampleCache refuses a cache without a readable pair
                unreadable.append(int(cache.rows[index]))
                index = (index + 1) % len(cache)
            flip, prompt = self._draw(index, position)
            for side, image in enumerate(cache.records_of(index)):
                cache.latents.read(image, int(flip), out=latent_rows[side, slot])
                if size_shards is not None:
                    size_shards.read(image, int(flip), out=sizes[side, slot].numpy())
            for shards, records in caption_rows:
                shards.read(prompt, out=records[slot])
            rows.append(int(cache.rows[index]))
            truncated += cache.is_truncated(prompt)
        latents = latents.flatten(0, 1)
        stds = latents[:, 1] if moments == 2 else None
        return Batch(
            positions=torch.tensor(positions),
            rows=torch.tensor(rows),
            pair_ids=[cache.pair_id(row) for row in rows],
            images=LatentMoments(latents[:, 0], stds, plan.scaling_factor, plan.shift_factor),
            captions=captions,
            truncated=truncated,
            unreadable=unreadable,
            sizes=None if size_shards is None else sizes.flatten(0, 1),
        )

    __getitems__ = batch  # what a DataLoader calls

    def image(self, index: int, side: int, position: int) -> SingleItem | None:
        """One image of a pair, the chosen one at side 0, with the draws of `position`; None where it was unreadable."""
        cache, image = self.table, self.table.records_of(index)[side]
        if not cache.is_readable(image):
            return None
        flip, prompt = self._draw(index, position)
        moments = torch.from_numpy(cache.latents.read(image, int(flip)))
        stds = moments[1] if len(moments) == 2 else None
        return SingleItem(
            LatentMoments(moments[0], stds, cache.plan.scaling_factor, cache.plan.shift_factor),
            self._conditioning(prompt),
            cache.is_truncated(prompt),
            None if cache.sizes is None else torch.from_numpy(cache.sizes.read(image, int(flip))),
        )

    def caption(self, index: int | None) -> Conditioning:
        """A pair's caption, never dropped; None is the empty caption."""
        return self._conditioning(0 if index is None else self.table.prompt_of(index))

    def _conditioning(self, prompt: int) -> Conditioning:
        entries = self.table.conditioning.items()
        return Conditioning({name: torch.from_numpy(shards.read(prompt)) for name, shards in entries})

    def _draw(self, index: int, position: int) -> tuple[bool, int]:
        """Whether the images are mirrored, and the record of the caption."""
        flip, prompt = False, self.table.prompt_of(index)
        if self.augment:
            coin, _, _ = noise.draw_augmentation(self.seed, position)
            flip = self.data_config.horizontal_flip and coin < 0.5
            is_dropped = noise.draw_coin(self.seed, position, "caption") < self.data_config.caption_dropout
            prompt = 0 if is_dropped else prompt
        return flip, prompt


def finish(folder: Path, plan: ExamplePlan) -> None:
    """Write the manifest, which marks the cache as finished. Every shard must be there."""
    names = [*plan.tables, "plan.json"]
    names += [kind.checksum_path(shard).name for kind in plan.shards(folder) for shard in range(len(kind))]
    content = {name: file_sha256(folder / name) for name in names}
    write_text(folder / "manifest.json", json.dumps(content, indent=2))


def is_finished(folder: Path) -> bool:
    """Whether a cache is finished, with every shard's checksums in place."""
    with reading(folder):
        return (folder / "manifest.json").is_file() and all((folder / name).is_file() for name in _manifest(folder))


def _manifest(folder: Path) -> dict[str, str]:
    return read_json(folder / "manifest.json", "remove it and build the cache again")


def _read_table(path: Path, columns: Sequence[str] | None = None) -> "pa.Table":
    import pyarrow.parquet as pq

    with reading(path):
        return pq.read_table(path, columns=columns)
