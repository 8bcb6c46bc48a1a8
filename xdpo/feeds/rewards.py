"""The rewards of sampled images: several scorers normalised and added, and which images of a prompt become pairs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from xdpo import noise

Item = TypeVar("Item")


class Moments(NamedTuple):
    """Running mean and spread of one reward."""

    number: int = 0  # of values
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / self.number) if self.number else 0.0

    def with_values(self, values: np.ndarray) -> "Moments":
        """The moments after these values too, of which those that are not finite are left out.

        Chan, Golub and LeVeque (1979).
        """
        values = values[np.isfinite(values)]
        if not len(values):
            return self
        count, mean = self.number + len(values), float(values.mean())
        difference = mean - self.mean
        return Moments(
            count,
            self.mean + difference * len(values) / count,
            self.squares + float(np.square(values - mean).sum()) + difference**2 * self.number * len(values) / count,
        )


def mixture(
    rewards: Mapping[str, np.ndarray], weights: Mapping[str, float], moments: Mapping[str, Moments]
) -> np.ndarray:
    """Σ weight · (reward − mean) / deviation over the weighted rewards, each of shape (prompts, images).

    Without normalisation the reward with the largest numbers would decide alone. A reward that was always equal adds 0.
    """
    total = np.zeros(next(iter(rewards.values())).shape)
    for name, weight in weights.items():
        deviation = moments[name].deviation
        total += weight * (rewards[name] - moments[name].mean) / deviation if deviation else 0 * rewards[name]
    return total


class SampledPair(NamedTuple):
    """Two images of one prompt by their numbers, the one with the higher reward first."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class Choice:
    """The pairs of a round, and what gave none."""

    pairs: list[SampledPair]
    skipped_prompts: int  # they gave no pair: no two images whose rewards differ by more than the margin
    not_finite: int  # images whose reward is NaN or infinite; they are in no pair


def choose_pairs(rewards: np.ndarray, how: str, margin: float) -> Choice:
    """Pairs of images of the same prompt whose rewards differ by more than `margin`.

    rewards: (prompts, images). how: best_worst takes one pair a prompt, all every pair. Raises ValueError for another.
    """
    if how not in ("best_worst", "all"):
        raise ValueError(f"unknown online.pairs {how!r}; choose from best_worst, all")
    pairs, skipped = [], 0
    for prompt, group in enumerate(rewards):
        ranked = [int(image) for image in np.argsort(-group, kind="stable") if np.isfinite(group[image])]
        candidates = [(better, worse) for place, better in enumerate(ranked) for worse in ranked[place + 1 :]]
        if how == "best_worst":
            candidates = [(ranked[0], ranked[-1])] if len(ranked) > 1 else []
        found = [SampledPair(prompt, *pair) for pair in candidates if group[pair[0]] - group[pair[1]] > margin]
        pairs += found
        skipped += not found
    return Choice(pairs, skipped, int((~np.isfinite(rewards)).sum()))


def optimality(rewards: np.ndarray, limit: float) -> np.ndarray:
    """½ + ½·clip(A / limit, ±1) of each image, (prompts, images), from its advantage A within its prompt.

    A is the reward's distance from its prompt's mean, in deviations of these distances over all prompts (DiffusionNFT
    §3.3; the deviation over all prompts is Flow-GRPO's). NaN for an image whose reward is not finite, and for every
    image of a prompt whose rewards are equal: it says nothing.
    """
    finite = np.where(np.isfinite(rewards), rewards, np.nan)
    has_two = np.isfinite(finite).sum(axis=1) > 1
    distances = np.full_like(finite, np.nan)
    distances[has_two] = finite[has_two] - np.nanmean(finite[has_two], axis=1, keepdims=True)
    distances[has_two & (np.nanmax(np.abs(np.nan_to_num(distances)), axis=1) == 0)] = np.nan
    if np.isnan(distances).all():
        return distances
    return 0.5 + 0.5 * np.clip(distances / np.nanstd(distances) / limit, -1, 1)


def shuffled(items: Sequence[Item], seed: int, round_number: int) -> list[Item]:
    """A round's pairs or images in the order in which it trains on them, so that a batch isn't of few prompts."""
    order = torch.randperm(len(items), generator=noise.generator(seed, round_number, "online_pairs"))
    return [items[index] for index in order.tolist()]
