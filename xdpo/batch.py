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
    optimality: Tensor | None = None  # (2B,) float32 from 0 to 1; None: 1 for a desirable image, 0 for another


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


def take_pairs(batch: Batch, indices: Sequence[int]) -> Batch:
    """The pairs at these indices of a batch of pairs. Its unreadable rows and truncated captions stay counted."""
    both = torch.tensor([*indices, *(index + len(batch.positions) for index in indices)])
    images = batch.images
    if isinstance(images, LatentMoments):
        stds = None if images.stds is None else images.stds[both]
        taken: Tensor | LatentMoments = images._replace(means=images.means[both], stds=stds)
    else:
        taken = images[both]
    return batch._replace(
        positions=batch.positions[list(indices)],
        rows=batch.rows[list(indices)],
        pair_ids=[batch.pair_ids[index] for index in indices],
        images=taken,
        sizes=None if batch.sizes is None else batch.sizes[both],
        captions=type(batch.captions)({name: value[list(indices)] for name, value in batch.captions.items()}),
    )


def join_pairs(batches: Sequence[Batch]) -> Batch:
    """Encoded batches of pairs as one, in the order of their positions."""
    order = torch.argsort(torch.cat([batch.positions for batch in batches]))
    moments = [batch.images for batch in batches if isinstance(batch.images, LatentMoments)]
    assert len(moments) == len(batches), "pixels can't be joined with latents"

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of chosen, then rejected images of each batch → of all."""
        chosen, rejected = zip(*(tensor.chunk(2) for tensor in tensors), strict=True)
        return torch.cat([torch.cat(side)[order.to(side[0].device)] for side in (chosen, rejected)])

    first = batches[0]
    pair_ids = [name for batch in batches for name in batch.pair_ids]
    captions = {name: torch.cat([batch.captions[name] for batch in batches]) for name in first.captions}
    means = joined([moment.means for moment in moments])
    stds = [moment.stds for moment in moments if moment.stds is not None]
    sizes = [batch.sizes for batch in batches if batch.sizes is not None]
    return first._replace(
        positions=torch.cat([batch.positions for batch in batches])[order],
        rows=torch.cat([batch.rows for batch in batches])[order],
        pair_ids=[pair_ids[index] for index in order.tolist()],
        images=moments[0]._replace(means=means, stds=joined(stds) if stds else None),
        sizes=joined(sizes) if len(sizes) == len(batches) else None,
        captions=type(first.captions)({name: value[order.to(value.device)] for name, value in captions.items()}),
        truncated=sum(batch.truncated for batch in batches),
        unreadable=[row for batch in batches for row in batch.unreadable],
    )
