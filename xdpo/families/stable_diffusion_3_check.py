"""Checks a Stable Diffusion 3 or 3.5 pipeline, and its parts against each other, before a weight is loaded.

Only configs and vocabularies are read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xdpo.families.checks import (
    autoencoder_problems,
    flow_scheduler_problems,
    t5_tokenizer_problems,
    tokenizer_problems,
    transformer_problems,
)
from xdpo.families.pipeline_files import read_json

USE = "take a pipeline of Stable Diffusion 3 or 3.5"
KIND = "SD3Transformer2DModel"


def problems(folder: Path) -> list[str]:
    """What is wrong with the small files of a pipeline that has all parts, T5 or not."""
    transformer, vae, clip, clip_2 = (
        read_json(folder / part / "config.json") for part in ("transformer", "vae", "text_encoder", "text_encoder_2")
    )
    t5 = _t5(folder)
    if found := autoencoder_problems(vae):
        return found
    return [
        *transformer_problems(transformer, KIND, USE),
        *_fit_problems(transformer, vae, clip, clip_2, t5),
        *tokenizer_problems(folder / "tokenizer", clip),
        *tokenizer_problems(folder / "tokenizer_2", clip_2),
        *([] if t5 is None else t5_tokenizer_problems(folder / "tokenizer_3", t5)),
        *flow_scheduler_problems(read_json(folder / "scheduler" / "scheduler_config.json")),
    ]


def denoiser_problems(denoiser: Path, base: Path) -> list[str]:
    """What is wrong with the config of a transformer that is to replace that of `base`."""
    transformer = read_json(denoiser / "config.json")
    vae, clip, clip_2 = (read_json(base / part / "config.json") for part in ("vae", "text_encoder", "text_encoder_2"))
    return [*transformer_problems(transformer, KIND, USE), *_fit_problems(transformer, vae, clip, clip_2, _t5(base))]


def _t5(folder: Path) -> dict[str, Any] | None:
    config = folder / "text_encoder_3" / "config.json"
    return read_json(config) if config.is_file() else None


def _fit_problems(
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    clip: Mapping[str, Any],
    clip_2: Mapping[str, Any],
    t5: Mapping[str, Any] | None,
) -> list[str]:
    """Problems where the widths of a pipeline's parts don't match."""
    problems = []
    latents, taken = vae.get("latent_channels", 4), transformer.get("in_channels", 16)
    given = transformer.get("out_channels") or taken
    if not taken == given == latents:
        problems.append(
            f"the transformer takes {taken} channels and gives {given} (in_channels, out_channels), and the "
            f"autoencoder's latents have {latents}: Stable Diffusion 3 has 16. Take both from one text-to-image model"
        )
    if vae.get("shift_factor") is None:
        problems.append("the autoencoder has no shift_factor: Stable Diffusion 3 has 0.0609; take its own vae")
    pooled = clip.get("projection_dim", 512) + clip_2.get("projection_dim", 512)
    if pooled != (told := transformer.get("pooled_projection_dim", 2048)):
        problems.append(
            f"the two text encoders' pooled states are {pooled} wide together (projection_dim), and the transformer "
            f"takes {told} (pooled_projection_dim); take them from one pipeline"
        )
    width = transformer.get("joint_attention_dim", 4096)
    side_by_side = clip.get("hidden_size", 512) + clip_2.get("hidden_size", 512)
    if side_by_side > width or (t5 is not None and t5.get("d_model", 512) != width):
        of_t5 = "" if t5 is None else f" and T5's {t5.get('d_model', 512)} (d_model)"
        problems.append(
            f"the two CLIP encoders' states are {side_by_side} wide together (hidden_size){of_t5}, and the transformer "
            f"attends to {width} (joint_attention_dim); take them from one pipeline"
        )
    return problems
