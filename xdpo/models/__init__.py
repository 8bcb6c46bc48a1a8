"""A pipeline's parts for training, and whole models by name for generating."""

from xdpo.models.named import ModelSpec, ResolvedModel, load_model, read_model_spec, resolve_model
from xdpo.models.parts import (
    PipelineParts,
    adapter_off,
    check_pipeline_folder,
    encode_captions,
    encode_images,
    load_parts,
    make_policy,
    make_reference,
    pipeline_with,
    trainable_parameters,
)

__all__ = [
    "ModelSpec",
    "PipelineParts",
    "ResolvedModel",
    "adapter_off",
    "check_pipeline_folder",
    "encode_captions",
    "encode_images",
    "load_model",
    "load_parts",
    "make_policy",
    "make_reference",
    "pipeline_with",
    "read_model_spec",
    "resolve_model",
    "trainable_parameters",
]
