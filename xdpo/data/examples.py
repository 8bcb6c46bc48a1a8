"""Pairs → training examples: the pair at a position of the training order, decoded, augmented, tokenized; the loader.

An example is a function of (seed, position) alone, never of the batch, the worker, the process or the time. Therefore
a resumed run can jump to its position, and two processes see exactly what one would.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xdpo import noise
from xdpo.batch import Batch, SingleItem, Tokens, stack
from xdpo.config import DataConfig
from xdpo.data.columns import DataError
from xdpo.data.images import UnreadableImageError, decode_rgb, size_and_crop, square_pixels
from xdpo.data.interface import PairRows
from xdpo.data.table import PairTable, pair_id
from xdpo.ending import ignore_signals

MAX_SUBSTITUTIONS = 100

Tokenize = Callable[[str], tuple[Tokens, bool]]
"""A caption → its token ids, (L,) each, and whether it lost tokens."""


class PairExample(NamedTuple):
    """The pair at a position of the training order, decoded, augmented, tokenized."""

    position: int
    row: int  # of the source
    pair_id: str
    pixel_values: Tensor  # (2, 3, R, R) float32 in [−1, 1], chosen first
    sizes: Tensor  # (2, 4): see Batch
    tokens: Tokens  # (L,) each
    caption_dropped: bool
    truncated: bool  # whether the caption lost tokens
    unreadable: list[int]  # rows whose images could not be decoded, which this pair replaces


class PairDataset(Dataset):
    """Examples by position 0, 1, 2, … without end: position p belongs to epoch p // len(table).

    tokenize: of the model's family. data_config decides resolution, crop, flips and dropped captions.
    shuffle: each epoch has its own permutation of the pairs; otherwise the order of the table.
    augment: crop, flip and caption dropout as configured; otherwise a centre crop. Both are off for held-out pairs.
    """

    def __init__(
        self,
        table: PairTable,
        tokenize: Tokenize,
        seed: int,
        data_config: DataConfig,
        *,
        shuffle: bool = True,
        augment: bool = True,
    ):
        self.table = table
        self.tokenize = tokenize
        self.seed = seed
        self.data_config = data_config
        self.order: noise.Order = noise.SampleOrder(seed, len(table), shuffle)
        self.augment = augment

    def __len__(self) -> int:
        """Pairs in an epoch; positions continue beyond it."""
        return len(self.table)

    def __getitem__(self, position: int) -> PairExample:
        """The example at a position.

        Where images can't be decoded, the next pair of the table replaces theirs, so the example stays a function of
        (seed, position).
        Raises DataError after 100 unreadable pairs in a row, or when none of a smaller table can be read.
        """
        index, unreadable = self.order[position], []
        for _ in range(min(len(self.table), MAX_SUBSTITUTIONS)):
            row = int(self.table.rows[index])
            record = self.table.dataset[row]
            try:
                images = [decode_rgb(record["jpg_0"]), decode_rgb(record["jpg_1"])]
                break
            except UnreadableImageError as error:
                unreadable.append(row)
                reason = error
                index = (index + 1) % len(self.table)
        else:
            raise DataError(
                f"{len(unreadable)} pairs in a row have unreadable images, last {_row_name(self.table, row)}: {reason}"
            )
        if self.table.chosen_side[index] == 1:
            images.reverse()
        caption, caption_dropped = record["caption"], self._drops_caption(position)
        tokens, truncated = self.tokenize("" if caption_dropped else caption)
        pixel_values, sizes = self._transform(images, position)
        return PairExample(
            position=position,
            row=row,
            pair_id=pair_id(record, row),
            pixel_values=pixel_values,
            sizes=sizes,
            tokens=tokens,
            caption_dropped=caption_dropped,
            truncated=truncated,
            unreadable=unreadable,
        )

    def image(self, index: int, side: int, position: int) -> SingleItem | None:
        """One image of a pair, the chosen one at side 0, with the draws of `position`; None where it is unreadable."""
        cell = self.table.dataset.images.cell(int(self.table.rows[index]), int(self.table.chosen_side[index]) ^ side)
        try:
            image = decode_rgb(cell)
        except UnreadableImageError:
            return None
        tokens, truncated = self.tokenize("" if self._drops_caption(position) else self.table.caption(index))
        pixel_values, sizes = self._transform([image], position)
        return SingleItem(pixel_values[0], tokens, truncated, sizes[0])

    def caption(self, index: int | None) -> Tokens:
        """The token ids, (L,) each, of a pair's caption, never dropped; None is the empty caption."""
        return self.tokenize("" if index is None else self.table.caption(index))[0]

    def batch(self, positions: Sequence[int]) -> Batch:
        """The examples at B positions as one batch (collate_pairs)."""
        return collate_pairs([self[position] for position in positions])

    __getitems__ = batch  # what a DataLoader calls

    def _transform(self, images: list[Image.Image], position: int) -> tuple[Tensor, Tensor]:
        """Flip and crop all images of a position, both of a pair, in the same way: pixels, sizes."""
        flip, offset = False, (0.5, 0.5)
        if self.augment:
            coin, across, down = noise.draw_augmentation(self.seed, position)
            flip = self.data_config.horizontal_flip and coin < 0.5
            offset = (across, down) if self.data_config.crop == "random" else offset
        resolution = self.data_config.resolution
        pixels = [square_pixels(image, resolution, offset=offset, flip=flip) for image in images]
        sizes = [size_and_crop(image, resolution, offset=offset, flip=flip) for image in images]
        return torch.stack(pixels), torch.stack(sizes)

    def _drops_caption(self, position: int) -> bool:
        return self.augment and noise.draw_coin(self.seed, position, "caption") < self.data_config.caption_dropout


class StepSampler:
    """The positions of one rank's micro-batches, from an optimizer step on, without end.

    Optimizer step k consumes positions k·G … (k+1)·G − 1 with G = total_batch_pairs = W·A·B; its micro-step a on
    rank r of W takes the B = micro_batch_pairs positions from k·G + (a·W + r)·B. So the same pairs make up a step
    however G is split, and the end of an epoch ends no step.
    """

    def __init__(
        self, *, start_step: int, total_batch_pairs: int, micro_batch_pairs: int, rank: int = 0, world_size: int = 1
    ):
        if total_batch_pairs % (micro_batch_pairs * world_size):
            raise ValueError(
                f"total_batch_pairs {total_batch_pairs} must be a multiple of "
                f"micro_batch_pairs {micro_batch_pairs} × {world_size} processes"
            )
        self.first_position = start_step * total_batch_pairs + rank * micro_batch_pairs
        self.stride = micro_batch_pairs * world_size
        self.micro_batch_pairs = micro_batch_pairs

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first_position
        while True:  # (a·W + r)·B grows by W·B with every micro-step, within a step and from one step to the next
            yield list(range(first, first + self.micro_batch_pairs))
            first += self.stride


def collate_pairs(examples: Sequence[PairExample]) -> Batch:
    """A list of B examples → one batch."""
    pixels = torch.stack([example.pixel_values for example in examples], dim=1)  # (2, B, 3, R, R)
    return Batch(
        positions=torch.tensor([example.position for example in examples]),
        rows=torch.tensor([example.row for example in examples]),
        pair_ids=[example.pair_id for example in examples],
        images=pixels.flatten(0, 1),
        captions=stack([example.tokens for example in examples]),
        truncated=sum(example.truncated for example in examples),
        unreadable=[row for example in examples for row in example.unreadable],
        sizes=torch.stack([example.sizes for example in examples], dim=1).flatten(0, 1),
    )


def held_out_batches(
    num_pairs: int, num_draws: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """The batches of held-out positions of one rank: each batch of pairs with all its draws one after another.

    Draw k of pair i has position i + k · num_pairs.
    """
    pairs = list(range(rank, num_pairs, world_size))
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    return [[pair + draw * num_pairs for pair in batch] for batch in batches for draw in range(num_draws)]


def make_loader(
    dataset: Dataset, batches: Iterable[list[int]], *, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """A loader of batches of positions, such as a StepSampler's.

    dataset: a PairDataset, or another that gives whole batches by position (`__getitems__`). Batches do not depend on
    num_workers. They are already one rank's: don't pass the loader to accelerate's prepare.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_unchanged,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # a loader must not draw from the global generator
    )


def _unchanged(batch: Any) -> Batch:
    """`__getitems__` has made the batch already, which DataLoader's types don't know of."""
    return batch


class UnreadableTracker:
    """Stops a run whose data are damaged: one in which more than max_share of the pairs read have unreadable images."""

    def __init__(self, table: PairRows, max_share: float):
        self.table = table
        self.max_share = max_share
        self.pairs_read = 0
        self.rows: set[int] = set()

    def update(self, pairs_read: int, unreadable: Iterable[int]) -> None:
        """Count the pairs read and the unreadable rows among them, each row once.

        The share is one of at least 100 pairs, so that one bad file does not end a run at its start, and of at most the
        table's pairs, so that it does not shrink with the epochs. Raises DataError, naming up to ten rows.
        """
        self.pairs_read += pairs_read
        self.rows.update(unreadable)
        pairs_seen = max(min(self.pairs_read, len(self.table)), 100)
        if len(self.rows) > self.max_share * pairs_seen:
            shown = ", ".join(_row_name(self.table, row) for row in sorted(self.rows)[:10])
            raise DataError(
                f"{len(self.rows)} of the first {self.pairs_read:,} pairs read have unreadable images, more than "
                f"data.max_unreadable_share={self.max_share:g} allows: {shown}. Repair the files, or raise the share"
            )


def _row_name(table: PairRows, row: int) -> str:
    return f"row {row} (pair {table.pair_id(row)})"
