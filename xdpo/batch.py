"""The types in which every data set gives a batch: images as pixels or encoded, captions as tokens or encoded."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


class Tokens(dict[str, Tensor]):
    """Token ids (N, L) of N captions, one entry for each tokenizer of a family."""


class Conditioning(dict[str, Tensor]):
    """A denoiser's inputs from N captions, (N, …) each; the family names the entries."""


class LatentMoments(NamedTuple):
    """An autoencoder's posterior of N images, before shift and scaling: a denoiser takes (x − shift) · scaling."""

    means: Tensor  # (N, C, h, w)
    stds: Tensor | None  # of the same shape; None where a cache holds means only
    scaling_factor: float  # of the autoencoder
    shift_factor: float = 0.0  # of the autoencoder


class SingleImages(NamedTuple):
    """Position and label of each of 2B images that form no pairs."""

    positions: Tensor  # (2B,) int64 in the order of single images; they decide each image's draws
    desirable: Tensor  # (2B,) bool


class Batch(NamedTuple):
    """B pairs, or 2B single images, at B positions of the training order."""

    positions: Tensor  # (B,) int64
    rows: Tensor  # (B,) int64 of the source; (2B,) of single images
    pair_ids: list[str]  # B names
    images: Tensor | LatentMoments  # of 2B, chosen first; pixel values are (2B, 3, R, R) float32 in [−1, 1]
    captions: Tokens | Conditioning  # B of pairs, 2B of single images
    truncated: int  # captions that lost tokens
    unreadable: list[int]  # rows whose images could not be read, and that others stand in for
    single: SingleImages | None = None  # None for pairs
    rejected_latents: Tensor | None = None  # (B, C, h, w) as the denoiser takes them, instead of the rejected images
    sizes: Tensor | None = None  # (2B, 4) float32: see data.images.size_and_crop; None from a cache without them


class SingleItem(NamedTuple):
    """One image of a pair with its caption, not batched."""

    image: Tensor | LatentMoments  # pixel values (3, R, R)
    caption: Tokens | Conditioning
    truncated: bool
    size: Tensor | None = None  # (4,): see Batch


Captions = TypeVar("Captions", bound=Tokens | Conditioning)


def stack(captions: Sequence[Captions]) -> Captions:
    """Captions of one kind, one by one → all of them along a new first dimension."""
    first = captions[0]
    return type(first)({name: torch.stack([caption[name] for caption in captions]) for name in first})
