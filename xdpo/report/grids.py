"""Tables as grids of cells, which can be written as Markdown, aligned text or HTML."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from xdpo.images.making import MAY_DIFFER, Making
from xdpo.scores.results import Benchmark
from xdpo.scores.statistics import Comparison, average_ranks

if TYPE_CHECKING:
    from xdpo.scores.features import Drift

TITLES = {
    "pickscore": "PickScore",
    "hpsv2": "HPSv2",
    "hpsv2.1": "HPSv2.1",
    "image_reward": "ImageReward",
    "clip": "CLIP",
    "aesthetic": "Aesthetic",
    "ict": "ICT",
    "hp": "HP",
    "hpsv3": "HPSv3",
    "vqascore": "VQAScore",
    "saturation": "Saturation",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "high frequencies": "High frequencies",
    "distance": "Distance",
    "spread": "Spread",
    "tiny_reward": "Reward (tiny)",
    "tiny_alignment": "Alignment (tiny)",
    "tiny_appeal": "Appeal (tiny)",
    "tiny_warmth": "Warmth (tiny)",
    "tiny_warm_reward": "Warm reward (tiny)",
    "tiny_heldout_reward": "Reward (tiny, held-out judge)",
    "tiny_heldout_alignment": "Alignment (tiny, held-out judge)",
    "tiny_heldout_appeal": "Appeal (tiny, held-out judge)",
    "tiny_heldout_warmth": "Warmth (tiny, held-out judge)",
    "tiny_heldout_warm_reward": "Warm reward (tiny, held-out judge)",
    "eval/d": "d of both images",
}
BRIEF = 24  # characters up to which a cell of the page is kept on one line
BEST = "Marked is a model whose paired difference from every other has a 95 % interval above zero."
_DECIMALS = {"pickscore": 3, "hpsv2": 3, "hpsv2.1": 3, "image_reward": 3, "clip": 4, "aesthetic": 3}


@dataclass(frozen=True)
class Cell:
    """A cell of a table. `value` is its sorting key, `detail` is smaller print after the text, `best` marks the highest
    of its kind. `tone` is "better" or "worse" than the baseline, "higher" or "lower" without a judgement, "differs"
    from it, "published" or empty."""

    text: str
    value: float | str | None = None
    detail: str = ""
    best: bool = False
    tone: str = ""

    @property
    def sign(self) -> str:
        """The tone as a character, for readers who don't see its colour."""
        return {"better": "▲", "worse": "▼", "higher": "▲", "lower": "▼", "differs": "≠"}.get(self.tone, "")


class Paired(NamedTuple):
    """A model and the baseline with which it is compared, by a scorer on a prompt set."""

    prompt_set: str
    baseline: str
    model: str
    scorer: str


@dataclass(frozen=True)
class Grid:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


# --- numbers in words ------------------------------------------------------------------------------------


def title_of(scorer: str) -> str:
    """A scorer's display name: from the table, the class name for path/to/file.py:Class, else unchanged."""
    return TITLES.get(scorer, scorer.rpartition(".py:")[2])


def number(value: float | None, scorer: str, sign: bool = False) -> str:
    """A score with the decimals usual for the scorer; "–" for None or a number that is not finite."""
    if value is None or not isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{_DECIMALS.get(scorer, 4)}f}".replace("-", "−")


def percent(share: float, sign: bool = False, decimals: int = 1) -> str:
    if not isfinite(share):
        return "–"
    return f"{share:{'+' if sign else ''}.{decimals}%}".replace("-", "−").replace("%", " %")


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval(low: float, high: float, scorer: str, sign: bool = False) -> str:
    return f"[{number(low, scorer, sign)}, {number(high, scorer, sign)}]"


# --- the tables ------------------------------------------------------------------------------------------


def overview(benchmark: Benchmark) -> Grid:
    """Means with intervals: a row per model, a column per scorer, marked where a model is better than every other."""
    cells = {(m, s): benchmark.summary(m, s) for m in benchmark.models for s in benchmark.scorers}
    best = {s: benchmark.best(s) for s in benchmark.scorers}
    rows = tuple(
        (
            Cell(model, model),
            *(
                Cell(
                    number(cells[model, s].mean, s),
                    cells[model, s].mean,
                    interval(*cells[model, s].interval, s),
                    best=model == best[s],
                )
                for s in benchmark.scorers
            ),
        )
        for model in benchmark.models
    )
    columns = ("Model", *(title_of(s) for s in benchmark.scorers))
    note = f"Means over {len(benchmark.prompts):,} prompts with 95 % bootstrap intervals. {BEST}"
    return Grid(f"{benchmark.name}: mean scores", columns, rows, note)


def details(benchmark: Benchmark, baseline: str) -> Grid:
    """Mean, median, standard error, interval and change against the baseline, one row per model and scorer."""
    rows = []
    for scorer in benchmark.scorers:
        for model in benchmark.models:
            summary = benchmark.summary(model, scorer)
            change = benchmark.comparison(baseline, model, scorer)
            shift, relative = Cell("–"), Cell("–")
            if model != baseline:
                tone = shift_tone(change)
                shift = Cell(number(change.mean_shift, scorer, sign=True), change.mean_shift, tone=tone)
                relative = Cell(percent(change.relative_change, sign=True), change.relative_change, tone=tone)
            rows.append(
                (
                    Cell(title_of(scorer), title_of(scorer)),
                    Cell(model, model),
                    Cell(f"{summary.count:,}", summary.count),
                    Cell(number(summary.mean, scorer), summary.mean),
                    Cell(number(summary.median, scorer), summary.median),
                    Cell(number(summary.standard_error, scorer), summary.standard_error),
                    Cell(interval(*summary.interval, scorer), summary.interval[0]),
                    shift,
                    relative,
                )
            )
    columns = ("Metric", "Model", "Prompts", "Mean", "Median", "Std. error", "95 % interval", "Change", "Relative")
    note = f"Change of the mean against {baseline}; ▲ or ▼ where its 95 % interval excludes zero."
    return Grid(f"{benchmark.name}: mean, median and change", columns, tuple(rows), note)


def win_rates(benchmark: Benchmark, baselines: Sequence[str], corrected: Mapping[Paired, float]) -> Grid:
    """Win rates of each model against each baseline, paired by prompt; `corrected` are their corrected p-values."""
    rows = []
    for paired in compared(benchmark, baselines):
        c = benchmark.comparison(paired.baseline, paired.model, paired.scorer)
        low, high = c.win_rate_interval
        p = corrected[paired]
        tone = "" if p >= 0.05 else "better" if c.wins > c.losses else "worse"
        rows.append(
            (
                Cell(title_of(paired.scorer), title_of(paired.scorer)),
                Cell(paired.model, paired.model),
                Cell(paired.baseline, paired.baseline),
                Cell(percent(c.win_rate), c.win_rate, tone=tone),
                Cell(f"[{100 * low:.1f}, {100 * high:.1f}]", low),
                Cell(f"{c.wins:,}", c.wins),
                Cell(f"{c.ties:,}", c.ties),
                Cell(f"{c.losses:,}", c.losses),
                Cell(p_value(c.sign_test), c.sign_test),
                Cell(p_value(p), p),
            )
        )
    columns = ("Metric", "Model", "Against", "Win rate", "95 % interval", "Wins", "Ties", "Losses", "p", "p, corrected")
    note = (
        "Paired by prompt, ties ½, Wilson's intervals; p is the sign test's, corrected by Holm's method for the "
        f"{len(corrected):,} comparisons of this report; ▲ or ▼ where the corrected p is below 0.05."
    )
    return Grid(f"{benchmark.name}: win rates", columns, tuple(rows), note)


def compared(benchmark: Benchmark, baselines: Sequence[str]) -> list[Paired]:
    """What is compared with the baselines; two baselines are compared with one another once."""
    return [
        Paired(benchmark.name, baseline, model, scorer)
        for position, baseline in enumerate(baselines)
        for scorer in benchmark.scorers
        for model in benchmark.models
        if model != baseline and model not in baselines[:position]
    ]


def every_pair(benchmark: Benchmark) -> Grid:
    """Win rates of all models against one another by each scorer."""
    rows = []
    for scorer in benchmark.scorers:
        for model in benchmark.models:
            for other in (other for other in benchmark.models if other != model):
                wins = benchmark.wins(other, model, scorer)
                low, high = wins.interval
                rows.append(
                    (
                        Cell(title_of(scorer), title_of(scorer)),
                        Cell(model, model),
                        Cell(other, other),
                        Cell(percent(wins.rate), wins.rate),
                        Cell(f"[{100 * low:.1f}, {100 * high:.1f}]", low),
                    )
                )
    columns = ("Metric", "Model", "Against", "Win rate", "95 % interval")
    return Grid(f"{benchmark.name}: win rates of every pair", columns, tuple(rows))


def ranks(benchmark: Benchmark) -> Grid:
    """Ranks averaged over prompts: a row per model, a column per scorer and their mean, the best model first."""
    of_scorer = np.array([average_ranks(benchmark.scores[scorer]) for scorer in benchmark.scorers])
    means = of_scorer.mean(axis=0)
    rows = tuple(
        (
            Cell(benchmark.models[i], benchmark.models[i]),
            *(Cell(f"{rank:.2f}", float(rank)) for rank in of_scorer[:, i]),
            Cell(f"{means[i]:.2f}", float(means[i])),
        )
        for i in np.argsort(means, kind="stable")
    )
    columns = ("Model", *(title_of(scorer) for scorer in benchmark.scorers), "Mean")
    note = "The rank among the models, averaged over prompts: 1 is the highest score, and ties share their ranks."
    return Grid(f"{benchmark.name}: average ranks", columns, rows, note)


def by_category(benchmark: Benchmark, baseline: str) -> Grid:
    """Means by style or category, their change against the baseline and the win rate, one row for each."""
    rows = []
    for scorer in benchmark.scorers:
        for category, positions in benchmark.categories.items():
            for model in benchmark.models:
                c = benchmark.comparison(baseline, model, scorer, category)
                rate, shift, between = Cell("–"), Cell("–"), Cell("–")
                if model != baseline:
                    rate = Cell(percent(c.win_rate), c.win_rate)
                    shift = Cell(number(c.mean_shift, scorer, sign=True), c.mean_shift, tone=shift_tone(c))
                    between = Cell(interval(*c.mean_shift_interval, scorer, sign=True), c.mean_shift_interval[0])
                rows.append(
                    (
                        Cell(title_of(scorer), title_of(scorer)),
                        Cell(category or "none", category or "none"),
                        Cell(f"{len(positions):,}", len(positions)),
                        Cell(model, model),
                        Cell(number(c.mean_after, scorer), c.mean_after),
                        shift,
                        between,
                        rate,
                    )
                )
    columns = ("Metric", "Category", "Prompts", "Model", "Mean", "Change", "95 % interval", "Win rate")
    note = f"Change and win rate against {baseline}; ▲ or ▼ where the change's interval excludes zero, not corrected."
    return Grid(f"{benchmark.name}: by style or category", columns, tuple(rows), note)


def drifts(found: Sequence["Drift"], features: str) -> Grid:
    """The drift of each model from the reference images. features: of which network they are, in words."""
    rows = tuple(
        (
            Cell(drift.prompt_set, drift.prompt_set),
            Cell(drift.model, drift.model),
            Cell(f"{drift.images:,}", drift.images),
            Cell(f"{drift.gaussian:.3f}".replace("-", "−"), drift.gaussian),
            Cell(f"{drift.polynomial:.3f}".replace("-", "−"), drift.polynomial),
        )
        for drift in found
    )
    note = (
        f"1000 × squared maximum mean discrepancy from {found[0].references:,} reference images on features of "
        f"{features}, with CMMD's Gaussian and KID's polynomial kernel. Models are comparable where they have equally "
        "many images; published CMMD and KID are on features of other networks."
    )
    return Grid("Drift from the reference images", ("Prompt set", "Model", "Images", "CMMD's", "KID's"), rows, note)


def made(makings: Sequence[Making], baselines: Mapping[str, str]) -> Grid:
    """How each model's images of each prompt set were made; marked where they differ from the set's baseline."""
    by_set = {making.prompt_set: making.facts for making in reversed(makings)}  # of the first model, or the baseline
    by_set |= {making.prompt_set: making.facts for making in makings if making.model == baselines[making.prompt_set]}
    rows = []
    for making in makings:
        expected = by_set[making.prompt_set]
        cells = [
            Cell(text, text, tone="differs" if fact not in MAY_DIFFER and text != expected[fact] else "")
            for fact, text in making.facts.items()
        ]
        rows.append((Cell(making.prompt_set, making.prompt_set), Cell(making.model, making.model), *cells))
    note = "≠ marks what differs from the baseline of the prompt set; such scores compare settings as well as models."
    return Grid("How the images were made", ("Prompt set", "Model", *makings[0].facts), tuple(rows), note)


def shift_tone(comparison: Comparison, above: str = "better", below: str = "worse") -> str:
    """The tone of a paired change: `above` or `below` where its interval excludes zero, else empty."""
    low, high = comparison.mean_shift_interval
    return above if low > 0 else below if high < 0 else ""


# --- how they are written ----------------------------------------------------------------------------------


def plain(text: str) -> str:
    """The text on one line, with everything escaped that Markdown or HTML would read as markup."""
    markup = r"([\\`*|]|(?<!\w)_|_(?!\w)|(?<=\])\()"  # an underscore within a word is not markup
    return re.sub(markup, r"\\\1", escape(" ".join(text.split()), quote=False))


def to_markdown(grid: Grid) -> str:
    """The table in GitHub's Markdown: the best in bold, details after the number."""

    def shown(cell: Cell) -> str:
        text = f"**{plain(cell.text)}**" if cell.best and cell.text else plain(cell.text)
        return " ".join(filter(None, [text, cell.sign, plain(cell.detail)]))

    numeric = numeric_columns(grid)
    lines = [
        "| " + " | ".join(map(plain, grid.columns)) + " |",
        "|" + "|".join(" ---: " if right else " --- " for right in numeric) + "|",
        *("| " + " | ".join(map(shown, row)) + " |" for row in grid.rows),
    ]
    return "\n".join([*lines, *(["", plain(grid.note)] if grid.note else [])])


def to_text(grid: Grid) -> str:
    """The table as aligned columns for a terminal, the best marked with an asterisk."""

    def shown(cell: Cell) -> str:
        text = " ".join(filter(None, [cell.text, cell.sign, cell.detail]))
        return text + "*" if cell.best else text

    lines = [list(grid.columns), *([shown(cell) for cell in row] for row in grid.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(grid.columns))]
    numeric = numeric_columns(grid)

    def aligned(line: list[str]) -> str:
        cells = []
        for text, width, right in zip(line, widths, numeric, strict=True):
            if not right:
                cells.append(text.ljust(width))
            elif text.endswith("*"):
                cells.append(text.rjust(width + 1))
            else:
                cells.append(text.rjust(width) + " ")
        return "  ".join(cells).rstrip()

    body = [aligned(line) for line in lines]
    rule = "-" * max(map(len, body))
    return "\n".join([grid.title, rule, body[0], rule, *body[1:], rule, *([grid.note] if grid.note else [])])


def to_html(grid: Grid) -> str:
    """The table as HTML that the page's script makes sortable. All text is escaped."""
    numeric = numeric_columns(grid)

    def shown(cell: Cell, right: bool) -> str:
        kind = "number" if right else "brief" if len(cell.text) <= BRIEF else ""
        names = " ".join(filter(None, [kind, "best" if cell.best else "", cell.tone]))
        value = "" if cell.value is None else cell.value
        detail = f" <small>{escape(cell.detail)}</small>" if cell.detail else ""
        sign = f" <i>{cell.sign}</i>" if cell.sign else ""
        return f'<td class="{names}" data-value="{escape(str(value))}">{escape(cell.text)}{sign}{detail}</td>'

    head = "".join(
        f'<th scope="col" class="{"number" if right else ""}">{escape(column)}</th>'
        for column, right in zip(grid.columns, numeric, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(shown(cell, right) for cell, right in zip(row, numeric, strict=True)) + "</tr>"
        for row in grid.rows
    )
    note = f'<p class="note">{escape(grid.note)}</p>' if grid.note else ""
    return (
        f'<div class="scroll"><table class="sortable"><caption>{escape(grid.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>{note}"
    )


def numeric_columns(grid: Grid) -> list[bool]:
    """Which columns hold numbers: those in which every value is a number."""
    return [
        any(isinstance(row[i].value, int | float) for row in grid.rows)
        and not any(isinstance(row[i].value, str) for row in grid.rows)
        for i in range(len(grid.columns))
    ]
