"""Which pairs a config leaves out, by their captions, columns of numbers, and sizes of images.

Nothing here decodes an image.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xdpo.config import FilterConfig
from xdpo.data.columns import DataError
from xdpo.data.rows import Images
from xdpo.paths import user_path
from xdpo.tables import read_text

if TYPE_CHECKING:
    import pyarrow as pa


_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # Thai to Khmer, Japanese, Han
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


@dataclass(frozen=True)
class Filters:
    """The `filter` section of a config. held_out_captions: what training captions must not be; None: anything."""

    config: FilterConfig = field(default_factory=FilterConfig)
    held_out_captions: frozenset[str] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of numbers that are read."""
        return tuple(self.config.columns or ())

    @cached_property
    def phrases(self) -> frozenset[tuple[str, ...]]:
        """What captions must not have. Raises DataError or TableError for a file that can't be used."""
        return frozenset() if self.config.captions is None else read_phrases(user_path(self.config.captions))

    def passing(self, table: "pa.Table", numbers: Callable[[str], np.ndarray], images: Images) -> dict[str, np.ndarray]:
        """The name of each filter, as data.table.PairCounts has it → which rows pass it, (rows,) bool.

        table: the columns without images. numbers: a column's values by its name, NaN where they are missing.
        Raises DataError where sizes of images are needed and not known.
        """
        config, filters = self.config, {}
        if config.captions is not None:
            filters["denied_caption"] = ~_each_caption(table, Denied(self.phrases).finds)
        if config.columns is not None:
            within = [_is_within(numbers(name), *bounds) for name, bounds in config.columns.items()]
            filters["out_of_bounds"] = np.all(within, axis=0)
        if config.needs_sides:
            sides = np.stack([images.sides(side) for side in (0, 1)])
            shorter, longer = sides.min(axis=2), sides.max(axis=2)
            is_unknown = shorter == 0
            if config.min_side is not None:
                filters["too_small"] = (is_unknown | (shorter >= config.min_side)).all(axis=0)
            if config.max_aspect is not None:
                filters["too_long"] = (is_unknown | (longer <= config.max_aspect * shorter)).all(axis=0)
        if self.held_out_captions is not None:
            held_out = frozenset(map(normalized, self.held_out_captions))
            filters["held_out_caption"] = ~_each_caption(table, lambda caption: normalized(caption) in held_out)
        return filters

    def key(self) -> dict[str, object]:
        """What decides which pairs are left out, by the names of config keys; empty where none are."""
        given = self.config.model_dump(exclude_defaults=True, mode="json")
        if self.config.captions is not None:
            given["captions"] = hashlib.sha256(json.dumps(sorted(self.phrases)).encode()).hexdigest()
        return {f"filter.{name}": value for name, value in given.items()}


class Denied:
    """Words and phrases, each a tuple of words, that a text may have."""

    def __init__(self, phrases: frozenset[tuple[str, ...]]):
        self._phrases = phrases
        self._lengths = sorted(set(map(len, self._phrases)))

    def finds(self, text: str) -> bool:
        words = words_of(text)
        return any(
            tuple(words[start : start + length]) in self._phrases
            for length in self._lengths
            for start in range(len(words) - length + 1)
        )


def read_phrases(path: Path) -> frozenset[tuple[str, ...]]:
    """The words of each line that has some. Raises DataError for a file without any, and TableError."""
    phrases = frozenset(tuple(words) for line in read_text(path).splitlines() if (words := words_of(line)))
    if not phrases:
        raise DataError(f"filter.captions: {path} has no words; write one word or phrase on each line")
    return phrases


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits, and single letters of scripts without spaces."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def normalized(caption: str) -> str:
    """A caption without what people write differently: upper case, and spaces."""
    return " ".join(caption.casefold().split())


def _each_caption(table: "pa.Table", test: Callable[[str], bool]) -> np.ndarray:
    """Whether each row's caption passes a test, which is made once for each distinct caption; False without one."""
    captions = table.column("caption").combine_chunks().dictionary_encode()
    results = np.array([caption is not None and test(caption) for caption in captions.dictionary.to_pylist()], bool)
    places = captions.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return np.append(results, False)[places]


def _is_within(values: np.ndarray, lowest: float | None, highest: float | None) -> np.ndarray:
    is_within = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        if lowest is not None:
            is_within &= values >= lowest
        if highest is not None:
            is_within &= values <= highest
    return is_within
