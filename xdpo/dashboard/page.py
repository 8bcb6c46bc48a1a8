"""Writes a run's index.html from its rows of metrics.jsonl and its folder of sample sheets."""

import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import datetime
from html import escape
from pathlib import Path
from typing import NamedTuple

from xdpo.dashboard.charts import Chart, Line, draw
from xdpo.dashboard.series import Series
from xdpo.dashboard.verdict import of_held_out, verdict_of
from xdpo.files import reading, write_text
from xdpo.report.style import STYLE, fill
from xdpo.runlog import HELD_OUT, WARNED, tracker_name
from xdpo.runs import sample_sheets

SECONDS_BETWEEN_PAGES = 10
MOST_SHEETS = 12
_MARKS_OF_PACE = 60  # pages, hence the last ten minutes at least
_HERE = Path(__file__).parent


class _Curve(NamedTuple):
    """A metric that is shown first."""

    metric: str
    title: str
    note: str
    level: float | None = None
    is_share: bool = False


_CURVES = (
    _Curve(
        "implicit_accuracy",
        "Pairs in the right order",
        "The share of pairs that the policy orders as their label says; 50 % is a coin toss.",
        level=0.5,
        is_share=True,
    ),
    _Curve("margin", "Margin", "How much more the policy has gained on chosen images than on rejected ones.", level=0),
    _Curve("loss", "Loss", "Noisy in training; the other curves say more."),
)
_SHOWN_FIRST = {"d_chosen", "d_rejected", *(curve.metric for curve in _CURVES)}
_NO_CURVE = {"pairs_seen", WARNED}
_SECTIONS = {  # by the trackers' groups
    "online": "Rounds of online training",
    "train": "More about the objective",
    "optim": "Optimizer",
    "speed": "Speed and memory",
    "data": "Data",
}


class RunPage:
    """A run's index.html, written anew while rows come.

    The page has at most series.MOST_POINTS points of each curve and MOST_SHEETS sample sheets, which it links, and is
    written at most every SECONDS_BETWEEN_PAGES. A row costs the same however many came before it.
    """

    def __init__(self, folder: Path, *, max_steps: int, description: str):
        """description: the run in some lines of text, shown as they are."""
        self.path = folder / "index.html"
        self.max_steps, self.description = max_steps, description
        self.series: dict[str, Series] = {}
        self.step = 0
        self._written = float("-inf")
        self._pace: deque[tuple[float, int]] = deque(maxlen=_MARKS_OF_PACE)  # seconds, step

    def add(self, row: Mapping[str, float]) -> None:
        """Take a row of metrics.jsonl, the newest last. Nothing is written."""
        self.step = max(self.step, int(row["step"]))
        for name, value in row.items():
            if name != "step":
                self.series.setdefault(name, Series()).add(self.step, float(value))

    def write_if_due(self) -> None:
        """Write the page unless that was just done. Raises StorageError."""
        if time.monotonic() - self._written >= SECONDS_BETWEEN_PAGES:
            self.write("training")

    def close(self) -> None:
        """Write the page for the last time. Raises StorageError."""
        self.write("finished" if self.step >= self.max_steps else "stopped; the same command resumes")

    def fail(self, error: BaseException) -> None:
        """Write the page of a run that ended with an error. Raises StorageError."""
        self.write(f"ended with an error: {error or type(error).__name__}")

    def write(self, state: str) -> None:
        self._written = time.monotonic()
        self._pace.append((self._written, self.step))
        write_text(self.path, self._page(state))

    @property
    def seconds_per_step(self) -> float | None:
        """Of the last minutes, with evaluations, samples and checkpoints; None before two pages differ by a step."""
        (first_time, first_step), (last_time, last_step) = self._pace[0], self._pace[-1]
        return (last_time - first_time) / (last_step - first_step) if last_step > first_step else None

    def _page(self, state: str) -> str:
        now, is_live = datetime.now().astimezone(), state == "training"
        sections = [
            ("verdict", "How it goes", self._verdict()),
            ("curves", "Curves", self._first_curves()),
            ("samples", "Samples", _samples(self.path.parent)),
            *self._further_curves(),
            ("run", "This run", f'<pre tabindex="0">{escape(self.description)}</pre>'),
        ]
        filling = {
            "title": escape(self.path.parent.resolve().name),
            "state": escape(state),
            "style": STYLE + _text_of("dashboard.css"),
            "script": _text_of("dashboard.js"),
            "written": now.isoformat(timespec="seconds"),
            "written_shown": f"{now:%Y-%m-%d %H:%M:%S %Z}",
            "refresh": str(SECONDS_BETWEEN_PAGES if is_live else 0),
            "expected": f"{SECONDS_BETWEEN_PAGES + (self.seconds_per_step or 0):.0f}",
            "refresh_without_script": f'<meta http-equiv="refresh" content="{SECONDS_BETWEEN_PAGES}">' * is_live,
            "tiles": "".join(self._tiles(is_live)),
            "navigation": "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in sections),
            "sections": "".join(
                f'<section id="{anchor}"><h2>{title}</h2>{content}</section>' for anchor, title, content in sections
            ),
        }
        return fill(_HERE / "dashboard.html", filling)

    def _tiles(self, is_live: bool) -> Iterator[str]:
        share = min(1.0, self.step / self.max_steps)
        left = ""
        if is_live:
            pace = self.seconds_per_step
            left = f"{_span((self.max_steps - self.step) * pace)} left" if pace else "time left is not known yet"
        yield _tile("Progress", f"{share:.0%}", f"step {self.step:,} of {self.max_steps:,}", left, gauge=share)
        held_out, training = of_held_out(self.series, "implicit_accuracy"), self.series.get("implicit_accuracy")
        if (order := held_out or training) is not None:
            whose = f"held-out pairs, step {order.latest_step:,}" if held_out else "training pairs of the last step"
            value = order.latest
            yield _tile("Right order", f"{value:.1%}", whose, "50 % is a coin toss", gauge=value, has_middle=True)
        if (judged := verdict_of(self.series)) is not None:
            yield _tile("Errors", judged[0].title, "see below", level=judged[0].level)
        if {"pairs_per_second", "data_wait_share"} <= self.series.keys():
            speed, waiting = self.series["pairs_per_second"].latest, self.series["data_wait_share"].latest
            yield _tile("Speed", f"{speed:.3g}", "pairs a second", f"{waiting:.0%} of the time waiting for data")
        if "peak_memory_gb" in self.series:
            memory = self.series["peak_memory_gb"].latest
            yield _tile("Memory", f"{memory:.3g} GB", "at most, of the first process")

    def _verdict(self) -> str:
        judged = verdict_of(self.series)
        if judged is None:
            return "<p>There are no errors against a reference yet, or the objective has no reference.</p>"
        found, numbers = judged
        errors = Chart(
            "Errors against the reference, d",
            [
                *self._lines("d_chosen", "chosen, ", "chosen"),
                *self._lines("d_rejected", "rejected, ", "rejected"),
            ],
            "The policy's denoising error minus the reference's: below 0 the policy is better.",
            level=0,
        )
        return (
            f'<div class="charts"><div class="verdict {found.level}"><h3>{escape(found.title)}</h3>'
            f'<p>{escape(found.text)}</p><p class="tag">{escape(numbers)}</p></div>{draw(errors)}</div>'
        )

    def _lines(self, metric: str, label: str, style: str) -> list[Line]:
        """A metric of training and of held-out pairs; the faint one is training's where there are both."""
        training, held_out = self.series.get(metric), self.series.get(HELD_OUT + metric)
        is_noisy = of_held_out(self.series, metric) is not None
        lines = [Line(training, f"{label}training", style, is_noisy)] if training else []
        return lines + ([Line(held_out, f"{label}held out", style)] if held_out else [])

    def _first_curves(self) -> str:
        charts = [
            draw(Chart(curve.title, lines, curve.note, curve.level, curve.is_share))
            for curve in _CURVES
            if (lines := self._lines(curve.metric, "", "single"))
        ]
        return f'<div class="charts">{"".join(charts)}</div>' if charts else "<p>No step has been logged yet.</p>"

    def _further_curves(self) -> Iterator[tuple[str, str, str]]:
        """A section for each group of the other metrics: anchor, title, curves."""
        names = dict.fromkeys(name.removeprefix(HELD_OUT) for name in self.series if name not in _NO_CURVE)
        groups: dict[str, list[str]] = {}
        for name in names:
            if name not in _SHOWN_FIRST:
                groups.setdefault(tracker_name(name).partition("/")[0], []).append(name)
        for group in [*(known for known in _SECTIONS if known in groups), *(groups.keys() - _SECTIONS.keys())]:
            charts, constant = [], []
            for name in groups[group]:
                lines, title = self._lines(name, "", "single"), name.removeprefix(f"{group}/")
                if all(line.series.is_constant for line in lines):
                    constant.append(f"{title} {lines[-1].series.latest:g}")
                else:
                    charts.append(draw(Chart(title, lines)))
            still = f'<p class="note">The same all along: {escape(", ".join(constant))}.</p>' if constant else ""
            content = f'<div class="charts small">{"".join(charts)}</div>{still}'
            yield f"group-{escape(group)}", escape(_SECTIONS.get(group, group)), content


def _tile(
    title: str,
    value: str,
    *lines: str,
    gauge: float | None = None,
    has_middle: bool = False,
    level: str = "",
) -> str:
    """A tile with a value; `level` colours a value of words."""
    shown = "".join(f"<p>{_spaced(line)}</p>" for line in lines if line)
    bar = ""
    if gauge is not None:
        bar = f'<div class="gauge{"" if has_middle else " plain"}"><i style="width:{100 * gauge:.2f}%"></i></div>'
    size = "words" if level else "big"
    return f'<div class="tile {level}"><h3>{title}</h3><p class="{size}">{_spaced(value)}</p>{shown}{bar}</div>'


def _spaced(text: str) -> str:
    """Escaped text, with a space before each %."""
    return re.sub(r"(?<=\d)%", " %", escape(text))


def _samples(folder: Path) -> str:
    """A run's sample sheets, the newest first: links to the files, some of them where there are many."""
    with reading(folder):
        sheets = [path.name for path in sample_sheets(folder)]
    if not sheets:
        return "<p>There is no sample sheet; samples.every says how often one is drawn.</p>"
    shown = sheets
    if len(sheets) > MOST_SHEETS:
        shown = [sheets[round(number * (len(sheets) - 1) / (MOST_SHEETS - 1))] for number in range(MOST_SHEETS)]
    figures = "".join(
        f'<figure><a href="samples/{name}"><img loading="lazy" src="samples/{name}" alt="Sample sheet of {name[5:-4]}">'
        f"</a><figcaption>step {int(name[5:-4]):,}</figcaption></figure>"
        for name in reversed(shown)
    )
    some = f"{len(shown)} of {len(sheets)} sheets" if len(shown) < len(sheets) else "All sheets"
    note = f"{some} of samples/, the newest first. The seeds are always the same; click for the file."
    return f'<p class="note">{note}</p><div class="sheets" tabindex="0">{figures}</div>'


def _span(seconds: float) -> str:
    """A time as people say it: "about 3 h 20 min"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    days, hours = divmod(minutes // 60, 24)
    if days:
        return f"about {days} d {hours} h"
    return f"about {hours} h {minutes % 60} min" if hours else f"about {minutes} min"


def _text_of(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
