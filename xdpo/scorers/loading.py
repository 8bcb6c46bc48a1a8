"""Find a scorer, or its version, by the scorer's name.

`weights` is a folder of {repository}/{file} for machines without a network. Errors name missing files with the command
that downloads them.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from xdpo.paths import user_path
from xdpo.scorers import TINY_SCALES, check_name, is_custom, is_reward_model
from xdpo.scorers.custom import custom_version, load_custom
from xdpo.scorers.embedders import EMBEDDERS, Embed
from xdpo.scorers.interface import Scorer, as_rgb, full_precision
from xdpo.scorers.metrics import ARCHITECTURES, COMPUTATION, METRICS
from xdpo.scorers.weights import SIZES_FILE, digest, find_files, read_sizes


def load_scorer(name: str, device: str | torch.device = "cpu", weights: str | Path | None = None) -> Scorer:
    """Load a scorer by its name, by path/to/file.py:ClassName, or by the folder of a reward model.

    `weights` is a folder that replaces the hub; for a tiny judge it may be the file itself. Raises ValueError for an
    unknown name and for files that are missing, altered or broken.
    """
    version = scorer_version(name, weights)
    if is_custom(name):
        return load_custom(name, device, weights)
    if is_reward_model(name):
        from xdpo.scorers.reward_model import load_reward_model

        return load_reward_model(user_path(name), device)
    if name.startswith("tiny_"):
        from xdpo.tiny.judges import Judge

        quantity = name.removeprefix("tiny_")
        judge = Judge(quantity, device, _judge_weights(weights))
        return Scorer(name, version, TINY_SCALES[quantity], as_rgb, full_precision(judge.score))
    metric = METRICS[name]
    score_batch = metric.load(find_files(name, metric.files, weights), _sizes_of(metric.architecture, weights), device)
    return Scorer(name, version, metric.scale, metric.preprocess, full_precision(score_batch))


def scorer_version(name: str, weights: str | Path | None = None) -> str:
    """The version that load_scorer would give, from the files' checksums, without loading a model.

    Downloads and checks every file: called for all scorers first, it finds every fault before the scoring. Raises as
    load_scorer does.
    """
    check_name(name)
    if is_custom(name):
        return custom_version(name)
    if is_reward_model(name):
        from xdpo.scorers.reward_model import reward_model_version

        return reward_model_version(user_path(name))
    if name.startswith("tiny_"):
        from xdpo.tiny.judges import judge_weights

        path = _judge_weights(weights) or judge_weights(name.removeprefix("tiny_"))
        if not path.is_file():
            raise ValueError(
                f"{name}: no judge at {path}; it ships in assets/tiny, or make it: scripts/train_tiny_judge.py"
            )
        paths = {"judge": path}
    else:
        metric = METRICS[name]
        _sizes_of(metric.architecture, weights)
        paths = find_files(name, metric.files, weights)
    checksums = "\n".join(f"{key} {digest(path)}" for key, path in sorted(paths.items()))
    sizes = read_sizes(weights if not name.startswith("tiny_") else None)
    content = f"{name} computation {COMPUTATION}\n{checksums}\n{sizes or ''}"
    return f"{name} {COMPUTATION}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def load_embedder(
    name: str, device: str | torch.device = "cpu", weights: str | Path | None = None
) -> tuple[Callable[[Image.Image], Tensor], Embed]:
    """The preprocessing of an image, and the function that turns preprocessed images into unit vectors (B, D).

    `weights` is as for load_scorer. Raises as it does.
    """
    embedder = EMBEDDERS[name]
    sizes = _sizes_of(embedder.architecture, weights)
    return embedder.preprocess, full_precision(embedder.load(_embedder_file(name, weights), sizes, device))


def embedder_version(name: str, weights: str | Path | None = None) -> str:
    """A version that changes whenever the features may change; downloads and checks the weights."""
    return f"{EMBEDDERS[name].architecture} {COMPUTATION}-{digest(_embedder_file(name, weights))[:16]}"


def _embedder_file(name: str, weights: str | Path | None) -> Path:
    return find_files(f"features {name}", {"model": EMBEDDERS[name].weights}, weights)["model"]


def _judge_weights(weights: str | Path | None) -> Path | None:
    """The judge's file, if `weights` is a file. A folder is for the metrics only; the judges ship with the project."""
    return Path(weights) if weights is not None and not Path(weights).is_dir() else None


def _sizes_of(architecture: str, weights: str | Path | None) -> dict:
    """An architecture's sizes, changed by the sizes.json of a weights folder."""
    changes = read_sizes(weights)
    if weights is None or changes is None:
        return ARCHITECTURES[architecture]
    unknown = sorted(changes.keys() - ARCHITECTURES.keys())
    if unknown:
        architectures = ", ".join(ARCHITECTURES)
        raise ValueError(f"{Path(weights) / SIZES_FILE} speaks of unknown {unknown[0]!r}; choose from {architectures}")
    return _merge(ARCHITECTURES[architecture], changes.get(architecture, {}))


def _merge(base: dict, changes: dict) -> dict:
    return base | {
        key: _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }
