"""Checks a Stable Diffusion XL pipeline, and its parts against each other, before a weight is loaded.

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

TEXT_ENCODERS = {"text_encoder": ("CLIPTextModel",), "text_encoder_2": ("CLIPTextModelWithProjection",)}
BASE = "stabilityai/stable-diffusion-xl-base-1.0"
SIZES = 6  # numbers that the UNet is told of an image's size; the refiner is told five, a rating among them


def index_problem(index: Mapping[str, Any]) -> str | None:
    """What a pipeline's index says against it: the refiner's, or with other text encoders."""
    kinds = {part: (index.get(part) or (None, None))[1] for part in TEXT_ENCODERS}
    if kinds["text_encoder"] is None and kinds["text_encoder_2"] is not None:
        return (
            "it has the second text encoder alone, as Stable Diffusion XL's refiner, which finishes the base model's "
            f"images and is not trained here; take the base, {BASE}"
        )
    for part, (expected,) in TEXT_ENCODERS.items():
        if kinds[part] not in (None, expected):
            return f"model_index.json says {part} is a {kinds[part]} where a {expected} is meant; take {BASE}'s"
    return None


def problems(folder: Path) -> list[str]:
    """What is wrong with the small files of a pipeline that has all parts."""
    vae = read_json(folder / "vae" / "config.json")
    if found := autoencoder_problems(vae):
        return found
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    found = [*denoiser_problems(folder / "unet", folder), *shift_problems(vae, "Stable Diffusion XL")]
    for part, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        found += tokenizer_problems(folder / tokenizer, read_json(folder / part / "config.json"))
    distilled = distillation_problems(scheduler, "SDXL-Turbo", "EulerAncestralDiscreteScheduler", BASE)
    return [*found, *distilled, *diffusion_scheduler_problems(scheduler)]


def denoiser_problems(denoiser: Path, base: Path) -> list[str]:
    """What is wrong with the config of a UNet in the pipeline `base`."""
    unet, vae = read_json(denoiser / "config.json"), read_json(base / "vae" / "config.json")
    first, second = (read_json(base / part / "config.json") for part in TEXT_ENCODERS)
    if found := unet_problems(unet, "Stable Diffusion XL"):
        return found
    if (told := unet.get("addition_embed_type")) != "text_time":
        return [
            f"unet has addition_embed_type {told!r} where 'text_time' is meant: Stable Diffusion XL's UNet is told a "
            f"pooled caption and the image's size, that of 1.x and 2.x is not. Take {BASE}'s, or one trained from it"
        ]
    found = channel_problems(unet, vae)
    width, attended = first.get("hidden_size", 512) + second.get("hidden_size", 512), unet.get("cross_attention_dim")
    if {*attended} != {width} if isinstance(attended, list | tuple) else attended != width:
        found.append(
            f"the text encoders' states are {width} wide together (hidden_size), and the UNet attends to {attended} "
            "(cross_attention_dim): Stable Diffusion XL has 768 + 1280 = 2048. Take them from one pipeline"
        )
    pooled, per_number = second.get("projection_dim", 512), unet.get("addition_time_embed_dim") or 0
    taken = unet.get("projection_class_embeddings_input_dim")
    if taken != pooled + SIZES * per_number:
        is_refiner = taken == pooled + (SIZES - 1) * per_number
        found.append(
            f"unet takes {taken} numbers beside the timestep (projection_class_embeddings_input_dim) where the pooled "
            f"caption's {pooled} and {SIZES} times {per_number} for the image's size are meant"
            + ("; it is the refiner's, which is told a rating" * is_refiner)
            + f". Take {BASE}'s, or one trained from it"
        )
    return found
