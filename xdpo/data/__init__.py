"""Preference rows of any source → oriented (chosen, rejected) examples in a reproducible order."""

from xdpo.data.columns import DataError
from xdpo.data.examples import (
    PairDataset,
    StepSampler,
    UnreadableTracker,
    collate_pairs,
    held_out_batches,
    make_loader,
)
from xdpo.data.filters import Filters
from xdpo.data.interface import PairExamples, PairRows
from xdpo.data.scores import MarginWeights, PairWeights, finite_scores, no_scores, weigh_pairs
from xdpo.data.sources import is_converted, load_pairs, local_files, source_files
from xdpo.data.split import Split
from xdpo.data.table import PairCounts, PairTable
from xdpo.data.unpaired import (
    IMAGES_PER_POSITION,
    LabelledImages,
    UnpairedDataset,
    UnpairedOrder,
    image_positions_of,
    label_images,
)

__all__ = [
    "IMAGES_PER_POSITION",
    "DataError",
    "Filters",
    "LabelledImages",
    "MarginWeights",
    "PairCounts",
    "PairDataset",
    "PairExamples",
    "PairRows",
    "PairTable",
    "PairWeights",
    "Split",
    "StepSampler",
    "UnpairedDataset",
    "UnpairedOrder",
    "UnreadableTracker",
    "collate_pairs",
    "finite_scores",
    "held_out_batches",
    "image_positions_of",
    "is_converted",
    "label_images",
    "load_pairs",
    "local_files",
    "make_loader",
    "no_scores",
    "source_files",
    "weigh_pairs",
]
