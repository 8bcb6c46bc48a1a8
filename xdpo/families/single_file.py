"""Weights by the names that the original checkpoints have, in one file: what ComfyUI, A1111 and Forge load.

diffusers reads these names (`from_single_file`, `load_lora_weights`) and writes a LoRA's alone. There a UNet's blocks
are numbered through, an autoencoder's decoder is numbered from its end, and OpenCLIP's attention has queries, keys and
values in one matrix.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_IN_LAYER = re.compile(r"encoder\.layers\.(?P<number>\d+)\.(?P<rest>.+)")


def unet_layer(config: Mapping[str, Any], layer: str) -> str:
    """The original name of a UNet's layer, without the prefix."""
    return _renamed(layer, _unet_blocks(config), {".resnets.": _UNET_RESNET})


def same_layer(config: Mapping[str, Any], layer: str) -> str:
    """Kohya's scripts call Stable Diffusion 1.x's and 2.x's layers by diffusers' names."""
    return layer


def unet(weights: Weights, config: Mapping[str, Any]) -> dict[str, Tensor]:
    blocks = _unet_blocks(config)
    inner = {".resnets.": _UNET_RESNET}
    return {UNET_PREFIX + _renamed(name, blocks, inner): weight for name, weight in weights.items()}


def vae(weights: Weights, config: Mapping[str, Any]) -> dict[str, Tensor]:
    blocks, inner = _vae_blocks(config), {".resnets.": _VAE_RESNET, ".attentions.": _VAE_ATTENTION}
    named = {_renamed(name, blocks, inner): weight for name, weight in weights.items()}
    # The original attention is of convolutions of one pixel.
    is_attention = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight")
    return {
        VAE_PREFIX + name: weight[..., None, None] if is_attention.search(name) and weight.ndim == 2 else weight
        for name, weight in named.items()
    }


def clip(prefix: str, weights: Weights, config: Any) -> dict[str, Tensor]:
    """A text encoder that the original checkpoint holds by transformers' names."""
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights.items()}


def open_clip(prefix: str, weights: Weights, config: Any) -> dict[str, Tensor]:
    """A text encoder that the original checkpoint holds by OpenCLIP's names."""
    named: dict[str, Tensor] = {}
    for full_name, weight in weights.items():
        name = full_name.removeprefix("text_model.")
        if name == "text_projection.weight":
            named["text_projection"] = weight.T.contiguous()
        elif name in _OPEN_CLIP:
            named[_OPEN_CLIP[name]] = weight
        elif match := _IN_LAYER.fullmatch(name):
            layer = f"transformer.resblocks.{match['number']}"
            module, _, kind = match["rest"].rpartition(".")
            if module == "self_attn.q_proj":
                three = [weights[full_name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
                named[f"{layer}.attn.in_proj_{kind}"] = torch.cat(three)
            elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
                named[f"{layer}.{_OPEN_CLIP_LAYER[module]}.{kind}"] = weight
    return {prefix + name: weight for name, weight in named.items()}


def text_encoder(weights: Weights, config: Any) -> dict[str, Tensor]:
    """Stable Diffusion 1.x's, which is CLIP, or 2.x's, which is OpenCLIP, whose activation is another one."""
    if config.hidden_act == "quick_gelu":
        return clip("cond_stage_model.transformer.", weights, config)
    return open_clip("cond_stage_model.model.", weights, config)


def kohya(layers: Weights, alpha: float, rename: Callable[[str], str]) -> dict[str, Tensor]:
    """A UNet's LoRA by the names of kohya's scripts, each layer with its α.

    layers: by PEFT's names. rename: a layer's name → what it is called in the files of its family.
    """
    from diffusers.utils import convert_state_dict_to_kohya

    renamed = {}
    for name, weight in layers.items():
        layer, half, kind = name.rsplit(".", 2)
        renamed[f"unet.{rename(layer)}.{half}.{kind}"] = weight
    named = convert_state_dict_to_kohya(renamed)  # which takes every rank for its α
    return {name: torch.tensor(alpha) if name.endswith(".alpha") else weight for name, weight in named.items()}


def _unet_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    """Every block of a UNet → its original name."""
    per_block, blocks = config["layers_per_block"] + 1, dict(_UNET)  # of the way down the last one is a downsampler
    for number in range(len(config["down_block_types"])):
        for layer in range(per_block - 1):
            block = f"input_blocks.{number * per_block + layer + 1}"
            blocks[f"down_blocks.{number}.resnets.{layer}"] = f"{block}.0"
            blocks[f"down_blocks.{number}.attentions.{layer}"] = f"{block}.1"
        blocks[f"down_blocks.{number}.downsamplers.0.conv"] = f"input_blocks.{(number + 1) * per_block}.0.op"
    for number, kind in enumerate(config["up_block_types"]):
        for layer in range(per_block):
            block = f"output_blocks.{number * per_block + layer}"
            blocks[f"up_blocks.{number}.resnets.{layer}"] = f"{block}.0"
            blocks[f"up_blocks.{number}.attentions.{layer}"] = f"{block}.1"
        blocks[f"up_blocks.{number}.upsamplers.0.conv"] = f"{block}.{2 if 'CrossAttn' in kind else 1}.conv"
    return blocks


def _vae_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    """Every block of an autoencoder whose name or number differs → its original name."""
    blocks, last = {}, len(config["up_block_types"]) - 1
    for part, sampler in (("encoder", "down"), ("decoder", "up")):
        blocks[f"{part}.conv_norm_out"] = f"{part}.norm_out"
        blocks[f"{part}.mid_block.attentions.0"] = f"{part}.mid.attn_1"
        for number in (0, 1):
            blocks[f"{part}.mid_block.resnets.{number}"] = f"{part}.mid.block_{number + 1}"
        for number in range(last + 1):
            block = f"{part}.{sampler}.{number if part == 'encoder' else last - number}"
            for layer in range(config["layers_per_block"] + (part == "decoder")):
                blocks[f"{part}.{sampler}_blocks.{number}.resnets.{layer}"] = f"{block}.block.{layer}"
            blocks[f"{part}.{sampler}_blocks.{number}.{sampler}samplers.0.conv"] = f"{block}.{sampler}sample.conv"
    return blocks


def _renamed(name: str, blocks: Mapping[str, str], inner: Mapping[str, Mapping[str, str]]) -> str:
    """A name whose beginning is a block's. inner: what occurs in a block's name → new beginnings within the block."""
    for block, original in blocks.items():
        if name == block or name.startswith(block + "."):
            rest = name[len(block) :]
            for kind, names in inner.items():
                if kind in block:
                    beginning = next((old for old in names if rest.startswith(f".{old}.")), None)
                    rest = rest if beginning is None else f".{names[beginning]}{rest[len(beginning) + 1 :]}"
            return original + rest
    return name
