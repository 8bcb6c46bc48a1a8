"""Filling and opening the caches: their keys, encoding in advance, and a run's pairs and data sets."""

from xdpo.precompute.build import build_examples, build_missing_examples, verify_examples
from xdpo.precompute.keys import example_key, examples_folder, reference_key, takes_single_images
from xdpo.precompute.opening import (
    Examples,
    Pairs,
    count_shared,
    filters_of,
    latent_shape,
    load_table,
    make_dataset,
    open_examples,
    open_pairs,
    open_reference,
)

__all__ = [
    "Examples",
    "Pairs",
    "build_examples",
    "build_missing_examples",
    "count_shared",
    "example_key",
    "examples_folder",
    "filters_of",
    "latent_shape",
    "load_table",
    "make_dataset",
    "open_examples",
    "open_pairs",
    "open_reference",
    "reference_key",
    "takes_single_images",
    "verify_examples",
]
