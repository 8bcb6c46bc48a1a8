"""The paper on one page: denoising errors of a batch of pairs in, one loss per pair out.

Notation (docs/paper.md has the reasons for every choice):

    e_θ, e_ref   denoising error of policy and reference on one image at one (t, ε), a mean over (C, H, W)
    d            e_θ − e_ref; up to a constant that β absorbs, ln z = −d with z = p_θ / p_ref
    w, l         chosen and rejected image of the pair
    m            preference margin r(x_w) − r(x_l)

Every loss here is −log σ(m) (Eq. 2; Eq. 11 with the minus sign that its print lacks). With a γ ≥ 0 the two
terms of a margin have the same sign, so nothing cancels between them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

MAX_EXPONENT = 30.0
"""Upper limit of the exponents n·d and n·e; beyond it the exponential is flat and its gradient zero.

exp(30) = 1.1e13 lets a gradient of β/2·γ·n·exp(30), at β = 5000, γ = 1 and n = 6, still be squared for the
gradient norm within float32 (1.6e17² = 2.6e34 < 3.4e38). With n = 6 it takes an error 5 above the reference's
to get there, and predicting zero has an error of about 1: only a diverged model meets the limit.
There is no lower limit, since exp goes to zero by itself.
"""


class PairErrors(NamedTuple):
    """Denoising errors of B pairs, each tensor (B,): mean squared error over (C, H, W) of one image."""

    policy_chosen: torch.Tensor
    policy_rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor


class LossOutput(NamedTuple):
    """What the training step needs of a loss."""

    loss: torch.Tensor  # (B,)
    margin: torch.Tensor  # (B,), positive where the policy prefers the chosen image more than the reference does
    clamped: torch.Tensor  # 0-d integer: how many exponents of the batch met MAX_EXPONENT


def xdpo_loss(
    errors: PairErrors, *, beta: float, eta: float, gamma: float, n: float, reward: str = "appendix_c"
) -> torch.Tensor:
    """xDPO's loss of each pair, −log σ(m) (Eq. 11, Appendix C). Shape (B,).

    β and n are positive, η and γ not negative. Half precision is promoted to float32; float64 stays.
    No gradient reaches the reference's errors.
    Raises ValueError for an unknown reward or for errors of different shapes.
    """
    return -logsigmoid(xdpo_margin(errors, beta=beta, eta=eta, gamma=gamma, n=n, reward=reward))


def diffusion_dpo_loss(errors: PairErrors, *, beta: float) -> torch.Tensor:
    """Diffusion-DPO's loss of each pair, −log σ(m) (Eq. 5). Shape (B,). Precision and errors as xdpo_loss."""
    return -logsigmoid(diffusion_dpo_margin(errors, beta=beta))


def xdpo_margin(
    errors: PairErrors, *, beta: float, eta: float, gamma: float, n: float, reward: str = "appendix_c"
) -> torch.Tensor:
    """m = −(β/2) · [ η·(d_w − d_l) + γ·P ], where P is the power term of the chosen reward. Shape (B,).

    appendix_c  P = exp(n·d_w) − exp(n·d_l)                      Appendix C, the only executable definition
    eq9         P = exp(−n·d_l) − exp(−n·d_w)                    Eq. 9 with ln z = −d
    eq10        P = [exp(n·e_θ) − exp(n·e_ref)]_w − [same]_l     Eq. 10 with its ε_θ + ε read as ε_θ − ε
    """
    errors = _prepare(errors)
    power = sum(_exp_difference(a, b, n) for a, b in _power_terms(errors, reward))
    return -0.5 * beta * (eta * _gap(errors) + gamma * power)


def diffusion_dpo_margin(errors: PairErrors, *, beta: float) -> torch.Tensor:
    """m = −(β/2) · (d_w − d_l): Eq. 5 with ln z = −d, on the scale of its public code. Shape (B,)."""
    return -0.5 * beta * _gap(_prepare(errors))


def clamp_count(errors: PairErrors, n: float, reward: str = "appendix_c") -> torch.Tensor:
    """How many exponents of the batch lie beyond MAX_EXPONENT: a 0-d integer tensor on the errors' device.

    A pair has two exponents in appendix_c and eq9, four in eq10.
    """
    terms = _power_terms(_prepare(errors), reward)
    return sum((n * argument > MAX_EXPONENT).sum() for term in terms for argument in term)


def _prepare(errors: PairErrors) -> PairErrors:
    """The errors in at least float32, the reference's cut from the graph."""
    shapes = [tuple(error.shape) for error in errors]
    if len(set(shapes)) > 1:
        raise ValueError(f"the four errors of a pair must have one shape (B,), got {shapes}; reduce over (C, H, W)")
    promoted = [error.to(torch.promote_types(error.dtype, torch.float32)) for error in errors]
    return PairErrors(promoted[0], promoted[1], promoted[2].detach(), promoted[3].detach())


def _differences(errors: PairErrors) -> tuple[torch.Tensor, torch.Tensor]:
    """d = e_θ − e_ref of the chosen and of the rejected image."""
    return (
        errors.policy_chosen - errors.reference_chosen,
        errors.policy_rejected - errors.reference_rejected,
    )


def _gap(errors: PairErrors) -> torch.Tensor:
    """d_w − d_l."""
    d_chosen, d_rejected = _differences(errors)
    return d_chosen - d_rejected


def _power_terms(errors: PairErrors, reward: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pairs (a, b) for which the reward's power term P is the sum of exp(n·a) − exp(n·b)."""
    d_chosen, d_rejected = _differences(errors)
    match reward:
        case "appendix_c":
            return [(d_chosen, d_rejected)]
        case "eq9":
            return [(-d_rejected, -d_chosen)]
        case "eq10":
            return [
                (errors.policy_chosen, errors.reference_chosen),
                (errors.reference_rejected, errors.policy_rejected),
            ]
    raise ValueError(f"unknown reward {reward!r}; choose from appendix_c, eq9, eq10")


def _exp_difference(a: torch.Tensor, b: torch.Tensor, n: float) -> torch.Tensor:
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


def _xdpo(errors: PairErrors, *, beta: float, eta: float, gamma: float, n: float, reward: str) -> LossOutput:
    margin = xdpo_margin(errors, beta=beta, eta=eta, gamma=gamma, n=n, reward=reward)
    return LossOutput(-logsigmoid(margin), margin, clamp_count(errors, n, reward))


def _diffusion_dpo(errors: PairErrors, *, beta: float, **_inherited: object) -> LossOutput:
    """A config of Diffusion-DPO inherits the section's η, γ, n and reward; they don't act here."""
    margin = diffusion_dpo_margin(errors, beta=beta)
    return LossOutput(-logsigmoid(margin), margin, torch.zeros((), dtype=torch.long, device=margin.device))


LOSSES: dict[str, Callable[..., LossOutput]] = {"xdpo": _xdpo, "diffusion_dpo": _diffusion_dpo}
"""From `loss.name` to the function that the step calls with the errors and the section's other keys."""
