"""The random draws of a sample, and how a process adds noise. Tensors only."""

from collections.abc import Iterable, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from xdpo.noise.diffusion import DiffusionProcess
from xdpo.noise.draws import (
    HELD_OUT_SEED,
    Order,
    SampleOrder,
    draw_augmentation,
    draw_coin,
    draw_noise,
    draw_normals,
    draw_timesteps,
    generator,
    permutation,
)
from xdpo.noise.flow import FlowProcess
from xdpo.noise.weighting import Weighting

__all__ = [
    "HELD_OUT_SEED",
    "DiffusionProcess",
    "FlowProcess",
    "Order",
    "Process",
    "SampleOrder",
    "Weighting",
    "draw_augmentation",
    "draw_coin",
    "draw_noise",
    "draw_normals",
    "draw_timesteps",
    "generator",
    "permutation",
]


class Process(Protocol):
    """How noise is added to latents, which times are drawn, what the denoiser predicts, and the weight of a time.

    A time is what the denoiser is told. Every tensor of a call must be on the process's device.
    """

    def to(self, device: torch.device | str) -> Self: ...

    def draw_times(self, seed: int, positions: Iterable[int], latent_shape: Sequence[int]) -> Tensor:
        """One time per position, (B,) on the CPU; a function of (seed, position) and the latents' size (C, h, w)."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """(B, …) latents at times (B,)."""
        ...

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser should predict, (B, …) float32."""
        ...

    def denoised(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        """x̂_0, the latents that a prediction stands for, (B, …) float32."""
        ...

    def weights(self, times: Tensor) -> Tensor:
        """ω of each time, (B,) float32."""
        ...
