"""Rectified flow: latents move to noise on a straight line, and the network predicts the velocity.

Lipman et al. 2023, Liu et al. 2023; times are drawn as Stable Diffusion 3 does (Esser et al. 2024, Section 3.1).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from xdpo.noise.draws import draw_normals
from xdpo.noise.weighting import CONSTANT, Weighting

PATCH = 2  # latents of one token, down and across: in Stable Diffusion 3 and FLUX


@dataclass(frozen=True)
class ResolutionShift:
    """A shift that grows with an image's number of tokens, as FLUX's: μ, or e^μ, with μ linear in the tokens."""

    base_tokens: int
    max_tokens: int
    base_shift: float  # μ at base_tokens
    max_shift: float  # μ at max_tokens
    is_exponential: bool = True

    def __call__(self, tokens: int) -> float:
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = tokens * slope + (self.base_shift - slope * self.base_tokens)
        return math.exp(mu) if self.is_exponential else mu


@dataclass(frozen=True)
class FlowProcess:
    """x_σ = (1−σ)·x_0 + σ·ε, and the network predicts the velocity ε − x_0.

    A time is σ times num_timesteps, the number that the denoiser is told. Half precision is promoted to float32.
    """

    shift: float | ResolutionShift = 1.0  # above 1: more of the times are noisy ones
    num_timesteps: int = 1000
    weighting: Weighting = CONSTANT

    def __post_init__(self) -> None:
        if self.weighting.name == "temporal_discount":
            raise ValueError(
                "noise.weighting: temporal_discount counts the timesteps of a diffusion, and this model is a flow; "
                "set noise.weighting to constant or min_snr"
            )

    @classmethod
    def from_scheduler(cls, scheduler: Any, weighting: Weighting = CONSTANT, shift: float | None = None) -> Self:
        """Read a diffusers scheduler's shift, which `shift` replaces.

        Raises ValueError for a scheduler of a diffusion, one whose time runs backwards, or an impossible shift.
        """
        config, name = scheduler.config, type(scheduler).__name__
        if config.get("shift") is None or hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(f"{name} doesn't sample a flow; use a model with FlowMatchEulerDiscreteScheduler")
        if config.get("invert_sigmas"):
            raise ValueError(f"{name} has invert_sigmas: its time runs from noise to image; such models aren't trained")
        chosen: float | ResolutionShift = config["shift"]
        if shift is not None:
            chosen = shift
        elif config.get("use_dynamic_shifting"):
            chosen = ResolutionShift(
                config["base_image_seq_len"],
                config["max_image_seq_len"],
                config["base_shift"],
                config["max_shift"],
                config.get("time_shift_type", "exponential") == "exponential",
            )
        if isinstance(chosen, float | int) and not 0 < chosen < math.inf:
            raise ValueError(f"{name} has shift {chosen}, which is no positive number; Stable Diffusion 3 has 3")
        return cls(chosen, config["num_train_timesteps"], weighting)

    def to(self, device: torch.device | str) -> Self:
        """The same process: it holds no tensor."""
        return replace(self)

    def draw_times(self, seed: int, positions: Iterable[int], latent_shape: Sequence[int]) -> torch.Tensor:
        """One time per position, its σ logit-normal and shifted: (B,) float32 on the CPU."""
        return self.shifted(draw_normals(seed, positions, "timestep").sigmoid(), latent_shape) * self.num_timesteps

    def shifted(self, sigmas: torch.Tensor, latent_shape: Sequence[int]) -> torch.Tensor:
        """σ of images whose latents are (C, h, w), shifted as the sampler shifts its own."""
        _, height, width = latent_shape
        shift = self.shift
        if isinstance(shift, ResolutionShift):
            shift = shift((height // PATCH) * (width // PATCH))
        return shift * sigmas / (1 + (shift - 1) * sigmas)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """x_σ = (1−σ)·x_0 + σ·ε, of latents and noise (B, …)."""
        sigmas = self._sigmas(times, latents.dim())
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The velocity ε − x_0."""
        dtype = torch.promote_types(latents.dtype, torch.float32)
        return noise.to(dtype) - latents.to(dtype)

    def denoised(self, noisy: torch.Tensor, prediction: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """x̂_0 = x_σ − σ·v of a predicted velocity v."""
        return noisy - self._sigmas(times, noisy.dim()) * prediction

    def weights(self, times: torch.Tensor) -> torch.Tensor:
        """ω(σ) of each time: (B,) float32.

        constant   1
        min_snr    min(snr, γ)·σ² with snr = ((1−σ)/σ)²: the weight of Hang et al. 2023 for an error of x_0, which is σ²
                   times the velocity's
        """
        if self.weighting.name == "constant":
            return torch.ones_like(times)
        sigmas = times / self.num_timesteps
        return torch.minimum((1 - sigmas).square(), self.weighting.min_snr_gamma * sigmas.square())

    def _sigmas(self, times: torch.Tensor, num_dims: int) -> torch.Tensor:
        """σ, shaped (B, 1, …) to meet tensors of `num_dims` dimensions."""
        return (times / self.num_timesteps).reshape(-1, *[1] * (num_dims - 1))
