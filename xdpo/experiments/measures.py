"""Statistics of many runs' scores, with intervals: differences, win rates, pairs to reach a score.

An array of scores is (seeds, prompts). Intervals are 95 % percentile bootstraps that draw both seeds and prompts with
replacement, so that they cover other seeds and other prompts. What is the same for all prompts, such as a metric of a
run, has the interval of Student's t over seeds: a bootstrap of three values would cover 75 %.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from xdpo.report.curves import first_reached

RESAMPLES = 2000
MAY_BE_UNDEFINED = 0.05  # share of the resamples; with more, a statistic has no interval


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
    """A statistic of paired arrays (…, seeds, prompts), with its interval over the resamples in which it is finite.

    The interval is NaN where that is too few of them.
    """
    rng = np.random.default_rng(seed)
    seeds, prompts = arrays[0].shape[-2:]
    drawn = []
    for _ in range(RESAMPLES):
        rows, columns = rng.integers(seeds, size=seeds), rng.integers(prompts, size=prompts)
        drawn.append(statistic(*(array[..., rows, :][..., columns] for array in arrays)))
    values = np.array(drawn)
    finite = values[np.isfinite(values)]
    is_defined = len(finite) >= (1 - MAY_BE_UNDEFINED) * RESAMPLES
    low, high = np.quantile(finite, [0.025, 0.975]) if is_defined else (np.nan, np.nan)
    return Estimate(float(statistic(*arrays)), float(low), float(high))


def mean(scores: np.ndarray) -> Estimate:
    return estimate(lambda values: values.mean(), scores)


def paired(scores: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays (…, seeds, prompts) over the first seeds, which both have. Others of shape (prompts,) are for all."""
    others = np.broadcast_to(others, (*scores.shape[:-1], others.shape[-1])) if others.ndim == 1 else others
    seeds = min(scores.shape[-2], others.shape[-2])
    return scores[..., :seeds, :], others[..., :seeds, :]


def difference(scores: np.ndarray, others: np.ndarray) -> Estimate:
    """Mean of the differences, paired by seed and prompt."""
    ours, others = paired(scores, others)
    if all((array == array[:, :1]).all() for array in (ours, others)):
        return over_seeds(ours[:, 0] - others[:, 0])
    return estimate(lambda a, b: (a - b).mean(), ours, others)


def over_seeds(values: np.ndarray) -> Estimate:
    """The mean of a value for each seed, with Student's 95 % interval; one seed has none, which is NaN."""
    mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan
    half = float(t.ppf(0.975, len(values) - 1)) * error if error else error  # of equal values 0
    return Estimate(mean, mean - half, mean + half)


def win_rate(scores: np.ndarray, others: np.ndarray) -> Estimate:
    """Share of pairs of seed and prompt in which `scores` is higher, ties counted ½."""
    return estimate(lambda a, b: float(((a > b) + 0.5 * (a == b)).mean()), *paired(scores, others))


def speed_up(
    pairs: Sequence[float], curve: np.ndarray, baseline_pairs: Sequence[float], baseline: np.ndarray
) -> Estimate:
    """How many times fewer pairs a method needs to reach the baseline's final score (the paper's 1.5 and 1.6).

    Curves are (points, seeds, prompts), with the first point before training. The result is 0 if the method never
    reaches the score. Resamples in which the baseline ends no higher than it started are left out.
    """

    def ratio(scores: np.ndarray, baseline_scores: np.ndarray) -> float:
        means, baseline_means = scores.mean(axis=(1, 2)), baseline_scores.mean(axis=(1, 2))
        needed = first_reached(baseline_pairs, baseline_means, baseline_means[-1])
        reached = first_reached(pairs, means, baseline_means[-1])
        if not needed:
            return float("nan")
        return needed / reached if reached else 0.0

    return estimate(ratio, *paired(curve, baseline))


def difference_at_equal(
    curve: np.ndarray, progress: np.ndarray, other_curve: np.ndarray, other_progress: np.ndarray
) -> Estimate:
    """Difference of two curves where the progress of each first is what both reach: the lower of their highest values.

    All are (points, seeds, prompts), with the first point before training; the curves are straight between points. NaN
    where a progress never rises or was not measured.
    """

    def at_equal(ours: np.ndarray, our_progress: np.ndarray, others: np.ndarray, other_progress: np.ndarray) -> float:
        means = [array.mean(axis=(1, 2)) for array in (ours, our_progress, others, other_progress)]
        reached = np.minimum(means[1].max(), means[3].max())  # unlike min, NaN if either is
        if not reached > np.maximum(means[1][0], means[3][0]):
            return float("nan")
        one, other = first_reached(means[0], means[1], reached), first_reached(means[2], means[3], reached)
        return float("nan") if one is None or other is None else one - other

    ours, others = paired(curve, other_curve)
    our_progress, other_progress = paired(progress, other_progress)
    return estimate(at_equal, ours, our_progress, others, other_progress)
