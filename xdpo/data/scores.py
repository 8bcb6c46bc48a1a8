"""The scores of pairs → the factor of each pair's β: SmPO's margin weights, for `loss.margin_weight`.

A weight depends on the pair's two scores and on the range of all the training pairs' scores, never on a batch. Weights
are looked up by the pair's row in the source, which every batch has: where another pair replaced an unreadable one, the
row is that pair's.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xdpo.data.columns import DataError
from xdpo.data.interface import PairRows
from xdpo.data.split import Split
from xdpo.loss import margin_weights, preference_probability


@dataclass(frozen=True, eq=False)
class MarginWeights:
    """scale·(2p − 1) of every pair of a table; loss.modifiers has the formulas."""

    rows: Tensor  # (N,) int64 of the source, ascending
    weights: Tensor  # (N,) float32
    score_range: tuple[float, float]  # lowest and highest score of the training pairs

    def get(self, rows: Tensor, device: torch.device) -> Tensor:
        """The weights, (B,) float32 on `device`, of the pairs at B rows of the source. rows: on the CPU."""
        return self.weights[torch.searchsorted(self.rows, rows)].to(device, non_blocking=True)

    def __str__(self) -> str:
        lowest, highest = self.score_range
        return (
            f"mean {self.weights.mean():.4g}, scores from {lowest:g} to {highest:g}; "
            f"{int((self.weights < 0).sum()):,} of {len(self.weights):,} pairs turned round"
        )


class PairWeights(NamedTuple):
    """The margin weights of training and held-out pairs; None where there are no such pairs, or no weights."""

    train: MarginWeights | None
    held_out: MarginWeights | None

    def of(self, split: Split) -> MarginWeights | None:
        return self.held_out if split.is_held_out else self.train


def weigh_pairs(scale: float | None, train_pairs: PairRows, held_out_pairs: PairRows | None = None) -> PairWeights:
    """The margin weights of all pairs. scale: loss.margin_weight; None: no weights.

    The range of the scores is that of the training pairs, as in SmPO, for the held-out pairs too.
    Raises DataError where a score is missing or not finite, or the training pairs' scores are all equal.
    """
    if scale is None:
        return PairWeights(None, None)
    scores = finite_scores(train_pairs, Split.TRAIN)
    score_range = float(scores.min()), float(scores.max())
    if score_range[0] == score_range[1]:
        raise DataError(
            f"loss.margin_weight needs scores that differ, and all of the training pairs' are {score_range[0]:g}. Take "
            "another scorer's, or set loss.margin_weight=null"
        )
    train = _weights(train_pairs, scores, score_range, scale)
    if held_out_pairs is None:
        return PairWeights(train, None)
    held_out = _weights(held_out_pairs, finite_scores(held_out_pairs, Split.HELD_OUT), score_range, scale)
    return PairWeights(train, held_out)


def finite_scores(pairs: PairRows, split: Split) -> np.ndarray:
    """The scores, (2, N) float64, chosen first. Raises DataError where a pair has none, naming up to ten rows."""
    scores = pairs.scores
    if scores is None:
        raise no_scores(split)
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=0))
    if len(bad):
        shown = ", ".join(f"row {pairs.rows[index]}: {scores[0, index]:g}/{scores[1, index]:g}" for index in bad[:10])
        raise DataError(
            f"loss.margin_weight needs a finite score of both images; {len(bad)} of {len(pairs)} {split.title} "
            f"lack one ({shown}, chosen/rejected). Score them, drop their rows, or set loss.margin_weight=null"
        )
    return scores


def no_scores(split: Split) -> DataError:
    """The error of pairs without scores, whether of a source or of a cache."""
    return DataError(
        f"loss.margin_weight needs scores, and the {split.title} have none (columns score_0 and score_1). Take "
        "data that scripts/relabel.py wrote, or set loss.margin_weight=null. A cache has the scores of its data: where "
        "cache.examples or cache.local_copy was made without them, remove the folder, and it is made again"
    )


def _weights(pairs: PairRows, scores: np.ndarray, score_range: tuple[float, float], scale: float) -> MarginWeights:
    lowest, highest = score_range
    chosen, rejected = torch.from_numpy(scores)
    probability = preference_probability(chosen, rejected, lowest=lowest, highest=highest)
    # One number on every process and device: computed in float64 on the CPU, rounded once.
    weights = margin_weights(probability, scale=scale).float()
    return MarginWeights(torch.tensor(pairs.rows), weights, score_range)
