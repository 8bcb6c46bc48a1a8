"""Pairs → labelled single images, for objectives that need no pairs (Diffusion-KTO).

The label is Diffusion-KTO's: an image that was preferred at least once is desirable, every other one undesirable. An
image that occurs in several pairs counts once. Ties are not among the pairs, so an image that only tied is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from xdpo import noise
from xdpo.batch import Batch, LatentMoments, SingleImages, SingleItem, stack
from xdpo.data.columns import DataError
from xdpo.data.examples import MAX_SUBSTITUTIONS
from xdpo.data.interface import PairExamples

IMAGES_PER_POSITION = 2
"""Two single images per position of the training order, so that a batch costs what a batch of pairs does."""


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Every distinct image once: the pair and the side at which it occurs first, and its label.

    index (N,) int64, of a pair in its table; side (N,) uint8, 0 where it is that pair's chosen image;
    desirable (N,) bool.
    """

    index: np.ndarray
    side: np.ndarray
    desirable: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def of_label(self, *, desirable: bool) -> np.ndarray:
        """The images of one label, as numbers 0 … len − 1."""
        return np.flatnonzero(self.desirable == desirable)


def label_images(chosen: Sequence[Any] | np.ndarray, rejected: Sequence[Any] | np.ndarray) -> LabelledImages:
    """`chosen` and `rejected` name the images of each pair; equal names are the same image.

    Raises DataError where every image is desirable: the objective compares the two labels.
    """
    sides = np.stack([np.asarray(chosen), np.asarray(rejected)], axis=1)  # (pairs, 2)
    names, first = np.unique(sides, return_index=True)  # `first` counts pair by pair, chosen before rejected
    in_order = np.argsort(first, kind="stable")
    names, first = names[in_order], first[in_order]
    images = LabelledImages(first // 2, (first % 2).astype(np.uint8), np.isin(names, sides[:, 0]))
    if images.desirable.all():
        raise DataError(
            f"all {len(images)} images were preferred in some pair, so that none is undesirable; "
            "an unpaired objective needs both kinds. Train on more pairs, or choose a pairwise loss.name"
        )
    return images


class UnpairedOrder:
    """Which image is at a position of the order of single images: its number among the labelled images.

    A coin decides the label, desirable with probability `desirable_share`. The image is drawn from all of that label,
    with replacement (Diffusion-KTO's weighted sampler). Position p of the training order holds the images at positions
    IMAGES_PER_POSITION · p + s of this one.
    """

    def __init__(self, seed: int, images: LabelledImages, desirable_share: float):
        self.seed, self.desirable_share = seed, desirable_share
        self._images = images
        self._of_label = {label: images.of_label(desirable=label) for label in (True, False)}

    def __getitem__(self, image_position: int) -> int:
        source = noise.generator(self.seed, image_position, "unpaired")
        coin, choice = torch.rand(2, generator=source, dtype=torch.float64).tolist()
        candidates = self._of_label[coin < self.desirable_share]
        return int(candidates[int(choice * len(candidates))])

    def stand_ins(self, image: int) -> Iterator[int]:
        """An image, then the others of its label in their order, from the one behind it: each once."""
        candidates = self._of_label[bool(self._images.desirable[image])]
        start = int(np.searchsorted(candidates, image))
        for step in range(len(candidates)):
            yield int(candidates[(start + step) % len(candidates)])


def image_positions_of(positions: Sequence[int]) -> list[int]:
    """The 2B image positions of B positions, in the order that chosen and rejected images have in a batch."""
    return [IMAGES_PER_POSITION * position + slot for slot in range(IMAGES_PER_POSITION) for position in positions]


class UnpairedDataset(Dataset):
    """Batches by position of labelled single images, IMAGES_PER_POSITION of them at each position.

    pairs: gives the image at a side of a pair. Flip and dropped caption are drawn per image, at its image position.
    """

    def __init__(self, pairs: PairExamples, desirable_share: float):
        self.pairs = pairs
        self.images = label_images(*pairs.table.image_names())
        self.order = UnpairedOrder(pairs.seed, self.images, desirable_share)

    def __len__(self) -> int:
        """Positions in an epoch, in which as many images are drawn as there are; positions continue beyond it."""
        return -(-len(self.images) // IMAGES_PER_POSITION)

    def batch(self, positions: Sequence[int]) -> Batch:
        """One batch of B positions, 2B images in the order of image_positions_of.

        pair_ids names the two pairs of each position. Raises DataError after 100 unreadable images in a row.
        """
        image_positions = image_positions_of(positions)
        items: list[SingleItem] = []
        images: list[int] = []
        unreadable: list[int] = []
        for image_position in image_positions:
            image, item = self._readable(image_position, unreadable)
            images.append(image)
            items.append(item)
        rows = [int(self.pairs.table.rows[self.images.index[image]]) for image in images]
        names, half = [self.pairs.table.pair_id(row) for row in rows], len(positions)
        return Batch(
            positions=torch.tensor(positions),
            rows=torch.tensor(rows),
            pair_ids=[f"{one} and {other}" for one, other in zip(names[:half], names[half:], strict=True)],
            images=_stack_images([item.image for item in items]),
            captions=stack([item.caption for item in items]),
            truncated=sum(item.truncated for item in items),
            unreadable=unreadable,
            single=SingleImages(torch.tensor(image_positions), torch.from_numpy(self.images.desirable[images])),
            sizes=None if items[0].size is None else torch.stack([cast(torch.Tensor, item.size) for item in items]),
        )

    __getitems__ = batch  # what a DataLoader calls

    def _readable(self, image_position: int, unreadable: list[int]) -> tuple[int, SingleItem]:
        """The image at an image position, or the next readable one of its label."""
        for image in islice(self.order.stand_ins(self.order[image_position]), MAX_SUBSTITUTIONS):
            index = int(self.images.index[image])
            item = self.pairs.image(index, int(self.images.side[image]), image_position)
            if item is not None:
                return image, item
            unreadable.append(int(self.pairs.table.rows[index]))
        raise DataError(f"{len(unreadable)} images in a row are unreadable, last in row {unreadable[-1]}")


def _stack_images(images: Sequence[torch.Tensor | LatentMoments]) -> torch.Tensor | LatentMoments:
    # A data set gives one kind, with or without stds, which the union of an item's types doesn't say.
    if isinstance(images[0], torch.Tensor):
        return torch.stack(cast(list[torch.Tensor], images))
    every = cast(list[LatentMoments], images)
    stds = [moments.stds for moments in every if moments.stds is not None]
    means = torch.stack([moments.means for moments in every])
    return every[0]._replace(means=means, stds=torch.stack(stds) if stds else None)
