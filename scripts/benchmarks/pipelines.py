"""Pipelines of Stable Diffusion's kind with random weights, because time depends only on shapes."""

import json
import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from xdpo.families import PipelineParts, check_pipeline_folder, pipeline_with
from xdpo.families.stable_diffusion import STABLE_DIFFUSION

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from transformers import PreTrainedTokenizerBase

TOKENS = 77
LATENT_CHANNELS = 4
DOWNSCALING = 8
_CHARACTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
WORDS = [*_CHARACTERS, *(character + "</w>" for character in _CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
"""The tokenizer's: the printable characters, within a word and at its end, and both ends of a caption."""


def stable_diffusion_shapes(divisor: int = 1) -> dict[str, dict[str, Any]]:
    """Stable Diffusion 1.5's shapes, from its published configs, with every width divided by `divisor` (1, 2, 4 or 8).

    The vocabulary is divided too. Channels per normalisation group and the number of attention heads stay as they are.
    """
    return {
        "unet": {
            "sample_size": 64,
            "block_out_channels": tuple(width // divisor for width in (320, 640, 1280, 1280)),
            "layers_per_block": 2,
            "cross_attention_dim": 768 // divisor,
            "attention_head_dim": 8,  # the number of heads, in spite of its name
            "norm_num_groups": 32 // divisor,
        },
        "vae": {
            "sample_size": 512,
            "block_out_channels": tuple(width // divisor for width in (128, 256, 512, 512)),
            "layers_per_block": 2,
            "norm_num_groups": 32 // divisor,
        },
        "text_encoder": {
            "vocab_size": 49_408 // divisor,
            "hidden_size": 768 // divisor,
            "intermediate_size": 3072 // divisor,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    }


def thin_shapes() -> dict[str, dict[str, Any]]:
    """Nearly empty networks whose latents and text states are as large as Stable Diffusion 1.5's.

    The vocabulary is the tokenizer's own: weights of words that never occur would be counted and not be in memory.
    """
    return {
        "unet": {
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "cross_attention_dim": 768,
            "attention_head_dim": 1,
            "norm_num_groups": 4,
        },
        "vae": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
        "text_encoder": {
            "vocab_size": len(WORDS),
            "hidden_size": 768,
            "intermediate_size": 768,
            "num_hidden_layers": 1,
            "num_attention_heads": 12,
        },
    }


def tiny_shapes() -> dict[str, dict[str, Any]]:
    """Networks with a block of each kind and next to no weights."""
    return {
        "unet": {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (16, 16),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        },
        "vae": thin_shapes()["vae"],
        "text_encoder": {
            "vocab_size": len(WORDS),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    }


PIPELINES = {
    "sd15": stable_diffusion_shapes(),
    "quarter": stable_diffusion_shapes(divisor=4),
    "thin": thin_shapes(),
    "tiny": tiny_shapes(),
}
"""The pipelines that can be asked for by name."""


@contextmanager
def without_contents() -> Iterator[None]:
    """A context in which tensors have a shape and no contents, so that a network of any size fits."""
    # Fake parameters can't be moved; all are on one device.
    with FakeTensorMode(allow_non_fake_inputs=True), patch.object(nn.Module, "to", lambda module, *_, **__: module):
        yield


def build_networks(shapes: Mapping[str, Mapping[str, Any]]) -> PipelineParts:
    """Networks of these shapes, with random weights outside of `without_contents`."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        max_position_embeddings=TOKENS,
        bos_token_id=len(WORDS) - 2,
        eos_token_id=len(WORDS) - 1,
        **shapes["text_encoder"],
    )
    blocks = len(shapes["vae"]["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=LATENT_CHANNELS,
        **shapes["vae"],
    )
    modules = {"unet": UNet2DConditionModel(**shapes["unet"]), "vae": vae, "text_encoder": CLIPTextModel(text)}
    for module in modules.values():
        module.eval().requires_grad_(False)
    return PipelineParts(STABLE_DIFFUSION, modules, {}, None)


def pipeline_folder(name: str, working: Path) -> str:
    """A pipeline's folder or hub id: `name` itself, or for one of PIPELINES a folder that is built under `working`.

    Raises ValueError for an invalid one.
    """
    if name not in PIPELINES:
        check_pipeline_folder(name)
        return name
    folder = working / name
    if not folder.is_dir():
        # In a process of its own: the system adds what this one ever held to the peak of the processes it starts.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(save_pipeline, name, folder).result()
    return str(folder)


def save_pipeline(name: str, folder: Path) -> None:
    """Build one of PIPELINES with random weights and write it as a pipeline's folder."""
    from diffusers import PNDMScheduler

    torch.manual_seed(0)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    save_parts(build_networks(PIPELINES[name]), scheduler, folder)


def save_parts(parts: PipelineParts, scheduler: "SchedulerMixin", folder: Path) -> None:
    """Write networks as a pipeline's folder, with tokenizers of a few words."""
    from transformers import T5EncoderModel

    folder.mkdir(parents=True)
    tokenizers = {}
    for name in parts.family.tokenizers:
        encoder = parts.modules[name.replace("tokenizer", "text_encoder")]
        tokenizers[name] = _t5_tokenizer() if isinstance(encoder, T5EncoderModel) else _clip_tokenizer(folder)
    parts = replace(parts, tokenizers=tokenizers, scheduler=scheduler)
    pipeline_with(parts, parts.denoiser).save_pretrained(folder)


def _clip_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """A CLIP tokenizer of WORDS."""
    from transformers import CLIPTokenizer

    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: number for number, word in enumerate(WORDS)}), encoding="utf-8")
    merges.write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=TOKENS)


def _t5_tokenizer() -> "PreTrainedTokenizerBase":
    """A T5 tokenizer of the printable characters."""
    from transformers import T5TokenizerFast

    pieces = [(character, -2.0) for character in ("▁", *_CHARACTERS)]
    return T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *pieces], extra_ids=0)
