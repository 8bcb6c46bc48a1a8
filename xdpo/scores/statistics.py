"""Means, medians, win rates and shifts, with 95 % intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, nan, sqrt
from typing import NamedTuple

import numpy as np

Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution
RESAMPLES = 10_000


@dataclass(frozen=True)
class Summary:
    """One model's scores on a prompt set. `interval` is the mean's 95 % percentile bootstrap over prompts;
    `standard_error` is NaN for a single score."""

    count: int
    mean: float
    median: float
    standard_error: float
    interval: tuple[float, float]


class Wins(NamedTuple):
    """How often paired scores rise, stay and fall."""

    wins: int
    ties: int
    losses: int

    @property
    def rate(self) -> float:
        """The share of wins, ties counted ½."""
        return (self.wins + self.ties / 2) / sum(self)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate."""
        return wilson_interval(self.wins + self.ties / 2, sum(self))


@dataclass(frozen=True)
class Comparison:
    """One model's scores against another's on the same prompts and seeds.

    `win_rate` counts ties ½, and its interval is Wilson's. `mean_shift` is the mean of the paired differences, its
    interval a percentile bootstrap over prompts. All intervals are at 95 %. `sign_test` is the two-sided exact p-value
    of wins against losses, ties dropped.
    """

    wins: int
    ties: int
    losses: int
    win_rate: float
    win_rate_interval: tuple[float, float]
    mean_before: float
    mean_after: float
    mean_shift: float
    mean_shift_interval: tuple[float, float]
    sign_test: float

    @property
    def relative_change(self) -> float:
        """The shift divided by the absolute mean before; infinite or NaN where that is zero."""
        if self.mean_before == 0:
            return nan if self.mean_shift == 0 else inf * self.mean_shift
        return self.mean_shift / abs(self.mean_before)

    def __str__(self) -> str:
        low, high = self.win_rate_interval
        shift_low, shift_high = self.mean_shift_interval
        return (
            f"{self.wins} wins, {self.ties} ties, {self.losses} losses: {self.win_rate:.1%} "
            f"[{low:.1%}, {high:.1%}]; mean {self.mean_before:.4g} → {self.mean_after:.4g}, "
            f"shift {self.mean_shift:+.4g} [{shift_low:+.4g}, {shift_high:+.4g}]"
        )


def summarize(scores: Sequence[float] | np.ndarray) -> Summary:
    """Summary of one score per prompt. Raises ValueError without scores, and for scores that aren't finite."""
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"a summary needs a list of at least one score, got shape {values.shape}")
    _refuse_non_finite(values)
    error = float(values.std(ddof=1) / sqrt(len(values))) if len(values) > 1 else nan
    return Summary(len(values), float(values.mean()), float(np.median(values)), error, bootstrap_interval(values))


def compare(
    before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray, tie_width: float = 0.0
) -> Comparison:
    """Compare paired scores; a difference of at most `tie_width` is a tie.

    Raises ValueError for lists that are empty or differ in length, and for scores that aren't finite.
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"paired scores must be two lists of one length, got shapes {first.shape} and {second.shape}")
    _refuse_non_finite(first, second)
    difference = second - first
    counts = count_wins(difference, tie_width)
    return Comparison(
        wins=counts.wins,
        ties=counts.ties,
        losses=counts.losses,
        win_rate=counts.rate,
        win_rate_interval=counts.interval,
        mean_before=float(first.mean()),
        mean_after=float(second.mean()),
        mean_shift=float(difference.mean()),
        mean_shift_interval=bootstrap_interval(difference),
        sign_test=sign_test(counts.wins, counts.losses),
    )


def count_wins(difference: np.ndarray, tie_width: float = 0.0) -> Wins:
    """Differences of paired scores → counts; one of at most `tie_width` is a tie."""
    wins, losses = int((difference > tie_width).sum()), int((difference < -tie_width).sum())
    return Wins(wins, len(difference) - wins - losses, losses)


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion; successes may be a half-integer.

    Ties, counted ½, vary less than wins and losses do, so with them the interval covers more than 95 %.
    """
    if trials <= 0:
        raise ValueError(f"a win rate needs at least one comparison, got {trials}")
    share, z2 = successes / trials, Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    reach = Z_95 * sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # At 0 and 1 the bound is exactly 0 or 1, which rounding would miss slightly.
    low = 0.0 if successes == 0 else max(0.0, centre - reach)
    high = 1.0 if successes == trials else min(1.0, centre + reach)
    return low, high


def bootstrap_interval(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of the mean of `values` (N,); equal values give equal intervals."""
    values = np.asarray(values, np.float64)
    counts = _resample_counts(len(values), resamples, seed)
    pieces = (counts[start : start + 500] for start in range(0, resamples, 500))  # as float64 all would be 256 MB
    means = np.concatenate([piece.astype(np.float64) @ values for piece in pieces]) / len(values)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of the sign test; 1 without wins and losses."""
    decided, fewer = wins + losses, min(wins, losses)
    tail = term = 1  # binomial coefficients as exact integers: no underflow at 3,200 prompts
    for k in range(fewer):
        term = term * (decided - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**decided)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected by Holm's method: below 0.05 for one of them or more by chance in at most 5 % of all cases."""
    corrected, highest = [1.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda position: p_values[position])
    for rank, position in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[position]))
        corrected[position] = highest
    return corrected


def average_ranks(scores: np.ndarray) -> np.ndarray:
    """Scores (models, prompts) → each model's rank, averaged over prompts: (models,). 1 is the highest; ties share."""
    from scipy.stats import rankdata

    return rankdata(-scores, axis=0).mean(axis=1)


@lru_cache(maxsize=32)
def _resample_counts(length: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of `length` prompts occurs in each resample: (resamples, length), the same for all scorers."""
    rng = np.random.default_rng(seed)
    counts = np.empty((resamples, length), np.uint16)
    for start in range(0, resamples, 500):
        rows = min(500, resamples - start)
        drawn = rng.integers(0, length, (rows, length)) + length * np.arange(rows)[:, None]
        counts[start : start + rows] = np.bincount(drawn.ravel(), minlength=rows * length).reshape(rows, length)
    return counts


def _refuse_non_finite(*columns: np.ndarray) -> None:
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError("scores must be finite numbers; some are NaN or infinite")
