"""What scores say: win rates and mean shifts with 95 % intervals, in numbers and in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Comparison:
    """Scores of one model against another's on the same prompts and seeds.

    `win_rate` counts ties ½; its interval is Wilson's. `mean_shift` is the mean of the paired differences, its
    interval a percentile bootstrap over prompts. Both intervals are at 95 %.
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

    def __str__(self) -> str:
        low, high = self.win_rate_interval
        shift_low, shift_high = self.mean_shift_interval
        return (
            f"{self.wins} wins, {self.ties} ties, {self.losses} losses: {self.win_rate:.1%} "
            f"[{low:.1%}, {high:.1%}]; mean {self.mean_before:.4g} → {self.mean_after:.4g}, "
            f"shift {self.mean_shift:+.4g} [{shift_low:+.4g}, {shift_high:+.4g}]"
        )


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion; successes may be a half-integer (ties)."""
    if trials <= 0:
        raise ValueError(f"a win rate needs at least one comparison, got {trials}")
    share, z2 = successes / trials, Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    reach = Z_95 * sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def bootstrap_interval(values: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of the mean of `values` (N,), always the same for the same values."""
    rng = np.random.default_rng(seed)
    means = np.concatenate(  # in pieces: 10,000 × 3,200 draws at once would be 256 MB
        [values[rng.integers(0, len(values), (500, len(values)))].mean(axis=1) for _ in range(resamples // 500)]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def compare(before: Sequence[float], after: Sequence[float], tie_width: float = 0.0) -> Comparison:
    """Compare paired scores; a difference of at most `tie_width` is a tie.

    Raises ValueError for lists of different length, for none, and for scores that aren't finite.
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"paired scores must be two lists of one length, got shapes {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("scores must be finite numbers; some are NaN or infinite")
    difference = second - first
    wins, losses = int((difference > tie_width).sum()), int((difference < -tie_width).sum())
    ties = len(difference) - wins - losses
    successes = wins + ties / 2
    return Comparison(
        wins,
        ties,
        losses,
        successes / len(difference),
        wilson_interval(successes, len(difference)),
        float(first.mean()),
        float(second.mean()),
        float(difference.mean()),
        bootstrap_interval(difference),
    )
