"""report.html of a study: a single file with tables, the figure, and the disputed pairs with their images."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path

from xdpo.report.grids import Grid, to_html
from xdpo.report.published import user_study
from xdpo.report.thumbnails import data_uri
from xdpo.study import findings as tables
from xdpo.study.analysis import Dispute, order_of
from xdpo.study.findings import StudyFindings

_HERE = Path(__file__).parent / "pages"
MOST_SHOWN = 60  # disputed pairs with images; report.md lists all


def page(findings: StudyFindings, figure: Path) -> str:
    """The page as HTML that needs no network and no script. figure: the SVG of win rates. All text is escaped."""
    drawing = b64encode(figure.read_bytes()).decode()
    style = (_HERE / "report.css").read_text(encoding="utf-8")
    parts = [
        _table(tables.overview(findings.study, findings.results)),
        f'<figure><img alt="Win rates" src="data:image/svg+xml;base64,{drawing}"></figure>',
        _text(user_study()),
        "<h2>Disputed pairs</h2>",
        _disputed(findings),
        "<h2>By benchmark and style</h2>",
        _table(tables.by_group(findings.study, findings.results)),
        "<h2>Attention</h2>",
        _text(tables.attention_text(findings)),
        _table(tables.checks_grid(findings.checks, findings.excluded)),
    ]
    if findings.excluded:
        parts += [
            "<h2>Without the inattentive</h2>",
            _table(tables.overview(findings.study, findings.without_inattentive)),
        ]
    title = escape(findings.study.title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
        f"{_text(findings.summary)}{_text(findings.explanation)}\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


def _text(words: str) -> str:
    return f"<p>{escape(words)}</p>"


def _table(grid: Grid) -> str:
    return to_html(grid).replace('<button type="button">', "").replace("</button>", "")  # no script sorts here


def _disputed(findings: StudyFindings) -> str:
    if not findings.disputes:
        return _text(tables.NO_DISPUTES)
    by_item: dict[str, list[Dispute]] = {}
    for each in findings.disputes:
        by_item.setdefault(each.item, []).append(each)
    shown = list(by_item.items())[:MOST_SHOWN]
    words = (
        f"{len(by_item):,} pairs on which no answer has more than two thirds of the votes, those with least agreement "
        f"first. The left image is {findings.key.model}'s."
    )
    if len(shown) < len(by_item):
        words += f" Shown are {len(shown)}; report.md lists all."
    pairs = "\n".join(_pair(findings, name, each) for name, each in shown)
    return f'{_text(words)}<div class="disputes">{pairs}</div>'


def _pair(findings: StudyFindings, name: str, disputed: Sequence[Dispute]) -> str:
    item, model = findings.key.items[name], findings.key.model
    baseline = str(item.baseline)
    images = "".join(
        f'<figure><img alt="{escape(label)}" src="{data_uri(findings.study.folder / "images" / f"{image}.png")}">'
        f"<figcaption>{escape(label)}</figcaption></figure>"
        for image, label in zip(order_of(item, model), (model, baseline), strict=True)
    )
    texts = {question["id"]: question["text"] for question in findings.study.form.questions}
    answers = "".join(
        f"<li>{escape(texts[each.question])} {escape(model)} <b>{each.model}</b>, {escape(baseline)} "
        f"<b>{each.baseline}</b>" + (f", ties <b>{each.ties}</b></li>" if each.ties else "</li>")
        for each in disputed
    )
    place = " · ".join(filter(None, (item.benchmark, item.key)))
    return (
        f'<article><h3>{escape(item.prompt) or "(empty prompt)"}</h3><p class="note">{escape(place)}</p>'
        f'<div class="pair">{images}</div><ul>{answers}</ul></article>'
    )
