"""What families share in encoding captions: token ids, and T5's states as Stable Diffusion 3 and FLUX have them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xdpo.config import ModelConfig
from xdpo.families.interface import Choices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel


T5_TOKENS = "T5 tokens"  # a choice: how many tokens of a caption T5 reads


def t5_choices(model: ModelConfig, default: int) -> Choices:
    """How many tokens T5 reads, unless they are as many as in the pipeline, as they were before there was a choice."""
    return {} if model.t5_tokens in (None, default) else {T5_TOKENS: model.t5_tokens}


def t5_arguments(choices: Choices) -> dict[str, Any]:
    """The pipeline's arguments for what `t5_choices` chose."""
    return {"max_sequence_length": choices[T5_TOKENS]} if T5_TOKENS in choices else {}


def padded_ids(tokenizer: "PreTrainedTokenizerBase", caption: str, length: int) -> tuple[Tensor, bool]:
    """(length,) ids, cut or filled up, and whether they were cut."""
    ids = tokenizer(caption, padding="max_length", truncation=True, max_length=length).input_ids
    whole = tokenizer(caption, truncation=False, verbose=False).input_ids
    return torch.tensor(ids), len(whole) > length


def t5_states(encoder: "T5EncoderModel", ids: Tensor) -> Tensor:
    """(N, L, D) of ids (N, L). Not in fp16, in which the large T5 overflows: float32 takes its place."""
    device = ids.device.type
    is_fp16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
    with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not is_fp16):
        return encoder(ids).last_hidden_state
