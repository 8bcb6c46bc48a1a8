"""report.html: a single file. It embeds images up to a budget and links the others where they are on disk."""

import json
import re
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path

from xdpo.report import browser, grids
from xdpo.report.exports import file_stem, to_csv, to_latex
from xdpo.report.figures import colours_of
from xdpo.report.grids import Grid, to_html
from xdpo.report.sections import Evaluation, FigureFile, Section
from xdpo.report.style import STYLE, fill
from xdpo.report.thumbnails import embed
from xdpo.scores.results import Benchmark

_HERE = Path(__file__).parent
_SCRIPTS = ("tables.js", "browser.js", "viewer.js", "address.js")  # in this order; the last one starts the page


def page(title: str, evaluation: Evaluation, sections: Sequence[Section], folder: Path, embed_bytes: int) -> str:
    """The page as HTML that needs no network.

    Images are embedded as data URIs until `embed_bytes` are used up, in turn from all rankings. The others are links
    relative to `folder`, where the page will be. All text is escaped.
    """
    dealt = list(dict.fromkeys(browser.dealt(evaluation)))
    embedded = embed(dealt, embed_bytes)
    number_of = {path: number for number, path in enumerate(embedded)}
    still = [browser.still(evaluation, benchmark, embedded, folder) for benchmark in evaluation.benchmarks]
    shown_still = {int(number) for html in still for number in re.findall(r'data-embedded="(\d+)"', html)}
    data = {
        "extremes": browser.EXTREMES,
        # Those of the still pictures stand there alone.
        "embedded": ["" if number in shown_still else uri for number, uri in enumerate(embedded.values())],
        "sets": [browser.data(evaluation, benchmark, number_of, folder) for benchmark in evaluation.benchmarks],
    }
    names = [("s" + str(position), section) for position, section in enumerate(sections)]
    links = [(anchor, section.title) for anchor, section in names]
    last_anchor, last_part = names[-1]
    filling = {
        "title": escape(title),
        "style": STYLE + _text_of("page.css"),
        "script": "\n".join(map(_text_of, _SCRIPTS)),
        "subtitle": escape(_subtitle(evaluation)),
        "navigation": "".join(
            f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in [*links[:-1], ("images", "Images"), links[-1]]
        ),
        "sections": "".join(_section(anchor, section, evaluation) for anchor, section in names[:-1]),
        "account": _section(last_anchor, last_part, evaluation),
        "images_note": escape(_images_note(len(embedded), len(dealt))),
        "still": "".join(still),
        # No "<" inside a script element: neither "</script" nor "<!--" can end it early.
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return fill(_HERE / "page.html", filling)


def _text_of(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _images_note(embedded: int, total: int) -> str:
    if embedded == total:
        return f"All {total:,} images are in this file. A frame marks the highest score; click to enlarge."
    return (
        f"{embedded:,} of {total:,} images are in this file, those of the first, best and worst prompts of every "
        "metric and model; the others are read from the image folders, which must stay where they were. A frame marks "
        "the highest score; click to enlarge."
    )


def _subtitle(evaluation: Evaluation) -> str:
    models = {model for benchmark in evaluation.benchmarks for model in benchmark.models}
    scorers = {scorer for benchmark in evaluation.benchmarks for scorer in benchmark.scorers}
    prompts = sum(len(benchmark.prompts) for benchmark in evaluation.benchmarks)
    return f"{len(models)} models · {prompts:,} prompts · {len(scorers)} metrics"


def _tiles(benchmark: Benchmark, baseline: str) -> str:
    """A tile per metric: the model that wins most often against the baseline."""
    colours = colours_of(benchmark.models, baseline)
    others = [model for model in benchmark.models if model != baseline]
    tiles = []
    for scorer in benchmark.scorers if others else ():
        rates = {model: benchmark.comparison(baseline, model, scorer) for model in others}
        model = max(others, key=lambda name: rates[name].win_rate)
        best = rates[model]
        low, high = best.win_rate_interval
        tiles.append(
            f'<div class="tile"><h3>{escape(grids.title_of(scorer))}</h3>'
            f'<p class="big">{grids.percent(best.win_rate)}</p>'
            f"<p><b>{escape(model)}</b> wins against {escape(baseline)}</p>"
            f'<div class="gauge"><i style="width:{100 * best.win_rate:.2f}%;'
            f'background:{colours[model]}"></i>'
            f'<s style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></s></div></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _section(anchor: str, section: Section, evaluation: Evaluation) -> str:
    text = "".join(f"<p>{escape(line)}</p>" for line in section.text)
    if section.benchmark is not None:
        text += _tiles(section.benchmark, evaluation.baselines_of(section.benchmark)[0])
    if section.title == "Account":
        text = "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in section.text) + "</ul>"
    blocks = "".join(_block(block) for block in section.blocks)
    folded = "".join(
        f"<details><summary>{escape(grid.title)}</summary>{_table(grid)}</details>" for grid in section.folded
    )
    files = "".join(f'<p class="downloads">{escape(grid.title)} {_downloads(grid)}</p>' for grid in section.files)
    return f'<section id="{anchor}"><h2>{escape(section.title)}</h2>{text}{blocks}{folded}{files}</section>'


def _table(grid: Grid) -> str:
    return f'{to_html(grid)}<p class="downloads">{_downloads(grid)}</p>'


def _downloads(grid: Grid) -> str:
    """Links that save a table as CSV and LaTeX. The page holds both, so that it can be sent alone."""
    formats = {"csv": ("text/csv", to_csv(grid)), "tex": ("application/x-tex", to_latex(grid))}
    return " ".join(
        f'<a download="{escape(file_stem(grid))}.{ending}" '
        f'href="data:{media_type};base64,{b64encode(text.encode()).decode()}">{ending.upper()}</a>'
        for ending, (media_type, text) in formats.items()
    )


def _block(block: Grid | FigureFile) -> str:
    if isinstance(block, Grid):
        return _table(block)
    drawing = b64encode(block.svg.read_bytes()).decode()
    return f'<figure><img alt="{escape(block.alt)}" src="data:image/svg+xml;base64,{drawing}"></figure>'
