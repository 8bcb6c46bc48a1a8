"""FLUX.1: T5's states and CLIP's pooled state; a transformer that is a flow, on latents packed into tokens."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xdpo.batch import Conditioning, Tokens
from xdpo.config import ModelConfig
from xdpo.families.captions import T5_TOKENS, padded_ids, t5_arguments, t5_choices, t5_states
from xdpo.families.flux_check import denoiser_problems, problems
from xdpo.families.interface import Choices, Family, PipelineParts, unchanged
from xdpo.families.pipeline_files import read_json
from xdpo.families.processes import flow
from xdpo.families.stable_diffusion import encode_images, latent_shape, to_latents

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedTokenizerBase

DEFAULT_T5_TOKENS = 512  # of a caption; the pipeline's default
GUIDANCE = 3.5  # which FLUX.1-dev samples with
NUM_TIMESTEPS = 1000  # a time is σ times this, and the transformer is told σ
# Entries of a Conditioning.
TEXT = "text"  # T5's states, (N, T5's tokens, D)
POOLED = "pooled"  # (N, P)


def tokenize(
    tokenizers: Mapping[str, "PreTrainedTokenizerBase"], choices: Choices, caption: str
) -> tuple[Tokens, bool]:
    """A caption is truncated where T5 doesn't read all of it: CLIP gives a summary alone."""
    clip = tokenizers["tokenizer"]
    ids, _ = padded_ids(clip, caption, clip.model_max_length)
    t5_ids, is_cut = padded_ids(tokenizers["tokenizer_2"], caption, choices.get(T5_TOKENS, DEFAULT_T5_TOKENS))
    return Tokens({"tokenizer": ids, "tokenizer_2": t5_ids}), is_cut


def choices(model: ModelConfig, index: Mapping[str, Any]) -> Choices:
    return t5_choices(model, DEFAULT_T5_TOKENS)


@torch.no_grad()
def encode_captions(parts: PipelineParts, tokens: Tokens) -> Conditioning:
    return Conditioning(
        {
            TEXT: t5_states(parts.modules["text_encoder_2"], tokens["tokenizer_2"]),
            POOLED: parts.modules["text_encoder"](tokens["tokenizer"]).pooler_output,
        }
    )


def conditioning_shapes(parts: PipelineParts) -> dict[str, tuple[int, ...]]:
    config, length = parts.denoiser.config, parts.choices.get(T5_TOKENS, DEFAULT_T5_TOKENS)
    return {TEXT: (length, config.joint_attention_dim), POOLED: (config.pooled_projection_dim,)}


def predict(
    denoiser: nn.Module,
    noisy_latents: Tensor,
    times: Tensor,
    conditioning: Conditioning,
    guidance: float | None,
) -> Tensor:
    """guidance: the number that a guidance-distilled transformer is told, None for another."""
    _, _, height, width = noisy_latents.shape
    states = conditioning[TEXT]
    prediction = denoiser(
        hidden_states=pack(noisy_latents),
        timestep=times / NUM_TIMESTEPS,
        guidance=None if guidance is None else torch.full_like(times, guidance),
        pooled_projections=conditioning[POOLED],
        encoder_hidden_states=states,
        txt_ids=states.new_zeros(states.shape[1], 3),
        img_ids=image_ids(height // 2, width // 2).to(states),
    ).sample
    return unpack(prediction, height)


def predict_arguments(folder: Path, model: ModelConfig) -> dict[str, Any]:
    """Guidance is told to a transformer that was distilled with it."""
    if not read_json(folder / "transformer" / "config.json").get("guidance_embeds"):
        if model.guidance is not None:
            raise ValueError(
                f"model.guidance (got {model.guidance:g}) is told to a guidance-distilled model, such as FLUX.1-dev, "
                "and this pipeline's transformer is none (guidance_embeds); set it to null"
            )
        return {"guidance": None}
    return {"guidance": GUIDANCE if model.guidance is None else model.guidance}


def pack(latents: Tensor) -> Tensor:
    """Latents (N, C, h, w) → tokens (N, h/2 · w/2, 4C), each of 2 × 2 latents."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: Tensor, height: int) -> Tensor:
    """Tokens (N, h/2 · w/2, 4C) → latents (N, C, h, w) of height h."""
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, -1)), 2)


def image_ids(rows: int, columns: int) -> Tensor:
    """(rows · columns, 3): 0, row and column of each token."""
    down, across = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(down), down, across], dim=-1).flatten(0, 1)


def prompt_arguments(captions: Conditioning, empty: Conditioning) -> dict[str, Tensor]:
    """Guidance is a number that the transformer is told: the empty caption has no part in it."""
    return {"prompt_embeds": captions[TEXT], "pooled_prompt_embeds": captions[POOLED]}


def decode(pipeline: "DiffusionPipeline", latents: Tensor) -> Tensor:
    """latents: tokens of square images."""
    config = pipeline.vae.config
    latents = unpack(latents, 2 * math.isqrt(latents.shape[1]))
    return pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]


def use_plain_attention(denoiser: Any) -> None:
    denoiser.set_attention_backend("_native_math")


FLUX = Family(
    name="FLUX.1",
    pipeline_class="FluxPipeline",
    denoiser="transformer",
    encoders=("vae", "text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    classes={
        "transformer": ("FluxTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
    },
    # All attention projections, of the image's tokens and of the caption's.
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    without_extras={"image_encoder": None, "feature_extractor": None},
    size_multiple=16,
    problems=problems,
    denoiser_problems=denoiser_problems,
    process=flow,
    tokenize=tokenize,
    encode_captions=encode_captions,
    conditioning_shapes=conditioning_shapes,
    encode_images=encode_images,
    latent_shape=latent_shape,
    to_latents=to_latents,
    predict=predict,
    prompt_arguments=prompt_arguments,
    decode=decode,
    use_plain_attention=use_plain_attention,
    lora_names=unchanged,
    is_flow=True,
    guidance=GUIDANCE,
    keys=("guidance", "t5_tokens"),
    choices=choices,
    sampling_arguments=t5_arguments,
    predict_arguments=predict_arguments,
    pack=pack,
    unpack=unpack,
)
