"""Turn rows of the score table into comparisons: per prompt set, one number per (scorer, model, prompt)."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite

import numpy as np

from xdpo.images.reading import natural_order
from xdpo.scores.statistics import Comparison, Summary, Wins, compare, count_wins, summarize
from xdpo.scores.table import PlacedScore


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt of scored images. `key` names it within its set, such as "anime/12"."""

    key: str
    category: str
    text: str


@dataclass(frozen=True)
class Benchmark:
    """Models on one prompt set, over the prompts for which all of them have finite scores by all scorers.

    `scores[scorer]` is (models, prompts); several images of one prompt count as their mean. `prompts_seen` is the
    number of prompts that at least one model has; `limited_by` is how many of them a model lacks, for models that lack
    some.
    """

    name: str
    models: tuple[str, ...]
    prompts: tuple[ScoredPrompt, ...]
    scores: dict[str, np.ndarray]
    prompts_seen: int
    limited_by: dict[str, int]

    @property
    def scorers(self) -> tuple[str, ...]:
        return tuple(self.scores)

    @cached_property
    def categories(self) -> dict[str, np.ndarray]:
        """Positions of the prompts of each category, categories in the order of first occurrence."""
        positions: dict[str, list[int]] = defaultdict(list)
        for position, prompt in enumerate(self.prompts):
            positions[prompt.category].append(position)
        return {category: np.array(rows) for category, rows in positions.items()}

    def of(self, model: str, scorer: str, category: str | None = None) -> np.ndarray:
        """Scores (prompts,) of a model, only of one category if it is given."""
        row = self.scores[scorer][self.models.index(model)]
        return row if category is None else row[self.categories[category]]

    def summary(self, model: str, scorer: str, category: str | None = None) -> Summary:
        which = (model, scorer, category)
        if which not in self._summaries:
            self._summaries[which] = summarize(self.of(*which))
        return self._summaries[which]

    def comparison(self, baseline: str, model: str, scorer: str, category: str | None = None) -> Comparison:
        which = (baseline, model, scorer, category)
        if which not in self._comparisons:
            self._comparisons[which] = compare(self.of(baseline, scorer, category), self.of(model, scorer, category))
        return self._comparisons[which]

    def wins(self, other: str, model: str, scorer: str) -> Wins:
        """How often a model wins against another; without the intervals of `comparison`, which take a while."""
        return count_wins(self.of(model, scorer) - self.of(other, scorer))

    def best(self, scorer: str) -> str | None:
        """The model that is better than every other: the interval of its paired mean shift is above zero. None if the
        data does not tell."""
        means = {model: float(self.of(model, scorer).mean()) for model in self.models}
        top = max(means, key=lambda model: means[model])
        rivals = [model for model in self.models if model != top]
        clear = all(self.comparison(rival, top, scorer).mean_shift_interval[0] > 0 for rival in rivals)
        return top if clear and rivals else None

    @cached_property
    def _summaries(self) -> dict[tuple, Summary]:
        return {}

    @cached_property
    def _comparisons(self) -> dict[tuple, Comparison]:
        """Kept, because each takes 10,000 resamples and tables and figures need the same ones."""
        return {}


def benchmarks_of(rows: Iterable[PlacedScore], models: Sequence[str], scorers: Sequence[str]) -> list[Benchmark]:
    """One Benchmark per prompt set in which at least one prompt is common to all models that have images there.

    Models and scorers keep the given order. A set leaves out models and scorers without any score in it.
    """
    by_set: dict[str, dict[tuple[str, str], dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    prompts: dict[tuple[str, str], ScoredPrompt] = {}
    for image, key, score in rows:
        if image.model in models and key.scorer in scorers:
            by_set[image.prompt_set][image.model, key.scorer][image.key].append(score)
            prompts.setdefault((image.prompt_set, image.key), ScoredPrompt(image.key, image.category, key.prompt))

    benchmarks = []
    for name, cells in sorted(by_set.items()):
        present_models = tuple(model for model in models if any(m == model for m, _ in cells))
        present_scorers = tuple(scorer for scorer in scorers if any(s == scorer for _, s in cells))
        usable = {
            model: set.intersection(
                *({key for key, v in cells[model, s].items() if all(map(isfinite, v))} for s in present_scorers)
            )
            for model in present_models
        }
        seen = {key for by_key in cells.values() for key in by_key}
        order = {category: position for position, category in enumerate(_categories(prompts, name, seen))}
        common = sorted(
            set.intersection(*usable.values()),
            key=lambda key: (order[prompts[name, key].category], natural_order(key)),
        )
        if common:
            scores = {
                scorer: np.array([[np.mean(cells[model, scorer][key]) for key in common] for model in present_models])
                for scorer in present_scorers
            }
            limited = {model: len(seen - keys) for model, keys in usable.items() if seen - keys}
            shared_prompts = tuple(prompts[name, key] for key in common)
            benchmarks.append(Benchmark(name, present_models, shared_prompts, scores, len(seen), limited))
    return benchmarks


def _categories(prompts: dict[tuple[str, str], ScoredPrompt], prompt_set: str, keys: set[str]) -> list[str]:
    """Categories in the order of their lowest prompt number, then by name."""
    lowest: dict[str, tuple] = {}
    for key in keys:
        category, number = prompts[prompt_set, key].category, natural_order(key.rpartition("/")[2])
        lowest[category] = min(lowest.get(category, number), number)
    return sorted(lowest, key=lambda category: (lowest[category], category))
