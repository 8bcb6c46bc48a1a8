"""What every objective takes and returns, and the arithmetic that several of them share.

Notation, here and in the other files:

    e_θ, e_ref   denoising error of policy and reference on one image at one (t, ε), a mean over (C, H, W)
    d            e_θ − e_ref; up to a constant that β absorbs, ln z = −d with z = p_θ / p_ref
    w, l         chosen and rejected image of a pair
    m            preference margin r(x_w) − r(x_l)
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xdpo.loss.registry import KEYS

MAX_EXPONENT = 30.0
"""Upper limit of every exponent (n·d and n·e in xDPO); beyond it the exponential is flat and its gradient zero.

exp(30) = 1.1e13 lets a gradient of β/2·γ·n·exp(30), at β = 5000, γ = 1 and n = 6, still be squared for the
gradient norm within float32 (1.6e17² = 2.6e34 < 3.4e38). With n = 6 it takes an error 5 above the reference's
to get there, and predicting zero has an error of about 1: only a diverged model reaches the limit.
There is no lower limit, since exp goes to zero by itself.
"""

PerPair = float | Tensor
"""One number for all pairs, or one per pair, (B,). β per pair weights a margin that is linear in β."""


class PairErrors(NamedTuple):
    """Denoising errors of B pairs, each tensor (B,): mean squared error over (C, H, W) of one image.

    The reference's two may be None for an objective without a reference (Objective.needs_reference).
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None


class ComparedErrors(NamedTuple):
    """PairErrors in at least float32 whose reference's are there, cut from the graph: what `prepare` returns."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor


class UnpairedErrors(NamedTuple):
    """Denoising errors of B unrelated images, and each one's label."""

    policy: Tensor  # (B,)
    reference: Tensor  # (B,)
    desirable: Tensor  # (B,) bool


class LossOutput(NamedTuple):
    """What the training step needs of a loss."""

    loss: Tensor  # (B,)
    margin: Tensor  # (B,), positive where the policy agrees with the label (more than the reference, if there is one)
    clamped: Tensor  # 0-d integer: how many exponents of the batch exceeded MAX_EXPONENT


def are_chosen(num_pairs: int, device: torch.device) -> Tensor:
    """Which of 2B images, chosen first, are chosen ones: (2B,) bool."""
    return torch.arange(2 * num_pairs, device=device) < num_pairs


def single_images(errors: PairErrors, desirable: Tensor | None = None) -> UnpairedErrors:
    """The 2B images of B pairs, chosen first; without `desirable`, (2B,) bool, the chosen ones are the desirable."""
    if desirable is None:
        desirable = are_chosen(len(errors.policy_chosen), errors.policy_chosen.device)
    return UnpairedErrors(torch.cat(errors[:2]), torch.cat(_of_reference(errors)), desirable)


def mean_by_pair(output: LossOutput) -> LossOutput:
    """An objective's output for the 2B images of `single_images` → means over the two images of each pair."""
    return LossOutput(output.loss.view(2, -1).mean(0), output.margin.view(2, -1).mean(0), output.clamped)


def prepare(errors: PairErrors) -> ComparedErrors:
    """The errors in at least float32, the reference's cut from the graph.

    Raises ValueError for different shapes, or where the reference's are missing.
    """
    policy, reference = errors[:2], _of_reference(errors)
    shapes = [tuple(error.shape) for error in (*policy, *reference)]
    if len(set(shapes)) > 1:
        raise ValueError(f"the four errors of a pair must have one shape (B,), got {shapes}; reduce over (C, H, W)")
    chosen, rejected = (at_least_float32(error) for error in policy)
    reference_chosen, reference_rejected = (at_least_float32(error).detach() for error in reference)
    return ComparedErrors(chosen, rejected, reference_chosen, reference_rejected)


def _of_reference(errors: PairErrors) -> tuple[Tensor, Tensor]:
    if errors.reference_chosen is None or errors.reference_rejected is None:
        raise ValueError("this objective compares policy and reference, and the reference's errors are missing")
    return errors.reference_chosen, errors.reference_rejected


def at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def differences(errors: ComparedErrors) -> tuple[Tensor, Tensor]:
    """d = e_θ − e_ref of the chosen and of the rejected image."""
    return (
        errors.policy_chosen - errors.reference_chosen,
        errors.policy_rejected - errors.reference_rejected,
    )


def gap(errors: ComparedErrors) -> Tensor:
    """d_w − d_l."""
    d_chosen, d_rejected = differences(errors)
    return d_chosen - d_rejected


def exp_difference(a: Tensor, b: Tensor, n: float) -> Tensor:
    """exp(n·a) − exp(n·b), exponents clamped to MAX_EXPONENT, without losing digits where a ≈ b.

    a and b are subtracted before anything rounds them. The larger exponential comes out of the difference, so
    expm1 sees only arguments ≤ 0: no overflow in either order, and (unlike with an absolute value) the exact
    gradient at a = b, where every run begins.
    """
    a, b = a.clamp(max=MAX_EXPONENT / n), b.clamp(max=MAX_EXPONENT / n)
    b_is_larger = b > a
    larger, smaller = torch.where(b_is_larger, b, a), torch.where(b_is_larger, a, b)
    difference = -torch.exp(n * larger) * torch.expm1(n * (smaller - larger))
    return torch.where(b_is_larger, -difference, difference)


def softplus_difference(a: Tensor, b: Tensor) -> Tensor:
    """softplus(a) − softplus(b) = ln[(1 + exp a)/(1 + exp b)], without losing digits where a ≈ b.

    Where a and b are close, this is ln(1 + σ(larger)·(exp(smaller − larger) − 1)); the logarithm's argument starts at
    1 and stays above exp(−1). Further apart nothing cancels.
    """
    b_is_larger = b > a
    larger, smaller = torch.where(b_is_larger, b, a), torch.where(b_is_larger, a, b)
    step = smaller - larger
    near = -torch.log1p(torch.sigmoid(larger) * torch.expm1(step.clamp(min=-1)))
    difference = torch.where(step > -1, near, logsigmoid(-smaller) - logsigmoid(-larger))
    return torch.where(b_is_larger, -difference, difference)


def count_clamped(arguments: Iterable[Tensor], n: float) -> Tensor:
    """How many of the exponents n·argument lie beyond MAX_EXPONENT: a 0-d integer tensor."""
    return torch.stack([(n * argument > MAX_EXPONENT).sum() for argument in arguments]).sum()


def unknown(key: str, value: str) -> ValueError:
    """The error for a value that is not among its key's choices."""
    return ValueError(f"unknown {key} {value!r}; choose from {', '.join(KEYS[key].choices)}")


def no_exponents(like: Tensor) -> Tensor:
    """LossOutput.clamped of an objective without exponents."""
    return torch.zeros((), dtype=torch.long, device=like.device)
