"""Everything random about a training sample, and the noising of latents.

A draw depends on (seed, position of the sample in training order, stream) alone: never on the batch it is in,
the process, the worker or the time. Hence resume is a jump to a position, and two processes equal one.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

HELD_OUT_SEED = 0  # held-out pairs meet the same (t, ε) in every run, so that runs can be compared
PREDICTION_TYPES = ("epsilon", "v_prediction")
NO_SIGNAL = 1e-6  # a last ᾱ below it comes of betas rescaled to no signal; Stable Diffusion's is 0.0047


def generator(seed: int, position: int, stream: str) -> torch.Generator:
    """A CPU generator of its own for one purpose of one sample ("timestep", "noise", "augment", …).

    The three are hashed to 32 bits, because torch's CPU generator (a Mersenne twister) uses only the low 32 bits
    of its seed: numbers packed side by side into 64 would collide. `seed` and `position` are not negative.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(stream.encode()), position))
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint32)[0]))


def permutation(seed: int, epoch: int, length: int) -> torch.Tensor:
    """The order of the rows 0 … length−1 in one epoch: (length,) int64."""
    return torch.randperm(length, generator=generator(seed, epoch, "permutation"))


class SampleOrder:
    """Which pair stands at a position of the training order: `order[position]` is an index below `length`.

    Position p belongs to epoch p // length. With `shuffle` each epoch has its own permutation of the pairs.
    """

    def __init__(self, seed: int, length: int, shuffle: bool):
        self.seed, self.length, self.shuffle = seed, length, shuffle
        self._epoch, self._permutation = -1, torch.empty(0)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.length)
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, permutation(self.seed, epoch, self.length)
        return int(self._permutation[place])


def draw_augmentation(seed: int, position: int) -> tuple[float, float, float]:
    """Three uniform numbers in [0, 1) for a pair's images: to flip them, and to place the crop across and down.

    All three are always drawn, so that switching one use off leaves the others as they were.
    """
    coin, across, down = torch.rand(3, generator=generator(seed, position, "augment")).tolist()
    return coin, across, down


def draw_caption_coin(seed: int, position: int) -> float:
    """A uniform number in [0, 1): a pair's caption is dropped where it lies below the share to drop."""
    return torch.rand(1, generator=generator(seed, position, "caption")).item()


def draw_timesteps(seed: int, positions: Iterable[int], schedule_length: int) -> torch.Tensor:
    """One timestep per pair, uniform over 0 … schedule_length−1: (B,) int64 on the CPU."""
    return torch.cat(
        [
            torch.randint(schedule_length, (1,), generator=generator(seed, int(position), "timestep"))
            for position in positions
        ]
    )


def draw_noise(
    seed: int, positions: Iterable[int], shape: Sequence[int], shared: bool = True, stream: str = "noise"
) -> torch.Tensor:
    """Gaussian noise for B pairs of latents of `shape`: (2B, *shape) float32 on the CPU, chosen first.

    shared: both images of a pair get the same noise (Appendix C); otherwise the rejected image gets its own,
    and the chosen one keeps what it had. `stream` names the purpose: "noise", or "posterior" for the VAE's sample.
    """
    chosen, rejected = [], []
    for position in positions:
        source = generator(seed, int(position), stream)
        chosen.append(torch.randn(*shape, generator=source))
        rejected.append(chosen[-1] if shared else torch.randn(*shape, generator=source))
    return torch.stack(chosen + rejected)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """How much signal is left at each timestep, and what the network predicts."""

    alphas_cumprod: torch.Tensor  # (T,) float32, ᾱ_t, falling with t
    prediction_type: str  # one of PREDICTION_TYPES

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction type {self.prediction_type!r} can't be trained here; "
                f"use a model whose scheduler has one of {', '.join(PREDICTION_TYPES)}"
            )

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> Self:
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
        schedule = cls(alphas_cumprod, scheduler.config.prediction_type)
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
        return type(self)(self.alphas_cumprod.to(device), self.prediction_type)


def add_noise(
    schedule: NoiseSchedule, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """x_t = √ᾱ_t · x_0 + √(1−ᾱ_t) · ε (DDPM, Ho et al. 2020, Eq. 4).

    latents, noise (B, …) and timesteps (B,) are on the schedule's device. Half precision is promoted to float32.
    """
    signal, sigma = _coefficients(schedule, timesteps, latents.dim())
    return signal * latents + sigma * noise


def target(
    schedule: NoiseSchedule, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network should predict: ε, or v = √ᾱ_t · ε − √(1−ᾱ_t) · x_0 (Salimans & Ho 2022).

    Shapes and precision as add_noise.
    """
    if schedule.prediction_type == "epsilon":
        return noise.to(torch.promote_types(noise.dtype, torch.float32))
    signal, sigma = _coefficients(schedule, timesteps, latents.dim())
    return signal * noise - sigma * latents


def timestep_weights(
    schedule: NoiseSchedule,
    timesteps: torch.Tensor,
    weighting: str = "constant",
    min_snr_gamma: float = 5.0,
    discount: float = 0.9,
) -> torch.Tensor:
    """ω(t) of each timestep: (B,) float32 on the schedule's device.

    constant            1
    min_snr             min(snr, γ)/snr for epsilon, min(snr, γ)/(snr + 1) for v, with snr = ᾱ/(1−ᾱ)
                        (Hang et al. 2023)
    temporal_discount   discount^((T−1−t)·50/T), scaled to mean 1 over all t: DenseReward discounts by 0.9 for
                        each of 50 sampling steps, counted from the noisiest. It samples by this; here it weights.

    Raises ValueError for another name.
    """
    alphas_cumprod = schedule.alphas_cumprod[timesteps]
    match weighting:
        case "constant":
            return torch.ones_like(alphas_cumprod)
        case "min_snr":
            snr = alphas_cumprod / (1 - alphas_cumprod)
            if schedule.prediction_type == "epsilon":
                return (min_snr_gamma / snr).clamp(max=1)  # without the 0/0 where the last step has no signal
            return snr.clamp(max=min_snr_gamma) / (snr + 1)
        case "temporal_discount":
            steps_from_noisiest = torch.arange(len(schedule) - 1, -1, -1, dtype=torch.float64) * 50 / len(schedule)
            weights = discount**steps_from_noisiest
            return (weights / weights.mean()).to(alphas_cumprod)[timesteps]
    raise ValueError(f"unknown timestep weighting {weighting!r}; choose from constant, min_snr, temporal_discount")


def _coefficients(schedule: NoiseSchedule, timesteps: torch.Tensor, num_dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """√ᾱ_t and √(1−ᾱ_t), float32, shaped (B, 1, …) to meet tensors of `num_dims` dimensions."""
    alphas_cumprod = schedule.alphas_cumprod[timesteps].reshape(-1, *[1] * (num_dims - 1))
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
