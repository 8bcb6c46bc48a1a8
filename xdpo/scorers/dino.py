"""DINOv2, which learned from images alone: sizes, tensor names, and the network with its weights."""

from pathlib import Path

from torch import Tensor, nn

from xdpo.scorers.weights import fill, read_tensors

# transformers' Dinov2Config for facebook/dinov2-large. It was trained at 518 pixels; at 224 its positions, 37 × 37, are
# interpolated to 16 × 16.
DINOV2_VIT_L_14 = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}

_RENAMED = {  # earlier names in the file → transformers 5's
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def build_dinov2(sizes: dict, path: Path) -> nn.Module:
    """A transformers Dinov2Model with the weights at `path`; float32."""
    from accelerate import init_empty_weights
    from transformers import Dinov2Config, Dinov2Model

    with init_empty_weights(include_buffers=False):
        model = Dinov2Model(Dinov2Config(**sizes))
    fill(model, _renamed(read_tensors(path)), path)
    return model.eval().requires_grad_(False)


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that transformers' model has; unknown names are kept, and `fill` refuses them."""
    renamed = {}
    for name, tensor in tensors.items():
        old = next((part for part in _RENAMED if f".{part}." in name), None)
        renamed[name.replace(old, _RENAMED[old]) if old else name] = tensor
    return renamed
