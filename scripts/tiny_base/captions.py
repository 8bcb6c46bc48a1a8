"""Tokenizers learnt on the captions, and the sizes of their encoders."""

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer, T5TokenizerFast

MAX_TOKENS = 32


def train_clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose BPE was learnt on the captions: one token for every word of the grammar."""
    blank = CLIPTokenizer(model_max_length=MAX_TOKENS)
    return blank.train_new_from_iterator(captions, vocab_size=640)


def clip_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(N, MAX_TOKENS) token ids."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """A two-layer CLIP text model's."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer(captions: list[str]) -> T5TokenizerFast:
    """A T5 tokenizer with a piece for every word of the captions, and for the characters of other text."""
    words = sorted({word for caption in captions for word in caption.replace(",", " ,").split()})
    characters = sorted({character for word in words for character in word})
    pieces = [("▁", -3.0), *((f"▁{word}", -1.0) for word in words), *((each, -4.0) for each in characters)]
    pieces = list(dict(pieces).items())  # a word may be a character
    return T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *pieces], extra_ids=0)


def t5_ids(tokenizer: T5TokenizerFast, captions: list[str]) -> Tensor:
    """(N, MAX_TOKENS) token ids."""
    said = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return said.input_ids
