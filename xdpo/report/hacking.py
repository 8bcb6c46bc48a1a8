"""The panel on reward hacking: rewards that the training used, those that it did not, and statistics of the images."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from textwrap import wrap

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xdpo.report.curves import Curve
from xdpo.report.figures import COLOURS, STYLE, colours_of, short
from xdpo.report.grids import Cell, Grid, interval, number, percent, shift_tone, title_of
from xdpo.scores.image_statistics import DISTANCE, STATISTICS
from xdpo.scores.results import Benchmark

MOST_SENTENCES = 12
TRAINED, OTHERS = "rewards trained on", "other rewards"


@dataclass(frozen=True)
class Change:
    """A model's change of a quantity against the baseline, and its paired 95 % interval, in standard deviations of the
    baseline's prompts. NaN where those are all equal."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """A prompt set's scores and image statistics, to be compared with the baseline."""

    scores: Benchmark
    statistics: Benchmark
    baseline: str
    trained_on: Sequence[str]

    @property
    def models(self) -> list[str]:
        return [model for model in self.scores.models if model != self.baseline and model in self.statistics.models]

    @property
    def groups(self) -> dict[str, list[str]]:
        """Title → scorers or statistics. Without a reward that the training used, all are "rewards"."""
        trained = [scorer for scorer in self.scores.scorers if scorer in self.trained_on]
        others = [scorer for scorer in self.scores.scorers if scorer not in self.trained_on]
        rewards = {TRAINED: trained, OTHERS: others} if trained else {"rewards": others}
        statistics = [name for name in STATISTICS if name in self.statistics.scores]
        return {title: names for title, names in {**rewards, "image statistics": statistics}.items() if names}

    def change(self, model: str, quantity: str) -> Change:
        benchmark = self.statistics if quantity in self.statistics.scores else self.scores
        comparison = benchmark.comparison(self.baseline, model, quantity)
        spread = float(benchmark.of(self.baseline, quantity).std())
        if spread == 0:
            return Change(nan, nan, nan)
        low, high = comparison.mean_shift_interval
        return Change(comparison.mean_shift / spread, low / spread, high / spread)

    def mean_change(self, model: str, quantities: Sequence[str]) -> float:
        """The changes' mean over the quantities that have one; NaN without any."""
        changes = [self.change(model, quantity).mean for quantity in quantities]
        finite = [change for change in changes if np.isfinite(change)]
        return float(np.mean(finite)) if finite else nan

    def is_suspicious(self, model: str) -> bool:
        """Whether every reward that the training used rises and no other does, by the intervals."""
        groups = self.groups
        if not groups.get(TRAINED) or not groups.get(OTHERS):
            return False
        trained, others = ([self.change(model, name).low > 0 for name in groups[title]] for title in (TRAINED, OTHERS))
        return all(trained) and not any(others)

    def distance(self, model: str) -> float | None:
        """The mean distance from the baseline's images of the same seeds; None where seeds differ."""
        known = DISTANCE in self.statistics.scores
        return float(self.statistics.of(model, DISTANCE).mean()) if known else None


def in_words(panel: Panel) -> tuple[str, ...]:
    """What the numbers are, and a sentence on each model; of many models, on those alone that are suspicious."""
    sentences = [f"Changes against {panel.baseline}, in standard deviations over its prompts."]
    for model in panel.models:
        if len(panel.models) > MOST_SENTENCES and not panel.is_suspicious(model):
            continue
        parts = []
        for title, quantities in panel.groups.items():
            if title == "image statistics":
                parts += [f"{name} {_signed(panel.change(model, name).mean)}" for name in quantities]
            else:
                parts.append(f"{title} {_signed(panel.mean_change(model, quantities))}")
        away = panel.distance(model)
        moved = "" if away is None else f"; images of the same seed are {percent(away)} of the pixels' range apart"
        warning = " What it was trained on rises, and no other reward does." if panel.is_suspicious(model) else ""
        sentences.append(f"{model}: {', '.join(parts)}{moved}.{warning}")
    return tuple(sentences)


def table(panel: Panel) -> Grid:
    """Means of the image statistics and their paired change against the baseline."""
    rows = []
    for name in panel.statistics.scorers:
        for model in panel.statistics.models:
            c = panel.statistics.comparison(panel.baseline, model, name)
            shift, between = Cell("–"), Cell("–")
            if model != panel.baseline:
                shift = Cell(number(c.mean_shift, name, sign=True), c.mean_shift, tone=shift_tone(c, "higher", "lower"))
                between = Cell(interval(*c.mean_shift_interval, name, sign=True), c.mean_shift_interval[0])
            title = title_of(name)
            rows.append(
                (Cell(title, title), Cell(model, model), Cell(number(c.mean_after, name), c.mean_after), shift, between)
            )
    note = (
        f"Change against {panel.baseline}; ▲ or ▼ where its interval excludes zero. Saturation is the mean of HSV's; "
        "contrast the luma's standard deviation; sharpness that of its Laplacian; high frequencies the share of its "
        "variance above a quarter of a cycle per pixel; distance the root mean square difference from the baseline's "
        "image of the same seed; spread that from the model's next image of the same prompt. Pixels run from 0 to 1."
    )
    columns = ("Statistic", "Model", "Mean", "Change", "95 % interval")
    return Grid(f"{panel.scores.name}: image statistics", columns, tuple(rows), note)


def draw(panel: Panel, curves: Sequence[Curve]) -> Figure:
    """A panel for each group of rewards or statistics with a mark per model, and one per run over its checkpoints."""
    groups, models = panel.groups, panel.models
    colours = colours_of(panel.scores.models, panel.baseline)
    longest = max(map(len, groups.values()))
    runs = [curve for curve in curves if sum(model in models for _, model in curve.points) > 1]
    with rc_context(STYLE):
        height = 1.0 + longest * (0.25 + 0.14 * len(models))
        size = (1.2 + 3.2 * len(groups), height + 2.6 * len(runs) + 0.2)
        figure = Figure(figsize=size, layout="constrained")
        above, *below = np.atleast_1d(figure.subfigures(1 + len(runs), 1, height_ratios=[height, *[2.6] * len(runs)]))
        panels = above.subplots(1, len(groups), squeeze=False, sharex=True)[0]
        for axes, (title, quantities) in zip(panels, groups.items(), strict=True):
            _group(axes, panel, title, quantities, colours)
        unit = f"change against {panel.baseline}, in standard deviations over its prompts; 95 % intervals"
        above.suptitle("\n".join(wrap(unit, round(15 * size[0]))), fontsize=8, color="#555555")
        above.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        for part, curve in zip(below, runs, strict=True):
            _over_training(part.subplots(), panel, curve)
    return figure


def _group(axes: Axes, panel: Panel, title: str, quantities: Sequence[str], colours: dict[str, str]) -> None:
    for place, model in enumerate(panel.models):
        offset = 0.5 * ((place + 0.5) / len(panel.models) - 0.5)
        changes = [panel.change(model, quantity) for quantity in quantities]
        reach = [[c.mean - c.low for c in changes], [c.high - c.mean for c in changes]]
        rows = [row + offset for row in range(len(quantities))]
        marks = dict(fmt="o", markersize=4, capsize=2, color=colours[model], label=short(model, 40))
        axes.errorbar([c.mean for c in changes], rows, xerr=reach, **marks)
    axes.axvline(0, color="#222222", linestyle=(0, (3, 2)), linewidth=1)
    axes.grid(axis="x", color="#e6e9ee", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_yticks(range(len(quantities)), [title_of(quantity) for quantity in quantities])
    axes.set_ylim(len(quantities) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title)


def _over_training(axes: Axes, panel: Panel, curve: Curve) -> None:
    points = [(p.pairs, m) for p, m in curve.points if m in panel.models or m == panel.baseline]
    lines: dict[str, list[str]] = {}
    for title, names in panel.groups.items():
        lines |= {name: [name] for name in names} if title == "image statistics" else {title: names}
    for position, (title, quantities) in enumerate(lines.items()):
        style = "-" if title in panel.groups else "--"
        changes = [panel.mean_change(model, quantities) for _, model in points]
        axes.plot(
            [x for x, _ in points], changes, style, marker="o", markersize=3, color=COLOURS[position], label=title
        )
    axes.axhline(0, color="#222222", linestyle=(0, (3, 2)), linewidth=1)
    axes.set(xlabel="training pairs seen", ylabel="change")
    axes.set_title(curve.run)
    axes.legend(frameon=False, fontsize=7, ncols=2)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−") if np.isfinite(value) else "–"
