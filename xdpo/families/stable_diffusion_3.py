"""Stable Diffusion 3 and 3.5: two CLIP text encoders and, if the pipeline has it, T5; a transformer that is a flow."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xdpo.batch import Conditioning, Tokens
from xdpo.config import ModelConfig
from xdpo.families.captions import T5_TOKENS, padded_ids, t5_arguments, t5_choices, t5_states
from xdpo.families.interface import Choices, Family, PipelineParts, unchanged
from xdpo.families.processes import flow
from xdpo.families.stable_diffusion import encode_images, latent_shape, to_latents
from xdpo.families.stable_diffusion_3_check import denoiser_problems, problems

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedTokenizerBase

DEFAULT_T5_TOKENS = 256  # of a caption; the pipeline's default
# Entries of a Conditioning. T5's are left out where the pipeline has no T5, whose states would all be zero.
CLIP = "clip"  # (N, L, D), the two encoders' states side by side, zeros up to the transformer's width D
T5 = "t5"  # (N, T5's tokens, D)
POOLED = "pooled"  # (N, P)


def tokenize(
    tokenizers: Mapping[str, "PreTrainedTokenizerBase"], choices: Choices, caption: str
) -> tuple[Tokens, bool]:
    """A caption is truncated where no encoder reads all of it: T5 reads more than the two CLIP encoders."""
    length = tokenizers["tokenizer"].model_max_length
    lengths = {"tokenizer": length, "tokenizer_2": length, "tokenizer_3": choices.get(T5_TOKENS, DEFAULT_T5_TOKENS)}
    ids = {name: padded_ids(tokenizers[name], caption, lengths[name]) for name in lengths if tokenizers.get(name)}
    return Tokens({name: each for name, (each, _) in ids.items()}), all(is_cut for _, is_cut in ids.values())


def choices(model: ModelConfig, index: Mapping[str, Any]) -> Choices:
    """Raises ValueError for T5's tokens where there is no T5."""
    if model.t5_tokens is not None and (index.get("text_encoder_3") or [None, None])[1] is None:
        raise ValueError(f"model.t5_tokens (got {model.t5_tokens}): this pipeline has no T5; set it to null")
    return t5_choices(model, DEFAULT_T5_TOKENS)


@torch.no_grad()
def encode_captions(parts: PipelineParts, tokens: Tokens) -> Conditioning:
    width = parts.denoiser.config.joint_attention_dim
    outputs = [
        parts.modules[encoder](tokens[tokenizer], output_hidden_states=True)
        for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
    ]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    conditioning = Conditioning(
        {
            CLIP: nn.functional.pad(states, (0, width - states.shape[-1])),
            POOLED: torch.cat([output.text_embeds for output in outputs], dim=-1),
        }
    )
    if "text_encoder_3" in parts.modules:
        conditioning[T5] = t5_states(parts.modules["text_encoder_3"], tokens["tokenizer_3"])
    return conditioning


def conditioning_shapes(parts: PipelineParts) -> dict[str, tuple[int, ...]]:
    config = parts.denoiser.config
    shapes: dict[str, tuple[int, ...]] = {
        CLIP: (parts.tokenizers["tokenizer"].model_max_length, config.joint_attention_dim),
        POOLED: (config.pooled_projection_dim,),
    }
    if "text_encoder_3" in parts.modules:
        shapes[T5] = (parts.choices.get(T5_TOKENS, DEFAULT_T5_TOKENS), config.joint_attention_dim)
    return shapes


def predict(denoiser: nn.Module, noisy_latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
    return denoiser(
        hidden_states=noisy_latents,
        timestep=times,
        encoder_hidden_states=_states(conditioning),
        pooled_projections=conditioning[POOLED],
    ).sample


def prompt_arguments(captions: Conditioning, empty: Conditioning) -> dict[str, Tensor]:
    return {
        "prompt_embeds": _states(captions),
        "pooled_prompt_embeds": captions[POOLED],
        "negative_prompt_embeds": _states(empty),
        "negative_pooled_prompt_embeds": empty[POOLED],
    }


def _states(conditioning: Conditioning) -> Tensor:
    """What the transformer attends to, (N, L + T5's tokens, D)."""
    clip = conditioning[CLIP]
    t5 = conditioning[T5] if T5 in conditioning else clip.new_zeros(len(clip), DEFAULT_T5_TOKENS, clip.shape[-1])
    return torch.cat([clip, t5], dim=-2)


def decode(pipeline: "DiffusionPipeline", latents: Tensor) -> Tensor:
    config = pipeline.vae.config
    return pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]


STABLE_DIFFUSION_3 = Family(
    name="Stable Diffusion 3 and 3.5",
    pipeline_class="StableDiffusion3Pipeline",
    denoiser="transformer",
    encoders=("vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    tokenizers=("tokenizer", "tokenizer_2", "tokenizer_3"),
    optional=("text_encoder_3", "tokenizer_3"),
    classes={
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder_3": ("T5EncoderModel",),
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
    is_flow=True,
    guidance=7.0,
    lora_names=unchanged,
    keys=("t5_tokens",),
    choices=choices,
    sampling_arguments=t5_arguments,
    use_plain_attention=None,  # diffusers has its joint attention in fused kernels alone
)
