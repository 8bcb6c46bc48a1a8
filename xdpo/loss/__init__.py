"""Preference objectives: denoising errors of a batch in, one loss per pair (or image) out. Pure functions of tensors.

registry.py declares them, without PyTorch. xdpo.py is the paper on a page; the objectives that it is compared with
stand beside it, one file per family.
"""

from importlib import import_module

from xdpo.loss.registry import KEYS, OBJECTIVES, Key, Objective

_MODULE_OF = {  # of what computes with tensors
    "LossOutput": "types",
    "MAX_EXPONENT": "types",
    "PairErrors": "types",
    "UnpairedErrors": "types",
    "clamp_count": "xdpo",
    "diffusion_dpo_loss": "xdpo",
    "diffusion_dpo_margin": "xdpo",
    "xdpo_loss": "xdpo",
    "xdpo_margin": "xdpo",
    "margin_weights": "modifiers",
    "negative_log_sigmoid": "modifiers",
    "preference_probability": "modifiers",
    "safeguard": "modifiers",
}

__all__ = ["KEYS", "OBJECTIVES", "Key", "Objective", *_MODULE_OF]


def __getattr__(name: str):
    """Import what computes with tensors when it is first asked for: the config needs the registry alone."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
