"""Preference objectives: denoising errors of a batch in, one loss per pair (or image) out. Pure functions of tensors.

xdpo.py is the paper on a page; the objectives that it is compared with stand beside it, one file per family.
"""

from xdpo.loss.modifiers import margin_weights, negative_log_sigmoid, preference_probability, safeguard
from xdpo.loss.registry import LOSSES, OBJECTIVES, Objective
from xdpo.loss.types import MAX_EXPONENT, LossOutput, PairErrors, UnpairedErrors
from xdpo.loss.xdpo import clamp_count, diffusion_dpo_loss, diffusion_dpo_margin, xdpo_loss, xdpo_margin

__all__ = [
    "LOSSES",
    "MAX_EXPONENT",
    "OBJECTIVES",
    "LossOutput",
    "Objective",
    "PairErrors",
    "UnpairedErrors",
    "clamp_count",
    "diffusion_dpo_loss",
    "diffusion_dpo_margin",
    "margin_weights",
    "negative_log_sigmoid",
    "preference_probability",
    "safeguard",
    "xdpo_loss",
    "xdpo_margin",
]
