"""The policy and its frozen copy, and whole models by name for generating."""

from xdpo.models.named import ModelSpec, ResolvedModel, load_model, read_model_spec, resolve_model
from xdpo.models.policy import (
    adapter_layers,
    adapter_off,
    as_reference,
    make_policy,
    make_reference,
    trainable_parameters,
)

__all__ = [
    "ModelSpec",
    "ResolvedModel",
    "adapter_layers",
    "adapter_off",
    "as_reference",
    "load_model",
    "make_policy",
    "make_reference",
    "read_model_spec",
    "resolve_model",
    "trainable_parameters",
]
