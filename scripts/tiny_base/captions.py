"""Tokenizers made for the captions, and the sizes of their encoders."""

import re

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer, T5TokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

MAX_TOKENS = 32
START, END, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"


def clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer with one token for every word of the captions.

    Its merges are made word by word. The tokenizers library would learn them from counts, and break ties by chance: two
    trainings from one seed would have different tokens.
    """
    alphabet = [character for _, character in sorted(bytes_to_unicode().items())]
    merges: dict[tuple[str, str], None] = {}  # in order
    for word in sorted({word for caption in captions for word in re.findall(r"[a-z]+|[^\sa-z]", caption)}):
        pieces = [*word[:-1], word[-1] + END_OF_WORD]
        for pair in merges:
            pieces = merged(pieces, pair)
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces = merged(pieces, (pieces[0], pieces[1]))
    tokens = [*alphabet, *(each + END_OF_WORD for each in alphabet), *map("".join, merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=MAX_TOKENS)


def merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Pieces of a word after one merge of byte-pair encoding, from left to right."""
    done: list[str] = []
    for piece in pieces:
        if done and (done[-1], piece) == pair:
            done[-1] += piece
        else:
            done.append(piece)
    return done


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
