"""Checks a Stable Diffusion 1.x or 2.x pipeline, and its parts against each other, before a weight is loaded.

Only configs and vocabularies are read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xdpo.families.checks import (
    autoencoder_problems,
    channel_problems,
    diffusion_scheduler_problems,
    distillation_problems,
    shift_problems,
    tokenizer_problems,
    unet_problems,
)
from xdpo.families.pipeline_files import read_json

OWN = "Stable Diffusion 1.x or 2.x"
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")


def index_problem(index: Mapping[str, Any]) -> str | None:
    """What a pipeline's index says against it: another text encoder."""
    kind = index["text_encoder"][1] if index.get("text_encoder") else None
    if kind in TEXT_ENCODERS:
        return None
    return (
        f"model_index.json says {index.get('_class_name')} with the text encoder {kind} where {TEXT_ENCODERS[0]} is "
        f"meant; take a pipeline of {OWN}"
    )


def problems(folder: Path) -> list[str]:
    """What is wrong with the small files of a pipeline that has all parts."""
    unet, vae, text = (read_json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    text = text.get("text_config") or text  # of a whole CLIP model
    if found := autoencoder_problems(vae):
        return found
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return [
        *_unet_problems(unet),
        *_fit_problems(unet, vae, text),
        *tokenizer_problems(folder / "tokenizer", text),
        *distillation_problems(scheduler, "SD-Turbo", "EulerDiscreteScheduler", f"a pipeline of {OWN}"),
        *diffusion_scheduler_problems(scheduler),
    ]


def denoiser_problems(denoiser: Path, base: Path) -> list[str]:
    """What is wrong with the config of a UNet that is to replace that of `base`."""
    unet, vae, text = (read_json(path / "config.json") for path in (denoiser, base / "vae", base / "text_encoder"))
    return [*_unet_problems(unet), *_fit_problems(unet, vae, text.get("text_config") or text)]


def _unet_problems(unet: Mapping[str, Any]) -> list[str]:
    """Problems of a UNet that is of another class, or takes more than noisy latents, a timestep and a caption."""
    if found := unet_problems(unet, OWN):
        return found
    if (told := unet.get("addition_embed_type")) is not None:
        return [
            f"unet has addition_embed_type {told!r}: it is told more than a caption, as Stable Diffusion XL's is. Take "
            f"one of {OWN}"
        ]
    return []


def _fit_problems(unet: Mapping[str, Any], vae: Mapping[str, Any], text: Mapping[str, Any]) -> list[str]:
    """Problems where the widths of a pipeline's parts don't match."""
    problems = channel_problems(unet, vae)
    width = text.get("hidden_size", 512)
    attended = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim", 1280)
    attended = sorted({*attended} if isinstance(attended, list | tuple) else {attended})
    if attended != [width]:
        problems.append(
            f"the text encoder's states are {width} wide (hidden_size), and the UNet attends to "
            f"{' and '.join(map(str, attended))} (cross_attention_dim): Stable Diffusion 1.x has 768, 2.x 1024. Take "
            "both from one pipeline"
        )
    return [*problems, *shift_problems(vae, OWN)]
