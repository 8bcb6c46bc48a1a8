"""TFLOP per pair of every training mode at a model's true shapes, compared with a step without any cache.

Counted on networks without weights; a multiplication with its addition is 2 FLOP. A pair costs two forward and
backward passes of the policy, and where nothing is cached two forward passes of the reference, two of the
autoencoder's encoder and one of each text encoder, as in Diffusion-DPO's public training script.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arguments import add_number
from benchmarks.pipelines import without_contents
from benchmarks.results import Criterion, Outcome
from benchmarks.true_models import TRUE_MODELS
from xdpo.arguments import positive
from xdpo.batch import Tokens
from xdpo.config import ComputeConfig, ModelConfig
from xdpo.families import PipelineParts
from xdpo.models import adapter_layers, adapter_off, make_policy
from xdpo.report.grids import Cell, Grid

CACHES = {
    "nothing": (False, False),
    "examples": (True, False),
    "examples and reference": (True, True),
}
"""What a training finds computed already → (encoded examples, the reference's errors)."""

LIMITS = {"full": 0.56, "lora": 0.42}  # of the full step of Stable Diffusion 1.5 that recomputes everything


@dataclass(frozen=True)
class PartCosts:
    """TFLOP of each network on one image or one caption."""

    denoiser_forward: float
    full_forward_backward: float
    full_forward_backward_checkpointed: float
    lora_forward_backward: float
    lora_forward_backward_checkpointed: float
    lora_forward_adapter_off: float
    autoencoder: float
    text_encoder: float

    def policy(self, trainable: str, gradient_checkpointing: bool) -> float:
        ending = "_checkpointed" if gradient_checkpointing else ""
        return getattr(self, f"{trainable}_forward_backward{ending}")

    def reference(self, trainable: str) -> float:
        return self.denoiser_forward if trainable == "full" else self.lora_forward_adapter_off


@dataclass(frozen=True)
class PairCosts:
    """TFLOP of a pair, by network."""

    policy: float
    reference: float
    autoencoder: float
    text_encoder: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=TRUE_MODELS, default="sd15", help="default: sd15")
    parser.add_argument("--resolution", type=positive, help="side of the images (default: what the model is made for)")
    add_number(parser, "--lora-rank", 64, "rank of the adapters")


def run(options: argparse.Namespace) -> Outcome:
    model = TRUE_MODELS[options.model]
    resolution = options.resolution or model.resolution
    with without_contents(), sdpa_kernel(SDPBackend.MATH):  # the counter doesn't know of a CPU's fused attention
        networks = model.build()
        kept = kept_bytes(networks, model.captions(), resolution)
        parts = count_parts(networks, model.captions(), resolution, options.lora_rank)
    rows, measured, totals = [], [], {}
    for checkpointing in (False, True):
        for trainable in ("full", "lora"):
            for caches in CACHES:
                costs = pair_costs(parts, trainable, caches, checkpointing)
                totals[trainable, caches, checkpointing] = costs.total
                ratio = costs.total / totals["full", "nothing", checkpointing]
                names = {"trained": trainable, "gradient_checkpointing": checkpointing, "cached": caches}
                measured.append({**names, **asdict(costs), "total": costs.total, "ratio": ratio})
                numbers = (*asdict(costs).values(), costs.total, ratio)
                words = (_trained(trainable, options.lora_rank), caches, "yes" if checkpointing else "no")
                rows.append((*map(Cell, words), *(Cell(f"{number:.3f}", number) for number in numbers)))
    columns = ("trained", "cached", "checkpointed", "policy", "reference", "VAE", "text", "TFLOP a pair", "ratio")
    note = (
        "ratio: to the full fine-tune that recomputes everything, with gradient checkpointing likewise on or off. "
        f"One pass: denoiser forward {parts.denoiser_forward:.3f}, with backward {parts.full_forward_backward:.3f}, "
        f"LoRA's {parts.lora_forward_backward:.3f}; autoencoder {parts.autoencoder:.3f}, text {parts.text_encoder:.3f}"
        f". cache.examples keeps {kept['image']:,} bytes an image (its mean latents) and {kept['caption']:,} a "
        "caption, in fp16"
    )
    title = f"TFLOP per pair, {model.name} at {resolution} pixels"
    criteria = []
    for trainable, limit in LIMITS.items() if options.model == "sd15" else ():
        ratio = totals[trainable, "examples and reference", False] / totals["full", "nothing", False]
        name = {"full": "full fine-tune", "lora": "LoRA"}[trainable]
        claim = f"{name} with both caches costs at most {limit} of the full step that recomputes everything"
        criteria.append(Criterion(claim, ratio, ratio <= limit))
    return Outcome(
        Grid(title, columns, tuple(rows), note),
        {"parts": asdict(parts), "modes": measured, "cache_bytes": kept},
        tuple(criteria),
    )


def kept_bytes(networks: PipelineParts, caption: Tokens, resolution: int) -> dict[str, int]:
    """Bytes in cache.examples of an image's mean latents and of a caption, in fp16."""
    conditioning = networks.encode_captions(caption)
    return {
        "image": 2 * math.prod(networks.latent_shape(resolution)),
        "caption": 2 * sum(states[0].numel() for states in conditioning.values()),
    }


def count_parts(networks: PipelineParts, caption: Tokens, resolution: int, lora_rank: int) -> PartCosts:
    """Count every part. Leaves the denoiser with an adapter and gradient checkpointing on."""
    denoiser, family = networks.denoiser, networks.family
    latents = torch.zeros(1, *networks.latent_shape(resolution))
    timesteps = torch.zeros(1)
    states = family.with_size(networks.encode_captions(caption), resolution)

    @torch.no_grad()
    def forward() -> None:
        family.predict(denoiser, latents, timesteps, states)

    def forward_backward() -> None:
        family.predict(denoiser, latents, timesteps, states).sum().backward()

    forward_alone = count_tflop(forward)
    make_policy(networks, ModelConfig(trainable="full"), ComputeConfig())
    full = count_tflop(forward_backward)
    denoiser.enable_gradient_checkpointing()
    full_checkpointed = count_tflop(forward_backward)
    denoiser.requires_grad_(False).disable_gradient_checkpointing()
    make_policy(networks, ModelConfig(trainable="lora", lora_rank=lora_rank), ComputeConfig())
    lora = count_tflop(forward_backward)
    with adapter_off(adapter_layers(denoiser)):
        adapter_off_forward = count_tflop(forward)
    denoiser.enable_gradient_checkpointing()
    return PartCosts(
        forward_alone,
        full,
        full_checkpointed,
        lora,
        count_tflop(forward_backward),
        adapter_off_forward,
        count_tflop(lambda: networks.encode_images(torch.zeros(1, 3, resolution, resolution))),
        count_tflop(lambda: networks.encode_captions(caption)),
    )


def count_tflop(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def pair_costs(parts: PartCosts, trainable: str, caches: str, gradient_checkpointing: bool) -> PairCosts:
    """The costs of a pair. caches: one of CACHES."""
    has_examples, has_reference = CACHES[caches]
    return PairCosts(
        policy=2 * parts.policy(trainable, gradient_checkpointing),
        reference=0 if has_reference else 2 * parts.reference(trainable),
        autoencoder=0 if has_examples else 2 * parts.autoencoder,
        text_encoder=0 if has_examples else parts.text_encoder,
    )


def _trained(trainable: str, lora_rank: int) -> str:
    return "full" if trainable == "full" else f"LoRA, rank {lora_rank}"
