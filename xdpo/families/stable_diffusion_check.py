"""Checks a Stable Diffusion 1.x or 2.x pipeline, and its parts against each other, before a weight is loaded.

Only configs, vocabularies and the headers of safetensors files are read.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xdpo.families.pipeline_files import (
    CONFIGS,
    PARTS,
    WITH_WEIGHTS,
    read_header,
    read_json,
    weight_paths,
)
from xdpo.noise import DiffusionProcess

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

OTHER_FAMILIES = {
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "FLUX",
    "Kandinsky": "Kandinsky",
    "PixArt": "PixArt",
    "HunyuanDiT": "Hunyuan-DiT",
    "Sana": "Sana",
    "IF": "DeepFloyd IF",
}
"""How the `_class_name` of another family's model_index.json begins → the family's name."""

TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
_ATTENTION_OF_OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def check_unet(unet: Path, base: Path, label: str, *, has_weights: bool) -> None:
    """Refuse a UNet's folder that doesn't fit a checked pipeline's text encoder and autoencoder.

    base: a folder with that pipeline's configs. has_weights: the folder must hold the UNet's weights too, which are
    checked. Raises ValueError.
    """
    config, vae, text = (
        read_json(path) for path in (unet / "config.json", base / CONFIGS["vae"], base / CONFIGS["text_encoder"])
    )
    problems = [*_unet_problems(config), *_fit_problems(config, vae, text.get("text_config") or text)]
    if not problems and (has_weights or weight_paths(unet)[1]):
        problems = _compare(unet, "unet", partial(_empty, part_class(base, "unet"), unet))
    if problems:
        raise ValueError(f"{label} doesn't fit its pipeline:\n  " + "\n  ".join(problems))


def weight_problems(folder: Path, parts: tuple[str, ...] = WITH_WEIGHTS) -> list[str]:
    """A sentence for each part whose weights differ from its config in names or shapes."""
    problems = []
    for part in parts:
        problems += _compare(folder / part, part, partial(build_empty, folder, part))
    return problems


def part_class(folder: Path, part: str) -> "type[ModelMixin | PreTrainedModel]":
    """The class of a checked pipeline's "unet", "vae" or "text_encoder"."""
    import diffusers
    import transformers

    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    return kinds.get(part) or getattr(transformers, read_json(folder / "model_index.json")["text_encoder"][1])


def build_empty(folder: Path, part: str) -> nn.Module:
    """A part of a checked pipeline as its config has it, without memory for its weights."""
    return _empty(part_class(folder, part), folder / part)


def _empty(kind: "type[ModelMixin | PreTrainedModel]", folder: Path) -> nn.Module:
    with torch.device("meta"):
        if hasattr(kind, "config_class"):  # transformers
            return kind(kind.config_class.from_pretrained(folder))
        return kind.from_config(read_json(folder / "config.json"))


# --- configs -------------------------------------------------------------------------------------------


def problems(folder: Path) -> list[str]:
    """What is wrong with a pipeline's small files. For a pipeline of another family, only that."""
    if not (folder / "model_index.json").is_file():
        lacking = ["model_index.json", *(part for part in PARTS if not (folder / part).is_dir())]
        return [_lacks(lacking)]
    index = read_json(folder / "model_index.json")
    if problem := _family_problem(index):
        return [problem]
    files = [*(part for part in PARTS if not (folder / part).is_dir())]
    files += [file for part, file in CONFIGS.items() if part not in files and not (folder / file).is_file()]
    if files:
        return [_lacks(files)]
    unet, vae, text, scheduler = (read_json(folder / CONFIGS[part]) for part in CONFIGS)
    text = text.get("text_config") or text  # of a whole CLIP model
    if vae.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        return [
            f"vae is of the kind {vae['_class_name']}; images are encoded with an AutoencoderKL. Take the vae folder "
            "of the model's original pipeline"
        ]
    return [
        *_unet_problems(unet),
        *_fit_problems(unet, vae, text),
        *_tokenizer_problems(folder / "tokenizer", text),
        *_scheduler_problems(scheduler),
    ]


def _lacks(files: list[str]) -> str:
    return (
        f"it is not a Stable Diffusion pipeline folder; it lacks {', '.join(files)}. Save one with "
        "StableDiffusionPipeline.save_pretrained(folder, safe_serialization=True)"
    )


def _family_problem(index: Mapping[str, Any]) -> str | None:
    name = str(index.get("_class_name"))
    use = "only Stable Diffusion 1.x and 2.x can be used here, such as stable-diffusion-v1-5/stable-diffusion-v1-5"
    for start, family in OTHER_FAMILIES.items():
        if name.startswith(start):
            return f"model_index.json says {name}: it is {family}; {use}"
    present = {part for part, kind in index.items() if isinstance(kind, list) and kind[1] is not None}
    further = sorted(
        part for part in present if part == "transformer" or part.endswith(("_2", "_3")) or "prior" in part
    )
    if further or "unet" not in present:
        has = f"has {', '.join(further)}" if further else "has no unet"
        return f"model_index.json says {name}, which {has}: another family of models; {use}"
    kind = index["text_encoder"][1] if "text_encoder" in present else None
    if kind not in TEXT_ENCODERS:
        return f"model_index.json says {name} with the text encoder {kind} where {TEXT_ENCODERS[0]} is meant; {use}"
    return None


def _unet_problems(unet: Mapping[str, Any]) -> list[str]:
    """Problems of a UNet that is of another class, or takes more than noisy latents, a timestep and a caption."""
    kind = unet.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        return [f"unet is a {kind} where a UNet2DConditionModel is meant; take one of Stable Diffusion 1.x or 2.x"]
    further_inputs = {
        "addition_embed_type": "as Stable Diffusion XL's is",
        "class_embed_type": "as an upscaler's is",
        "num_class_embeds": "as an upscaler's is",
    }
    return [
        f"unet has {key} {unet[key]!r}: it is told more than a caption, {like}. Take one of Stable Diffusion 1.x or 2.x"
        for key, like in further_inputs.items()
        if unet.get(key) is not None
    ]


def _fit_problems(unet: Mapping[str, Any], vae: Mapping[str, Any], text: Mapping[str, Any]) -> list[str]:
    """Problems where the widths of a pipeline's parts don't match."""
    problems = []
    latents, taken, given = vae.get("latent_channels", 4), unet.get("in_channels", 4), unet.get("out_channels", 4)
    if taken != latents:
        more = taken > latents
        problems.append(
            f"the UNet takes {taken} channels (in_channels) and the autoencoder's latents have {latents}. "
            + ("The others are for a mask or a second image, as in inpainting, depth and editing models; " * more)
            + "take a text-to-image model whose UNet and autoencoder belong together"
        )
    elif given != latents:
        problems.append(
            f"the UNet gives {given} channels (out_channels) and the autoencoder's latents have {latents}; a UNet that "
            "predicts a variance too can't be used, take one that predicts the noise alone"
        )
    width = text.get("hidden_size", 512)
    attended = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim", 1280)
    attended = sorted({*attended} if isinstance(attended, list | tuple) else {attended})
    if attended != [width]:
        problems.append(
            f"the text encoder's states are {width} wide (hidden_size), and the UNet attends to "
            f"{' and '.join(map(str, attended))} (cross_attention_dim): Stable Diffusion 1.x has 768, 2.x 1024. Take "
            "both from one pipeline"
        )
    if vae.get("in_channels", 3) != 3 or vae.get("out_channels", 3) != 3:
        channels = vae.get("in_channels", 3), vae.get("out_channels", 3)
        problems.append(f"the autoencoder has {channels} channels for images where (3, 3) is meant; take another vae")
    if vae.get("shift_factor") or vae.get("latents_mean"):
        problems.append(
            "the autoencoder shifts its latents (shift_factor or latents_mean), as those of Stable Diffusion 3 and "
            "FLUX do and Stable Diffusion 1.x and 2.x don't; take the vae of the UNet's own pipeline"
        )
    return problems


def _tokenizer_problems(tokenizer: Path, text: Mapping[str, Any]) -> list[str]:
    positions, words = text.get("max_position_embeddings", 77), text.get("vocab_size", 49408)
    file = tokenizer / "tokenizer_config.json"
    length = (read_json(file) if file.is_file() else {}).get("model_max_length")
    problems = []
    if not isinstance(length, int) or length > 10**9:  # transformers' sign of no limit is 1e30
        problems.append(
            "the tokenizer has no limit: tokenizer/tokenizer_config.json lacks model_max_length. Add "
            f'"model_max_length": {positions} there, the positions that the text encoder has'
        )
    elif length > positions:
        problems.append(
            f"the tokenizer gives up to {length} tokens (model_max_length) and the text encoder has {positions} "
            f"positions (max_position_embeddings); write {positions} into tokenizer/tokenizer_config.json, or take "
            "both from one pipeline"
        )
    last = _last_token(tokenizer)
    if last is None:
        problems.append("tokenizer has neither vocab.json nor tokenizer.json; take that folder from the pipeline again")
    elif last >= words:
        problems.append(
            f"the tokenizer's last token is number {last} and the text encoder knows {words} (vocab_size); take both "
            "from one pipeline, or resize the text encoder's embeddings where tokens were added"
        )
    return problems


def _last_token(tokenizer: Path) -> int | None:
    numbers: list[int] = []
    for name in ("vocab.json", "added_tokens.json"):
        if (tokenizer / name).is_file():
            numbers += read_json(tokenizer / name).values()
    if (tokenizer / "tokenizer.json").is_file():
        whole = read_json(tokenizer / "tokenizer.json")
        numbers += whole.get("model", {}).get("vocab", {}).values()
        numbers += [token["id"] for token in whole.get("added_tokens") or ()]
    return max(numbers, default=None)


def _scheduler_problems(config: Mapping[str, Any]) -> list[str]:
    import diffusers

    kind = getattr(diffusers, name := str(config.get("_class_name")), None)
    if kind is None:
        return [f"scheduler is of the kind {name}, which diffusers doesn't know; take DDIMScheduler or PNDMScheduler"]
    try:
        DiffusionProcess.from_scheduler(kind.from_config(dict(config)))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        return [f"scheduler: {error}"]
    return []


# --- weights -------------------------------------------------------------------------------------------


def _compare(part: Path, name: str, build: Callable[[], nn.Module]) -> list[str]:
    """Problems of a part's weight files: weights of its config's module that they lack or have in another shape."""
    _, files = weight_paths(part)
    if not files:
        content = ", ".join(sorted(path.name for path in part.iterdir())) or "nothing"
        pickled = any(path.suffix in (".bin", ".ckpt", ".pt") for path in part.iterdir())
        return [
            f"it lacks {name}/*.safetensors by the names that diffusers gives; found there: {content}. "
            + ("Pickled weights are not opened: they may run any code. " * pickled)
            + "Save it with StableDiffusionPipeline.save_pretrained(folder, safe_serialization=True)"
        ]
    if missing := _missing_shards(part, files):
        return [f"it lacks {', '.join(f'{name}/{shard}' for shard in missing)}, shards of its weights; copy them too"]
    try:
        actual = {_modern(weight): shape for path in files for weight, shape in read_header(path).items()}
        expected = {_modern(weight): tuple(value.shape) for weight, value in build().state_dict().items()}
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
