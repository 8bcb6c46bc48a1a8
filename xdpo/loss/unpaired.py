"""Objectives on single images, without pairs: Diffusion-KTO and DiffusionNFT."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xdpo.loss.types import LossOutput, UnpairedErrors, at_least_float32, no_exponents, unknown

_SMALLEST_DEVIATION = 1e-5


def diffusion_kto(
    errors: UnpairedErrors,
    *,
    z0: Tensor,
    beta: float,
    utility: str,
    desirable_weight: float,
    undesirable_weight: float,
) -> LossOutput:
    """λ·(1 − U(v)), v = ±β·(g − z0): + for a desirable image, − for the others; g = e_ref − e_θ. Shapes (B,).

    z0 is the reference point, a 0-d tensor, cut from the graph: max(0, mean of g). The training takes that mean over
    the whole batch of the previous optimizer step, on all processes. λ is the image's class weight. β has no factor ½
    here. The returned margin is v.

    utility        U(v)            slope
    kto            σ(v)            greatest at v = 0, fades to both sides
    loss_averse    log σ(v)        fades for gains only: λ·(1 − log σ(v)) is DPO on single images
    risk_seeking   −log σ(−v)      fades for losses only; the loss has no lower bound

    Source: Diffusion-KTO (arXiv 2404.04465), §4 and its public code; β = 5000, weights 1, four desirable images in
    five (a matter of the sampler). Its code has further forms of risk-seeking; this is the paper's.
    Limits: an image with both labels has the constant loss λ under kto. At the start (v = 0) a chosen and a rejected
    image with labels get Diffusion-DPO's gradient at the same β.
    Raises ValueError for an unknown utility, for shapes that differ and for labels that aren't bool.
    """
    gain = _gain(errors)
    label = errors.desirable.to(gain.dtype)
    value = (2 * label - 1) * beta * (gain - z0.detach())
    match utility:
        case "kto":
            loss = torch.sigmoid(-value)  # 1 − σ(v)
        case "loss_averse":
            loss = 1 - logsigmoid(value)
        case "risk_seeking":
            loss = 1 + logsigmoid(-value)
        case _:
            raise unknown("utility", utility)
    weight = label * desirable_weight + (1 - label) * undesirable_weight
    return LossOutput(weight * loss, value, no_exponents(value))


def diffusion_nft(
    errors: UnpairedErrors, *, optimality: Tensor, image_dot_reference: Tensor, error_weights: Tensor, beta: float
) -> LossOutput:
    """r·w₊·‖v₊ − v‖² + (1 − r)·w₋·‖v₋ − v‖², v± = v_old ± β·(v_θ − v_old): what is better is approached, worse is left.

    v is what the denoiser should predict, v_old the reference's prediction. Norms are means over (C, H, W), and follow
    from the two errors and the mean product c of the residuals v_θ − v and v_old − v, `image_dot_reference` (B,):
    ‖v₊ − v‖² = β²·e_θ + (1 − β)²·e_old + 2β·(1 − β)·c, and ‖v₋ − v‖² is the same with −β for β. r is the image's
    `optimality` (B,), from 0 to 1, and w± are `error_weights` (2, B), as `nft_weights` makes them. Shapes (B,). The
    returned margin is (2r − 1)·(e_old − e_θ).

    Source: DiffusionNFT (arXiv 2509.16117), for flows; ε- and v-prediction need no other formula, and that use is ours.
    The public code multiplies the whole by 5/β and adds 1e-4·‖v_θ − v_base‖² (modifiers.with_kl).
    Limits, with w± = 1: r = ½ pulls the policy to the reference, β²·‖v_θ − v_old‖² up to a constant; r = 1 and β = 1 is
    fine-tuning on the image.
    Raises ValueError for shapes that differ, and for labels that aren't bool.
    """
    gain = _gain(errors)
    shapes = {tuple(tensor.shape) for tensor in (gain, optimality, image_dot_reference, *error_weights)}
    if len(shapes) > 1:
        raise ValueError(f"optimality, dots and weights must have the errors' shape (B,), got {sorted(shapes)}")
    policy, old = at_least_float32(errors.policy), at_least_float32(errors.reference.detach())
    dot, better = at_least_float32(image_dot_reference), at_least_float32(optimality)
    approached, left = (
        sign * beta * (sign * beta * policy + 2 * (1 - sign * beta) * dot) + (1 - sign * beta) ** 2 * old
        for sign in (1, -1)
    )
    of_approached, of_left = at_least_float32(error_weights.detach())
    loss = better * of_approached * approached + (1 - better) * of_left * left
    return LossOutput(loss, (2 * better - 1) * gain, no_exponents(gain))


@torch.no_grad()
def nft_weights(policy: Tensor, old: Tensor, denoised_scales: Tensor, *, beta: float, error_weight: str) -> Tensor:
    """w₊ and w₋ of diffusion_nft, (2, B) float32, without gradient.

    constant           1
    self_normalized    s²/(s·mean |v± − v|): s·(v± − v) is what x̂_0 of v± lacks to x_0, so that the weighted error is
                       mean (x̂_0 − x_0)² / mean |x̂_0 − x_0|; a mean deviation below 1e-5 counts as 1e-5

    policy, old: the residuals v_θ − v and v_old − v, (B, …). denoised_scales (B,): s, which is σ for a flow and for
    v-prediction, and √(1 − ᾱ)/√ᾱ for ε-prediction, so that there the noisiest times weigh most.
    Source: the public code of DiffusionNFT, for flows. Raises ValueError for an unknown error_weight.
    """
    if error_weight == "constant":
        return torch.ones(2, len(policy), device=policy.device)
    if error_weight != "self_normalized":
        raise unknown("error_weight", error_weight)
    scales = at_least_float32(denoised_scales)
    implicit = (old + sign * beta * (policy - old) for sign in (1, -1))
    deviations = torch.stack([scales * residual.abs().flatten(1).mean(1) for residual in implicit])
    return scales.square() / deviations.clamp(min=_SMALLEST_DEVIATION)


def _gain(errors: UnpairedErrors) -> Tensor:
    """g = e_ref − e_θ, positive where the policy denoises better."""
    shapes = [tuple(tensor.shape) for tensor in errors]
    if len(set(shapes)) > 1:
        raise ValueError(f"errors and labels must have one shape (B,), got {shapes}; reduce over (C, H, W)")
    if errors.desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be a bool tensor, got {errors.desirable.dtype}; compare the labels with 1")
    return at_least_float32(errors.reference.detach()) - at_least_float32(errors.policy)
