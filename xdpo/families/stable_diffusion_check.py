"""Checks a Stable Diffusion 1.x or 2.x pipeline, and its parts against each other, before a weight is loaded.

Only configs and vocabularies are read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xdpo.families.checks import autoencoder_problems, diffusion_scheduler_problems, tokenizer_problems
from xdpo.families.pipeline_files import read_json

TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")


def problems(folder: Path) -> list[str]:
    """What is wrong with the small files of a pipeline that has all parts."""
    index = read_json(folder / "model_index.json")
    kind = index["text_encoder"][1] if index.get("text_encoder") else None
    if kind not in TEXT_ENCODERS:
        return [
            f"model_index.json says {index.get('_class_name')} with the text encoder {kind} where {TEXT_ENCODERS[0]} "
            "is meant; take a pipeline of Stable Diffusion 1.x or 2.x"
        ]
    unet, vae, text = (read_json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    text = text.get("text_config") or text  # of a whole CLIP model
    if found := autoencoder_problems(vae):
        return found
    return [
        *_unet_problems(unet),
        *_fit_problems(unet, vae, text),
        *tokenizer_problems(folder / "tokenizer", text),
        *diffusion_scheduler_problems(read_json(folder / "scheduler" / "scheduler_config.json")),
    ]


def denoiser_problems(denoiser: Path, base: Path) -> list[str]:
    """What is wrong with the config of a UNet that is to replace that of `base`."""
    unet, vae, text = (read_json(path / "config.json") for path in (denoiser, base / "vae", base / "text_encoder"))
    return [*_unet_problems(unet), *_fit_problems(unet, vae, text.get("text_config") or text)]


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
    if vae.get("shift_factor") or vae.get("latents_mean"):
        problems.append(
            "the autoencoder shifts its latents (shift_factor or latents_mean), as those of Stable Diffusion 3 and "
            "FLUX do and Stable Diffusion 1.x and 2.x don't; take the vae of the UNet's own pipeline"
        )
    return problems
