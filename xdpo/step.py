"""The method: a batch of pairs → denoising errors of policy and reference → loss, and the numbers worth watching."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xdpo.config import Config, LossConfig
from xdpo.loss import LOSSES, LossOutput, PairErrors
from xdpo.models import LatentMoments, PipelineParts, adapter_off, encode_captions, encode_images, sample_latents
from xdpo.noise import NoiseSchedule, add_noise, draw_noise, draw_timesteps, target, timestep_weights

STATISTICS = (
    "loss",
    "implicit_accuracy",  # share of pairs with a positive margin; a zero margin counts ½
    "margin",
    "d_chosen",  # policy's error minus reference's; negative where the policy denoises better
    "d_rejected",
    "policy_error",
    "reference_error",
    "sigmoid_minus_margin",  # the weight of the pair's gradient
    "clamped",  # exponents that met the loss's limit, per pair
)


class Encoded(NamedTuple):
    """What of B pairs does not change while training, float32."""

    moments: LatentMoments  # each (2B, C, h, w), chosen first
    text_states: Tensor  # (B, L, D), or (2B, L, D) of unpaired images
    scaling_factor: float  # of the latents


class Example(NamedTuple):
    """B pairs ready for the networks, on their device; images chosen first, then rejected."""

    noisy_latents: Tensor  # (2B, C, h, w)
    timesteps: Tensor  # (2B,)
    text_states: Tensor  # (2B, L, D)
    targets: Tensor  # (2B, C, h, w) float32
    weights: Tensor  # (2B,) ω(t)


class StepOutput(NamedTuple):
    loss: Tensor  # (B,)
    errors: PairErrors  # each (B,)
    statistics: Tensor  # (len(STATISTICS),) float32, sums over the B pairs


@dataclass(frozen=True)
class ExampleMaker:
    """Encodes a batch, where no cache did, and draws what is random about it from (seed, position) alone."""

    parts: PipelineParts
    schedule: NoiseSchedule
    config: Config
    device: torch.device

    def __call__(
        self, batch: dict, seed: int, positions: Sequence[int] | Tensor, opponents: Tensor | None = None
    ) -> Example:
        """`batch` of a data.PairDataset or a cache.CachedPairDataset; `positions` (B,) give each pair its draws.

        Of a data.UnpairedDataset, whose images have nothing in common, each of the 2B draws for itself, at its place.
        `opponents`, latents (B, C, h, w) as the UNet takes them, stand in for the rejected images.
        """
        noise = self.config.noise
        moments, text_states, scaling_factor = self.encode(batch)
        shape = moments.means.shape[1:]
        is_unpaired = "places" in batch
        if is_unpaired:
            positions = batch["places"]
        else:
            text_states = text_states.repeat(2, 1, 1)
        num_images = len(moments.means)

        def draw(stream: str, shared: bool) -> Tensor:
            # Of an unpaired image's two draws the second has no use.
            return self._to_device(draw_noise(seed, positions, shape, shared=shared, stream=stream)[:num_images])

        posterior_noise = draw("posterior", shared=False) if self.config.data.sample_latents else None
        drawn = draw("noise", shared=noise.shared_by_pair)
        timesteps = self._to_device(draw_timesteps(seed, positions, len(self.schedule)))
        timesteps = timesteps if is_unpaired else timesteps.repeat(2)

        latents = sample_latents(moments, posterior_noise, scaling_factor)
        if opponents is not None:
            latents = torch.cat([latents[: len(opponents)], opponents])
        return Example(
            noisy_latents=add_noise(self.schedule, latents, drawn, timesteps),
            timesteps=timesteps,
            text_states=text_states,
            targets=target(self.schedule, latents, drawn, timesteps),
            weights=timestep_weights(self.schedule, timesteps, noise.weighting, noise.min_snr_gamma, noise.discount),
        )

    def encode(self, batch: dict) -> Encoded:
        """Moments and text states of a batch: from the batch itself where a cache holds them, else by the encoders."""
        if "latent_means" in batch:
            means, stds, text_states = (
                None if batch[name] is None else self._to_device(batch[name]).float()
                for name in ("latent_means", "latent_stds", "text_states")
            )
            return Encoded(LatentMoments(means, stds), text_states, batch["scaling_factor"])
        vae, text_encoder = self.parts.vae, self.parts.text_encoder
        moments = encode_images(vae, self._to_device(batch["pixel_values"]))
        text_states = encode_captions(text_encoder, self._to_device(batch["input_ids"]))
        return Encoded(moments, text_states, vae.config.scaling_factor)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def denoising_errors(unet: nn.Module, example: Example) -> Tensor:
    """ω(t) · mean over (C, H, W) of (prediction − target)², (2B,) float32 (Eq. 10's norms; docs/paper.md: mean)."""
    prediction = unet(example.noisy_latents, example.timesteps, example.text_states).sample
    squared = (prediction.float() - example.targets).square()
    return example.weights * squared.mean(dim=(1, 2, 3))


def pair_errors(
    policy: nn.Module,
    bare_policy: nn.Module,
    reference: nn.Module | None,
    example: Example,
    reference_errors: Tensor | None = None,
) -> PairErrors:
    """Errors of policy and reference, each on chosen and rejected in one forward of the same shape and precision.

    `bare_policy` is the policy outside its distributed wrapper; without a reference it stands in for it, adapter off.
    `reference_errors`, (2, B) from a cache, chosen first, take the place of the reference's forward.
    """
    if reference_errors is None:
        with torch.no_grad(), adapter_off(bare_policy) if reference is None else nullcontext():
            reference_errors = denoising_errors(reference or bare_policy, example).view(2, -1)
    policy_chosen, policy_rejected = denoising_errors(policy, example).chunk(2)
    return PairErrors(policy_chosen, policy_rejected, reference_errors[0], reference_errors[1])


def preference_loss(errors: PairErrors, config: LossConfig) -> StepOutput:
    """The configured loss of each pair and its statistics."""
    numbers = config.model_dump(exclude={"name"})
    output = LOSSES[config.name](errors, **numbers)
    return StepOutput(output.loss, errors, _statistics(errors, output))


@torch.no_grad()
def _statistics(errors: PairErrors, output: LossOutput) -> Tensor:
    margin = output.margin
    per_pair = (
        output.loss,
        (margin > 0).float() + 0.5 * (margin == 0).float(),
        margin,
        errors.policy_chosen - errors.reference_chosen,
        errors.policy_rejected - errors.reference_rejected,
        0.5 * (errors.policy_chosen + errors.policy_rejected),
        0.5 * (errors.reference_chosen + errors.reference_rejected),
        torch.sigmoid(-margin),
    )
    return torch.stack([*(values.float().sum() for values in per_pair), output.clamped.float()])
