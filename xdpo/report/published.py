"""The paper's Tables 2 and 3 in the paper's layout: measured numbers, published ones, and the difference."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

from xdpo.report.grids import BEST, Cell, Grid, number
from xdpo.scores.results import Benchmark

_FILE = Path(__file__).resolve().parents[2] / "assets" / "published_tables.yaml"
_COLUMNS = {"hpsv2": "HPSV2 ↑", "pickscore": "PickScore ↑", "image_reward": "Image Reward ↑", "clip": "CLIP ↑"}
_TABLE2 = {**_COLUMNS, "aesthetic": "Aesthetic ↑"}
_Statistic = Callable[[np.ndarray], float]  # of a model's scores (prompts,)
_DATASETS = {"hpsv2": "HPSV2", "partiprompts": "PartiPrompts"}


@dataclass(frozen=True)
class _Line:
    """A method of a table: its title there, the measured model of that name if any, and the printed numbers."""

    title: str
    model: str | None
    published: Mapping[str, float]


@lru_cache(maxsize=1)
def _tables() -> dict:
    return yaml.safe_load(_FILE.read_text(encoding="utf-8"))


def published_score(prompt_set: str, model: str, scorer: str) -> float | None:
    """The printed mean of a model, recognised by its name, on a prompt set; None if the paper has none."""
    return _tables()["table2"].get(prompt_set, {}).get(method_of(model), {}).get(scorer)


def method_of(model: str) -> str | None:
    """The paper's method that a model is, recognised by its name; None for others."""
    return next((method for method, told in _tables()["methods"].items() if _is_named(model, told["aliases"])), None)


def methods() -> list[str]:
    """The paper's methods, the base first."""
    return list(_tables()["methods"])


def has_published(benchmark: Benchmark) -> bool:
    """Whether the paper has any of its scores."""
    return any(published_score(benchmark.name, m, s) is not None for m in benchmark.models for s in benchmark.scorers)


def table2(benchmarks: Sequence[Benchmark]) -> Grid:
    """Means by dataset and method. Models that the paper does not have come after its methods."""
    by_name = {benchmark.name: benchmark for benchmark in benchmarks}
    rows: list[tuple[Cell, ...]] = []
    for prompt_set, printed in _tables()["table2"].items():
        benchmark = by_name.get(prompt_set)
        methods = _tables()["methods"]
        lines = [
            _Line(methods[m]["title"], _model_named(benchmark, methods[m]["aliases"]), scores)
            for m, scores in printed.items()
        ]
        lines += _others(benchmark, lines)
        rows += _rows(_DATASETS[prompt_set], lines, list(_TABLE2), benchmark, {"measured": _mean})
    return Grid("Table 2: mean scores", ("Dataset", "Method", "", *_TABLE2.values()), tuple(rows), _note(benchmarks))


def table3(benchmarks: Sequence[Benchmark]) -> Grid:
    """The ablation on the HPSv2 prompts: medians, as its heading says, and means, which some of its numbers are."""
    benchmark = next((b for b in benchmarks if b.name == "hpsv2"), None)
    lines = [
        _Line(row["title"], _model_named(benchmark, row["aliases"]), {s: row[s] for s in _COLUMNS})
        for row in _tables()["table3"]
    ]
    statistics = {"median": _median, "mean": _mean}
    rows = _rows("HPSV2", lines, list(_COLUMNS), benchmark, statistics)
    return Grid(
        "Table 3: ablation, medians and means",
        ("Dataset", "Method", "", *_COLUMNS.values()),
        tuple(rows),
        _note([benchmark] if benchmark else []),
    )


def user_study() -> str:
    """The paper's user study in a sentence."""
    methods = _tables()["methods"]
    rates = ", ".join(f"{rate} % against {methods[m]['title']}" for m, rate in _tables()["user_study"].items())
    return f"Published user study (majority of five annotators, 200 HPSv2 prompts): xDPO is preferred in {rates}."


def published_user_study(benchmark: str, question: str, baseline: str) -> float | None:
    """The printed share of prompts on which xDPO won against a baseline, recognised by its name; None without one."""
    if (benchmark, question) != ("hpsv2", "preference"):
        return None
    for method, rate in _tables()["user_study"].items():
        if _is_named(baseline, _tables()["methods"][method]["aliases"]):
            return rate / 100
    return None


def _rows(
    dataset: str,
    lines: Sequence[_Line],
    scorers: Sequence[str],
    benchmark: Benchmark | None,
    statistics: Mapping[str, _Statistic],
) -> list[tuple[Cell, ...]]:
    """Rows of every method: one per statistic, the published one, and the first statistic's difference from it."""

    def measured_score(line: _Line, scorer: str, statistic: _Statistic) -> float | None:
        if benchmark is None or line.model is None or scorer not in benchmark.scores:
            return None
        return statistic(benchmark.of(line.model, scorer))

    def highest(values: Sequence[float | None]) -> float | None:
        return max((value for value in values if value is not None), default=None)

    measured = {
        name: [[measured_score(line, s, f) for s in scorers] for line in lines] for name, f in statistics.items()
    }
    best = [benchmark.best(s) if benchmark is not None and s in benchmark.scores else None for s in scorers]
    best_published = [highest([line.published.get(s) for line in lines]) for s in scorers]
    first = next(iter(statistics))
    rows = []
    for position, line in enumerate(lines):
        start = (Cell(dataset, dataset), Cell(line.title, line.title))
        for name, table in measured.items() if line.model is not None else ():
            cells = [
                Cell(number(v, s), v, best=statistics[name] is _mean and line.model == top)
                for v, s, top in zip(table[position], scorers, best, strict=True)
            ]
            rows.append((*start, Cell(name, name), *cells))
        if line.published:
            printed = [line.published[s] for s in scorers]
            cells = [
                Cell(_as_printed(v, s), v, best=v == top, tone="published")
                for v, s, top in zip(printed, scorers, best_published, strict=True)
            ]
            rows.append((*start, Cell("published", "published", tone="published"), *cells))
            if line.model is not None:
                gaps = [None if v is None else v - p for v, p in zip(measured[first][position], printed, strict=True)]
                cells = [Cell(number(gap, s, sign=True), gap) for gap, s in zip(gaps, scorers, strict=True)]
                rows.append((*start, Cell("difference", "difference"), *cells))
    return rows


def _mean(scores: np.ndarray) -> float:
    return float(np.mean(scores))


def _median(scores: np.ndarray) -> float:
    return float(np.median(scores))


def _as_printed(value: float, scorer: str) -> str:
    decimals = 3 if scorer in ("pickscore", "image_reward", "clip") else 2
    return f"{value:.{decimals}f}" if round(value, decimals) == value else f"{value:.3f}"


def _others(benchmark: Benchmark | None, lines: Sequence[_Line]) -> list[_Line]:
    named = {line.model for line in lines}
    return [_Line(model, model, {}) for model in (benchmark.models if benchmark else ()) if model not in named]


def _model_named(benchmark: Benchmark | None, aliases: Sequence[str]) -> str | None:
    return next((m for m in (benchmark.models if benchmark else ()) if _is_named(m, aliases)), None)


def _is_named(model: str, aliases: Sequence[str]) -> bool:
    return _bare(model) in {_bare(alias) for alias in aliases}


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _note(benchmarks: Sequence[Benchmark]) -> str:
    counts = [f"{b.name}: {len(b.prompts):,} prompts" for b in benchmarks if b.name in _DATASETS]
    measured = "Measured on " + ", ".join(counts) if counts else "Nothing measured on these prompt sets"
    return f"{measured}. “published” are the paper's numbers, the highest marked. {BEST} HPSv2 is v2.0 × 100."
