"""Figures, each saved as PNG and SVG: change per metric and category, win rates, distributions, quality in training."""

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import wrap

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter

from xdpo.files import replacing, writing
from xdpo.report.curves import Curve
from xdpo.report.grids import number, percent, shift_tone, title_of
from xdpo.report.published import method_of, methods, published_score
from xdpo.scores.results import Benchmark

# Any two of these and the baseline's grey are at least 20 apart (CIE 1976) for readers with protanopia or deuteranopia,
# and each has a contrast of 3 with white. The first ones are those of the paper's methods, its base last.
BASELINE_COLOUR = "#8f9192"
COLOURS = ("#0069d6", "#318d59", "#ad76b2", "#a53000", "#36393a", "#b5841a", "#059aea", "#4d2395")
CHOSEN_COLOUR, REJECTED_COLOUR = "#318d59", "#a53000"  # of a pair's images
_FURTHER_FONTS = (  # by the scripts that DejaVu lacks, where they are installed
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Noto Sans Devanagari",
    "Noto Sans Bengali",
    "Noto Sans Tamil",
    "Noto Sans Thai",
    "Arial Unicode MS",
    "Unifont",
)
_INSTALLED = {font.name for font in fontManager.ttflist}
STYLE = {
    "font.family": ["DejaVu Sans", *(name for name in _FURTHER_FONTS if name in _INSTALLED)],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.hashsalt": "xdpo",  # the same scores give the same file
    "svg.fonttype": "path",
}


_RIM = [withStroke(linewidth=2.5, foreground="white")]  # lets a dark line be seen over any colour
_DIVERGING = "PuOr"  # orange for worse, purple for better: colour-blind readers tell them apart


def colours_of(models: Sequence[str], baseline: str | None) -> dict[str, str]:
    """Each model's colour, in all figures and on the page.

    The paper's methods have the same colours in every report; other models take the colours that are left, in turn.
    """
    colours = {} if baseline is None else {baseline: BASELINE_COLOUR}
    base, *trained = methods()
    known = [*trained, base]
    for model in (model for model in models if model != baseline):
        method = method_of(model)
        if method is not None and COLOURS[known.index(method)] not in colours.values():
            colours[model] = COLOURS[known.index(method)]
    left = [colour for colour in (*COLOURS[len(known) :], *COLOURS[: len(known)]) if colour not in colours.values()]
    turn = cycle(left or COLOURS)
    return {model: colours.get(model) or next(turn) for model in models}


def metric_bars(benchmark: Benchmark, baseline: str) -> Figure:
    """One panel per metric with a bar per model: its mean's change against the baseline, with the interval.

    A diamond marks the paper's change where the paper has both numbers.
    """
    with rc_context(STYLE):
        height = 0.9 + _row_height(benchmark.models, 0.34) * len(benchmark.models)
        figure, panels = _panels(benchmark.scorers, 3.3, height, sharey=True)
        for axes, scorer in zip(panels, benchmark.scorers, strict=True):
            _change_panel(axes, benchmark, baseline, scorer)
        published_too = "; ◇ published change" if _any_published(benchmark, baseline) else ""
        prompts = f"95 % intervals over {len(benchmark.prompts):,} prompts"
        caption(figure, f"mean score, as change against {baseline}; {prompts}{published_too}")
    return figure


def _change_panel(axes: Axes, benchmark: Benchmark, baseline: str, scorer: str) -> None:
    models, colours = benchmark.models, colours_of(benchmark.models, baseline)
    for row, model in enumerate(models):
        change = benchmark.comparison(baseline, model, scorer)
        low, high = change.mean_shift_interval
        axes.barh(row, change.mean_shift, color=colours[model], height=0.62)
        if model != baseline:
            reach = [[change.mean_shift - low], [high - change.mean_shift]]
            _interval_bar(axes, change.mean_shift, row, reach)
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
    axes.set_yticks(range(len(models)), map(short, models))
    axes.set_ylim(len(models) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(title_of(scorer))


def _interval_bar(axes: Axes, value: float, row: float, reach: list[list[float]]) -> None:
    """An interval over a bar."""
    _, caps, lines = axes.errorbar(value, row, xerr=reach, color="#222222", linewidth=1, capsize=2)
    for part in (*caps, *lines):
        part.set_path_effects(_RIM)


def _any_published(benchmark: Benchmark, baseline: str) -> bool:
    return any(
        published_score(benchmark.name, baseline, s) is not None and published_score(benchmark.name, m, s) is not None
        for s in benchmark.scorers
        for m in benchmark.models
        if m != baseline
    )


def win_rate_bars(benchmark: Benchmark, baseline: str, colours: Mapping[str, str]) -> Figure:
    """Paired win rates against a baseline with Wilson's intervals, by metric (as the paper's Figure 3, bottom)."""
    others = [model for model in benchmark.models if model != baseline]
    # Stripes tell a model from an earlier one of the same colour.
    stripes = {m: "////" if colours[m] in [colours[o] for o in others[:i]] else "" for i, m in enumerate(others)}
    with rc_context(STYLE):
        height = 1.1 + len(benchmark.scorers) * (0.25 + 0.27 * len(others))
        figure = Figure(figsize=(8, height), layout="constrained")
        axes = figure.subplots()
        row, ticks = 0.0, []
        for scorer in benchmark.scorers:
            ticks.append((row + (len(others) - 1) / 2, title_of(scorer)))
            for model in others:
                c = benchmark.comparison(baseline, model, scorer)
                low, high = c.win_rate_interval
                label = short(model, 40) if scorer == benchmark.scorers[0] else None
                look = dict(color=colours[model], hatch=stripes[model], edgecolor="white", linewidth=0)
                axes.barh(row, c.win_rate, height=0.78, label=label, **look)
                reach = [[c.win_rate - low], [high - c.win_rate]]
                _interval_bar(axes, c.win_rate, row, reach)
                beside = dict(xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color="#333333")
                axes.annotate(percent(c.win_rate, decimals=0), (high, row), **beside)
                row += 1
            row += 0.8
        axes.grid(axis="x", color="#e6e9ee", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.axvline(0.5, color="#222222", linestyle=(0, (3, 2)), linewidth=1)
        axes.set(xlim=(0, 1.08), ylim=(row - 1.1, -0.7))  # room for the number of a full score
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        title = f"{benchmark.name}: win rate against {baseline}, {len(benchmark.prompts):,} prompts"
        axes.set_title("\n".join(wrap(title, 70)))
        widest = max(map(len, others))
        figure.legend(loc="outside lower center", ncols=max(1, min(5, len(others), 90 // (widest + 6))), frameon=False)
    return figure


def score_differences(benchmark: Benchmark, baseline: str, colours: Mapping[str, str]) -> Figure:
    """How the paired differences from the baseline are distributed: a panel per metric, a violin per model with lines
    at the quartiles."""
    others = [model for model in benchmark.models if model != baseline]
    with rc_context(STYLE):
        figure, panels = _panels(
            benchmark.scorers, width=3.3, height=0.9 + _row_height(others, 0.42) * len(others), sharey=True
        )
        for axes, scorer in zip(panels, benchmark.scorers, strict=True):
            for row, model in enumerate(others):
                change = benchmark.of(model, scorer) - benchmark.of(baseline, scorer)
                quartiles = [0.25, 0.5, 0.75]
                drawn = axes.violinplot(
                    change, [row], orientation="horizontal", widths=0.85, quantiles=quartiles, showextrema=False
                )
                for body in drawn["bodies"]:
                    body.set(facecolor=colours[model], alpha=0.75)
                drawn["cquantiles"].set(color="#222222", linewidth=1, path_effects=_RIM)
            axes.axvline(0, color="#222222", linestyle=(0, (3, 2)), linewidth=1)
            axes.set_yticks(range(len(others)), map(short, others))
            axes.set_ylim(len(others) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            axes.locator_params(axis="x", nbins=5)
            axes.set_title(title_of(scorer))
        caption(figure, f"score minus {baseline}'s on the same prompt; lines at the quartiles")
    return figure


def category_heat_map(benchmark: Benchmark, baseline: str) -> Figure:
    """A panel per metric, models by categories: the change of the mean against the baseline, in bold where its
    interval excludes zero. Colours are its size in standard deviations of the paired differences."""
    others = [model for model in benchmark.models if model != baseline]
    with rc_context(STYLE):
        height = 0.42 + _row_height(others, 0.3) * len(others)
        size = (2.2 + 0.78 * len(benchmark.categories), 1.3 + len(benchmark.scorers) * height)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(benchmark.scorers), 1, squeeze=False, sharex=True)[:, 0]
        for axes, scorer in zip(panels, benchmark.scorers, strict=True):
            texts, sizes = [], []
            for model in others:
                changes = [benchmark.comparison(baseline, model, scorer, category) for category in benchmark.categories]
                texts.append([(number(c.mean_shift, scorer, sign=True), shift_tone(c)) for c in changes])
                spread = float((benchmark.of(model, scorer) - benchmark.of(baseline, scorer)).std()) or 1.0
                sizes.append([c.mean_shift / spread for c in changes])
            _heat(axes, np.array(sizes), limit=1.0)
            for row, line in enumerate(texts):
                for column, (text, tone) in enumerate(line):
                    _cell_text(axes, column, row, text, sizes[row][column], limit=1.0, bold=bool(tone))
            axes.set_yticks(range(len(others)), map(short, others))
            axes.set_title(title_of(scorer))
        counts = [short(f"{name or 'none'} ({len(rows):,})") for name, rows in benchmark.categories.items()]
        panels[-1].set_xticks(range(len(counts)), counts, rotation=35, ha="right", rotation_mode="anchor")
        caption(
            figure,
            f"change of the mean against {baseline}, bold where its 95 % interval excludes zero; "
            "darkest at one standard deviation of the paired differences; prompts in brackets",
        )
    return figure


def win_matrix(benchmark: Benchmark) -> Figure:
    """A panel per metric: how often the row's model wins against the column's, in bold where the interval excludes
    50 %."""
    models = benchmark.models
    with rc_context(STYLE):
        side = 0.55 + 0.52 * len(models)
        figure, panels = _panels(benchmark.scorers, width=side + 0.4, height=side)
        for axes, scorer in zip(panels, benchmark.scorers, strict=True):
            rates = np.full((len(models), len(models)), np.nan)
            for row, model in enumerate(models):
                for column, other in enumerate(models):
                    if model != other:
                        wins = benchmark.wins(other, model, scorer)
                        rates[row, column] = wins.rate - 0.5
                        low, high = wins.interval
                        clear = low > 0.5 or high < 0.5
                        text = f"{100 * wins.rate:.0f}"
                        _cell_text(axes, column, row, text, wins.rate - 0.5, limit=0.5, bold=clear)
            _heat(axes, rates, limit=0.5)
            axes.set_xticks(range(len(models)), map(short, models), rotation=35, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(models)), map(short, models))
            axes.set_title(title_of(scorer))
        caption(figure, "% of prompts on which the row's model wins against the column's, ties ½")
    return figure


def caption(figure: Figure, text: str) -> None:
    """Write a line under a figure, wrapped to its width."""
    figure.supxlabel("\n".join(wrap(text, round(15 * figure.get_figwidth()))), fontsize=8, color="#555555")


def short(name: str, width: int = 22) -> str:
    """A model's or category's name for a figure: in lines of about `width` characters, broken where a word ends."""
    lines = [""]
    for part in re.findall(r"[^\s_./-]*[\s_./-]*", name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip(" ") for line in lines)


def _row_height(names: Sequence[str], least: float) -> float:
    """Inches of a row that has a name beside it."""
    return max(least, 0.06 + 0.15 * max(1 + short(name).count("\n") for name in names))


def _panels(scorers: Sequence[str], width: float, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with a panel per metric, at most three side by side; width and height of a panel in inches."""
    columns = min(3, len(scorers))
    rows = -(-len(scorers) // columns)
    figure = Figure(figsize=(1.2 + width * columns, 0.3 + rows * height), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for axes in panels[len(scorers) :]:
        axes.set_visible(False)
    return figure, panels[: len(scorers)]


def _heat(axes: Axes, values: np.ndarray, limit: float) -> None:
    axes.imshow(values, cmap=_DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)


def _cell_text(axes: Axes, column: int, row: int, text: str, value: float, limit: float, bold: bool) -> None:
    channels = np.array(colormaps[_DIVERGING](0.5 + value / (2 * limit))[:3])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    # Black on a luminance above 0.18, white below it: either way their contrast, as WCAG has it, is at least 4.5.
    colour = "white" if linear @ (0.2126, 0.7152, 0.0722) < 0.18 else "black"
    weight = "bold" if bold else "normal"
    axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour, fontweight=weight)


def quality_curves(benchmark: Benchmark, curves: Sequence[Curve], baseline: str) -> Figure:
    """Mean score against training pairs and against hours, a row per metric, a line per run (the paper's Figure 4).

    The bars are intervals of the paired difference from the baseline.
    """
    colours = colours_of(benchmark.models, baseline)
    with rc_context(STYLE):
        size = (8.5, 0.8 + 2.1 * len(benchmark.scorers))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(benchmark.scorers), 2, squeeze=False, sharey="row")
        for (by_pairs, by_hours), scorer in zip(panels, benchmark.scorers, strict=True):
            for curve in curves:
                evaluated = [(progress, model) for progress, model in curve.points if model in benchmark.models]
                if not evaluated:
                    continue
                points = [(progress, benchmark.comparison(baseline, model, scorer)) for progress, model in evaluated]
                _, last = evaluated[-1]  # whose colour the run has
                means = [change.mean_after for _, change in points]
                reach = [
                    [change.mean_shift - change.mean_shift_interval[0] for _, change in points],
                    [change.mean_shift_interval[1] - change.mean_shift for _, change in points],
                ]
                style = dict(color=colours[last], marker="o", markersize=4, capsize=2, linewidth=1.5)
                by_pairs.errorbar([p.pairs for p, _ in points], means, yerr=reach, label=short(curve.run, 40), **style)
                by_hours.errorbar([p.hours for p, _ in points], means, yerr=reach, **style)
            by_pairs.set_title(f"{benchmark.name}: {title_of(scorer)}")
        panels[-1][0].set_xlabel("training pairs seen")
        panels[-1][1].set_xlabel("hours in optimizer steps")
        caption(figure, f"bars: 95 % intervals of the paired difference from {baseline}")
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
