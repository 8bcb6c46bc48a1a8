"""Preference rows of any source → oriented (chosen, rejected) examples in a reproducible order."""

from xdpo.data.examples import (
    PairDataset,
    StepSampler,
    UnreadableTracker,
    collate_pairs,
    held_out_batches,
    make_loader,
)
from xdpo.data.sources import load_pairs
from xdpo.data.table import DataError, PairCounts, PairTable
from xdpo.data.unpaired import LabelledImages, UnpairedDataset, UnpairedOrder, label_images, places_of

__all__ = [
    "DataError",
    "LabelledImages",
    "PairCounts",
    "PairDataset",
    "PairTable",
    "StepSampler",
    "UnpairedDataset",
    "UnpairedOrder",
    "UnreadableTracker",
    "collate_pairs",
    "held_out_batches",
    "label_images",
    "load_pairs",
    "make_loader",
    "places_of",
]
