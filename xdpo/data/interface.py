"""What pairs and data sets have in common, whether they are read from a source or from a cache of encoded examples."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from xdpo.batch import Batch, Conditioning, SingleItem, Tokens
from xdpo.noise import Order


class PairRows(Protocol):
    """The usable pairs of a source, by index 0 … len − 1: a PairTable, or a cache.ExampleCache made from one."""

    @property
    def rows(self) -> np.ndarray:
        """(len,) int64, ascending: each pair's row in the source."""
        ...

    @property
    def scores(self) -> np.ndarray | None:
        """(2, len) float64, of each pair's chosen and rejected image; None where there are none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for equal pairs in equal order."""
        ...

    def __len__(self) -> int: ...

    def pair_id(self, row: int) -> str:
        """Name of the pair at a row of the source."""
        ...

    def caption(self, index: int) -> str:
        """The caption of a pair."""
        ...

    def image_names(self) -> tuple[np.ndarray, np.ndarray]:
        """Names of each pair's chosen and rejected image, equal where the image is the same."""
        ...


class PairExamples(Protocol):
    """Examples of pairs by position: a PairDataset, or a cache.CachedPairDataset of encoded ones."""

    seed: int
    order: Order  # self-play replaces it

    @property
    def table(self) -> PairRows: ...

    def batch(self, positions: Sequence[int]) -> Batch:
        """The examples at B positions as one batch."""
        ...

    def image(self, index: int, side: int, position: int) -> SingleItem | None:
        """One image of a pair, the chosen one at side 0, with the draws of `position`; None where it is unreadable."""
        ...

    def caption(self, index: int | None) -> Tokens | Conditioning:
        """A pair's caption, never dropped; None is the empty caption."""
        ...
