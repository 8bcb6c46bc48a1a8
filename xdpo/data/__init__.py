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

__all__ = [
    "DataError",
    "PairCounts",
    "PairDataset",
    "PairTable",
    "StepSampler",
    "UnreadableTracker",
    "collate_pairs",
    "held_out_batches",
    "load_pairs",
    "make_loader",
]
