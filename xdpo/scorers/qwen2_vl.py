"""Qwen2-VL, which reads an image and a text as one conversation: sizes, pixels, tokens, and its last states."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from xdpo.scorers.pixels import normalise, to_unit
from xdpo.scorers.weights import fill

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PATCH = 14  # pixels a side of what the image encoder reads
MERGED = 2  # patches a side that become one token
FRAMES = 2  # the encoder reads videos by two frames; an image is two equal ones
TOKEN_SIDE = PATCH * MERGED
IMAGE_TOKEN = "<|image_pad|>"

# transformers' Qwen2VLVisionConfig and Qwen2VLTextConfig. "dtype" is the precision in which the original computes.
_VISION: dict[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": PATCH,
    "spatial_merge_size": MERGED,
    "temporal_patch_size": FRAMES,
    "hidden_act": "quick_gelu",
}
_TEXT: dict[str, Any] = {
    "num_hidden_layers": 28,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
}
QWEN2_VL_2B: dict[str, Any] = {
    "dtype": "bfloat16",
    "text_config": _TEXT
    | {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "vision_config": _VISION | {"hidden_size": 1536},
}
QWEN2_VL_7B: dict[str, Any] = {
    "dtype": "bfloat16",
    "text_config": _TEXT
    | {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "vision_config": _VISION | {"hidden_size": 3584},
}


def dtype_of(sizes: Mapping[str, Any]) -> torch.dtype:
    """The precision in which a model of these sizes computes."""
    return getattr(torch, sizes["dtype"])


def qwen2_vl_network(sizes: Mapping[str, Any]) -> nn.Module:
    """A Qwen2VLModel of these sizes without a language head, its weights random."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    return Qwen2VLModel(Qwen2VLConfig(text_config=sizes["text_config"], vision_config=sizes["vision_config"]))


def fill_qwen2_vl(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    """Give a Qwen2VLModel tensors by the names of the published files, visual.… and model.…; errors name `path`."""
    renamed = {
        f"language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
        for name, tensor in tensors.items()
    }
    fill(model, renamed, path, dtype)


def load_tokenizer(path: Path, added: Sequence[str] = ()) -> "Tokenizer":
    """Qwen2's tokenizer from a tokenizer.json, with new tokens at the end. Raises ValueError for a broken file."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} can't be read as a tokenizer: {error}; delete it and fetch it again") from error
    if tokenizer.token_to_id(IMAGE_TOKEN) is None:
        raise ValueError(f"{path} is another model's tokenizer: it has no token {IMAGE_TOKEN}; fetch it again")
    tokenizer.add_special_tokens(list(added))
    return tokenizer


def token_id(tokenizer: "Tokenizer", token: str) -> int:
    """The id of a token that the tokenizer has."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def conversation(text: str, image_tokens: int) -> str:
    """A user's turn with an image and a text, to be answered, as the published chat template writes it."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{IMAGE_TOKEN * image_tokens}<|vision_end|>{text}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def tokenize(tokenizer: "Tokenizer", text: str, pixels: Tensor) -> tuple[Tensor, int]:
    """The ids (L,) of a conversation about an image (3, H, W), and the place of the image's first token."""
    image_tokens = (pixels.shape[1] // TOKEN_SIDE) * (pixels.shape[2] // TOKEN_SIDE)
    ids = tokenizer.encode(conversation(text, image_tokens)).ids
    return torch.tensor(ids), ids.index(token_id(tokenizer, IMAGE_TOKEN))


def whole_image(image: Image.Image, least: int, most: int) -> Tensor:
    """The whole image as (3, H, W) float32 of CLIP's mean and deviation, of `least` to `most` pixels.

    Both sides are multiples of 28, and the ratio is kept as well as that allows. The originals refuse an image more
    than 200 times as long as wide.
    """
    rgb = image.convert("RGB")
    sides = [max(TOKEN_SIDE, round(side / TOKEN_SIDE) * TOKEN_SIDE) for side in rgb.size]
    if math.prod(sides) > most:
        shrink = math.sqrt(math.prod(rgb.size) / most)
        sides = [max(TOKEN_SIDE, math.floor(side / shrink / TOKEN_SIDE) * TOKEN_SIDE) for side in rgb.size]
    elif math.prod(sides) < least:
        grow = math.sqrt(least / math.prod(rgb.size))
        sides = [math.ceil(side * grow / TOKEN_SIDE) * TOKEN_SIDE for side in rgb.size]
    return normalise(to_unit(rgb.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)))


def patches(pixels: Tensor) -> Tensor:
    """Pixels (3, H, W) → patches (N, 1176): four neighbours that become one token follow one another."""
    rows, columns = (length // TOKEN_SIDE for length in pixels.shape[1:])
    cells = pixels.reshape(3, rows, MERGED, PATCH, columns, MERGED, PATCH).permute(1, 4, 2, 5, 0, 3, 6)
    frames = cells.unsqueeze(5).expand(*cells.shape[:5], FRAMES, *cells.shape[5:])
    return frames.reshape(rows * columns * MERGED**2, -1)


def positions_in_a_line(length: int) -> Tensor:
    """0, 1, 2, … on each of the three axes of the rotary positions: (3, length)."""
    return torch.arange(length).expand(3, -1)


def positions_in_a_grid(first: int, rows: int, columns: int, length: int) -> Tensor:
    """Rotary positions (3, length) on the axes time, height and width, as Qwen2-VL was trained.

    The image's tokens, rows × columns of them from `first` on, have their row and column. The text goes on after the
    larger of both.
    """
    line = positions_in_a_line(length)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    image = torch.stack([torch.zeros_like(row), row, column]).flatten(1)
    after = first + rows * columns
    moved = line[:, after:] - rows * columns + max(rows, columns)
    return torch.cat([line[:, :first], first + image, moved], dim=1)


def last_states(model: Any, pixels: Tensor, token_ids: Tensor, first: int, positions: Tensor) -> Tensor:
    """The states (L, D) after the last layer's norm of a conversation: pixels (3, H, W), ids (L,), positions (3, L).

    `first` is the place of the image's first token. Image and tokens may lie on another device than the model.
    """
    rows, columns = (length // PATCH for length in pixels.shape[1:])
    device, dtype = model.device, model.dtype
    states = model.language_model.embed_tokens(token_ids.to(device))
    grid = torch.tensor([[1, rows, columns]], device=device)
    image = model.visual(patches(pixels).to(device, dtype), grid_thw=grid).pooler_output
    states[first : first + len(image)] = image
    outputs = model.language_model(
        inputs_embeds=states[None], position_ids=positions.to(device)[:, None], use_cache=False
    )
    return outputs.last_hidden_state[0]
