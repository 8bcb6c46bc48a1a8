"""Pairs → labelled single images, for objectives that need no pairs (Diffusion-KTO).

The label is Diffusion-KTO's: an image that was preferred at least once is desirable, every other one undesirable. An
image that stands in several pairs is one image. Ties are no part of the pairs; an image that only tied is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from xdpo import noise
from xdpo.data.examples import MAX_SUBSTITUTIONS
from xdpo.data.table import DataError

IMAGES_PER_POSITION = 2
"""A position of the training order holds as many images as one of pairs does, so a batch costs the same."""


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Every distinct image once: the pair and the side at which it stands first, and its label.

    index (N,) int64, of a pair in its table; side (N,) uint8, 0 where it is that pair's chosen image;
    desirable (N,) bool.
    """

    index: np.ndarray
    side: np.ndarray
    desirable: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def places(self, *, desirable: bool) -> np.ndarray:
        """Where the images of one label stand."""
        return np.flatnonzero(self.desirable == desirable)


def label_images(chosen: Sequence[Any], rejected: Sequence[Any]) -> LabelledImages:
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
    """Which image stands at a place of the training order: `order[place]` is an index into the labelled images.

    A coin decides the label, `desirable_share` of them desirable, and the image is drawn among all of that label, with
    replacement (Diffusion-KTO's weighted sampler). Place IMAGES_PER_POSITION · p + s is slot s of position p.
    """

    def __init__(self, seed: int, images: LabelledImages, desirable_share: float):
        self.seed, self.desirable_share = seed, desirable_share
        self._images = images
        self._places = {label: images.places(desirable=label) for label in (True, False)}

    def __getitem__(self, place: int) -> int:
        source = noise.generator(self.seed, place, "unpaired")
        coin, choice = torch.rand(2, generator=source, dtype=torch.float64).tolist()
        candidates = self._places[coin < self.desirable_share]
        return int(candidates[int(choice * len(candidates))])

    def stand_ins(self, image: int) -> Iterator[int]:
        """An image, then those of its label that follow it, round and round: each of them once."""
        candidates = self._places[bool(self._images.desirable[image])]
        start = int(np.searchsorted(candidates, image))
        for step in range(len(candidates)):
            yield int(candidates[(start + step) % len(candidates)])


def places_of(positions: Sequence[int]) -> list[int]:
    """The 2B places of B positions: slot 0 of all, then slot 1, as chosen and rejected images stand in a batch."""
    return [IMAGES_PER_POSITION * position + slot for slot in range(IMAGES_PER_POSITION) for position in positions]


class UnpairedDataset(Dataset):
    """Batches by position of labelled single images, IMAGES_PER_POSITION of them at each position.

    pairs: a PairDataset or a cache.CachedPairDataset; it gives the image at a side of a pair. Flip and dropped caption
    are an image's own: they are drawn at its place.
    """

    def __init__(self, pairs: Any, desirable_share: float):
        self.pairs = pairs
        self.images = label_images(*pairs.table.image_names())
        self.order = UnpairedOrder(pairs.seed, self.images, desirable_share)

    def __len__(self) -> int:
        """Positions that hold as many images as there are; positions go on beyond it."""
        return -(-len(self.images) // IMAGES_PER_POSITION)

    def batch(self, positions: Sequence[int]) -> dict[str, Any]:
        """One batch of B positions, 2B images in the order of places_of.

        Of the pairs' batch, with 2B images of their own instead of B pairs: rows, input_ids or text_states (2B, …);
        pair_ids names the two pairs of each position. Beside it, places (2B,) int64, which give each image its draws,
        and desirable (2B,) bool.
        Raises DataError after 100 unreadable images in a row.
        """
        places = places_of(positions)
        items, images, unreadable = [], [], []
        for place in places:
            image, item = self._readable(place, unreadable)
            images.append(image)
            items.append(item)
        rows = [int(self.pairs.table.rows[self.images.index[image]]) for image in images]
        names, half = [self.pairs.table.pair_id(row) for row in rows], len(positions)
        tensors = [name for name, value in items[0].items() if isinstance(value, torch.Tensor)]
        return {
            **items[0],
            "positions": torch.tensor(positions),
            "places": torch.tensor(places),
            "rows": torch.tensor(rows),
            "pair_ids": [f"{one} and {other}" for one, other in zip(names[:half], names[half:], strict=True)],
            "desirable": torch.from_numpy(self.images.desirable[images]),
            "truncated": sum(item["truncated"] for item in items),
            "unreadable": unreadable,
            **{name: torch.stack([item[name] for item in items]) for name in tensors},
        }

    __getitems__ = batch  # what a DataLoader calls

    def _readable(self, place: int, unreadable: list[int]) -> tuple[int, dict[str, Any]]:
        """The image at a place, or the next one of its label that can be read."""
        for image in islice(self.order.stand_ins(self.order[place]), MAX_SUBSTITUTIONS):
            index = int(self.images.index[image])
            item = self.pairs.image(index, int(self.images.side[image]), place)
            if item is not None:
                return image, item
            unreadable.append(int(self.pairs.table.rows[index]))
        raise DataError(f"{len(unreadable)} images in a row are unreadable, last in row {unreadable[-1]}")
