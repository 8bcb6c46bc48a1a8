"""The objectives on pairs that the paper is compared with, beside Diffusion-DPO (xdpo.py) and f-DPO (f_divergence.py).

All β are on the scale of Diffusion-DPO's public code: s = −(β/2)·(d_w − d_l) is its margin. Publications that write
β·Δ with Δ = d_l − d_w mean half of the β here.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from xdpo.loss.modifiers import negative_log_sigmoid
from xdpo.loss.types import (
    MAX_EXPONENT,
    LossOutput,
    PairErrors,
    PerPair,
    at_least_float32,
    differences,
    no_exponents,
    prepare,
    unknown,
)
from xdpo.loss.xdpo import diffusion_dpo_margin


def ipo(errors: PairErrors, *, beta: PerPair) -> LossOutput:
    """(s − ½)², s = (β/2)·Δ: the margin is pulled to ½ instead of to infinity.

    Source: Azar et al. 2023 (arXiv 2310.12036), for diffusion the script of diffusers: (Δ − 1/(2β′))² with
    β′ = β/2 = 2500. Ours is that times the constant β′²: its slope at the start is −β/2, against −4e-4 as printed,
    which would leave most of a UNet's gradients below AdamW's ε.
    Limits: quadratic in s, so a pair that is very wrong counts more, and one beyond ½ is pulled back.
    """
    margin = diffusion_dpo_margin(errors, beta=beta)
    return _output((margin - 0.5).square(), margin)


def hinge(errors: PairErrors, *, beta: PerPair) -> LossOutput:
    """max(0, 1 − s): every pair pulls equally until its margin is 1, and then not at all.

    Source: SLiC-HF (Zhao et al. 2023, arXiv 2305.10425), for diffusion the script of diffusers, relu(1 − β′·Δ) with
    β′ = β/2 = 2500.
    """
    margin = diffusion_dpo_margin(errors, beta=beta)
    return _output(relu(1 - margin), margin)


def dmpo(errors: PairErrors, *, beta: PerPair, alpha: float) -> LossOutput:
    """KL(p ‖ q) of two coins, p = σ(s) and q = 1 − α: p·ln(p/q) + (1 − p)·ln((1 − p)/(1 − q)). 0 < α < 1.

    Source: DMPO (arXiv 2507.07510), the reverse of the KL that −log σ minimises; α = 0.01 and β = 2000 as in the
    code of Diffusion-SDPO.
    Limits: zero, with zero slope, at s = ln((1 − α)/α); ln 2 minus p's entropy at α = ½. Bounded by −ln α: the slope
    fades where a pair is very wrong, which spares noisy labels.
    """
    margin = diffusion_dpo_margin(errors, beta=beta)
    agree = torch.sigmoid(margin) * (logsigmoid(margin) - math.log1p(-alpha))
    disagree = torch.sigmoid(-margin) * (logsigmoid(-margin) - math.log(alpha))
    return _output(agree + disagree, margin)


def alpha_dpo(errors: PairErrors, *, beta: PerPair, alpha: PerPair) -> LossOutput:
    """The α-divergence of p = σ(s) from certainty: (p^α − (1 − α) − α·p) / (α·(α − 1)), 0 < α < 1.

    Source: α-DPO for diffusion (ICLR 2026) and its public code, whose launcher (SDXL) has β = 4000 and α = 0.9999.
    There α is then multiplied by the mean of σ(s) over the global batch, from the first step on, so that its runs have
    an α of about a half; here it stays what it is. α may be a 0-d tensor or (B,).
    Limits: α → 0 is −ln p − (1 − p), DPO and a bounded term; α → 1 is p·ln p + 1 − p. Bounded by 1/α, so the slope
    fades where a pair is very wrong.
    """
    margin = diffusion_dpo_margin(errors, beta=beta)
    log_p = logsigmoid(margin)
    # p^α − p = −p^α·(p^(1−α) − 1): nothing cancels as α → 1, and no exponent is positive.
    power = -torch.exp(alpha * log_p) * torch.expm1((1 - alpha) * log_p)
    return _output((torch.sigmoid(-margin) - power / (1 - alpha)) / alpha, margin)


def dspo(errors: PairErrors, *, policy_dot_reference: Tensor, beta: float) -> LossOutput:
    """mean ‖a − k·(a − a_ref)‖² on the chosen image, k = β·(1 − σ(s)), a = prediction − target.

    `policy_dot_reference` (B,) is the mean over (C, H, W) of a·a_ref on the chosen image with the errors' ω(t), with
    its gradient to the policy. Expanded, the loss is (1 − k)²·e_θ + 2k(1 − k)·<a, a_ref> + k²·e_ref.

    Source: DSPO (ICLR 2025) and its public code for SD1.5, where one β stands in k and in s, k has a gradient, and the
    grid is 0.001, 0.01, 0.05. (Its SDXL branch has another expression, which is not here.)
    Limits: β → 0 is sft. With the published β s is all but zero and k ≈ β/2, so that the score-matching term leads
    the loss; both terms of k·(a − a_ref) vanish while the policy is the reference.
    """
    prepared = prepare(errors)
    margin = diffusion_dpo_margin(errors, beta=beta)
    k = beta * torch.sigmoid(-margin)
    dot = at_least_float32(policy_dot_reference)
    loss = (1 - k).square() * prepared.policy_chosen + 2 * k * (1 - k) * dot + k.square() * prepared.reference_chosen
    return _output(loss, margin)


def mapo(errors: PairErrors, *, beta: float, k: float, scale: float, label_smoothing: float) -> LossOutput:
    """e_w − β·log σ(m), m = T·[f(e_w) − f(e_l)], f(e) = k·e / (exp(k·e) − 1). No reference.

    Source: MaPO (arXiv 2406.06424) and its public code: β = 0.1, k = 0.5 (`snr_value`), T = 1000, the number of
    training timesteps (`scale`). Here β weighs the preference against the denoising of the chosen image.
    Limits: β → 0 is sft; near e = 0 the margin is (T·k/2)·(e_l − e_w), which is 250 with the defaults.
    """
    chosen, rejected = _policy(errors)
    margin = scale * (_bernoulli(k * chosen) - _bernoulli(k * rejected))
    loss = chosen + beta * negative_log_sigmoid(margin, label_smoothing)
    clamped = (k * torch.stack([chosen, rejected]) > MAX_EXPONENT).sum()
    return LossOutput(loss, margin, clamped)


def _bernoulli(x: Tensor) -> Tensor:
    """x / (exp(x) − 1) for x ≥ 0, 1 at 0; flat beyond MAX_EXPONENT."""
    is_small = x < 1e-3  # the series' first missing term is x⁴/720
    away_from_zero = torch.where(is_small, 1.0, x.clamp(max=MAX_EXPONENT))
    return torch.where(is_small, 1 - x / 2 + x.square() / 12, away_from_zero / torch.expm1(away_from_zero))


def sft(errors: PairErrors) -> LossOutput:
    """e_w: fine-tuning on the chosen images. No reference, no hyper-parameter; the logged margin is e_l − e_w."""
    chosen, rejected = _policy(errors)
    return _output(chosen, rejected - chosen)


def seppo(errors: PairErrors, *, beta: PerPair, flip: str, label_smoothing: float) -> LossOutput:
    """−log σ(m), m = −(β/2)·[d(x_w) − φ·d(x_ref)], φ = sign(e_ref(x_w) − e_θ(x_w)), without gradient.

    `rejected` is the image x_ref that the reference, a past policy, sampled for the same prompt; `chosen` is the
    anchor. Where the policy is better than the reference on the anchor (φ = 1), x_ref counts as rejected, where it
    is worse (φ = −1) as chosen, and where they are equal not at all. `flip: indicator` has φ = 0 instead of −1.

    Source: SePPO (arXiv 2410.05255); there the indicator scores 21.56 PickScore against the sign's 21.57. Its text
    gives no β; 2000 is Diffusion-DPO's.
    Limits: where φ = 1 this is Diffusion-DPO.
    Raises ValueError for an unknown flip.
    """
    d_anchor, d_sampled = differences(prepare(errors))
    match flip:
        case "sign":
            factor = torch.sign(-d_anchor.detach())
        case "indicator":
            factor = (d_anchor.detach() < 0).to(d_anchor.dtype)
        case _:
            raise unknown("flip", flip)
    margin = -0.5 * beta * (d_anchor - factor * d_sampled)
    return _output(negative_log_sigmoid(margin, label_smoothing), margin)


def _policy(errors: PairErrors) -> tuple[Tensor, Tensor]:
    """The policy's errors on chosen and rejected, in at least float32. Raises ValueError for different shapes."""
    chosen, rejected = errors.policy_chosen, errors.policy_rejected
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"the two errors of a pair must have one shape (B,), got {tuple(chosen.shape)} and {tuple(rejected.shape)}"
        )
    return at_least_float32(chosen), at_least_float32(rejected)


def _output(loss: Tensor, margin: Tensor) -> LossOutput:
    return LossOutput(loss, margin, no_exponents(margin))
