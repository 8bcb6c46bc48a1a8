"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet that attends to its last states, four latent channels."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xdpo.batch import Conditioning, LatentMoments, Tokens
from xdpo.families import single_file
from xdpo.families.captions import padded_ids
from xdpo.families.interface import Choices, Family, PipelineParts
from xdpo.families.processes import diffusion
from xdpo.families.stable_diffusion_check import TEXT_ENCODERS, denoiser_problems, index_problem, problems

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedTokenizerBase

TEXT = "text"  # the text encoder's last states, (N, L, D)


def tokenize(
    tokenizers: Mapping[str, "PreTrainedTokenizerBase"], choices: Choices, caption: str
) -> tuple[Tokens, bool]:
    tokenizer = tokenizers["tokenizer"]
    ids, is_cut = padded_ids(tokenizer, caption, tokenizer.model_max_length)
    return Tokens(input_ids=ids), is_cut


@torch.no_grad()
def encode_captions(parts: PipelineParts, tokens: Tokens) -> Conditioning:
    return Conditioning({TEXT: parts.modules["text_encoder"](tokens["input_ids"]).last_hidden_state})


def conditioning_shapes(parts: PipelineParts) -> dict[str, tuple[int, ...]]:
    length = parts.tokenizers["tokenizer"].model_max_length
    return {TEXT: (length, parts.modules["text_encoder"].config.hidden_size)}


@torch.no_grad()
def encode_images(parts: PipelineParts, pixel_values: Tensor) -> LatentMoments:
    # Contiguous, whatever layout the convolutions gave: the UNet rounds differently in another one.
    posterior = parts.vae.encode(pixel_values).latent_dist
    means, stds = posterior.mean.float().contiguous(), posterior.std.float().contiguous()
    config = parts.vae.config
    return LatentMoments(means, stds, config.scaling_factor, config.shift_factor or 0.0)


def latent_shape(parts: PipelineParts, resolution: int) -> tuple[int, int, int]:
    side = resolution // 2 ** (len(parts.vae.config.block_out_channels) - 1)
    return parts.vae.config.latent_channels, side, side


def to_latents(moments: LatentMoments, noise: Tensor | None) -> Tensor:
    latents = moments.means
    if noise is not None:
        if moments.stds is None:
            raise ValueError("latents can't be sampled where only the posterior's means were kept")
        latents = latents + moments.stds * noise
    return (latents - moments.shift_factor) * moments.scaling_factor


def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    return denoiser(noisy_latents, timesteps, conditioning[TEXT]).sample


def prompt_arguments(captions: Conditioning, empty: Conditioning) -> dict[str, Tensor]:
    return {"prompt_embeds": captions[TEXT], "negative_prompt_embeds": empty[TEXT]}


def decode(pipeline: "DiffusionPipeline", latents: Tensor) -> Tensor:
    return pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]


def use_plain_attention(denoiser: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    denoiser.set_attn_processor(AttnProcessor())


STABLE_DIFFUSION = Family(
    name="Stable Diffusion 1.x and 2.x",
    pipeline_class="StableDiffusionPipeline",
    denoiser="unet",
    encoders=("vae", "text_encoder"),
    tokenizers=("tokenizer",),
    classes={"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",), "text_encoder": TEXT_ENCODERS},
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),  # all attention projections
    without_extras={
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    },
    index_problem=index_problem,
    problems=problems,
    denoiser_problems=denoiser_problems,
    process=diffusion,
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
    single_file={"unet": single_file.unet, "vae": single_file.vae, "text_encoder": single_file.text_encoder},
    kohyas_layer=single_file.same_layer,
)
