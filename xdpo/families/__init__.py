"""Families of base models: all that differs between them, a file each, and a pipeline's parts checked and loaded."""

from xdpo.families.interface import Family, PipelineParts
from xdpo.families.loading import (
    FAMILIES,
    caption_choices,
    check_config,
    check_formats,
    check_model,
    check_pipeline_folder,
    choices_of_loaded,
    family_of,
    family_of_loaded,
    family_of_pipeline,
    held_in_bf16,
    load_parts,
    part_checksum,
    pipeline_with,
)

__all__ = [
    "FAMILIES",
    "Family",
    "PipelineParts",
    "caption_choices",
    "check_config",
    "check_formats",
    "check_model",
    "check_pipeline_folder",
    "choices_of_loaded",
    "family_of",
    "family_of_loaded",
    "family_of_pipeline",
    "held_in_bf16",
    "load_parts",
    "part_checksum",
    "pipeline_with",
]
