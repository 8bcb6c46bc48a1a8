"""Scorers from users: a class in a Python file, named path/to/file.py:ClassName.

The class needs `score(images, prompts)`: RGB PIL images and as many prompts → one number per image, higher being
better. It is constructed with those of the keywords `device` and `weights` that it accepts. Its attributes `version`
and `scale` are used if it has them; without `version`, the file's checksum is the version. If it has `preprocess` and
`score_batch` as `interface.Scorer` describes them, DataLoader workers preprocess the images.
"""

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xdpo.paths import user_path
from xdpo.scorers.interface import Scorer, as_rgb
from xdpo.scorers.weights import digest


def custom_class(name: str) -> tuple[type, Path]:
    """The class that path/to/file.py:ClassName names, and the file. Raises ValueError if there is none."""
    file, _, class_name = name.rpartition(":")
    path = user_path(file)
    if not path.is_file():
        raise ValueError(f"scorer {name!r}: no file {str(path)!r} here; give it as path/to/file.py:ClassName")
    module_name = f"xdpo_custom_scorer_{digest(path)[:16]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None  # it is a .py file
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # pickle looks here for the file's definitions
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    scorer_class = getattr(sys.modules[module_name], class_name, None)
    if not inspect.isclass(scorer_class) or not callable(getattr(scorer_class, "score", None)):
        raise ValueError(f"scorer {name!r}: {path} has no class {class_name!r} with a method score(images, prompts)")
    return scorer_class, path


def custom_version(name: str) -> str:
    scorer, path = custom_class(name)
    return str(getattr(scorer, "version", None) or f"{path.name}:{scorer.__name__} sha256 {digest(path)[:16]}")


def load_custom(name: str, device: str | torch.device, weights: str | Path | None) -> Scorer:
    """Construct the class and wrap it as a Scorer."""
    scorer_class, _ = custom_class(name)
    accepted = inspect.signature(scorer_class).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted)
    names = {parameter.name for parameter in accepted}
    offered = {"device": device, "weights": weights}
    instance = scorer_class(**{key: value for key, value in offered.items() if takes_any or key in names})
    score_batch = getattr(instance, "score_batch", instance.score)

    def checked(items: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        scores = list(score_batch(items, prompts))
        try:
            scores = [float(score) for score in scores]
        except (TypeError, ValueError) as error:
            raise ValueError(f"scorer {name!r} must return a number for each image: {error}") from error
        if len(scores) != len(items):
            raise ValueError(
                f"scorer {name!r} returned {len(scores)} scores for {len(items)} images; one each is needed"
            )
        return scores

    return Scorer(
        name=name,
        version=custom_version(name),
        scale=str(getattr(instance, "scale", "the scorer's own")),
        preprocess=getattr(instance, "preprocess", as_rgb),
        score_batch=checked,
    )
