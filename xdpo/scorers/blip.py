"""ImageReward's network: BLIP's image encoder, a BERT that attends to it in both directions, and a head on [CLS]."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from xdpo.scorers.head import build_head
from xdpo.scorers.weights import fill, read_tensors

PROMPT_LENGTH = 35  # tokens, with [CLS] and [SEP]; always padded to it
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072  # of ImageReward-v1.0 over its training set

# transformers' BlipVisionConfig and BlipTextConfig of ImageReward's networks. The LayerNorms' epsilons and the number
# of heads differ from transformers' defaults.
BLIP_VIT_L_16 = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": 30524,  # bert-base-uncased and the two tokens BLIP adds
        "hidden_size": 768,
        "encoder_hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "bos_token_id": None,
        "is_decoder": True,  # builds the layers that attend to the image; the mask stays bidirectional
    },
}


class ImageRewardNetwork(nn.Module):
    """Pixels and tokens → rewards; Xu et al. 2023, section 3."""

    def __init__(self, vision: nn.Module, text: nn.Module, head: nn.Module):
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    def forward(self, pixels: Tensor, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Pixels (B, 3, 224, 224), ids and mask (B, 35) → rewards (B,), normalised as published."""
        patches = self.vision(pixel_values=pixels).last_hidden_state
        states = self.text(
            input_ids=token_ids,
            attention_mask=token_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
            is_decoder=False,
        ).last_hidden_state
        return (self.head(states[:, 0]).squeeze(1) - REWARD_MEAN) / REWARD_STD


def blip_networks(sizes: dict) -> tuple[nn.Module, nn.Module]:
    """BLIP's two encoders of these sizes, their weights random."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision = BlipVisionModel(BlipVisionConfig(**sizes["vision_config"]))
    return vision, BlipTextModel(BlipTextConfig(**sizes["text_config"]), add_pooling_layer=False)


def build_image_reward(sizes: dict, path: Path) -> ImageRewardNetwork:
    """ImageReward with the weights of ImageReward.pt; float32."""
    from accelerate import init_empty_weights

    tensors = read_tensors(path)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    with init_empty_weights(include_buffers=False):
        vision, text = blip_networks(sizes)
    fill(vision, from_timm(part("blip.visual_encoder.")), path)
    text_tensors = part("blip.text_encoder.")
    text_tensors.pop("embeddings.position_ids", None)
    fill(text, text_tensors, path)
    # blip.vision_proj and blip.text_proj belong to a training loss of BLIP and are not used in the reward.
    return ImageRewardNetwork(vision, text, build_head(part("mlp."), path)).eval().requires_grad_(False)


_TIMM_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}


def from_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a ViT's tensors from timm's names (blocks.0.attn.qkv.weight, …) to those of BlipVisionModel."""
    renamed = {}
    for name, tensor in tensors.items():
        layer = ""
        if name.startswith("blocks."):
            _, number, name = name.split(".", 2)
            layer = f"encoder.layers.{number}."
        stem, dot, kind = name.rpartition(".")
        renamed[f"{layer}{_TIMM_NAMES.get(stem, stem)}.{kind}" if dot else _TIMM_NAMES.get(name, name)] = tensor
    return renamed


def load_bert_tokenizer(path: Path) -> Callable[[Sequence[str]], tuple[Tensor, Tensor]]:
    """bert-base-uncased's tokenizer from its vocab.txt: texts → ids and mask, both (B, 35) long.

    Raises ValueError for a broken file.
    """
    from tokenizers import BertWordPieceTokenizer

    try:
        tokenizer = BertWordPieceTokenizer(str(path), lowercase=True)
        padding = tokenizer.token_to_id("[PAD]")
        tokenizer.enable_truncation(PROMPT_LENGTH)
        tokenizer.enable_padding(pad_id=padding, length=PROMPT_LENGTH)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} can't be read as a vocabulary: {error}; delete it and fetch it again") from error

    def tokenize(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encodings = tokenizer.encode_batch(list(texts))
        ids = torch.tensor([encoding.ids for encoding in encodings])
        return ids, torch.tensor([encoding.attention_mask for encoding in encodings])

    return tokenize
