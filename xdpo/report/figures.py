"""Figures, each saved as PNG and SVG: change per metric, win rates, and quality against training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from xdpo.files import replacing, writing
from xdpo.report.curves import Curve
from xdpo.report.grids import number, percent, title_of
from xdpo.report.published import published_score
from xdpo.scores.results import Benchmark

# Okabe and Ito's colours, which colour-blind readers can distinguish; grey is the baseline's.
BASELINE_COLOUR = "#8a919e"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5cc0", "#444444")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.hashsalt": "xdpo",  # the same scores give the same file
    "svg.fonttype": "path",
}


def colours_of(models: Sequence[str], baseline: str) -> dict[str, str]:
    """Each model's colour, in all figures and on the page."""
    others = [model for model in models if model != baseline]
    return {baseline: BASELINE_COLOUR} | {m: COLOURS[i % len(COLOURS)] for i, m in enumerate(others)}


def metric_bars(benchmark: Benchmark, baseline: str) -> Figure:
    """One panel per metric with a bar per model: its mean's change against the baseline, with the interval.

    A diamond marks the paper's change where the paper has both numbers.
    """
    models, scorers = benchmark.models, benchmark.scorers
    columns = min(3, len(scorers))
    rows = -(-len(scorers) // columns)
    with rc_context(STYLE):
        size = (1.2 + 3.3 * columns, rows * (0.9 + 0.34 * len(models)))
        figure = Figure(figsize=size, layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
        for axes, scorer in zip(panels, scorers, strict=False):
            _change_panel(axes, benchmark, baseline, scorer)
        for axes in panels[len(scorers) :]:
            axes.set_visible(False)
        figure.supxlabel(
            f"mean score, as change against {baseline}; 95 % intervals over {len(benchmark.prompts):,} prompts"
            + ("; ◇ published change" if _any_published(benchmark, baseline) else ""),
            fontsize=8,
            color="#555555",
        )
    return figure


def _change_panel(axes: Axes, benchmark: Benchmark, baseline: str, scorer: str) -> None:
    models, colours = benchmark.models, colours_of(benchmark.models, baseline)
    for row, model in enumerate(models):
        change = benchmark.comparison(baseline, model, scorer)
        low, high = change.mean_shift_interval
        axes.barh(row, change.mean_shift, color=colours[model], height=0.62)
        if model != baseline:
            reach = [[change.mean_shift - low], [high - change.mean_shift]]
            axes.errorbar(change.mean_shift, row, xerr=reach, color="#222222", linewidth=1, capsize=2)
            published_before = published_score(benchmark.name, baseline, scorer)
            published_after = published_score(benchmark.name, model, scorer)
            if published_before is not None and published_after is not None:
                published_change = published_after - published_before
                axes.plot(published_change, row, "D", markersize=5, markerfacecolor="none", color="#222222")
        text = number(change.mean_after, scorer)
        axes.annotate(
            text, (1, row), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
            va="center", fontsize=8, color="#333333",
        )  # fmt: skip
    axes.grid(axis="x", color="#e6e9ee", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.axvline(0, color=BASELINE_COLOUR, linewidth=1)
    axes.margins(x=0.08)
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(title_of(scorer))


def _any_published(benchmark: Benchmark, baseline: str) -> bool:
    return any(
        published_score(benchmark.name, baseline, s) is not None and published_score(benchmark.name, m, s) is not None
        for s in benchmark.scorers
        for m in benchmark.models
        if m != baseline
    )


def win_rate_bars(benchmark: Benchmark, baseline: str, colours: Mapping[str, str]) -> Figure:
    """Paired win rates against a baseline with bootstrap intervals, by metric (as the paper's Figure 3, bottom)."""
    others = [model for model in benchmark.models if model != baseline]
    with rc_context(STYLE):
        height = 1.1 + len(benchmark.scorers) * (0.25 + 0.27 * len(others))
        figure = Figure(figsize=(8, height), layout="constrained")
        axes = figure.subplots()
        row, ticks = 0.0, []
        for scorer in benchmark.scorers:
            ticks.append((row + (len(others) - 1) / 2, title_of(scorer)))
            for model in others:
                c = benchmark.comparison(baseline, model, scorer)
                low, high = c.win_rate_bootstrap
                label = model if scorer == benchmark.scorers[0] else None
                axes.barh(row, c.win_rate, color=colours[model], height=0.78, label=label)
                reach = [[c.win_rate - low], [high - c.win_rate]]
                axes.errorbar(c.win_rate, row, xerr=reach, color="#222222", linewidth=1, capsize=2)
                inside = dict(xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color="white")
                axes.annotate(percent(c.win_rate, decimals=0), (0, row), **inside)
                row += 1
            row += 0.8
        axes.grid(axis="x", color="#e6e9ee", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.axvline(0.5, color="#222222", linestyle=(0, (3, 2)), linewidth=1)
        axes.set(xlim=(0, 1), ylim=(row - 1.1, -0.7))
        axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title(f"{benchmark.name}: win rate against {baseline}, {len(benchmark.prompts):,} prompts")
        figure.legend(loc="outside lower center", ncols=min(5, len(others)), frameon=False)
    return figure


def quality_curves(benchmark: Benchmark, curves: Sequence[Curve]) -> Figure:
    """Mean score against training pairs and against hours, a row per metric, a line per run (the paper's Figure 4)."""
    with rc_context(STYLE):
        size = (8.5, 0.6 + 2.1 * len(benchmark.scorers))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(benchmark.scorers), 2, squeeze=False, sharey="row")
        for (by_pairs, by_hours), scorer in zip(panels, benchmark.scorers, strict=True):
            for position, curve in enumerate(curves):
                points = [(p, benchmark.summary(m, scorer)) for p, m in curve.points if m in benchmark.models]
                means = [summary.mean for _, summary in points]
                reach = [
                    [s.mean - s.interval[0] for _, s in points],
                    [s.interval[1] - s.mean for _, s in points],
                ]
                style = dict(color=COLOURS[position % len(COLOURS)], marker="o", markersize=4, capsize=2, linewidth=1.5)
                by_pairs.errorbar([p.pairs for p, _ in points], means, yerr=reach, label=curve.run, **style)
                by_hours.errorbar([p.hours for p, _ in points], means, yerr=reach, **style)
            by_pairs.set_title(f"{benchmark.name}: {title_of(scorer)}")
        panels[-1][0].set_xlabel("training pairs seen")
        panels[-1][1].set_xlabel("hours in optimizer steps")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def save(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write `path`.png and `path`.svg; return both paths. Raises StorageError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (path.with_name(path.name + suffix) for suffix in (".png", ".svg"))  # a model's name may have a dot
    with rc_context(STYLE), replacing(png, "wb") as png_file, replacing(svg, "wb") as svg_file:
        figure.savefig(png_file, format="png", dpi=150, facecolor="white")
        figure.savefig(svg_file, format="svg", metadata={"Date": None})
    return png, svg
