"""Curves as SVG, whose colours are the page's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

from xdpo.dashboard.series import Series

_WIDTH, _HEIGHT = 560, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 26
_MOST_MARKS = 40  # more evaluations than this are a line without marks


@dataclass(frozen=True)
class Line:
    series: Series
    label: str
    style: str  # a class of the page's style sheet
    is_noisy: bool = False  # drawn faintly, with a band from the least to the greatest value


@dataclass(frozen=True)
class Chart:
    title: str
    lines: Sequence[Line]
    note: str = ""
    level: float | None = None  # where a dashed line is drawn: a coin toss, no difference
    is_share: bool = False


def draw(chart: Chart) -> str:
    """A chart as an HTML figure: title, legend, curves. All text is escaped."""
    lines = [line for line in chart.lines if line.series.points]
    right = max([1.0, *(line.series.points[-1].step for line in lines)])
    values = [point.mean for line in lines for point in line.series.points]
    ticks = nice_ticks(min(values), max(values), chart.level) if values else [0.0, 1.0]
    low, high = ticks[0], ticks[-1]

    def at(step: float, value: float) -> str:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / right
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - min(max(value, low), high)) / (high - low)
        return f"{x:.1f},{y:.1f}"

    drawn = [_grid(ticks, right, at, chart.is_share)]
    if chart.level is not None:
        drawn.append(f'<polyline class="level" points="{at(0, chart.level)} {at(right, chart.level)}"/>')
    for number, line in sorted(enumerate(lines), key=lambda numbered: not numbered[1].is_noisy):
        points = line.series.points
        if line.is_noisy and any(point.low != point.high for point in points):
            edge = [at(point.step, point.high) for point in points]
            edge += [at(point.step, point.low) for point in reversed(points)]
            drawn.append(f'<polygon class="{line.style}" points="{" ".join(edge)}"/>')
        places = [at(point.step, point.mean) for point in points]
        drawn.append(
            f'<polyline class="{line.style}{" noisy" if line.is_noisy else ""}" data-line="{number}" '
            f'points="{" ".join(places)}"/>'
        )
        if not line.is_noisy and len(places) <= _MOST_MARKS:
            marks = (place.split(",") for place in places)
            drawn += [f'<circle class="{line.style}" cx="{x}" cy="{y}" r="3"/>' for x, y in marks]
    legend = "".join(
        f'<span><i class="{line.style}{" noisy" if line.is_noisy else ""}"></i>{escape(line.label)} '
        f"<b>{_shown(line.series.latest, chart.is_share)}</b></span>"
        for line in lines
    )
    lost = sum(line.series.not_finite for line in chart.lines)
    note = chart.note + (f" {lost} values are not finite and not drawn." if lost else "")
    frame = f'data-low="{low:g}" data-high="{high:g}" data-right="{right:g}"' + " data-share" * chart.is_share
    box = f'data-box="{_LEFT} {_TOP} {_WIDTH - _RIGHT} {_HEIGHT - _BOTTOM}"'
    return (
        f'<figure class="chart"><h3>{escape(chart.title)}</h3><p class="legend">{legend}</p>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(chart.title)}" {frame} {box}>'
        f'{"".join(drawn)}</svg><p class="note">{escape(note)}</p></figure>'
    )


def _grid(ticks: Sequence[float], right: float, at: Callable[[float, float], str], is_share: bool) -> str:
    drawn = []
    for tick in ticks:
        x, y = at(0, tick).split(",")
        drawn.append(f'<polyline class="grid" points="{at(0, tick)} {at(right, tick)}"/>')
        drawn.append(f'<text x="{float(x) - 6}" y="{float(y) + 4}" text-anchor="end">{_shown(tick, is_share)}</text>')
    for number, step in enumerate(step for step in nice_ticks(0, right) if step <= right and step.is_integer()):
        x, _ = at(step, ticks[0]).split(",")
        anchor = "middle" if number else "start"
        drawn.append(
            f'<text x="{x}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{step:,.0f}{"" if number else " steps"}</text>'
        )
    return "".join(drawn)


def nice_ticks(low: float, high: float, level: float | None = None) -> list[float]:
    """Three to seven round numbers with equal distances around low, high and a level; two at least if all are equal."""
    if level is not None:
        low, high = min(low, level), max(high, level)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal but for rounding
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    raw = (high - low) / 4
    power = 10.0 ** floor(log10(raw))
    distance = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = floor(low / distance + 1e-9)
    ticks = [first * distance]
    while ticks[-1] < high - distance * 1e-6:
        ticks.append((first + len(ticks)) * distance)
    return ticks


def _shown(value: float, is_share: bool = False) -> str:
    return (f"{100 * value:.3g} %" if is_share else f"{value:.4g}").replace("-", "−")
