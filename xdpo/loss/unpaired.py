"""Diffusion-KTO: single images, each desirable or not; no pairs."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xdpo.loss.types import LossOutput, UnpairedErrors, at_least_float32, no_exponents, unknown


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


def _gain(errors: UnpairedErrors) -> Tensor:
    """g = e_ref − e_θ, positive where the policy denoises better."""
    shapes = [tuple(tensor.shape) for tensor in errors]
    if len(set(shapes)) > 1:
        raise ValueError(f"errors and labels must have one shape (B,), got {shapes}; reduce over (C, H, W)")
    if errors.desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be a bool tensor, got {errors.desirable.dtype}; compare the labels with 1")
    return at_least_float32(errors.reference.detach()) - at_least_float32(errors.policy)
