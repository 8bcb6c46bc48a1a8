"""Diffusion with discrete timesteps, as DDPM defines it: the network predicts the noise, or v."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from xdpo.noise.draws import draw_timesteps
from xdpo.noise.weighting import CONSTANT, Weighting

PREDICTION_TYPES = ("epsilon", "v_prediction")
NO_SIGNAL = 1e-6  # a last ᾱ below it means betas rescaled to zero signal; Stable Diffusion's is 0.0047


@dataclass(frozen=True, eq=False)
class DiffusionProcess:
    """How much signal is left at each timestep, and what the network predicts.

    Every tensor of a call must be on the process's device. Half precision is promoted to float32.
    """

    alphas_cumprod: torch.Tensor  # (T,) float32, ᾱ_t, falling with t
    prediction_type: str  # one of PREDICTION_TYPES
    weighting: Weighting = CONSTANT

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction type {self.prediction_type!r} can't be trained here; "
                f"use a model whose scheduler has one of {', '.join(PREDICTION_TYPES)}"
            )

    @classmethod
    def from_scheduler(cls, scheduler: Any, weighting: Weighting = CONSTANT) -> Self:
        """Read a diffusers scheduler's ᾱ and prediction type.

        Raises ValueError for a scheduler without ᾱ (flow matching), with another prediction type, or with settings that
        contradict each other: ᾱ beyond 0 … 1 or growing, or a step without signal where the noise is predicted.
        """
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            raise ValueError(
                f"{type(scheduler).__name__} has no alphas_cumprod; "
                "use a model with a diffusion scheduler such as DDPM, DDIM or PNDM"
            )
        alphas_cumprod = alphas_cumprod.float()
        if not (((alphas_cumprod >= 0) & (alphas_cumprod <= 1)).all() and (alphas_cumprod.diff() <= 0).all()):
            raise ValueError(
                "its betas leave no falling share of signal between 1 and 0 (alphas_cumprod goes from "
                f"{alphas_cumprod[0]:.3g} to {alphas_cumprod[-1]:.3g}); Stable Diffusion has beta_schedule "
                "scaled_linear, beta_start 0.00085, beta_end 0.012"
            )
        schedule = cls(alphas_cumprod, scheduler.config.prediction_type, weighting)
        if schedule.prediction_type == "epsilon" and alphas_cumprod[-1] < NO_SIGNAL:
            raise ValueError(
                f"the last of its {len(schedule)} steps holds no signal (ᾱ = {alphas_cumprod[-1]:.2g}) and its "
                "prediction_type is epsilon: no image follows from noise that is predicted from noise. Set "
                "rescale_betas_zero_snr to false, or prediction_type to v_prediction if the model was trained so"
            )
        return schedule

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> Self:
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def draw_times(self, seed: int, positions: Iterable[int], latent_shape: Sequence[int]) -> torch.Tensor:
        """One timestep per position, uniform over 0 … T−1 for latents of any size: (B,) int64 on the CPU."""
        return draw_timesteps(seed, positions, len(self))

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = √ᾱ_t · x_0 + √(1−ᾱ_t) · ε (DDPM, Ho et al. 2020, Eq. 4), of latents and noise (B, …)."""
        signal, sigma = self._coefficients(timesteps, latents.dim())
        return signal * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network should predict: ε, or v = √ᾱ_t · ε − √(1−ᾱ_t) · x_0 (Salimans & Ho 2022)."""
        if self.prediction_type == "epsilon":
            return noise.to(torch.promote_types(noise.dtype, torch.float32))
        signal, sigma = self._coefficients(timesteps, latents.dim())
        return signal * noise - sigma * latents

    def denoised(self, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x̂_0 = (x_t − √(1−ᾱ_t)·ε)/√ᾱ_t of a predicted ε, or √ᾱ_t·x_t − √(1−ᾱ_t)·v of a predicted v."""
        signal, sigma = self._coefficients(timesteps, noisy.dim())
        if self.prediction_type == "epsilon":
            return (noisy - sigma * prediction) / signal
        return signal * noisy - sigma * prediction

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """ω(t) of each timestep: (B,) float32.

        constant            1
        min_snr             min(snr, γ)/snr for epsilon, min(snr, γ)/(snr + 1) for v, with snr = ᾱ/(1−ᾱ)
                            (Hang et al. 2023)
        temporal_discount   discount^((T−1−t)·50/T), scaled to mean 1 over all t: DenseReward discounts by 0.9 for
                            each of 50 sampling steps, counted from the noisiest. It samples by this; here it weights.
        """
        alphas_cumprod = self.alphas_cumprod[timesteps]
        match self.weighting.name:
            case "min_snr":
                gamma, snr = self.weighting.min_snr_gamma, alphas_cumprod / (1 - alphas_cumprod)
                if self.prediction_type == "epsilon":
                    return (gamma / snr).clamp(max=1)  # without the 0/0 where the last step has no signal
                return snr.clamp(max=gamma) / (snr + 1)
            case "temporal_discount":
                steps_from_noisiest = torch.arange(len(self) - 1, -1, -1, dtype=torch.float64) * 50 / len(self)
                weights = self.weighting.discount**steps_from_noisiest
                return (weights / weights.mean()).to(alphas_cumprod)[timesteps]
        return torch.ones_like(alphas_cumprod)

    def _coefficients(self, timesteps: torch.Tensor, num_dims: int) -> tuple[torch.Tensor, torch.Tensor]:
        """√ᾱ_t and √(1−ᾱ_t), float32, shaped (B, 1, …) to meet tensors of `num_dims` dimensions."""
        alphas_cumprod = self.alphas_cumprod[timesteps].reshape(-1, *[1] * (num_dims - 1))
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
