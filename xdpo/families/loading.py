"""Which family a pipeline is of; its parts from a folder or the hub, checked before a weight is read."""

import copy
import hashlib
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xdpo import processes
from xdpo.config import Config, ModelConfig
from xdpo.families.checks import (
    autoencoder_problems,
    lacking_files,
    lacks,
    part_class,
    replaced_problems,
    weight_problems,
)
from xdpo.families.flux import FLUX
from xdpo.families.interface import Choices, Family, PipelineParts
from xdpo.families.pipeline_files import Unreachable, describe_file, fetch, read_json, weight_paths
from xdpo.families.stable_diffusion import STABLE_DIFFUSION
from xdpo.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from xdpo.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from xdpo.files import kept_sha256

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FAMILIES = {
    family.pipeline_class: family
    for family in (
        STABLE_DIFFUSION,
        STABLE_DIFFUSION_XL,
        STABLE_DIFFUSION_3,
        FLUX,
    )
}
"""Every family, by the `_class_name` of its model_index.json."""

OTHER_FAMILIES = {
    "Flux2": "FLUX.2",
    "Kandinsky": "Kandinsky",
    "PixArt": "PixArt",
    "HunyuanDiT": "Hunyuan-DiT",
    "Sana": "Sana",
    "IF": "DeepFloyd IF",
}
"""How the `_class_name` of a family's model_index.json begins that can't be used here → that family's name."""

EXTRAS = ("safety_checker", "feature_extractor", "image_encoder", "scheduler")


def family_of(folder: Path) -> Family:
    """The family of a pipeline's folder: by its class, else by the beginning of that name, else by its parts.

    Pipelines for other uses have the parts of their family's own, such as StableDiffusionImg2ImgPipeline. Raises
    ValueError for a folder of no family here.
    """
    if not (folder / "model_index.json").is_file():
        lacking = [part for part in STABLE_DIFFUSION.parts if not (folder / part).is_dir()]
        raise ValueError(lacks(["model_index.json", *lacking], STABLE_DIFFUSION))
    index = read_json(folder / "model_index.json")
    name = str(index.get("_class_name"))
    beginnings = {class_name.removesuffix("Pipeline"): family for class_name, family in FAMILIES.items()}
    beginning = max(filter(name.startswith, [*beginnings, *OTHER_FAMILIES]), key=len, default=None)
    if beginning in beginnings:
        family = beginnings[beginning]
        return family.without([part for part in family.optional if (index.get(part) or [None, None])[1] is None])
    use = f"only {' and '.join(family.name for family in FAMILIES.values())} can be used here"
    if beginning is not None:
        raise ValueError(f"model_index.json says {name}: it is {OTHER_FAMILIES[beginning]}; {use}")
    present = {part for part, kind in index.items() if isinstance(kind, list) and kind[1] is not None} - {*EXTRAS}
    nearest = max(FAMILIES.values(), key=lambda family: len(present & {*family.parts}))
    further, missing = sorted(present - {*nearest.parts}), sorted({*nearest.parts} - present - {*EXTRAS})
    if further or missing:
        has = f"has {', '.join(further)}" if further else f"has no {' and no '.join(missing)}"
        raise ValueError(f"model_index.json says {name}, which {has}: another family of models; {use}")
    return nearest


def family_of_pipeline(model: ModelConfig) -> Family:
    """The family of the pipeline that a config names; of a hub model only the index is fetched. Raises ValueError."""
    return family_of(fetch(model.pipeline, model.revision, ()))


def family_of_loaded(pipeline: "DiffusionPipeline") -> Family:
    """The family of a pipeline that `pipeline_with` made."""
    return FAMILIES[type(pipeline).__name__]


def choices_of_loaded(pipeline: "DiffusionPipeline") -> Choices:
    """The choices of a pipeline that `pipeline_with` made; none of one that the library loaded."""
    return getattr(pipeline, "caption_choices", {})


def check_model(model: ModelConfig) -> None:
    """Refuse a config's model before a weight is read: a pipeline that can't be used, or keys that don't fit it.

    A hub model that can't be reached passes, as in `check_pipeline_folder`. Raises ValueError.
    """
    if model.family is not None and model.family not in FAMILIES:
        raise ValueError(f"model.family: {model.family!r} is none; choose from {', '.join(FAMILIES)}, or null for any")
    check_pipeline_folder(model.pipeline, model.revision)
    try:
        family = family_of_pipeline(model)
        configs = fetch(model.pipeline, model.revision, (family.denoiser,))
        if model.vae is not None:
            _check_autoencoder(model, family)
    except Unreachable:
        return
    if model.family not in (None, family.pipeline_class):
        raise ValueError(
            f"model.family: the config is for {FAMILIES[model.family].name}, and model.pipeline {model.pipeline!r} is "
            f"{family.name}; give a pipeline of that family, or take a config for this one"
        )
    further = {key for other in FAMILIES.values() for key in other.keys} - {*family.keys}
    if given := [key for key in sorted(further) if getattr(model, key) is not None]:
        raise ValueError(f"model.{given[0]}: {family.name} has no such choice; set it to null")
    family.choices(model, read_json(configs / "model_index.json"))
    family.predict_arguments(configs, model)


def check_config(settings: Config) -> None:
    """Refuse a config that asks for what its pipeline doesn't have, before any weight is read: see `check_model`.

    Beside its model these are its noise, its resolution, its attention and its export.
    """
    import diffusers

    check_model(settings.model)
    try:
        family = family_of_pipeline(settings.model)
        folder = fetch(settings.model.pipeline, settings.model.revision, ("scheduler",))
    except Unreachable:
        return
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    family.process(getattr(diffusers, scheduler["_class_name"]).from_config(scheduler), settings.noise)
    if settings.data.resolution % family.size_multiple:
        raise ValueError(
            f"data.resolution (got {settings.data.resolution}) must be a multiple of {family.size_multiple} for "
            f"{family.name}"
        )
    check_formats(family, settings.export.formats, is_adapter=settings.model.trainable == "lora")
    if settings.compute.attention == "eager" and family.use_plain_attention is None:
        raise ValueError(f"compute.attention: eager isn't available for {family.name}; set compute.attention=sdpa")


def check_formats(family: Family, formats: Collection[str], *, is_adapter: bool) -> None:
    """Refuse forms in which a model of this family can't be exported. Raises ValueError."""
    single = [form for form in formats if not form.startswith("diffusers")]
    if is_adapter and (whole := [form for form in single if form.startswith("unet")]):
        raise ValueError(
            f"export.formats: {whole[0]} is the file of a whole UNet, and this model is an adapter; take single_file"
        )
    if single and not (family.kohyas_layer if is_adapter else family.single_file):
        raise ValueError(
            f"export.formats: {single[0]} isn't available for {family.name}, whose original names aren't known here; "
            "take diffusers"
        )


def _check_autoencoder(model: ModelConfig, family: Family) -> None:
    """Refuse an autoencoder whose latents can't take the place of the pipeline's. Raises ValueError."""
    base = read_json(fetch(model.pipeline, model.revision, ("vae",)) / "vae" / "config.json")
    folder = _autoencoder_folder(str(model.vae))
    other = read_json(folder / "config.json")
    problems = autoencoder_problems(other) + [
        f"{name} is {other.get(name)!r}, and the pipeline's own autoencoder has {base.get(name)!r}: its latents mean "
        "something else to the denoiser. Take one that was made for this family"
        for name in ("latent_channels", "scaling_factor", "shift_factor")
        if other.get(name) != base.get(name)
    ]
    if len(other.get("block_out_channels", ())) != len(base.get("block_out_channels", ())):
        problems.append("it shrinks images by another factor than the pipeline's own autoencoder")
    if not problems and Path(str(model.vae)).is_dir():
        problems = replaced_problems(family, folder, "vae", folder)
    if problems:
        raise ValueError(f"model.vae: {model.vae!r} can't be used:\n  " + "\n  ".join(problems))


def _autoencoder_folder(vae: str, *, weights: bool = False) -> Path:
    """The folder of an autoencoder: `vae` itself or its vae/, on the disk or on the hub. Raises ValueError."""
    if Path(vae).is_file():
        raise ValueError(f"model.vae: {vae!r} {describe_file(Path(vae))}")
    folder = fetch(vae, None, ("vae", ""), key="model.vae")
    part = next((part for part in ("vae", "") if (folder / part / "config.json").is_file()), None)
    if part is None:
        raise ValueError(
            f"model.vae: {vae!r} has neither vae/config.json nor config.json; give an autoencoder's folder"
        )
    return (fetch(vae, None, (), (part,), key="model.vae") if weights else folder) / part


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
        folder = fetch(pipeline, revision, ())
        problems = _problems(pipeline, revision, folder)
    except Unreachable:
        return
    if problems:
        raise ValueError(f"model.pipeline: {pipeline!r} can't be used:\n  " + "\n  ".join(problems))


def _problems(pipeline: str, revision: str | None, folder: Path) -> list[str]:
    """What is wrong with a pipeline; of a folder the headers of its weights are read too. Raises Unreachable."""
    try:
        family = family_of(folder)
    except ValueError as error:
        return [str(error)]
    if problem := family.index_problem(read_json(folder / "model_index.json")):
        return [problem]
    folder = fetch(pipeline, revision, family.parts)
    if files := lacking_files(folder, family):
        return [lacks(files, family)]
    problems = family.problems(folder)
    if not problems and Path(pipeline).is_dir():
        problems = weight_problems(family, folder, family.with_weights)
    return problems


def load_parts(config: ModelConfig, *, encoders: bool = True, dtype: torch.dtype = torch.float32) -> PipelineParts:
    """Load a pipeline from a hub id or a folder; safetensors only, in `dtype` but for the parts of `held_in_bf16`.

    encoders: load the autoencoder and the text encoders too; cached examples need neither. A part that exists only as a
    variant (fp16, …) is loaded from that, and a note is printed. Raises ValueError where the pipeline can't be loaded
    or is of no known family.
    """
    import diffusers
    import transformers

    check_model(config)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    is_local = Path(config.pipeline).is_dir()  # then check_pipeline_folder has checked its weights
    family = family_of_pipeline(config)
    configs = fetch(config.pipeline, config.revision, (family.denoiser,))
    family = family._replace(predict=partial(family.predict, **family.predict_arguments(configs, config)))
    loaded = (family.denoiser, *family.encoders * encoders)
    own = [part for part in loaded if part != "vae" or config.vae is None]
    folder = fetch(config.pipeline, config.revision, (*family.tokenizers, "scheduler"), weights=own)
    if problems := [] if is_local else weight_problems(family, folder, own):
        raise ValueError(f"model.pipeline: could not load {config.pipeline!r}:\n  " + "\n  ".join(problems))
    halved = held_in_bf16(family, config)
    dtypes = {part: torch.bfloat16 if part in halved else dtype for part in loaded}
    options: dict[str, Any] = {"use_safetensors": True}
    folders = {part: folder / part for part in loaded}
    if "vae" not in own and "vae" in loaded:
        folders["vae"] = _autoencoder_folder(str(config.vae), weights=True)
    variants = {part: variant for part in loaded if (variant := weight_paths(folders[part])[0]) is not None}
    try:
        given: dict[str, Any] = {part: None for part in family.encoders if not encoders}
        for part in loaded:
            if part in variants or part not in own:
                kind = part_class(family, folder, part)
                given[part] = kind.from_pretrained(
                    folders[part], variant=variants.get(part), dtype=dtypes[part], **options
                )
        pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(
            folder, dtype={"default": torch.float32, **dtypes}, **family.without_extras, **options, **given
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"model.pipeline: could not load {config.pipeline!r}: {error}") from error
    if variants and processes.rank() == 0:
        shown = ", ".join(f"{part} as {variant}" for part, variant in variants.items())
        print(f"note: {config.pipeline} holds {shown} alone; loaded from that", file=sys.stderr)
    modules = {name: getattr(pipeline, name) for name in loaded}
    for module in modules.values():
        module.eval().requires_grad_(False)
    tokenizers = {name: getattr(pipeline, name) for name in family.tokenizers}
    arguments = {
        name: value
        for name, value in pipeline.config.items()
        if not name.startswith("_") and not isinstance(value, list | tuple)
    }
    return PipelineParts(family, modules, tokenizers, pipeline.scheduler, arguments, caption_choices(config))


def held_in_bf16(family: Family, model: ModelConfig) -> tuple[str, ...]:
    """The parts whose weights model.frozen_precision keeps in bf16.

    The autoencoder is small and may need float32. A denoiser that is trained whole, and its reference, are float32.
    """
    if model.frozen_precision == "fp32":
        return ()
    return (*family.text_encoders, *[family.denoiser] * (model.trainable == "lora"))


def caption_choices(model: ModelConfig) -> Choices:
    """The choices of a config's model."""
    index = read_json(fetch(model.pipeline, model.revision, ()) / "model_index.json")
    return family_of_pipeline(model).choices(model, index)


def part_checksum(config: ModelConfig, *names: str) -> str:
    """16 hexadecimal digits of the SHA-256 of the files of a pipeline's parts ("vae", "unet", …).

    They are configs, vocabularies and the weights that `load_parts` reads, not other variants. Files of a hub model are
    fetched where they aren't in its cache; nothing is loaded. Raises ValueError where there are none.
    """
    family = family_of_pipeline(config)
    own = [name for name in names if name != "vae" or config.vae is None]
    folder = fetch(config.pipeline, config.revision, own, [name for name in own if name in family.with_weights])
    digest = hashlib.sha256()
    for name in names:
        part = folder / name if name in own else _autoencoder_folder(str(config.vae), weights=True)
        files = [path for path in sorted(part.iterdir()) if path.suffix in (".json", ".txt")]
        for path in [*files, *weight_paths(part)[1]]:
            digest.update(f"{name}/{path.name} {kept_sha256(path)}\n".encode())
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
        **{**parts.options, **family.without_extras},
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.caption_choices = parts.choices
    return pipeline
