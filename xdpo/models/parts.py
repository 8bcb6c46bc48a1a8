"""The parts of a Stable Diffusion pipeline as training needs them: encoders, the trainable policy, the reference."""

import copy
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xdpo import processes
from xdpo.config import ComputeConfig, ModelConfig
from xdpo.models.pipeline_files import fetch, weight_paths
from xdpo.models.stable_diffusion import check_pipeline_folder, part_class, weight_problems

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # all attention projections of the UNet


class LatentMoments(NamedTuple):
    """Mean and standard deviation of an autoencoder's posterior."""

    means: Tensor
    stds: Tensor | None  # None where only means were kept


@dataclass(frozen=True)
class PipelineParts:
    """What a pipeline folder holds, all weights float32, nothing trainable; no encoders where they were left out."""

    tokenizer: object
    text_encoder: nn.Module | None
    vae: nn.Module | None
    unet: nn.Module
    scheduler: object

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square image of side `resolution`."""
        side = resolution // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.latent_channels, side, side


def load_parts(config: ModelConfig, *, encoders: bool = True) -> PipelineParts:
    """Load a pipeline from a hub id or a folder; safetensors only, float32.

    encoders: load the autoencoder and the text encoder too; examples from a cache need neither. A part that is there
    as a variant alone (fp16, …) is loaded from that, and a line says so. Raises ValueError where the pipeline can't be
    loaded or isn't one of Stable Diffusion 1.x or 2.x.
    """
    import diffusers
    import transformers
    from diffusers import StableDiffusionPipeline

    check_pipeline_folder(config.pipeline, config.revision)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    encoding, denoising = ("vae", "text_encoder"), ("unet", "scheduler", "tokenizer")
    folder = fetch(config.pipeline, config.revision, (*denoising, *encoding * encoders), weights=True)
    loaded = ("unet", *encoding * encoders)
    is_local = folder == Path(config.pipeline)  # then its weights have just been checked
    if problems := [] if is_local else weight_problems(folder, loaded):
        raise ValueError(f"model.pipeline: could not load {config.pipeline!r}:\n  " + "\n  ".join(problems))
    options = {"dtype": torch.float32, "use_safetensors": True}
    variants = {part: variant for part in loaded if (variant := weight_paths(folder / part)[0]) is not None}
    try:
        given = {part: None for part in encoding if not encoders}
        for part, variant in variants.items():
            given[part] = part_class(folder, part).from_pretrained(folder, subfolder=part, variant=variant, **options)
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
            **options,
            **given,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"model.pipeline: could not load {config.pipeline!r}: {error}") from error
    if variants and processes.rank() == 0:
        those = ", ".join(f"{part} as {variant}" for part, variant in variants.items())
        print(f"note: {config.pipeline} holds {those} alone; loaded from that, as float32", file=sys.stderr)
    for module in filter(None, (pipeline.text_encoder, pipeline.vae, pipeline.unet)):
        module.eval().requires_grad_(False)
    return PipelineParts(pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.unet, pipeline.scheduler)


def part_checksum(config: ModelConfig, *names: str) -> str:
    """16 hexadecimal digits of the SHA-256 of all files of a pipeline's parts ("vae", "unet", …) that count.

    Configs, vocabularies and the weights that `load_parts` reads, no other variants. Files of a hub model are fetched
    where they aren't in its cache; nothing is loaded. Raises ValueError where there are none.
    """
    folder = fetch(config.pipeline, config.revision, names, weights=True)
    digest = hashlib.sha256()
    for name in names:
        files = [path for path in sorted((folder / name).iterdir()) if path.suffix in (".json", ".txt")]
        for path in [*files, *weight_paths(folder / name)[1]]:
            with path.open("rb") as file:
                digest.update(f"{name}/{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def pipeline_with(parts: PipelineParts, unet: nn.Module):
    """A StableDiffusionPipeline that shares the parts' memory and denoises with `unet`; no safety checker."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=unet,
        scheduler=copy.deepcopy(parts.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_reference(unet: nn.Module, model: ModelConfig, compute: ComputeConfig) -> nn.Module | None:
    """The frozen reference: a copy of the UNet, or None for LoRA, whose reference is the policy without its adapter.

    Its weights stay float32 and its forward runs under the policy's autocast: any other precision moves the first
    margin away from 0 by rounding times β. Compiled, they require gradients that nobody asks for (`as_reference`).
    """
    if model.trainable == "lora":
        return None
    reference = copy.deepcopy(unet).eval().requires_grad_(compute.compile)
    _apply_compute(reference, compute)
    return reference


def make_policy(unet: nn.Module, model: ModelConfig, compute: ComputeConfig) -> nn.Module:
    """Make `unet` trainable, in place: all of it, or a LoRA adapter on every attention projection.

    Like the reference it drops nothing out: a margin would be that noise times β.
    """
    if model.trainable == "lora":
        from peft import LoraConfig

        unet.add_adapter(
            LoraConfig(
                r=model.lora_rank,
                lora_alpha=model.lora_alpha,
                init_lora_weights="gaussian",
                target_modules=list(LORA_TARGETS),
            )
        )
    else:
        unet.requires_grad_(True)
    _apply_compute(unet, compute)
    return unet.eval()


def _apply_compute(unet: nn.Module, compute: ComputeConfig) -> None:
    """Switches that policy and reference share, so that equal weights give equal bits (compiled: `as_reference`)."""
    if compute.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if compute.channels_last:
        unet.to(memory_format=torch.channels_last)
    if compute.attention == "eager":
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())
    if compute.compile:
        _compile(unet)


def _compile(unet: nn.Module) -> None:
    """Compile the forward of training alone: what records no gradient, evaluation and sampling, runs as written.

    Shapes are static, so each micro-batch size has one graph; autocast is around it, so modules of one make share it.
    """
    import torch._dynamo

    # One graph within DDP as without it: split at DDP's buckets where the policy comes first, whole where the reference
    # does, it would round in two ways. What splitting overlaps is an exchange that comes once in an optimizer step.
    torch._dynamo.config.optimize_ddp = False
    plain = unet.forward
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)

    def forward(*args: object, **kwargs: object) -> object:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    unet.forward = forward
    unet.is_compiled_for_training = True


@contextmanager
def as_reference(policy: nn.Module, reference: nn.Module | None) -> Iterator[nn.Module]:
    """The module that is the reference in here: `reference`, or without one the policy without its adapter.

    Its output is a constant: detach it. A compiler rounds a forward that saves activations differently from one that
    doesn't, and one with an adapter differently from one without. So where the policy is compiled and trains, the
    reference runs through the policy's own graph: it records gradients, which are dropped, and an adapter is in it
    with B = 0, which adds an exact 0. Equal weights then give equal bits, at the price of the policy's activations for
    the length of a forward.
    """
    module = policy if reference is None else reference
    if getattr(policy, "is_compiled_for_training", False) and torch.is_grad_enabled():
        with nullcontext() if reference is not None else _zero_adapter(policy):
            yield module
    else:
        with torch.no_grad(), nullcontext() if reference is not None else adapter_off(policy):
            yield module


@contextmanager
def adapter_off(unet: nn.Module) -> Iterator[None]:
    """Run the LoRA policy as its own reference."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


@contextmanager
def _zero_adapter(unet: nn.Module) -> Iterator[None]:
    """A LoRA adapter that adds 0, in the same graph as ever."""
    outputs = [parameter for name, parameter in unet.named_parameters() if ".lora_B." in name]
    kept = [parameter.detach().clone() for parameter in outputs]
    with torch.no_grad():
        torch._foreach_zero_(outputs)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(outputs, kept)


@torch.no_grad()
def follow(reference: nn.Module, policy: nn.Module, decay: float) -> None:
    """Move the reference towards the policy: decay · reference + (1 − decay) · policy, weight by weight."""
    torch._foreach_lerp_(list(reference.parameters()), list(policy.parameters()), 1 - decay)


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@torch.no_grad()
def encode_images(vae: nn.Module, pixel_values: Tensor) -> LatentMoments:
    """Pixels (N, 3, R, R) in [-1, 1] → the posterior's moments, each (N, C, h, w) float32, before scaling.

    Contiguous, whatever layout the convolutions left: the UNet would round another one differently.
    """
    posterior = vae.encode(pixel_values).latent_dist
    return LatentMoments(posterior.mean.float().contiguous(), posterior.std.float().contiguous())


def sample_latents(moments: LatentMoments, noise: Tensor | None, scaling_factor: float) -> Tensor:
    """Latents (N, C, h, w) as the UNet knows them: a sample of the posterior by `noise`, or its mean without."""
    latents = moments.means if noise is None else moments.means + moments.stds * noise
    return latents * scaling_factor


@torch.no_grad()
def encode_captions(text_encoder: nn.Module, input_ids: Tensor) -> Tensor:
    """Token ids (B, L) → text states (B, L, D)."""
    return text_encoder(input_ids).last_hidden_state
