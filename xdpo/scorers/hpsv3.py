"""HPSv3 (Ma et al. 2025): Qwen2-VL reads an image with an instruction, and a head rates it at the reward token."""

import ast
import zipfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from xdpo.scorers import qwen2_vl
from xdpo.scorers.weights import fill, read_tensors

REWARD_TOKEN = "<|Reward|>"  # the tokenizer's last; the head reads the state there
PIXELS = 256 * qwen2_vl.TOKEN_SIDE**2  # of every image, as nearly as its ratio allows
MESSAGE_MODULE = "hpsv3/dataset/data_collator_qwen.py"  # in the package on the index

# Qwen2-VL-7B with as many embeddings as tokens, the reward token included.
HPSV3_QWEN2_VL_7B: dict[str, Any] = qwen2_vl.QWEN2_VL_7B | {
    "text_config": qwen2_vl.QWEN2_VL_7B["text_config"] | {"vocab_size": 151658}
}


def pixels_of(image: Image.Image) -> Tensor:
    """An image as about 200,704 pixels (3, H, W), both sides multiples of 28; see whole_image."""
    return qwen2_vl.whole_image(image, PIXELS, PIXELS)


def read_message(wheel: Path) -> str:
    """What the network was trained to be asked, with {text_prompt} in it, from the original package's wheel.

    The text is read as data; no code of the package is run. Raises ValueError for another file.
    """
    try:
        with zipfile.ZipFile(wheel) as package:
            source = package.read(MESSAGE_MODULE)
        texts = {
            statement.targets[0].id: statement.value.value
            for statement in ast.parse(source).body
            if isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Name)
            and isinstance(statement.value, ast.Constant)
            and isinstance(statement.value.value, str)
        }
        return texts["INSTRUCTION"] + texts["prompt_with_special_token"]
    except (OSError, zipfile.BadZipFile, KeyError, SyntaxError) as error:
        raise ValueError(f"{wheel} is not the package hpsv3: {error}; delete it and fetch it again") from error


class HPSv3Network(nn.Module):
    """Pixels and tokens → reward."""

    def __init__(self, model: Any, head: nn.Module):
        super().__init__()
        self.model, self.head = model, head

    def forward(self, pixels: Tensor, token_ids: Tensor, first: int, reward_place: int) -> Tensor:
        """Pixels (3, H, W), ids (L,), the places of the image's first token and of the reward token → a mean ().

        The original passes no positions, so that the image's tokens too are counted in a line.
        """
        positions = qwen2_vl.positions_in_a_line(len(token_ids))
        states = qwen2_vl.last_states(self.model, pixels, token_ids, first, positions)
        return self.head(states[reward_place].float())[0]


def hpsv3_networks(sizes: dict) -> tuple[nn.Module, nn.Module]:
    """Qwen2-VL of these sizes and the head, their weights random."""
    head = nn.Sequential(
        nn.Linear(sizes["text_config"]["hidden_size"], 1024),
        nn.ReLU(),
        nn.Dropout(0.05),  # in training only
        nn.Linear(1024, 16),
        nn.ReLU(),
        nn.Linear(16, 2),  # the mean of the reward, and its deviation
    )
    return qwen2_vl.qwen2_vl_network(sizes), head


def build_hpsv3(sizes: dict, path: Path) -> HPSv3Network:
    """HPSv3 with the weights of HPSv3.safetensors: Qwen2-VL in the sizes' precision, the head in float32."""
    from accelerate import init_empty_weights

    tensors = read_tensors(path)
    tensors.pop("lm_head.weight", None)  # predicts words, which the reward doesn't need
    in_head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("rm_head.")}
    with init_empty_weights(include_buffers=False):
        model, head = hpsv3_networks(sizes)
    qwen2_vl.fill_qwen2_vl(model, tensors, path, qwen2_vl.dtype_of(sizes))
    fill(head, {name.removeprefix("rm_head."): tensor for name, tensor in in_head.items()}, path)
    _round_frequencies(model, qwen2_vl.dtype_of(sizes))
    return HPSv3Network(model, head).eval().requires_grad_(False)


def _round_frequencies(model: Any, dtype: torch.dtype) -> None:
    """Round the frequencies of the rotary positions to `dtype`, as the original does, which casts all that it holds.

    In bfloat16 that moves the angles far along a conversation by more than a radian. The network learned with them.
    """
    model.language_model.rotary_emb.inv_freq = model.language_model.rotary_emb.inv_freq.to(dtype)
    model.visual.rotary_pos_emb = _RoundedAngles(model.visual.rotary_pos_emb.inv_freq.to(dtype))


class _RoundedAngles(nn.Module):
    """The image encoder's rotary angles, computed in the precision of the frequencies."""

    def __init__(self, frequencies: Tensor):
        super().__init__()
        self.frequencies = nn.Buffer(frequencies, persistent=False)

    def forward(self, patches: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of patches (N, 2) → cosines and sines of the angles, each (N, head width)."""
        angles = (places[..., None].to(self.frequencies.dtype) * self.frequencies).flatten(1)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()
