"""The trained network and the frozen copy that it is compared with: adapters, compute switches, compilation."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from xdpo.config import ComputeConfig, ModelConfig
from xdpo.families import Family, PipelineParts

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from peft.tuners.tuners_utils import BaseTunerLayer


def make_reference(parts: PipelineParts, model: ModelConfig, compute: ComputeConfig) -> "ModelMixin | None":
    """A frozen copy of the denoiser, or None for LoRA, whose reference is the policy without its adapter.

    A copy's weights stay float32 and its forward runs under the policy's autocast: in any other precision the first
    margin would differ from 0 by rounding times β. Compiled, they require gradients, which are dropped (see
    xdpo.reference).
    """
    if model.trainable == "lora":
        return None
    return as_reference(parts.family, copy.deepcopy(parts.denoiser), compute)


def as_reference(family: Family, network: "ModelMixin", compute: ComputeConfig) -> "ModelMixin":
    """Make a network what `make_reference` makes of its copy, in place."""
    network.eval().requires_grad_(compute.compile)
    _apply_compute(family, network, compute)
    return network


def make_policy(parts: PipelineParts, model: ModelConfig, compute: ComputeConfig) -> "ModelMixin":
    """Make the parts' denoiser trainable, in place: all of it, or LoRA adapters on the family's layers.

    Dropout is off, as in the reference: otherwise margins would contain its noise times β.
    """
    denoiser = parts.denoiser
    if model.trainable == "lora":
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        denoiser.add_adapter(
            LoraConfig(
                r=model.lora_rank,
                lora_alpha=model.lora_alpha,
                init_lora_weights="gaussian",
                target_modules=list(parts.family.lora_targets),
            )
        )
        cast_training_params(denoiser, torch.float32)  # adapters begin in the precision of the layers below them
    else:
        denoiser.requires_grad_(True)
    _apply_compute(parts.family, denoiser, compute)
    return denoiser.eval()


def _apply_compute(family: Family, denoiser: "ModelMixin", compute: ComputeConfig) -> None:
    """Apply the switches that policy and reference share: equal weights must give equal bits (see xdpo.reference)."""
    if compute.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if compute.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if compute.attention == "eager" and family.use_plain_attention is not None:  # refused before where it is
        family.use_plain_attention(denoiser)
    if compute.compile:
        _compile(denoiser)


def _compile(denoiser: "ModelMixin") -> None:
    """Compile the forward of training only: without gradients, in evaluation and sampling, it runs uncompiled.

    Shapes are static, so each micro-batch size has one graph. Autocast is outside, so policy and reference share it.
    """
    import torch._dynamo

    # One graph within DDP as without it. Otherwise the graph would be split at DDP's buckets if the policy is compiled
    # first and whole if the reference is, which round differently. Splitting would gain little: it overlaps an exchange
    # that happens once per optimizer step.
    torch._dynamo.config.optimize_ddp = False
    plain = denoiser.forward
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)

    def forward(*args: object, **kwargs: object) -> object:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    denoiser.forward = forward
    denoiser.is_compiled_for_training = True


def adapter_layers(denoiser: nn.Module) -> "list[BaseTunerLayer]":
    """The layers of a LoRA policy that an adapter changes."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapter_off(layers: "Sequence[BaseTunerLayer]") -> Iterator[None]:
    """A context in which a LoRA policy runs without its adapter, as its own reference. layers: its `adapter_layers`.

    Only their flag is set. `disable_adapters` walks through all modules, of which XL's UNet has thousands, and switches
    every weight's requires_grad too, in every micro-step.
    """
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
