"""Preference objectives: denoising errors of a batch in, one loss per pair (or image) out. Pure functions of tensors.

registry.py declares them, without PyTorch. xdpo.py is the paper on a page; the objectives that it is compared with
stand beside it, one file per family.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xdpo.loss.registry import KEYS, OBJECTIVES, Key, Objective

if TYPE_CHECKING:  # what __getattr__ gives
    from xdpo.loss.modifiers import margin_weights, negative_log_sigmoid, preference_probability, safeguard
    from xdpo.loss.types import MAX_EXPONENT, LossOutput, PairErrors, UnpairedErrors
    from xdpo.loss.xdpo import clamp_count, diffusion_dpo_loss, diffusion_dpo_margin, xdpo_loss, xdpo_margin

__all__ = [
    "KEYS",
    "MAX_EXPONENT",
    "OBJECTIVES",
    "Key",
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


def __getattr__(name: str) -> Any:
    """Import what computes with tensors when it is first asked for: the config needs the registry alone."""
    if name in __all__:
        for file in ("types", "modifiers", "xdpo"):
            module = import_module(f"{__name__}.{file}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
