"""The method: a batch of pairs → denoising errors of policy and reference → loss, and the numbers worth watching."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xdpo.config import Config, LossConfig
from xdpo.loss import OBJECTIVES, LossOutput, PairErrors, UnpairedErrors, safeguard
from xdpo.models import LatentMoments, PipelineParts, as_reference, encode_captions, encode_images, sample_latents
from xdpo.noise import NoiseSchedule, add_noise, draw_noise, draw_timesteps, target, timestep_weights

STATISTICS = (
    "loss",
    "implicit_accuracy",  # share of pairs with the label's order; a zero margin counts ½
    "margin",
    "d_chosen",  # policy's error minus reference's; negative where the policy denoises better. Also of desirable images
    "d_rejected",
    "policy_error",
    "reference_error",
    "sigmoid_minus_margin",  # the weight of the pair's gradient
    "clamped",  # exponents that met the loss's limit, per pair
    "gain",  # reference's error minus policy's, over both images: Diffusion-KTO's z0 is its mean
    "num_chosen",  # images that are chosen or desirable; one a pair, but for unpaired images
    "num_rejected",
)
OF_THE_REFERENCE = ("d_chosen", "d_rejected", "reference_error", "gain")


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


class Measured(NamedTuple):
    """What one batch's forward passes gave."""

    errors: PairErrors  # each (B,); the reference's None where it isn't needed
    inputs: dict[str, Tensor]  # what else an objective takes, by the name of its argument


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

    def encoded(self, batch: dict) -> dict:
        """The batch with its encodings in place of its images and captions: for several draws on the same pairs."""
        moments, text_states, scaling_factor = self.encode(batch)
        rest = {name: value for name, value in batch.items() if name not in ("pixel_values", "input_ids")}
        return rest | {
            "latent_means": moments.means,
            "latent_stds": moments.stds,
            "text_states": text_states,
            "scaling_factor": scaling_factor,
        }

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


def residuals(unet: nn.Module, example: Example) -> Tensor:
    """Prediction − target, (2B, C, h, w) float32."""
    prediction = unet(example.noisy_latents, example.timesteps, example.text_states).sample
    return prediction.float() - example.targets


def denoising_errors(unet: nn.Module, example: Example) -> Tensor:
    """ω(t) · mean over (C, H, W) of (prediction − target)², (2B,) float32 (Eq. 10's norms; docs/paper.md: mean)."""
    return _weighted_mean(residuals(unet, example).square(), example)


def _weighted_mean(values: Tensor, example: Example) -> Tensor:
    return example.weights[: len(values)] * values.mean(dim=(1, 2, 3))


def inputs_of(config: LossConfig) -> frozenset[str]:
    """Names of what the objective takes beside the errors, and of what its modifiers do."""
    modifiers = {"policy_dot": config.safeguard, "margin_weights": config.margin_weight}
    asked = {name for name, value in modifiers.items() if value is not None}
    return frozenset(OBJECTIVES[config.name].inputs) | asked


def measure(
    policy: nn.Module,
    bare_policy: nn.Module,
    reference: nn.Module | None,
    example: Example,
    config: LossConfig,
    reference_errors: Tensor | None = None,
) -> Measured:
    """What the configured objective needs: one forward of policy and reference each, of the same shape and precision.

    `bare_policy` is the policy outside its distributed wrapper; without a reference it stands in for it, adapter off.
    `reference_errors`, (2, B) from a cache, chosen first, take the place of the reference's forward. Measured inputs
    are policy_dot and policy_dot_reference, means over (C, H, W) of products of residuals, both (B,).
    """
    inputs = inputs_of(config)
    reference_chosen = reference_rejected = None
    if config.needs_reference:
        if reference_errors is None:
            with as_reference(bare_policy, reference) as network:
                reference_residuals = residuals(network, example).detach()
            reference_errors = _weighted_mean(reference_residuals.square(), example).view(2, -1)
        reference_chosen, reference_rejected = reference_errors
    policy_residuals = residuals(policy, example)
    policy_chosen, policy_rejected = _weighted_mean(policy_residuals.square(), example).chunk(2)
    chosen, rejected = policy_residuals.chunk(2)
    found = {}
    if "policy_dot" in inputs:
        found["policy_dot"] = _weighted_mean(chosen.detach() * rejected.detach(), example)
    if "policy_dot_reference" in inputs:
        found["policy_dot_reference"] = _weighted_mean(chosen * reference_residuals.chunk(2)[0], example)
    return Measured(PairErrors(policy_chosen, policy_rejected, reference_chosen, reference_rejected), found)


def preference_loss(errors: PairErrors, config: LossConfig, inputs: Mapping[str, Tensor] | None = None) -> StepOutput:
    """The configured loss of each pair and its statistics.

    `inputs`: a Measured's; with loss.margin_weight margin_weights (B,), which multiply β; for an unpaired objective z0,
    0-d, and desirable, (2B,) bool, whose images stand where chosen and rejected ones do; without it they are chosen and
    rejected. Its loss and margin are means over two images.
    """
    inputs = dict(inputs or {})
    desirable = inputs.pop("desirable", None)
    if (dot := inputs.pop("policy_dot", None)) is not None:
        guarded = safeguard(errors, dot, mu=config.safeguard)
    else:
        guarded = errors
    objective, numbers, weights = OBJECTIVES[config.name], config.numbers, None
    if config.margin_weight is not None:
        weights = inputs.pop("margin_weights")
        numbers["beta"] = numbers["beta"] * weights
    if not config.is_unpaired:
        output = objective.function(guarded, **inputs, **numbers)
        return StepOutput(output.loss, errors, _statistics(errors, output, None, weights))
    if desirable is None:
        desirable = torch.arange(2 * len(errors.policy_chosen), device=errors.policy_chosen.device)
        desirable = desirable < len(errors.policy_chosen)
    single = UnpairedErrors(torch.cat(errors[:2]), torch.cat(errors[2:]), desirable)
    each = objective.function(single, **inputs, **numbers)
    output = LossOutput(each.loss.view(2, -1).mean(0), each.margin.view(2, -1).mean(0), each.clamped)
    return StepOutput(output.loss, errors, _statistics(errors, output, desirable))


def detached(errors: PairErrors) -> PairErrors:
    """The errors without their graphs."""
    return PairErrors(*(None if error is None else error.detach() for error in errors))


def averages(sums: Sequence[float], num_pairs: int, config: LossConfig) -> dict[str, float]:
    """Sums of STATISTICS over `num_pairs` pairs as means by name, without those of a reference that isn't there."""
    numbers = dict(zip(STATISTICS, sums, strict=True))
    counts = {name: max(numbers.pop(f"num_{name.removeprefix('d_')}"), 1) for name in ("d_chosen", "d_rejected")}
    counts["gain"] = 2 * num_pairs
    left_out = () if config.needs_reference else OF_THE_REFERENCE
    return {name: total / counts.get(name, num_pairs) for name, total in numbers.items() if name not in left_out}


@torch.no_grad()
def _statistics(
    errors: PairErrors, output: LossOutput, desirable: Tensor | None, weights: Tensor | None = None
) -> Tensor:
    margin, num_pairs = output.margin, len(output.margin)
    # A negative weight turns a pair round: its margin then has the scorer's sign, and the accuracy is the label's.
    agreement = margin if weights is None else margin * weights.sign()
    has_reference = errors.reference_chosen is not None
    reference = (
        torch.cat(errors[2:]) if has_reference else torch.full((2 * num_pairs,), torch.nan, device=margin.device)
    )
    difference = torch.cat(errors[:2]) - reference
    if desirable is None:
        desirable = torch.arange(2 * num_pairs, device=margin.device) < num_pairs
    sums = (
        output.loss.float().sum(),
        ((agreement > 0).float() + 0.5 * (agreement == 0).float()).sum(),
        margin.float().sum(),
        (difference * desirable).float().sum(),
        (difference * ~desirable).float().sum(),
        0.5 * (errors.policy_chosen + errors.policy_rejected).float().sum(),
        0.5 * reference.float().sum(),
        torch.sigmoid(-margin).float().sum(),
        output.clamped.float(),
        -difference.float().sum(),
        desirable.float().sum(),
        (~desirable).float().sum(),
    )
    return torch.stack(sums)
