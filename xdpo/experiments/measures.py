"""Statistics of many runs' scores, with intervals: differences, win rates, pairs to reach a score.

An array of scores is (seeds, prompts). Intervals are 95 % percentile bootstraps that draw both seeds and prompts with
replacement, so that they cover other seeds and other prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from xdpo.report.curves import first_reached

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; NaN where it isn't defined."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """The sign of a difference: 1 or −1 if the interval excludes zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def estimate(statistic: Callable[..., float], *arrays: np.ndarray, seed: int = 0) -> Estimate:
    """A statistic of paired arrays (…, seeds, prompts), with its interval over the resamples in which it is finite."""
    rng = np.random.default_rng(seed)
    seeds, prompts = arrays[0].shape[-2:]
    drawn = []
    for _ in range(RESAMPLES):
        rows, columns = rng.integers(seeds, size=seeds), rng.integers(prompts, size=prompts)
        drawn.append(statistic(*(array[..., rows, :][..., columns] for array in arrays)))
    values = np.array(drawn)
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
    return Estimate(float(statistic(*arrays)), float(low), float(high))


def mean(scores: np.ndarray) -> Estimate:
    return estimate(lambda values: values.mean(), scores)


def difference(scores: np.ndarray, others: np.ndarray) -> Estimate:
    """Mean of the differences, paired by seed and prompt."""
    return estimate(lambda a, b: (a - b).mean(), scores, np.broadcast_to(others, scores.shape))


def win_rate(scores: np.ndarray, others: np.ndarray) -> Estimate:
    """Share of pairs of seed and prompt in which `scores` is higher, ties counted ½."""
    others = np.broadcast_to(others, scores.shape)
    return estimate(lambda a, b: float(((a > b) + 0.5 * (a == b)).mean()), scores, others)


def speed_up(pairs: Sequence[float], curve: np.ndarray, baseline: np.ndarray) -> Estimate:
    """How many times fewer pairs a method needs to reach the baseline's final score (the paper's 1.5 and 1.6).

    Curves are (points, seeds, prompts), with the first point before training. The result is 0 if the method never
    reaches the score. Resamples in which the baseline ends no higher than it started are left out.
    """

    def ratio(scores: np.ndarray, baseline_scores: np.ndarray) -> float:
        means, baseline_means = scores.mean(axis=(1, 2)), baseline_scores.mean(axis=(1, 2))
        needed = first_reached(pairs, baseline_means, baseline_means[-1])
        reached = first_reached(pairs, means, baseline_means[-1])
        if not needed:
            return float("nan")
        return needed / reached if reached else 0.0

    return estimate(ratio, curve, baseline)
