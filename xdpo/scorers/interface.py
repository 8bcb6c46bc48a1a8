"""The interface of a scorer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from PIL import Image

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Scorer:
    """Scores images against their prompts, higher being better.

    name: as given to load_scorer. version: changes whenever the scores may change; a key for caches. scale: one line on
    the unit of the scores. preprocess: a PIL image of any mode → one input of score_batch; it runs on the CPU without
    the model, so that a DataLoader's workers can do it. score_batch: inputs and as many prompts → their scores.
    """

    name: str
    version: str
    scale: str
    preprocess: Callable[[Image.Image], Any]
    score_batch: Callable[[Sequence[Any], Sequence[str]], list[float]]

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str], batch_size: int = 16) -> list[float]:
        """One float per image. Raises ValueError unless there are as many prompts as images."""
        if len(images) != len(prompts):
            raise ValueError(f"{self.name}: {len(images)} images but {len(prompts)} prompts; give one prompt per image")
        scores: list[float] = []
        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            scores += self.score_batch([self.preprocess(image) for image in images[batch]], list(prompts[batch]))
        return scores


def as_rgb(image: Image.Image) -> Image.Image:
    """The preprocessing of scorers that take PIL images."""
    return image if image.mode == "RGB" else image.convert("RGB")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs `function` without gradients, autocast and TF32, whatever the process has switched on."""

    def wrapped(*arguments: P.args, **options: P.kwargs) -> R:
        # torch puts cudnn.conv on its module at run time.
        switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
        before = [switch.fp32_precision for switch in switches]
        for switch in switches:
            switch.fp32_precision = "ieee"
        try:
            with torch.inference_mode(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
                return function(*arguments, **options)
        finally:
            for switch, precision in zip(switches, before, strict=True):
                switch.fp32_precision = precision

    return wrapped
