"""Figures of a reproduction: quality against pairs and what it is bought with, both errors, slopes of reward forms."""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from xdpo.experiments.findings import BOTH_ERRORS, Findings
from xdpo.loss import KEYS, PairErrors, xdpo_margin
from xdpo.report.figures import BASELINE_COLOUR, CHOSEN_COLOUR, COLOURS, REJECTED_COLOUR, STYLE, colours_of
from xdpo.report.grids import title_of
from xdpo.scores.image_statistics import DISTANCE, SPREAD

FORMS = KEYS["reward"].choices


def styles_of(findings: Findings) -> dict[str, dict[str, str]]:
    """The colour of each method with curves, the same in all figures; dashes tell it from an earlier one's."""
    styles: dict[str, dict[str, str]] = {}
    names = [name for name, method in findings.plan.methods.items() if method.curves]
    for name, colour in colours_of(names, baseline=None).items():
        repeated = any(style["color"] == colour for style in styles.values())
        styles[name] = {"color": colour, "linestyle": "--" if repeated else "-"}
    return styles


def quality(findings: Findings) -> Figure:
    """Changes of score and alignment from the base, against training pairs: a line and its interval for each method.

    There is a row of panels for each group of methods with curves. The baseline is in all of them.
    """
    plan, styles = findings.plan, styles_of(findings)
    rows = _by_group(findings)
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.4 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), 2, squeeze=False, sharex=True, sharey="col")
        for row, (group, methods) in zip(panels, rows.items(), strict=True):
            for axes, scorer in zip(row, (plan.score, plan.alignment), strict=True):
                axes.axhline(0, color=BASELINE_COLOUR, linewidth=0.8)
                for method in methods:
                    pairs = findings.curve(method, "pairs").mean(axis=(1, 2))
                    points = findings.changes(method, scorer)
                    axes.plot(
                        pairs, [p.value for p in points], marker="o", markersize=4, label=method, **styles[method]
                    )
                    low, high = [point.low for point in points], [point.high for point in points]
                    axes.fill_between(pairs, low, high, color=styles[method]["color"], alpha=0.08, linewidth=0)
                axes.grid(color="#e6e9ee", linewidth=0.7)
            row[0].set_ylabel(group)
        for axes, scorer in zip(panels[0], (plan.score, plan.alignment), strict=True):
            axes.set_title(f"{title_of(scorer)}, change")
        for axes in panels[-1]:
            axes.set_xlabel("training pairs seen")
        for axes in panels.flat:
            label_lines(axes)
    return figure


def trade_offs(findings: Findings) -> Figure:
    """How methods with curves buy one thing with another: a line for each over its checkpoints, from the base on.

    The score against the distance from the base's images and against the mean d of held-out images; alignment, and how
    much a prompt's images differ where it has several, against the score. A row of panels for each group.
    """
    plan, styles = findings.plan, styles_of(findings)
    rows = _by_group(findings)
    columns = [(DISTANCE, plan.score), (BOTH_ERRORS, plan.score), (plan.score, plan.alignment), (plan.score, SPREAD)]
    measured = {quantity for _, quantity in findings.scores[plan.guidance]}
    measured |= {BOTH_ERRORS} if findings.with_errors else set()
    columns = [column for column in columns if set(column) <= measured]
    with rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(columns), 3.2 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), len(columns), squeeze=False, sharex="col", sharey="col")
        for row, methods in zip(panels, rows.values(), strict=True):
            for axes, (across, up) in zip(row, columns, strict=True):
                axes.axhline(0, color=BASELINE_COLOUR, linewidth=0.8)
                for method in methods:
                    bought, paid = findings.changes(method, up), findings.curve(method, across)
                    paid = (paid - paid[0]).mean(axis=(1, 2))
                    if not np.isfinite(paid).all():
                        continue  # an objective without a reference logs no d
                    reach = [[p.value - p.low for p in bought], [p.high - p.value for p in bought]]
                    look = dict(marker="o", markersize=4, capsize=2, elinewidth=0.7, label=method, **styles[method])
                    axes.errorbar(paid, [p.value for p in bought], yerr=reach, **look)
                axes.grid(color="#e6e9ee", linewidth=0.7)
        for axes, group in zip(panels[:, 0], rows, strict=True):
            axes.annotate(group, (0, 1), xycoords="axes fraction", xytext=(4, -10), textcoords="offset points")
        for top, bottom, (across, up) in zip(panels[0], panels[-1], columns, strict=True):
            top.set_title(f"{title_of(up)}, change", fontsize=9)
            bottom.set_xlabel(f"{title_of(across)}, change")
        for axes in panels.flat:
            label_lines(axes)
    return figure


def _by_group(findings: Findings) -> dict[str, list[str]]:
    """Group → the methods with curves that its table has too, and the baseline."""
    methods, curves = findings.plan.methods, findings.with_curves
    return {
        group: [n for n in curves if n == findings.plan.baseline or group in (methods[n].group, *methods[n].also_in)]
        for group in dict.fromkeys(methods[name].group for name in curves)
    }


def label_lines(axes: Axes) -> None:
    """Write the lines' labels to the right of the panel, each in its line's colour and tied to the line's last point.

    A label is as high as that point, or as near to it as the other labels leave room. To be called when everything is
    drawn, as it depends on the axes' limits.
    """
    low, high = axes.get_ylim()
    gap = (high - low) / 15
    lines = sorted(_labelled(axes).items(), key=lambda labelled: labelled[1].get_ydata()[-1])
    heights: list[float] = []
    for _, line in lines:  # from below, each above the one before
        heights.append(max(line.get_ydata()[-1], heights[-1] + gap if heights else low))
    ceiling = high
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - gap
    beside = axes.get_yaxis_transform()  # across in parts of the panel's width, up in data
    for (label, line), height in zip(lines, heights, strict=True):
        end, colour = (line.get_xdata()[-1], line.get_ydata()[-1]), line.get_color()
        tie = dict(arrowstyle="-", color=colour, linewidth=0.6, alpha=0.6, shrinkA=0, shrinkB=0)
        where = dict(xytext=(1.03, height), textcoords=beside, va="center", annotation_clip=False)
        axes.annotate(label, end, fontsize=7.5, color=colour, arrowprops=tie, **where)


def _labelled(axes: Axes) -> dict[str, Line2D]:
    """Label → line, of plots and of error bars."""
    handles, labels = axes.get_legend_handles_labels()
    lines = [handle[0] if isinstance(handle, Container) else handle for handle in handles]
    return dict(zip(labels, lines, strict=True))


def errors(findings: Findings) -> Figure:
    """d of chosen and of rejected held-out images during training, means over seeds, a panel for each method with d.

    There has to be at least one. All panels have one scale. Where methods differ by more than a factor of ten, it is
    linear up to the largest d of the method that stays nearest to the base, and logarithmic beyond.
    """
    with rc_context(STYLE):
        methods, sides = findings.with_errors, {"chosen": CHOSEN_COLOUR, "rejected": REJECTED_COLOUR}
        curves = {(m, side): findings.logged_curve(m, f"eval/d_{side}") for m in methods for side in sides}
        largest = [max(np.abs(curves[method, side][1]).max() for side in sides) for method in methods]
        columns = min(6, len(methods))
        rows = -(-len(methods) // columns)
        figure = Figure(figsize=(1.8 * columns + 0.8, 1.6 * rows + 0.6), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        for axes, method in zip(panels, methods, strict=False):
            if max(largest) > 10 * min(largest) > 0:
                axes.set_yscale("symlog", linthresh=min(largest))
            axes.axhline(0, color=BASELINE_COLOUR, linewidth=0.8)
            for side, colour in sides.items():
                steps, values = curves[method, side]
                axes.plot(steps, values.mean(axis=0), color=colour, label=side)
                axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
            axes.set_title(method, fontsize=8)
            axes.tick_params(labelsize=7)
        for axes in panels[len(methods) :]:
            axes.set_visible(False)
        figure.supxlabel("optimizer step", fontsize=8)
        figure.supylabel("d", fontsize=9)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


def slopes(settings: Mapping[str, float], reference_error: float, seen: Mapping[float, tuple[float, float]]) -> Figure:
    """Slope of each reward form at an image whose error differs by d from the reference's, relative to d = 0.

    settings: beta and eta; γ is 1/n. seen: by exponent, the range of d at the end of training, which is shaded. The
    left panel shows d near that range, the right one up to n·d = 2. There is a row of panels for each exponent.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 2.3 * len(seen) + 0.5), layout="constrained")
        panels = figure.subplots(len(seen), 2, squeeze=False)
        for row, (n, reached) in zip(panels, seen.items(), strict=True):
            for axes, limit in zip(row, (1.5 * max(map(abs, reached)), 2 / n), strict=True):
                _slope_panel(axes, {**settings, "n": n, "gamma": 1 / n}, reference_error, limit)
                axes.axvspan(*reached, color=BASELINE_COLOUR, alpha=0.25, linewidth=0)
                axes.set_title(f"n = {n:g}, γ = 1/n", fontsize=9)
        panels[-1][0].set_xlabel("d = policy's error − reference's; shaded: reached in training")
        panels[-1][1].set_xlabel("the same, further out")
        figure.supylabel("slope of the reward, d = 0 at 1", fontsize=8)
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False)
    return figure


def _slope_panel(axes: Axes, settings: Mapping[str, float], reference_error: float, limit: float) -> None:
    d = np.linspace(-min(limit, reference_error), limit, 201)
    for colour, form in zip(COLOURS, FORMS, strict=False):
        slope = reward_slope(d, settings, reference_error, form)
        axes.plot(d, slope / reward_slope(np.zeros(1), settings, reference_error, form), color=colour, label=form)
    axes.axhline(1, color="#222222", linestyle=":", linewidth=1, label="diffusion_dpo")
    axes.grid(color="#e6e9ee", linewidth=0.7)


def reward_slope(d: np.ndarray, settings: Mapping[str, float], reference_error: float, form: str) -> np.ndarray:
    """−∂m/∂e_θ of the chosen image at each d, by automatic differentiation of the loss's own margin."""
    reference = torch.full((len(d),), reference_error, dtype=torch.float64)
    policy = (reference + torch.from_numpy(d)).requires_grad_()
    margin = xdpo_margin(PairErrors(policy, reference, reference, reference), **settings, reward=form)
    (gradient,) = torch.autograd.grad(margin.sum(), policy)
    return -gradient.numpy()
