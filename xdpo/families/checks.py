"""Checks that families share: weight files against configs, tokenizers, schedulers. No weight is loaded.

Only configs, vocabularies and the headers of safetensors files are read.
"""

import json
from collections.abc import Callable, Collection, Mapping, Set
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xdpo.families.interface import Family
from xdpo.families.pipeline_files import read_header, read_json, weight_paths
from xdpo.noise import DiffusionProcess, FlowProcess, Process

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

_ATTENTION_OF_OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def part_class(family: Family, folder: Path, part: str) -> "type[ModelMixin | PreTrainedModel]":
    """The class of a part with weights of a checked pipeline."""
    import diffusers
    import transformers

    name, *others = family.classes[part]
    if others:
        name = read_json(folder / "model_index.json")[part][1]
    return getattr(diffusers, name, None) or getattr(transformers, name)


def build_empty(family: Family, folder: Path, part: str) -> nn.Module:
    """A part of a checked pipeline as its config has it, without memory for its weights."""
    return _empty(part_class(family, folder, part), folder / part)


def _empty(kind: "type[ModelMixin | PreTrainedModel]", folder: Path) -> nn.Module:
    with torch.device("meta"):
        if hasattr(kind, "config_class"):  # transformers
            return kind(kind.config_class.from_pretrained(folder))
        return kind.from_config(read_json(folder / "config.json"))


# --- configs -------------------------------------------------------------------------------------------


def lacking_files(folder: Path, family: Family) -> list[str]:
    """The folders that a pipeline lacks of its parts, and the configs that are missing in the others."""
    configs = {part: f"{part}/config.json" for part in family.with_weights}
    configs["scheduler"] = "scheduler/scheduler_config.json"
    lacking = [part for part in family.parts if not (folder / part).is_dir()]
    return lacking + [file for part, file in configs.items() if part not in lacking and not (folder / file).is_file()]


def lacks(files: Collection[str], family: Family) -> str:
    """A sentence on what a folder lacks of a pipeline."""
    return (
        f"it is not the folder of a whole pipeline; it lacks {', '.join(files)}. Save one with "
        f"{family.pipeline_class}.save_pretrained(folder, safe_serialization=True)"
    )


def autoencoder_problems(vae: Mapping[str, Any]) -> list[str]:
    """Problems of an autoencoder's config: of another class, or not for RGB images."""
    if (kind := vae.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        return [
            f"vae is of the kind {kind}; images are encoded with an AutoencoderKL. Take the vae folder of the model's "
            "original pipeline"
        ]
    channels = vae.get("in_channels", 3), vae.get("out_channels", 3)
    if channels != (3, 3):
        return [f"the autoencoder has {channels} channels for images where (3, 3) is meant; take another vae"]
    return []


def shift_problems(vae: Mapping[str, Any], families: str) -> list[str]:
    """An autoencoder that shifts its latents, where `families` don't."""
    if not (vae.get("shift_factor") or vae.get("latents_mean")):
        return []
    return [
        "the autoencoder shifts its latents (shift_factor or latents_mean), as those of Stable Diffusion 3 and FLUX do "
        f"and those of {families} don't; take the vae of the UNet's own pipeline"
    ]


def unet_problems(unet: Mapping[str, Any], families: str) -> list[str]:
    """A UNet of another class or for another task than text to image, where one of `families` is meant."""
    kind = unet.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        return [f"unet is a {kind} where a UNet2DConditionModel is meant; take one of {families}"]
    if unet.get("time_cond_proj_dim") is not None:
        return [
            "unet has time_cond_proj_dim: it is told the guidance scale, as a model that was distilled to few steps "
            f"(LCM), which training at all timesteps would undo. Take one of {families} before it was distilled"
        ]
    return [
        f"unet has {key} {unet[key]!r}: it is told more than a caption, as an upscaler's is. Take one of {families}"
        for key in ("class_embed_type", "num_class_embeds")
        if unet.get(key) is not None
    ]


def transformer_problems(transformer: Mapping[str, Any], kind: str, use: str) -> list[str]:
    """A transformer of another class than `kind`. use: which pipeline to take."""
    if (found := transformer.get("_class_name", kind)) == kind:
        return []
    return [f"transformer is of the kind {found}, and {kind} is meant; {use}"]


def channel_problems(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> list[str]:
    """A UNet that takes or gives other channels than the autoencoder's latents have."""
    latents, taken, given = vae.get("latent_channels", 4), unet.get("in_channels", 4), unet.get("out_channels", 4)
    if taken != latents:
        more = taken > latents
        return [
            f"the UNet takes {taken} channels (in_channels) and the autoencoder's latents have {latents}. "
            + ("The others are for a mask or a second image, as in inpainting, depth and editing models; " * more)
            + "take a text-to-image model whose UNet and autoencoder belong together"
        ]
    if given != latents:
        return [
            f"the UNet gives {given} channels (out_channels) and the autoencoder's latents have {latents}; a UNet that "
            "predicts a variance too can't be used, take one that predicts the noise alone"
        ]
    return []


def tokenizer_problems(tokenizer: Path, text: Mapping[str, Any]) -> list[str]:
    """Problems of a tokenizer's folder with the config of the CLIP text encoder that reads its tokens."""
    name = tokenizer.name
    positions, words = text.get("max_position_embeddings", 77), text.get("vocab_size", 49408)
    file = tokenizer / "tokenizer_config.json"
    length = (read_json(file) if file.is_file() else {}).get("model_max_length")
    problems = []
    if not isinstance(length, int) or length > 10**9:  # transformers' sign of no limit is 1e30
        problems.append(
            f"the tokenizer has no limit: {name}/tokenizer_config.json lacks model_max_length. Add "
            f'"model_max_length": {positions} there, the positions that the text encoder has'
        )
    elif length > positions:
        problems.append(
            f"the tokenizer gives up to {length} tokens (model_max_length) and the text encoder has {positions} "
            f"positions (max_position_embeddings); write {positions} into {name}/tokenizer_config.json, or take "
            "both from one pipeline"
        )
    return [*problems, *_vocabulary_problems(tokenizer, words)]


def t5_tokenizer_problems(tokenizer: Path, t5: Mapping[str, Any]) -> list[str]:
    """Problems of a tokenizer's folder with T5's config. T5 has no limit of positions."""
    return _vocabulary_problems(tokenizer, t5.get("vocab_size", 32128))


def _vocabulary_problems(tokenizer: Path, words: int) -> list[str]:
    last = _last_token(tokenizer)
    if last is None:
        return [f"{tokenizer.name} has neither vocab.json nor tokenizer.json; take that folder from the pipeline again"]
    if last >= words:
        return [
            f"the {tokenizer.name}'s last token is number {last} and the text encoder knows {words} (vocab_size); take "
            "both from one pipeline, or resize the text encoder's embeddings where tokens were added"
        ]
    return []


def _last_token(tokenizer: Path) -> int | None:
    numbers: list[int] = []
    for name in ("vocab.json", "added_tokens.json"):
        if (tokenizer / name).is_file():
            numbers += read_json(tokenizer / name).values()
    if (tokenizer / "tokenizer.json").is_file():
        whole = read_json(tokenizer / "tokenizer.json")
        vocabulary = whole.get("model", {}).get("vocab", {})
        numbers += vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        numbers += [token["id"] for token in whole.get("added_tokens") or ()]
    return max(numbers, default=None)


def distillation_problems(scheduler: Mapping[str, Any], turbo: str, turbos_kind: str, base: str) -> list[str]:
    """A scheduler as few-step models have it, whose weights and other configs are those of the model before.

    turbo: a model whose scheduler is a `turbos_kind` with trailing timesteps. base: what to take.
    """
    kind, spacing = str(scheduler.get("_class_name")), scheduler.get("timestep_spacing")
    undone = "training at all of them would undo that, and at four alone is not supported"
    if kind == "LCMScheduler":
        return [
            f"scheduler is an {kind}, as a model's that was distilled to few timesteps (LCM): {undone}. Take {base}; "
            "where this model is not distilled, take its own scheduler"
        ]
    if (kind, spacing) != (turbos_kind, "trailing") or scheduler.get("prediction_type", "epsilon") != "epsilon":
        return []
    return [
        f"scheduler is an {kind} with timestep_spacing trailing, as {turbo}'s, which was distilled to four "
        f"timesteps: {undone}. Take {base}; where "
        'this model is not distilled, write "leading" for "trailing" into scheduler/scheduler_config.json'
    ]


def diffusion_scheduler_problems(config: Mapping[str, Any]) -> list[str]:
    """Problems of a scheduler's config where a diffusion process is meant."""
    return _scheduler_problems(config, DiffusionProcess.from_scheduler, "DDIMScheduler or PNDMScheduler")


def flow_scheduler_problems(config: Mapping[str, Any]) -> list[str]:
    """Problems of a scheduler's config where a flow is meant."""
    return _scheduler_problems(config, FlowProcess.from_scheduler, "FlowMatchEulerDiscreteScheduler")


def _scheduler_problems(config: Mapping[str, Any], process: Callable[[Any], Process], usual: str) -> list[str]:
    import diffusers

    kind = getattr(diffusers, name := str(config.get("_class_name")), None)
    if kind is None:
        return [f"scheduler is of the kind {name}, which diffusers doesn't know; take {usual}"]
    try:
        process(kind.from_config(dict(config)))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        return [f"scheduler: {error}"]
    return []


# --- weights -------------------------------------------------------------------------------------------


def weight_problems(family: Family, folder: Path, parts: Collection[str]) -> list[str]:
    """A sentence for each of these parts of a checked pipeline whose weights differ from its config."""
    problems = []
    for part in parts:
        problems += _compare(family, folder / part, part, partial(build_empty, family, folder, part))
    return problems


def check_denoiser(family: Family, denoiser: Path, base: Path, label: str, *, has_weights: bool) -> None:
    """Refuse a denoiser's folder that doesn't fit a checked pipeline's encoders.

    base: a folder with that pipeline's configs. has_weights: the folder must hold the denoiser's weights too, which are
    checked. Raises ValueError.
    """
    problems = family.denoiser_problems(denoiser, base)
    if not problems and (has_weights or weight_paths(denoiser)[1]):
        problems = replaced_problems(family, base, family.denoiser, denoiser)
    if problems:
        raise ValueError(f"{label} doesn't fit its pipeline:\n  " + "\n  ".join(problems))


def replaced_problems(family: Family, base: Path, part: str, folder: Path) -> list[str]:
    """The same of a part that is to replace the one of a checked pipeline, `base`."""
    return _compare(family, folder, part, partial(_empty, part_class(family, base, part), folder))


def _compare(family: Family, part: Path, name: str, build: Callable[[], nn.Module]) -> list[str]:
    """Problems of a part's weight files: weights of its config's module that they lack or have in another shape."""
    _, files = weight_paths(part)
    if not files:
        content = ", ".join(sorted(path.name for path in part.iterdir())) or "nothing"
        pickled = any(path.suffix in (".bin", ".ckpt", ".pt") for path in part.iterdir())
        return [
            f"it lacks {name}/*.safetensors by the names that diffusers gives; found there: {content}. "
            + ("Pickled weights are not opened: they may run any code. " * pickled)
            + f"Save it with {family.pipeline_class}.save_pretrained(folder, safe_serialization=True)"
        ]
    if missing := _missing_shards(part, files):
        return [f"it lacks {', '.join(f'{name}/{shard}' for shard in missing)}, shards of its weights; copy them too"]
    try:
        actual = {_modern(weight): shape for path in files for weight, shape in read_header(path).items()}
        module = build()
        twins = _twins(module, actual.keys())
        expected = {_modern(weight): tuple(value.shape) for weight, value in module.state_dict().items()}
        expected = {weight: shape for weight, shape in expected.items() if weight not in twins}
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        return [f"{name}: {error}"]
    if lacking := sorted(expected.keys() - actual.keys()):
        others = sorted(actual.keys() - expected.keys())
        return [
            f"{name}: {len(lacking)} of {len(expected)} weights are missing, {lacking[0]} for one"
            + (f"; {len(others)} have names that don't belong there, {others[0]} for one" if others else "")
            + f". Is it another model's file, or a prefix too many or too few? Take {name} from its pipeline again"
        ]
    if odd := sorted(weight for weight, shape in expected.items() if actual[weight] != shape):
        return [
            f"{name}: {len(odd)} of {len(expected)} weights have another shape than {name}/config.json says: {odd[0]} "
            f"{actual[odd[0]]} for {expected[odd[0]]}. Config and weights are of two models; take both from one"
        ]
    return []


def _twins(module: nn.Module, actual: Set[str]) -> set[str]:
    """Weights that are other weights of the module too, one of which is in its file: T5's embeddings have two names."""
    names: dict[int, set[str]] = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), set()).add(_modern(name))
    return set().union(*(same - actual for same in names.values() if same & actual))


def _missing_shards(part: Path, files: list[Path]) -> list[str]:
    """Files that are missing although an index beside the weights names them."""
    present = {path.name for path in files}
    named: set[str] = set()
    for index in part.glob("*.safetensors.index*.json"):
        shards = {*json.loads(index.read_text("utf-8")).get("weight_map", {}).values()}
        if shards & present:  # the index of these weights, not of a variant beside them
            named |= shards
    return sorted(named - present)


def _modern(weight: str) -> str:
    """A weight's name as the newest library versions write it; they convert older names themselves."""
    weight = weight.removeprefix("text_model.")
    for old, new in _ATTENTION_OF_OLD.items():
        weight = weight.replace(old, new)
    return weight
