"""The paper on one page: denoising errors of a batch of pairs in, one loss per pair out.

The notation is that of types.py; docs/paper.md has the reasons for every choice. Both losses here are −log σ(m)
(Eq. 2; Eq. 11 with the minus sign that its print lacks). With a γ ≥ 0 the two terms of a margin have the same sign,
so nothing cancels between them.
"""

from torch import Tensor

from xdpo.loss.modifiers import negative_log_sigmoid
from xdpo.loss.types import (
    ComparedErrors,
    LossOutput,
    PairErrors,
    PerPair,
    count_clamped,
    differences,
    exp_difference,
    gap,
    no_exponents,
    prepare,
    unknown,
)


def xdpo_loss(errors: PairErrors, *, beta: PerPair, eta: float, gamma: float, n: float, reward: str) -> Tensor:
    """xDPO's loss of each pair, −log σ(m) (Eq. 11, Appendix C). Shape (B,).

    β and n are positive, η and γ not negative. Half precision is promoted to float32; float64 stays.
    No gradient reaches the reference's errors.
    Raises ValueError for an unknown reward or for errors of different shapes.
    """
    return negative_log_sigmoid(xdpo_margin(errors, beta=beta, eta=eta, gamma=gamma, n=n, reward=reward))


def diffusion_dpo_loss(errors: PairErrors, *, beta: PerPair) -> Tensor:
    """Diffusion-DPO's loss of each pair, −log σ(m) (Eq. 5). Shape (B,). Precision and errors as xdpo_loss."""
    return negative_log_sigmoid(diffusion_dpo_margin(errors, beta=beta))


def xdpo_margin(errors: PairErrors, *, beta: PerPair, eta: float, gamma: float, n: float, reward: str) -> Tensor:
    """m = −(β/2) · [ η·(d_w − d_l) + γ·P ], where P is the power term of the chosen reward. Shape (B,).

    appendix_c  P = exp(n·d_w) − exp(n·d_l)                      Appendix C, the only executable definition
    eq9         P = exp(−n·d_l) − exp(−n·d_w)                    Eq. 9 with ln z = −d
    eq10        P = [exp(n·e_θ) − exp(n·e_ref)]_w − [same]_l     Eq. 10 with its ε_θ + ε read as ε_θ − ε
    """
    compared = prepare(errors)
    power = sum(exp_difference(a, b, n) for a, b in _power_terms(compared, reward))
    return -0.5 * beta * (eta * gap(compared) + gamma * power)


def diffusion_dpo_margin(errors: PairErrors, *, beta: PerPair) -> Tensor:
    """m = −(β/2) · (d_w − d_l): Eq. 5 with ln z = −d, on the scale of its public code. Shape (B,)."""
    return -0.5 * beta * gap(prepare(errors))


def clamp_count(errors: PairErrors, n: float, reward: str) -> Tensor:
    """How many exponents of the batch lie beyond MAX_EXPONENT: a 0-d integer tensor on the errors' device.

    A pair has two exponents in appendix_c and eq9, four in eq10.
    """
    terms = _power_terms(prepare(errors), reward)
    return count_clamped((argument for term in terms for argument in term), n)


def _power_terms(errors: ComparedErrors, reward: str) -> list[tuple[Tensor, Tensor]]:
    """The pairs (a, b) for which the reward's power term P is the sum of exp(n·a) − exp(n·b)."""
    d_chosen, d_rejected = differences(errors)
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
    raise unknown("reward", reward)


def xdpo(
    errors: PairErrors,
    *,
    beta: PerPair,
    eta: float,
    gamma: float,
    n: float,
    reward: str,
    label_smoothing: float,
) -> LossOutput:
    """The objective `xdpo`: xdpo_loss; published are the paper's headline numbers (§5.2, Table 3)."""
    margin = xdpo_margin(errors, beta=beta, eta=eta, gamma=gamma, n=n, reward=reward)
    return LossOutput(negative_log_sigmoid(margin, label_smoothing), margin, clamp_count(errors, n, reward))


def diffusion_dpo(errors: PairErrors, *, beta: PerPair, label_smoothing: float) -> LossOutput:
    """The objective `diffusion_dpo`; β = 2000 is its paper's for SD1.5 (its launcher has 5000)."""
    margin = diffusion_dpo_margin(errors, beta=beta)
    return LossOutput(negative_log_sigmoid(margin, label_smoothing), margin, no_exponents(margin))
