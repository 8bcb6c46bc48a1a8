"""The image browser's part of the page: its data, the order in which images are embedded, and the still pictures."""

import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import zip_longest
from math import isfinite
from pathlib import Path
from urllib.parse import quote

import numpy as np

from xdpo.images.making import MAY_DIFFER
from xdpo.images.reading import Picture
from xdpo.report import grids
from xdpo.report.figures import colours_of
from xdpo.report.sections import Evaluation
from xdpo.scores.results import Benchmark, ScoredPrompt

EXTREMES = 3  # best and worst prompts that the page shows first, with and without its script


def data(evaluation: Evaluation, benchmark: Benchmark, number_of: Mapping[Path, int], folder: Path) -> dict:
    """The image browser's data for one prompt set: scores as [scorer][model], images as [model][image].

    An image is (its number among the embedded ones or -1, its link, its seed or None). Prompts of which a model has
    several images also have their scores one by one, as [scorer][model][image].
    """
    baseline = evaluation.baselines_of(benchmark)[0]
    colours = colours_of(benchmark.models, baseline)
    titles = [grids.title_of(scorer) for scorer in benchmark.scorers]
    prompts = []
    for i, prompt in enumerate(benchmark.prompts):
        pictures = [_pictures(evaluation, benchmark, model, prompt.key) for model in benchmark.models]
        told = {
            "key": prompt.key,
            "category": prompt.category,
            "text": prompt.text,
            "scores": [[round(float(v), 5) for v in benchmark.scores[s][:, i]] for s in benchmark.scorers],
            "images": [[(number_of.get(p.path, -1), _link(p.path, folder), p.seed) for p in of] for of in pictures],
        }
        if any(len(of_model) > 1 for of_model in pictures):
            told["each"] = [[[_score(evaluation, p, s) for p in of] for of in pictures] for s in benchmark.scorers]
        prompts.append(told)
    return {
        "name": benchmark.name,
        "baseline": baseline,
        "model": _shown_first(benchmark, baseline),
        "models": benchmark.models,
        "colours": [colours[model] for model in benchmark.models],
        "scorers": titles if len(set(titles)) == len(titles) else benchmark.scorers,
        "settings": [_settings(evaluation, benchmark, model, baseline) for model in benchmark.models],
        "prompts": prompts,
    }


def _pictures(evaluation: Evaluation, benchmark: Benchmark, model: str, key: str) -> Sequence[Picture]:
    return evaluation.pictures.get((benchmark.name, model, key), ())


def _score(evaluation: Evaluation, picture: Picture, scorer: str) -> float | None:
    """One image's score; None where it has none that is finite."""
    place = (picture.prompt_set, picture.model, picture.key, picture.repeat, scorer)
    score = evaluation.score_of.get(place)
    return None if score is None or not isfinite(score) else round(score, 5)


def _settings(evaluation: Evaluation, benchmark: Benchmark, model: str, baseline: str) -> list[tuple[str, str, bool]]:
    """How a model's images were made, as (fact, text, whether it is unlike the baseline's); each has its own seed."""
    facts = {making.model: making.facts for making in evaluation.makings if making.prompt_set == benchmark.name}
    expected = facts.get(baseline, {})
    return [
        (fact, text, fact not in MAY_DIFFER and text != expected.get(fact))
        for fact, text in facts.get(model, {}).items()
        if fact != "Seed"
    ]


def _shown_first(benchmark: Benchmark, baseline: str) -> str:
    """The model that the image browser compares with the baseline until a reader chooses."""
    return benchmark.models[0] if benchmark.models[-1] == baseline else benchmark.models[-1]


def _name_of(prompt: ScoredPrompt) -> str:
    return f"{prompt.category} {prompt.key.rpartition('/')[2]}".strip()


def _link(path: Path, folder: Path) -> str:
    """A link from the page in `folder` to a file; relative, unless they are on different drives."""
    try:
        return quote(Path(os.path.relpath(path, folder)).as_posix())
    except ValueError:
        return path.resolve().as_uri()


def dealt(evaluation: Evaluation) -> Iterator[Path]:
    """All images, in the order in which they are embedded.

    Prompts are dealt from all rankings of all prompt sets in turn, so that a small budget leaves none of them without
    its first prompts; a prompt's images of all models stay together. Further images of a prompt come after all first
    ones.
    """
    rankings = [ranking for benchmark in evaluation.benchmarks for ranking in _rankings(evaluation, benchmark)]
    dealt = dict.fromkeys(place for places in zip_longest(*rankings) for place in places if place is not None)
    models = {benchmark.name: benchmark.models for benchmark in evaluation.benchmarks}
    for which in (slice(1), slice(1, None)):
        for prompt_set, key in dealt:
            for model in models[prompt_set]:
                yield from (picture.path for picture in evaluation.pictures.get((prompt_set, model, key), ())[which])


def _rankings(evaluation: Evaluation, benchmark: Benchmark) -> Iterator[list[tuple[str, str]]]:
    """The orders in which the page shows a set's prompts, as (prompt set, key): as numbered, best and worst first."""
    baseline = evaluation.baselines_of(benchmark)[0]
    places = [(benchmark.name, prompt.key) for prompt in benchmark.prompts]
    yield places
    for scorer in benchmark.scorers:
        for model in (model for model in benchmark.models if model != baseline):
            order = np.argsort(benchmark.of(baseline, scorer) - benchmark.of(model, scorer), kind="stable")
            yield [places[i] for i in order]
            yield [places[i] for i in order[::-1]]


# --- the still pictures, for a browser without the script -------------------------------------------------------


def still(
    evaluation: Evaluation,
    benchmark: Benchmark,
    embedded: Mapping[Path, str],
    folder: Path,
) -> str:
    """The best and worst prompts by the first metric as HTML; the script takes its copies of these images from here."""
    baseline = evaluation.baselines_of(benchmark)[0]
    model, scorer = _shown_first(benchmark, baseline), benchmark.scorers[0]
    pair = list(dict.fromkeys((baseline, model)))
    change = benchmark.of(model, scorer) - benchmark.of(baseline, scorer)
    order = np.argsort(-change, kind="stable")
    count = min(EXTREMES, len(order) // 2 or 1)
    colours = colours_of(benchmark.models, baseline)
    number_of = {path: number for number, path in enumerate(embedded)}

    def figure(i: int, name: str) -> str:
        key = benchmark.prompts[i].key
        image = '<div class="broken">no image here</div>'
        for picture in _pictures(evaluation, benchmark, name, key)[:1]:
            number = f' data-embedded="{number_of[picture.path]}"' if picture.path in number_of else ""
            source = embedded.get(picture.path) or _link(picture.path, folder)
            image = f'<img loading="lazy" alt="{escape(name)}" src="{source}"{number}>'
        score = grids.number(float(benchmark.of(name, scorer)[i]), scorer)
        dot = f'<i style="background:{colours[name]}"></i>'
        return f"<figure>{image}<figcaption>{dot}{escape(name)} <b>{score}</b></figcaption></figure>"

    def card(i: int) -> str:
        prompt = benchmark.prompts[i]
        direction = "up" if change[i] > 0 else "down" if change[i] < 0 else ""
        gain = f'<span class="change {direction}">{grids.number(float(change[i]), scorer, sign=True)}</span>'
        return (
            f'<article class="card"><header>{gain if len(pair) > 1 else ""}<p class="text">{escape(prompt.text)}</p>'
            f'<span class="tag">{escape(_name_of(prompt))}</span></header>'
            f'<div class="strip">{"".join(figure(i, name) for name in pair)}</div></article>'
        )

    compared = f"{model} against {baseline}" if len(pair) > 1 else model
    ends = {"best": order[:count], "worst": order[::-1][:count]} if len(pair) > 1 else {"first": range(count)}
    return "".join(
        f"<h3>{escape(f'{benchmark.name}: {end} prompts by {grids.title_of(scorer)}, {compared}')}</h3>"
        f'<div class="cards">{"".join(card(int(i)) for i in positions)}</div>'
        for end, positions in ends.items()
    )
