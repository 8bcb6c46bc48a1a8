"""A pipeline's parts for training, and whole models by name for generating."""

from xdpo.models.named import ModelSpec, ResolvedModel, load_model, read_model_spec, resolve_model
from xdpo.models.parts import (
    LatentMoments,
    PipelineParts,
    adapter_off,
    as_reference,
    encode_captions,
    encode_images,
    follow,
    load_parts,
    make_policy,
    make_reference,
    part_checksum,
    pipeline_with,
    sample_latents,
    trainable_parameters,
)
from xdpo.models.stable_diffusion import check_pipeline_folder

__all__ = [
    "LatentMoments",
    "ModelSpec",
    "PipelineParts",
    "ResolvedModel",
    "adapter_off",
    "as_reference",
    "check_pipeline_folder",
    "encode_captions",
    "encode_images",
    "follow",
    "load_model",
    "load_parts",
    "make_policy",
    "make_reference",
    "part_checksum",
    "pipeline_with",
    "read_model_spec",
    "resolve_model",
    "sample_latents",
    "trainable_parameters",
]
