"""Scorers behind one small interface: `load_scorer(name).score(images, prompts)`, one float per image."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image


class Scorer(Protocol):
    """Anything that scores PIL images against their prompts, higher being better."""

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]: ...


def _tiny(quantity: str) -> Callable[..., Scorer]:
    def load(device: str | torch.device, weights: str | Path | None) -> Scorer:
        from xdpo.tiny.judges import Judge

        return Judge(quantity, device, weights)

    return load


SCORERS: dict[str, Callable[..., Scorer]] = {
    "tiny_alignment": _tiny("alignment"),
    "tiny_appeal": _tiny("appeal"),
    "tiny_reward": _tiny("reward"),
}
"""From a scorer's name to the function that loads it, called with device and weights."""


def load_scorer(name: str, device: str | torch.device = "cpu", weights: str | Path | None = None) -> Scorer:
    """Load a scorer by name; `weights` takes the place of its own. Raises ValueError for an unknown name."""
    if name not in SCORERS:
        near = difflib.get_close_matches(name, SCORERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown scorer {name!r}; choose from {', '.join(sorted(SCORERS))}{hint}")
    return SCORERS[name](device, weights)
