"""Checks a FLUX.1 pipeline, and its parts against each other, before a weight is loaded.

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

USE = "take a pipeline of FLUX.1-dev"
KIND = "FluxTransformer2DModel"


def problems(folder: Path) -> list[str]:
    """What is wrong with the small files of a pipeline that has all parts."""
    transformer, vae, clip, t5 = (
        read_json(folder / part / "config.json") for part in ("transformer", "vae", "text_encoder", "text_encoder_2")
    )
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if found := autoencoder_problems(vae):
        return found
    return [
        *transformer_problems(transformer, KIND, USE),
        *_fit_problems(transformer, vae, clip, t5),
        *tokenizer_problems(folder / "tokenizer", clip),
        *t5_tokenizer_problems(folder / "tokenizer_2", t5),
        *(flow_scheduler_problems(scheduler) or _distilled(transformer, scheduler)),
    ]


def denoiser_problems(denoiser: Path, base: Path) -> list[str]:
    """What is wrong with the config of a transformer that is to replace that of `base`."""
    transformer = read_json(denoiser / "config.json")
    vae, clip, t5 = (read_json(base / part / "config.json") for part in ("vae", "text_encoder", "text_encoder_2"))
    return [*transformer_problems(transformer, KIND, USE), *_fit_problems(transformer, vae, clip, t5)]


def _distilled(transformer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> list[str]:
    """FLUX.1-schnell is told no guidance, as models restored from it are; its scheduler alone has no dynamic shift."""
    if transformer.get("guidance_embeds") or scheduler.get("use_dynamic_shifting"):
        return []
    return [
        "it is FLUX.1-schnell, or has its scheduler: schnell is distilled to four steps, which training at all times "
        f"would undo; {USE}. For a model that was restored from schnell to many steps, write "
        '"use_dynamic_shifting": true into scheduler/scheduler_config.json, as FLUX.1-dev has it'
    ]


def _fit_problems(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], clip: Mapping[str, Any], t5: Mapping[str, Any]
) -> list[str]:
    """Problems where the widths of a pipeline's parts don't match."""
    problems = []
    packed, taken = 4 * vae.get("latent_channels", 4), transformer.get("in_channels", 64)
    given = transformer.get("out_channels") or taken
    if not taken == given == packed:
        more = taken > packed
        problems.append(
            f"the transformer takes {taken} channels and gives {given} (in_channels, out_channels), and 2 × 2 of the "
            f"autoencoder's latents have {packed}. "
            + ("The others are for a mask or a second image, as in the Fill, Canny and Depth models; " * more)
            + USE
        )
    if vae.get("shift_factor") is None:
        problems.append("the autoencoder has no shift_factor: FLUX.1 has 0.1159; take its own vae")
    if (pooled := clip.get("hidden_size", 512)) != (told := transformer.get("pooled_projection_dim", 768)):
        problems.append(
            f"CLIP's pooled state is {pooled} wide (hidden_size), and the transformer takes {told} "
            "(pooled_projection_dim); take both from one pipeline"
        )
    if (width := t5.get("d_model", 512)) != (attended := transformer.get("joint_attention_dim", 4096)):
        problems.append(
            f"T5's states are {width} wide (d_model), and the transformer attends to {attended} (joint_attention_dim); "
            "take both from one pipeline"
        )
    return problems
