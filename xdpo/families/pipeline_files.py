"""The files of a pipeline in diffusers' layout, in a folder or on the hub, read without loading a weight."""

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from xdpo.files import lfs_pointer

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[^.-]+))?(?:-\d+-of-\d+)?(?:\.(?P<after>[^.-]+))?\.safetensors"
)
_PREFERRED = ("fp16", "bf16", "ema")  # in this order, where the main weights are missing

CONVERT = (
    "Convert it once: python -c \"from diffusers import {pipeline_class} as P; P.from_single_file('{path}')"
    ".save_pretrained('FOLDER')\" and give that FOLDER"
)
_FAMILY_NAMES = {  # a prefix of weights in a single file → the only family that has it
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "FLUX",
    "model.diffusion_model.double_blocks.": "FLUX",
}


class Unreachable(ValueError):
    """A hub model that is not in the cache and can't be downloaded now."""


def weight_files(names: Iterable[str]) -> tuple[str | None, list[str]]:
    """Which of a part's files hold its weights: (variant, names).

    The variant is None where the main weights exist; variants beside them ("fp16", "non_ema") are ignored. Sharded
    weights give all shards. There are no names where no safetensors file has a name of diffusers' kind.
    """
    by_variant: dict[str | None, list[str]] = {}
    for name in sorted(names):
        if match := _WEIGHTS.fullmatch(name):
            by_variant.setdefault(match["variant"] or match["after"], []).append(name)
    if not by_variant:
        return None, []
    order = [None, *_PREFERRED]
    ranks = {variant: order.index(variant) if variant in order else len(order) for variant in by_variant}
    variant = min(by_variant, key=lambda variant: (ranks[variant], variant or ""))
    return variant, by_variant[variant]


def weight_paths(part: Path) -> tuple[str | None, list[Path]]:
    """The variant and the weight files of a part's folder, as `weight_files` chooses them."""
    variant, names = weight_files(path.name for path in part.glob("*.safetensors"))
    return variant, [part / name for name in names]


def fetch(
    pipeline: str,
    revision: str | None,
    parts: Collection[str],
    weights: Collection[str] = (),
    key: str = "model.pipeline",
) -> Path:
    """A folder with these parts of a pipeline: the folder itself, or the cache's copy of a hub model.

    parts: folders; "" is the top one, of a model that is a single part. weights: the parts whose weights are fetched
    too; the rest is configs and vocabularies, which are small. key: of the config, for messages. Raises Unreachable
    where the hub can't be reached and the cache lacks them, other ValueErrors for a model that doesn't exist.
    """
    if Path(pipeline).is_dir():
        return Path(pipeline)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    every = dict.fromkeys([*parts, *weights])
    patterns = ["model_index.json", *(f"{part}/*{ending}" for part in every if part for ending in (".json", ".txt"))]
    patterns += ["config.json"] * ("" in every)
    is_online = True
    try:
        if weights:
            try:
                weight_patterns = [f"{part}/*.safetensors" if part else "*.safetensors" for part in weights]
                files = snapshot_download(pipeline, revision=revision, allow_patterns=weight_patterns, dry_run=True)
                patterns += _chosen([Path(file.filename) for file in files], weights)
            except DryRunError:  # offline: use what the cache has
                is_online = False
        folder = Path(snapshot_download(pipeline, revision=revision, allow_patterns=patterns))
        lacking = [part for part in weights if not weight_paths(folder / part)[1]]
        if lacking and is_online:
            raise ValueError(
                f"{key}: {pipeline!r} has no safetensors weights of {', '.join(lacking) or 'it'} by the names that "
                "diffusers gives, and pickled ones are not opened; take a revision or a copy that has them"
            )
        if lacking:
            raise LocalEntryNotFoundError(f"no weights of {', '.join(lacking)}")
        return folder
    except LocalEntryNotFoundError as error:
        raise Unreachable(
            f"{key}: could not load {pipeline!r}: it is not in the hub's cache, or not all of it, and the hub "
            f"can't be asked ({_first_line(error)}). Check the network, or download it once and give its folder"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"{key}: could not load {pipeline!r}: {_first_line(error)}. Check the name and the revision, and "
            "log in (hf auth login) where the model asks for that"
        ) from error


def _chosen(files: Collection[Path], parts: Collection[str]) -> list[str]:
    """The safetensors files of a hub model that are read."""
    by_part = {Path(part): [file.name for file in files if file.parent == Path(part)] for part in parts}
    return [(part / name).as_posix() for part, names in by_part.items() for name in weight_files(names)[1]]


def read_json(path: Path) -> dict[str, Any]:
    """A config. Raises ValueError for a file that is damaged or no mapping."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"can't read {path}: {_pointer(path) or error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a mapping is meant; download it again")
    return content


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a safetensors file, from its header. Raises ValueError for a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        problem = _pointer(path) or f"{_first_line(error)}; it is damaged or was cut short"
        raise ValueError(f"can't read {path} ({path.stat().st_size:,} bytes): {problem}. Download it again") from error


def describe_file(path: Path) -> str:
    """What a single file in place of a folder is, and how to use it: the end of a sentence about it."""
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        return (
            "is a single file of pickled weights, which may run any code when it is opened, so it is not. Take the "
            ".safetensors file of the same model. "
            + CONVERT.format(path=path.with_suffix(".safetensors"), pipeline_class="StableDiffusionPipeline")
        )
    if path.suffix != ".safetensors":
        return "is a file, and a folder is meant"
    names = read_header(path)
    if any("lora" in name for name in names):
        return "is a single file of LoRA weights; give it with --lora, and its pipeline with --model"
    for prefix, family in _FAMILY_NAMES.items():
        if any(name.startswith(prefix) for name in names):
            return f"is a single file of {family}, and a pipeline's folder in diffusers' layout is meant; take that"
    if any(name.startswith("model.diffusion_model.") for name in names):
        is_xl = any(name.startswith("conditioner.embedders.1.") for name in names)
        convert = CONVERT.format(path=path, pipeline_class=f"StableDiffusion{'XL' * is_xl}Pipeline")
        return f"is a single file, and a folder in diffusers' layout is meant. {convert}"
    if any(name.startswith("down_blocks.") for name in names):
        return (
            "is a single file with a UNet's weights; put it into a folder as diffusion_pytorch_model.safetensors, "
            "beside the UNet's config.json, and give that folder: with --unet, or as unet/ of a whole pipeline"
        )
    return f"is a single file of {len(names)} weights ({', '.join(sorted(names)[:2])}, …), and a folder is meant"


def _pointer(path: Path) -> str | None:
    with path.open("rb") as file:
        return lfs_pointer(file.read(40))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
