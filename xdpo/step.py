"""The method: errors of policy and reference on a batch → loss, and the statistics to log."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xdpo.batch import Batch
from xdpo.config import LossConfig
from xdpo.loss import LossOutput, PairErrors, safeguard
from xdpo.loss.modifiers import with_kl
from xdpo.loss.types import are_chosen
from xdpo.loss.unpaired import nft_weights
from xdpo.noisy import NoisyBatch, residuals, weighted_mean
from xdpo.reference import Reference


class Statistics(NamedTuple):
    """Sums over B pairs, 0-d float32 each."""

    loss: Tensor
    implicit_accuracy: Tensor  # pairs with the label's order; a zero margin counts ½
    margin: Tensor
    d_chosen: Tensor  # policy's error − reference's on chosen or desirable images; negative: the policy is better
    d_rejected: Tensor
    policy_error: Tensor
    reference_error: Tensor
    sigmoid_minus_margin: Tensor  # the weight of the pair's gradient
    clamped: Tensor  # exponents that reached loss.MAX_EXPONENT
    gain: Tensor  # reference's error minus policy's, over both images: Diffusion-KTO's z0 is its mean
    num_chosen: Tensor  # images that are chosen or desirable; of pairs, one each
    num_rejected: Tensor


_OF_THE_REFERENCE = ("d_chosen", "d_rejected", "reference_error", "gain")


class Measured(NamedTuple):
    """The results of one batch's forward passes."""

    errors: PairErrors  # each (B,); the reference's None where it isn't needed
    inputs: dict[str, Tensor]  # further arguments of the objective and its modifiers, by name


class StepOutput(NamedTuple):
    loss: Tensor  # (B,)
    errors: PairErrors  # each (B,)
    statistics: Statistics


def inputs_of(config: LossConfig) -> frozenset[str]:
    """Names of the tensors that the objective and its modifiers take beside the errors."""
    modifiers = {
        "policy_dot": config.safeguard is not None,
        "margin_weights": config.margin_weight is not None,
        "base_distance": config.kl_weight > 0,
    }
    of_modifiers = {name for name, is_on in modifiers.items() if is_on}
    return frozenset(config.objective.inputs) | of_modifiers


def measure(
    policy: nn.Module, reference: Reference, noisy: NoisyBatch, config: LossConfig, base: Reference | None = None
) -> Measured:
    """What the configured objective needs: one forward of policy and reference each, of the same shape and precision.

    base: what loss.kl_weight pulls to, where that isn't the reference; a third forward. Measured inputs are policy_dot
    and policy_dot_reference, (B,), and image_dot_reference, (2B,): means over (C, h, w) of products of residuals;
    base_distance (2B,), of squared differences of predictions; error_weights (2, 2B).
    Raises ValueError where the objective needs the reference's predictions and only its errors were recorded.
    """
    needed = inputs_of(config)
    # The reference goes first: its activations are freed before the policy's are kept for the backward pass.
    of_reference = reference.measure(noisy) if config.needs_reference else None
    of_base = of_reference if base is None else base.measure(noisy)
    policy_residuals = residuals(policy, noisy)
    policy_chosen, policy_rejected = weighted_mean(policy_residuals.square(), noisy).chunk(2)
    chosen, rejected = policy_residuals.chunk(2)
    inputs = {}
    if "policy_dot" in needed:
        inputs["policy_dot"] = weighted_mean(chosen.detach() * rejected.detach(), noisy)
    if config.objective.needs_predictions:
        if of_reference is None or of_reference.residuals is None:
            raise ValueError(f"loss.name: {config.name} needs the reference's predictions, not only its errors")
        if "policy_dot_reference" in needed:
            inputs["policy_dot_reference"] = weighted_mean(chosen * of_reference.residuals.chunk(2)[0], noisy)
        if "image_dot_reference" in needed:
            inputs["image_dot_reference"] = weighted_mean(policy_residuals * of_reference.residuals, noisy)
        if "error_weights" in needed:
            inputs["error_weights"] = nft_weights(
                policy_residuals,
                of_reference.residuals,
                noisy.denoised_scales,
                beta=float(config.hyperparameters["beta"]),
                error_weight=config.error_weight,
            )
        if "base_distance" in needed:
            assert of_base is not None and of_base.residuals is not None, "the base model is run, not recorded"
            inputs["base_distance"] = weighted_mean((policy_residuals - of_base.residuals).square(), noisy)
    reference_chosen, reference_rejected = (None, None) if of_reference is None else of_reference.errors
    return Measured(PairErrors(policy_chosen, policy_rejected, reference_chosen, reference_rejected), inputs)


def optimality_of(batch: Batch) -> Tensor:
    """How good each of a batch's 2B images is, (2B,) float32 from 0 to 1; in a pair the chosen is 1, the other 0."""
    if batch.single is None:
        return are_chosen(len(batch.positions), batch.positions.device).float()
    return batch.single.desirable.float() if batch.single.optimality is None else batch.single.optimality


def preference_loss(errors: PairErrors, config: LossConfig, inputs: Mapping[str, Tensor] | None = None) -> StepOutput:
    """The configured loss of each pair and its statistics.

    inputs: a Measured's; with loss.margin_weight, margin_weights (B,), which multiply β; for an unpaired objective z0,
    0-d, and desirable, (2B,) bool, the labels of its 2B images. Without `desirable` the chosen images are desirable and
    the rejected ones are not. An unpaired objective's loss and margin are means over two images.
    """
    arguments: dict[str, Any] = {**config.hyperparameters, **(inputs or {})}
    desirable = arguments.get("desirable")
    # The modifiers' inputs are applied here, so that no objective's function has an argument for them: the safeguard
    # changes a gradient of the errors, a pair's margin weight is a factor of its β, and the KL is added to its loss.
    policy_dot, base_distance = arguments.pop("policy_dot", None), arguments.pop("base_distance", None)
    margin_weights = None
    if config.margin_weight is not None:
        margin_weights = arguments.pop("margin_weights")
    guarded = errors
    if config.safeguard is not None and policy_dot is not None:
        guarded = safeguard(errors, policy_dot, mu=config.safeguard)
    if margin_weights is not None:
        arguments["beta"] = arguments["beta"] * margin_weights
    output = config.objective.of_pairs(guarded, **arguments)
    if base_distance is not None:
        output = with_kl(output, base_distance, weight=config.kl_weight)
    return StepOutput(output.loss, errors, _statistics(errors, output, desirable, margin_weights))


def detached(errors: PairErrors) -> PairErrors:
    """The errors without their graphs."""
    chosen, rejected = errors.reference_chosen, errors.reference_rejected
    return PairErrors(
        errors.policy_chosen.detach(),
        errors.policy_rejected.detach(),
        None if chosen is None else chosen.detach(),
        None if rejected is None else rejected.detach(),
    )


@torch.no_grad()
def _statistics(
    errors: PairErrors, output: LossOutput, desirable: Tensor | None, margin_weights: Tensor | None
) -> Statistics:
    margin, num_pairs = output.margin, len(output.margin)
    # A negative weight reverses a pair, so its margin has the scorer's sign; the accuracy is measured by the label.
    agreement = margin if margin_weights is None else margin * margin_weights.sign()
    if errors.reference_chosen is not None and errors.reference_rejected is not None:
        reference = torch.cat([errors.reference_chosen, errors.reference_rejected])
    else:
        reference = torch.full((2 * num_pairs,), torch.nan, device=margin.device)
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
    """Sums over `num_pairs` pairs, as floats → means by name; without a reference, none of its statistics.

    d_chosen and d_rejected are means over the images of their label, gain over all images, everything else over pairs.
    """
    images = {"d_chosen": max(sums.num_chosen, 1), "d_rejected": max(sums.num_rejected, 1), "gain": 2 * num_pairs}
    left_out = {"num_chosen", "num_rejected", *(() if config.needs_reference else _OF_THE_REFERENCE)}
    return {name: total / images.get(name, num_pairs) for name, total in sums._asdict().items() if name not in left_out}
