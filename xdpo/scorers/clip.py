"""CLIP for the metrics that use it: sizes, open_clip's tensor names, tokens of prompts, unit embeddings."""

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xdpo.scorers.weights import fill, read_tensors

if TYPE_CHECKING:
    from transformers import CLIPModel

CONTEXT_LENGTH = 77  # tokens, with the two that mark start and end

# transformers' CLIPConfig for OpenCLIP's ViT-H-14 (PickScore, HPS v2, CLIP): exact GELU, which configurations written
# for OpenAI's models replace by quick_gelu at a cost of up to 0.2 points of PickScore.
VIT_H_14 = {
    "projection_dim": 1024,
    "text_config": {
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": CONTEXT_LENGTH,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 2,  # makes transformers pool at the highest id, as open_clip does
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    },
}
VIT_H_14_VISION = {half: VIT_H_14[half] for half in ("projection_dim", "vision_config")}  # its image half (HP)
# The same for the image half of OpenAI's ViT-L/14 (aesthetic).
VIT_L_14 = {
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}


def clip_network(sizes: dict) -> "CLIPModel":
    """A CLIPModel of these sizes, its weights random."""
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(**sizes))


def clip_vision_network(sizes: dict) -> nn.Module:
    """The image half of a CLIPModel of these sizes and its projection, the weights random."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**sizes["vision_config"], projection_dim=sizes["projection_dim"])
    return CLIPVisionModelWithProjection(config)


def build_clip(sizes: dict, path: Path) -> "CLIPModel":
    """A transformers CLIPModel with the weights at `path`, in transformers' or open_clip's names; float32."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = clip_network(sizes)
    tensors = read_tensors(path)
    if "visual.conv1.weight" in tensors:
        tensors = from_open_clip(tensors)
    fill(model, _without_positions(tensors), path)
    return model.eval().requires_grad_(False)


def build_clip_vision(sizes: dict, path: Path) -> nn.Module:
    """The image half of a CLIPModel with the weights at `path`, and its projection; float32."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = clip_vision_network(sizes)
    halves = ("vision_model.", "visual_projection.")
    tensors = {name: tensor for name, tensor in read_tensors(path).items() if name.startswith(halves)}
    fill(model, _without_positions(tensors), path)
    return model.eval().requires_grad_(False)


def _without_positions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without position_ids, which older versions of transformers saved (0, 1, 2, …)."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}


_TOWERS = (("visual.transformer.", "vision_model.encoder."), ("transformer.", "text_model.encoder."))
_LAYER_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_SINGLE = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}


def from_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from open_clip's names (visual.conv1.weight, …) to those of transformers' CLIPModel.

    Query, key and value are one tensor in open_clip and three in transformers. Unknown names are kept; `fill` refuses
    them.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tower = next(((old, new) for old, new in _TOWERS if name.startswith(f"{old}resblocks.")), None)
        if tower:
            number, part = name.removeprefix(f"{tower[0]}resblocks.").split(".", 1)
            layer = f"{tower[1]}layers.{number}."
            if part.startswith("attn.in_proj_"):
                kind = part.removeprefix("attn.in_proj_")
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{layer}self_attn.{letter}_proj.{kind}"] = third
            else:
                stem, _, kind = part.rpartition(".")
                renamed[f"{layer}{_LAYER_PARTS.get(stem, stem)}.{kind}"] = tensor
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.T.contiguous()
        else:
            renamed[_SINGLE.get(name, name)] = tensor
    return renamed


def load_tokenizer(path: Path) -> Callable[[Sequence[str]], Tensor]:
    """CLIP's byte-pair tokenizer from a tokenizer.json: texts → (B, L) long, cut at 77 tokens, padded with 0.

    Padding comes after the end token, where the causal text model never looks. Raises ValueError for a broken file.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} can't be read as a tokenizer: {error}; delete it and fetch it again") from error
    tokenizer.enable_truncation(CONTEXT_LENGTH)
    tokenizer.enable_padding(pad_id=0)

    def tokenize(texts: Sequence[str]) -> Tensor:
        return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(texts))])

    return tokenize


def clean(prompt: str) -> str:
    """A prompt as open_clip and hpsv2 read it: repaired by ftfy, HTML unescaped twice, spaces collapsed, lower case."""
    import ftfy

    mended = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", mended).strip().lower()


def image_embeddings(model: "CLIPModel", pixels: Tensor) -> Tensor:
    """Pixels (B, 3, 224, 224) → unit vectors (B, D)."""
    return nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


def text_embeddings(model: "CLIPModel", token_ids: Tensor) -> Tensor:
    """Token ids (B, L) → unit vectors (B, D)."""
    return nn.functional.normalize(model.get_text_features(input_ids=token_ids).pooler_output, dim=-1)
