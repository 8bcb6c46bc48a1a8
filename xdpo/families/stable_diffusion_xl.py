"""Stable Diffusion XL: two CLIP text encoders, and a UNet that is also told a pooled state and the image's size."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xdpo.batch import Conditioning, LatentMoments, Tokens
from xdpo.config import ModelConfig
from xdpo.families import single_file, stable_diffusion
from xdpo.families.captions import padded_ids
from xdpo.families.interface import Choices, PipelineParts
from xdpo.families.stable_diffusion import STABLE_DIFFUSION
from xdpo.families.stable_diffusion_xl_check import TEXT_ENCODERS, denoiser_problems, index_problem, problems

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline
    from transformers import PreTrainedTokenizerBase

TEXT = "text"  # the last states but one of both text encoders, joined (N, L, 2048)
POOLED = "pooled"  # the second text encoder's projected state of the whole caption (N, 1280)
SIZE = "time_ids"  # (N, 6): height and width of the original, top and left of the crop, height and width aimed at
EMPTY_CAPTION = "empty caption"


def tokenize(
    tokenizers: Mapping[str, "PreTrainedTokenizerBase"], choices: Choices, caption: str
) -> tuple[Tokens, bool]:
    ids = {name: padded_ids(each, caption, each.model_max_length) for name, each in tokenizers.items()}
    return Tokens({name: each for name, (each, _) in ids.items()}), any(is_cut for _, is_cut in ids.values())


def choices(model: ModelConfig, index: Mapping[str, Any]) -> Choices:
    """How the empty caption is encoded; if the config leaves it open, as the pipeline does that samples."""
    own = "zeros" if index.get("force_zeros_for_empty_prompt", True) else "text"
    return {EMPTY_CAPTION: model.empty_caption or own}


@torch.no_grad()
def encode_captions(parts: PipelineParts, tokens: Tokens) -> Conditioning:
    first = parts.modules["text_encoder"](tokens["tokenizer"], output_hidden_states=True)
    second = parts.modules["text_encoder_2"](tokens["tokenizer_2"], output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    pooled = second.text_embeds
    if parts.choices[EMPTY_CAPTION] == "zeros":
        empty, _ = parts.tokenize("")
        is_empty = torch.stack([(ids == empty[name].to(ids.device)).all(1) for name, ids in tokens.items()]).all(0)
        states = states.masked_fill(is_empty[:, None, None], 0)
        pooled = pooled.masked_fill(is_empty[:, None], 0)
    return Conditioning({TEXT: states, POOLED: pooled})


def conditioning_shapes(parts: PipelineParts) -> dict[str, tuple[int, ...]]:
    first, second = (parts.modules[name].config for name in ("text_encoder", "text_encoder_2"))
    length = parts.tokenizers["tokenizer"].model_max_length
    return {TEXT: (length, first.hidden_size + second.hidden_size), POOLED: (second.projection_dim,)}


def with_size(conditioning: Conditioning, resolution: int, sizes: Tensor | None = None) -> Conditioning:
    """Without sizes every image is one that was as large as the training's and whole, as the sampler says it."""
    side, count, device = float(resolution), len(conditioning[TEXT]), conditioning[TEXT].device
    if sizes is None:
        sizes = torch.tensor([side, side, 0.0, 0.0], device=device).expand(count, -1)
    aimed_at = torch.tensor([side, side], device=device).expand(count, -1)
    return Conditioning({**conditioning, SIZE: torch.cat([sizes, aimed_at], dim=1)})


@contextmanager
def precision_for(vae: "AutoencoderKL", device: torch.device) -> Iterator[None]:
    """A context in which an autoencoder that overflows in float16 runs in float32, whatever the precision around it.

    Its config says so (force_upcast): the original one does, those that were changed to fit float16 do not.
    """
    if not vae.config.force_upcast:
        yield
        return
    vae.to(torch.float32)
    with torch.autocast(device.type, enabled=False):
        yield


@torch.no_grad()
def encode_images(parts: PipelineParts, pixel_values: Tensor) -> LatentMoments:
    with precision_for(parts.vae, pixel_values.device):
        return stable_diffusion.encode_images(parts, pixel_values)


def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    further = {"text_embeds": conditioning[POOLED], "time_ids": conditioning[SIZE]}
    return denoiser(noisy_latents, timesteps, conditioning[TEXT], added_cond_kwargs=further).sample


def prompt_arguments(captions: Conditioning, empty: Conditioning) -> dict[str, Tensor]:
    return {
        "prompt_embeds": captions[TEXT],
        "negative_prompt_embeds": empty[TEXT],
        "pooled_prompt_embeds": captions[POOLED],
        "negative_pooled_prompt_embeds": empty[POOLED],
    }


def decode(pipeline: "DiffusionPipeline", latents: Tensor) -> Tensor:
    with precision_for(pipeline.vae, latents.device):
        return stable_diffusion.decode(pipeline, latents.to(pipeline.vae.dtype))


STABLE_DIFFUSION_XL = STABLE_DIFFUSION._replace(
    name="Stable Diffusion XL",
    pipeline_class="StableDiffusionXLPipeline",
    encoders=("vae", "text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    classes={"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",), **TEXT_ENCODERS},
    without_extras={"feature_extractor": None, "image_encoder": None, "add_watermarker": False},
    guidance=5.0,
    keys=("empty_caption", "size_conditioning"),
    choices=choices,
    index_problem=index_problem,
    problems=problems,
    denoiser_problems=denoiser_problems,
    tokenize=tokenize,
    encode_captions=encode_captions,
    conditioning_shapes=conditioning_shapes,
    with_size=with_size,
    encode_images=encode_images,
    predict=predict,
    prompt_arguments=prompt_arguments,
    decode=decode,
    single_file={
        "unet": single_file.unet,
        "vae": single_file.vae,
        "text_encoder": partial(single_file.clip, "conditioner.embedders.0.transformer."),
        "text_encoder_2": partial(single_file.open_clip, "conditioner.embedders.1.model."),
    },
    kohyas_layer=single_file.unet_layer,
)
