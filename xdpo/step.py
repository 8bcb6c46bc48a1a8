"""The method: errors of policy and reference on a batch → loss, and the numbers worth watching."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xdpo.config import LossConfig
from xdpo.loss import LossOutput, PairErrors, safeguard
from xdpo.loss.types import are_chosen
from xdpo.noisy import NoisyBatch, residuals, weighted_mean
from xdpo.reference import Reference


class Statistics(NamedTuple):
    """Sums over B pairs, 0-d float32 each."""

    loss: Tensor
    implicit_accuracy: Tensor  # pairs with the label's order; a zero margin counts ½
    margin: Tensor
    d_chosen: Tensor  # policy's error minus reference's, of chosen or desirable images; negative: it denoises better
    d_rejected: Tensor
    policy_error: Tensor
    reference_error: Tensor
    sigmoid_minus_margin: Tensor  # the weight of the pair's gradient
    clamped: Tensor  # exponents that met the loss's limit
    gain: Tensor  # reference's error minus policy's, over both images: Diffusion-KTO's z0 is its mean
    num_chosen: Tensor  # images that are chosen or desirable; one a pair, but for single images
    num_rejected: Tensor


_OF_THE_REFERENCE = ("d_chosen", "d_rejected", "reference_error", "gain")


class Measured(NamedTuple):
    """What one batch's forward passes gave."""

    errors: PairErrors  # each (B,); the reference's None where it isn't needed
    inputs: dict[str, Tensor]  # what else an objective takes, by the name of its argument


class StepOutput(NamedTuple):
    loss: Tensor  # (B,)
    errors: PairErrors  # each (B,)
    statistics: Statistics


def inputs_of(config: LossConfig) -> frozenset[str]:
    """Names of what the objective takes beside the errors, and of what its modifiers do."""
    modifiers = {"policy_dot": config.safeguard, "margin_weights": config.margin_weight}
    asked = {name for name, value in modifiers.items() if value is not None}
    return frozenset(config.objective.inputs) | asked


def measure(policy: nn.Module, reference: Reference, noisy: NoisyBatch, config: LossConfig) -> Measured:
    """What the configured objective needs: one forward of policy and reference each, of the same shape and precision.

    Measured inputs are policy_dot and policy_dot_reference, means over (C, h, w) of products of residuals, both (B,).
    """
    inputs = inputs_of(config)
    # The reference first: its activations are gone before the policy's are kept for the backward pass.
    measured = reference.measure(noisy) if config.needs_reference else None
    policy_residuals = residuals(policy, noisy)
    policy_chosen, policy_rejected = weighted_mean(policy_residuals.square(), noisy).chunk(2)
    chosen, rejected = policy_residuals.chunk(2)
    found = {}
    if "policy_dot" in inputs:
        found["policy_dot"] = weighted_mean(chosen.detach() * rejected.detach(), noisy)
    if "policy_dot_reference" in inputs:
        if measured is None or measured.residuals is None:
            raise ValueError(f"loss.name: {config.name} needs the reference's predictions, not only its errors")
        found["policy_dot_reference"] = weighted_mean(chosen * measured.residuals.chunk(2)[0], noisy)
    reference_chosen, reference_rejected = (None, None) if measured is None else measured.errors
    return Measured(PairErrors(policy_chosen, policy_rejected, reference_chosen, reference_rejected), found)


def preference_loss(errors: PairErrors, config: LossConfig, inputs: Mapping[str, Tensor] | None = None) -> StepOutput:
    """The configured loss of each pair and its statistics.

    `inputs`: a Measured's; with loss.margin_weight margin_weights (B,), which multiply β; for an unpaired objective z0,
    0-d, and desirable, (2B,) bool, whose images stand where chosen and rejected ones do; without it they are chosen and
    rejected. Its loss and margin are means over two images.
    """
    arguments = {**config.numbers, **(inputs or {})}
    desirable, margin_weights = arguments.get("desirable"), None
    if config.margin_weight is not None:
        margin_weights = arguments.pop("margin_weights")
    guarded = errors
    if (dot := arguments.pop("policy_dot", None)) is not None:
        guarded = safeguard(errors, dot, mu=config.safeguard)
    if margin_weights is not None:
        arguments["beta"] = arguments["beta"] * margin_weights
    output = config.objective.of_pairs(guarded, **arguments)
    return StepOutput(output.loss, errors, _statistics(errors, output, desirable, margin_weights))


def detached(errors: PairErrors) -> PairErrors:
    """The errors without their graphs."""
    return PairErrors(*(None if error is None else error.detach() for error in errors))


@torch.no_grad()
def _statistics(
    errors: PairErrors, output: LossOutput, desirable: Tensor | None, margin_weights: Tensor | None
) -> Statistics:
    margin, num_pairs = output.margin, len(output.margin)
    # A negative weight reverses a pair: its margin then has the scorer's sign, and the accuracy is the label's.
    agreement = margin if margin_weights is None else margin * margin_weights.sign()
    has_reference = errors.reference_chosen is not None
    reference = (
        torch.cat(errors[2:]) if has_reference else torch.full((2 * num_pairs,), torch.nan, device=margin.device)
    )
    difference = torch.cat(errors[:2]) - reference
    if desirable is None:
        desirable = are_chosen(num_pairs, margin.device)
    return Statistics(
        loss=output.loss.float().sum(),
        implicit_accuracy=((agreement > 0).float() + 0.5 * (agreement == 0).float()).sum(),
        margin=margin.float().sum(),
        d_chosen=(difference * desirable).float().sum(),
        d_rejected=(difference * ~desirable).float().sum(),
        policy_error=0.5 * (errors.policy_chosen + errors.policy_rejected).float().sum(),
        reference_error=0.5 * reference.float().sum(),
        sigmoid_minus_margin=torch.sigmoid(-margin).float().sum(),
        clamped=output.clamped.float(),
        gain=-difference.float().sum(),
        num_chosen=desirable.float().sum(),
        num_rejected=(~desirable).float().sum(),
    )


def means(sums: Statistics, num_pairs: int, config: LossConfig) -> dict[str, float]:
    """Sums over `num_pairs` pairs, as numbers, → means by name, without those of a reference that isn't there.

    d_chosen and d_rejected are means over the images of their label, gain over all images, everything else over pairs.
    """
    images = {"d_chosen": max(sums.num_chosen, 1), "d_rejected": max(sums.num_rejected, 1), "gain": 2 * num_pairs}
    left_out = {"num_chosen", "num_rejected", *(() if config.needs_reference else _OF_THE_REFERENCE)}
    return {name: total / images.get(name, num_pairs) for name, total in sums._asdict().items() if name not in left_out}
