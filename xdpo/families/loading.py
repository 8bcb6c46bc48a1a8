"""A pipeline's parts from a folder or the hub, checked before a weight is read."""

import copy
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xdpo import processes
from xdpo.config import ModelConfig
from xdpo.families.interface import Family, PipelineParts
from xdpo.families.pipeline_files import Unreachable, describe_file, fetch, read_json, weight_paths
from xdpo.families.stable_diffusion import STABLE_DIFFUSION
from xdpo.families.stable_diffusion_check import PARTS, part_class, weight_problems
from xdpo.files import file_sha256

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FAMILIES = {family.pipeline_class: family for family in (STABLE_DIFFUSION,)}
"""Every family, by the `_class_name` of its model_index.json."""


def family_of(folder: Path) -> Family:
    """The family of a pipeline's folder; Stable Diffusion for an unknown class, which that family's check refuses."""
    index = folder / "model_index.json"
    name = read_json(index).get("_class_name") if index.is_file() else None
    return FAMILIES.get(str(name), STABLE_DIFFUSION)


def check_pipeline_folder(pipeline: str, revision: str | None = None) -> None:
    """Refuse what isn't a pipeline of a known family whose parts fit together, before any weight is read.

    pipeline: a folder, or a hub id, from which only small files are fetched here. A hub model that can't be reached
    passes: `load_parts` raises for it. Raises ValueError with a sentence for each problem.
    """
    path = Path(pipeline)
    if path.is_file():
        raise ValueError(f"model.pipeline: {pipeline!r} {describe_file(path)}")
    if not path.is_dir() and (path.is_absolute() or pipeline.startswith((".", "~")) or pipeline.count("/") != 1):
        raise ValueError(
            f"model.pipeline: no folder {pipeline!r} here, and it isn't a hub id of the form owner/name; "
            "give a folder in Stable Diffusion format (paths are relative to where the command is run) or a hub id"
        )
    try:
        folder = fetch(pipeline, revision, PARTS, weights=False)
    except Unreachable:
        return
    problems = family_of(folder).problems(folder)
    if not problems and path.is_dir():
        problems = weight_problems(folder)
    if problems:
        raise ValueError(f"model.pipeline: {pipeline!r} can't be used:\n  " + "\n  ".join(problems))


def load_parts(config: ModelConfig, *, encoders: bool = True) -> PipelineParts:
    """Load a pipeline from a hub id or a folder; safetensors only, float32.

    encoders: load the autoencoder and the text encoders too; cached examples need neither. A part that exists only as a
    variant (fp16, …) is loaded from that, and a note is printed. Raises ValueError where the pipeline can't be loaded
    or is of no known family.
    """
    import diffusers
    import transformers

    check_pipeline_folder(config.pipeline, config.revision)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    is_local = Path(config.pipeline).is_dir()  # then check_pipeline_folder has checked its weights
    family = family_of(fetch(config.pipeline, config.revision, (), weights=False))
    loaded = (family.denoiser, *family.encoders * encoders)
    folder = fetch(config.pipeline, config.revision, (*loaded, *family.tokenizers, "scheduler"), weights=True)
    if problems := [] if is_local else weight_problems(folder, loaded):
        raise ValueError(f"model.pipeline: could not load {config.pipeline!r}:\n  " + "\n  ".join(problems))
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
    variants = {part: variant for part in loaded if (variant := weight_paths(folder / part)[0]) is not None}
    try:
        given: dict[str, Any] = {part: None for part in family.encoders if not encoders}
        for part, variant in variants.items():
            given[part] = part_class(folder, part).from_pretrained(folder, subfolder=part, variant=variant, **options)
        pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(
            folder, **family.without_extras, **options, **given
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"model.pipeline: could not load {config.pipeline!r}: {error}") from error
    if variants and processes.rank() == 0:
        shown = ", ".join(f"{part} as {variant}" for part, variant in variants.items())
        print(f"note: {config.pipeline} holds {shown} alone; loaded from that, as float32", file=sys.stderr)
    modules = {name: getattr(pipeline, name) for name in loaded}
    for module in modules.values():
        module.eval().requires_grad_(False)
    tokenizers = {name: getattr(pipeline, name) for name in family.tokenizers}
    return PipelineParts(family, modules, tokenizers, pipeline.scheduler)


def part_checksum(config: ModelConfig, *names: str) -> str:
    """16 hexadecimal digits of the SHA-256 of the files of a pipeline's parts ("vae", "unet", …).

    They are configs, vocabularies and the weights that `load_parts` reads, not other variants. Files of a hub model are
    fetched where they aren't in its cache; nothing is loaded. Raises ValueError where there are none.
    """
    folder = fetch(config.pipeline, config.revision, names, weights=True)
    digest = hashlib.sha256()
    for name in names:
        files = [path for path in sorted((folder / name).iterdir()) if path.suffix in (".json", ".txt")]
        for path in [*files, *weight_paths(folder / name)[1]]:
            digest.update(f"{name}/{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


def pipeline_with(parts: PipelineParts, denoiser: nn.Module, *, encoders: bool = True) -> "DiffusionPipeline":
    """The family's diffusers pipeline, denoising with `denoiser`; it shares the parts' memory. No safety checker.

    encoders: with the parts' encoders, if they have any; a pipeline without encoders runs on the denoiser's device.
    """
    import diffusers

    family = parts.family
    modules = {name: parts.modules.get(name) if encoders else None for name in family.encoders}
    pipeline = getattr(diffusers, family.pipeline_class)(
        **modules,
        **parts.tokenizers,
        **{family.denoiser: denoiser},
        scheduler=copy.deepcopy(parts.scheduler),
        **family.without_extras,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
