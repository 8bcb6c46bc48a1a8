"""VQAScore (Lin et al. 2024): the probability that Qwen2-VL answers Yes when it is asked whether the image shows it."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from xdpo.scorers import qwen2_vl
from xdpo.scorers.weights import read_tensors

QUESTION = 'Does this image show "{}"?'  # t2v-metrics' for Qwen2-VL
ANSWER = "Yes"
LEAST_PIXELS, MOST_PIXELS = 4 * qwen2_vl.TOKEN_SIDE**2, 16384 * qwen2_vl.TOKEN_SIDE**2  # Qwen2-VL's own limits


def pixels_of(image: Image.Image) -> Tensor:
    """An image nearly at its own size (3, H, W), both sides multiples of 28; see whole_image."""
    return qwen2_vl.whole_image(image, LEAST_PIXELS, MOST_PIXELS)


def read_penalty(path: Path) -> float:
    """What a generation_config.json divides the chances of words by that were in the question: 1 for none."""
    try:
        return float(json.loads(path.read_text()).get("repetition_penalty", 1.0))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a generation config: {error}; delete it and fetch it again") from error


def build_vqascore(sizes: dict, first: Path, second: Path) -> nn.Module:
    """Qwen2-VL with the weights of both files, in the sizes' precision."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = qwen2_vl.qwen2_vl_network(sizes)
    qwen2_vl.fill_qwen2_vl(model, read_tensors(first) | read_tensors(second), first, qwen2_vl.dtype_of(sizes))
    return model.eval().requires_grad_(False)


def probability(model: Any, pixels: Tensor, token_ids: Tensor, first: int, answer: int, penalty: float) -> float:
    """The probability of the token `answer` after a conversation: pixels (3, H, W), ids (L,).

    `first` is the place of the image's first token. The embeddings are the language head too.
    """
    rows, columns = (length // qwen2_vl.TOKEN_SIDE for length in pixels.shape[1:])
    positions = qwen2_vl.positions_in_a_grid(first, rows, columns, len(token_ids))
    states = qwen2_vl.last_states(model, pixels, token_ids, first, positions)
    logits = nn.functional.linear(states[-1], model.language_model.embed_tokens.weight).float()
    seen = token_ids.unique().to(logits.device)
    logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
    return logits.softmax(0)[answer].item()
