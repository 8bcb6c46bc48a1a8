"""The random draws of a sample, and how a process adds noise. Tensors only."""

from collections.abc import Iterable
from typing import Protocol, Self

import torch
from torch import Tensor

from xdpo.noise.diffusion import DiffusionProcess
from xdpo.noise.draws import (
    HELD_OUT_SEED,
    Order,
    SampleOrder,
    draw_augmentation,
    draw_caption_coin,
    draw_noise,
    draw_timesteps,
    generator,
    permutation,
)

__all__ = [
    "HELD_OUT_SEED",
    "DiffusionProcess",
    "Order",
    "Process",
    "SampleOrder",
    "draw_augmentation",
    "draw_caption_coin",
    "draw_noise",
    "draw_timesteps",
    "generator",
    "permutation",
]


class Process(Protocol):
    """How noise is added to latents, which times are drawn, what the denoiser predicts, and the weight of a time."""

    def to(self, device: torch.device | str) -> Self: ...

    def draw_times(self, seed: int, positions: Iterable[int]) -> Tensor:
        """One time per position, (B,) on the CPU; a function of (seed, position)."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(B, …) latents at times (B,)."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict, (B, …) float32."""
        ...

    def weights(self, timesteps: Tensor, weighting: str, min_snr_gamma: float, discount: float) -> Tensor:
        """ω of each time, (B,) float32."""
        ...
