"""The prompts and annotators needed to detect a difference, from exact binomial laws."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import betabinom, binom

ALPHA = 0.05
MOST_PROMPTS = 10_000


@dataclass(frozen=True)
class Power:
    """The power of `prompts` pairs with `annotators` votes each, if single votes prefer the model at `vote_rate`.

    majority_rate: how often a decided pair goes to the model. power: how often the two-sided sign test over the
    majorities then has p < 0.05.
    """

    prompts: int
    annotators: int
    vote_rate: float
    majority_rate: float
    power: float


def power(prompts: int, annotators: int, vote_rate: float, spread: float = 0.0) -> Power:
    """Power of a study; exact if all pairs have the same probability of a vote (`spread` 0).

    spread: standard deviation over pairs of the probability that a vote goes to the model, which then has a Beta law,
    so that votes on one pair agree more than independent votes would. An even number of annotators leaves ties, which
    count as undecided. Raises ValueError for numbers out of range.
    """
    if prompts < 1 or annotators < 1 or not 0 < vote_rate < 1 or not spread >= 0:
        raise ValueError(
            "planning needs at least 1 prompt, 1 annotator, a rate between 0 and 1 and a spread from 0, got "
            f"{prompts}, {annotators}, {vote_rate} and {spread}"
        )
    wins, losses = (_majority(annotators, rate, spread) for rate in (vote_rate, 1 - vote_rate))
    rate = wins / (wins + losses)
    decided = np.arange(prompts + 1)
    few = _critical(decided)
    seen = binom.cdf(few, decided, rate) + binom.sf(decided - few - 1, decided, rate)
    total = (binom.pmf(decided, prompts, min(1.0, wins + losses)) * seen)[few >= 0].sum()
    return Power(prompts, annotators, vote_rate, rate, float(total))


def prompts_needed(annotators: int, vote_rate: float, least_power: float = 0.8, spread: float = 0.0) -> int | None:
    """About the fewest prompts with at least that power; None if MOST_PROMPTS are not enough.

    Power rises in small saw teeth, so a few prompts fewer may also be enough.
    """
    low, high = 1, 1
    while power(high, annotators, vote_rate, spread).power < least_power:
        if high == MOST_PROMPTS:
            return None
        low, high = high, min(2 * high, MOST_PROMPTS)
    while low < high:
        middle = (low + high) // 2
        if power(middle, annotators, vote_rate, spread).power >= least_power:
            high = middle
        else:
            low = middle + 1
    return high


def _majority(annotators: int, rate: float, spread: float) -> float:
    """How often more than half of the votes on a pair go one way."""
    needed = annotators // 2
    if spread == 0:
        return float(binom.sf(needed, annotators, rate))
    size = rate * (1 - rate) / spread**2 - 1  # a + b of the Beta law
    if size <= 0:
        raise ValueError(f"a spread of {spread} is not possible around a rate of {rate}; it is below its √(p(1−p))")
    return float(betabinom.sf(needed, annotators, rate * size, (1 - rate) * size))


def _critical(decided: np.ndarray) -> np.ndarray:
    """The most pairs on the smaller side with which the two-sided sign test has p < 0.05; −1 if none."""
    few = binom.ppf(ALPHA / 2, np.maximum(decided, 1), 0.5)  # the first with a tail of α/2 or more
    return np.where(decided == 0, -1, np.where(2 * binom.cdf(few, decided, 0.5) < ALPHA, few, few - 1))
