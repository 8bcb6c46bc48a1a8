"""Write a study's results: Markdown, a page, a bar chart with the published numbers, and a table of votes."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from xdpo.files import replacing, write_text
from xdpo.report.figures import BASELINE_COLOUR, COLOURS, STYLE, save
from xdpo.report.grids import percent, to_markdown
from xdpo.report.published import published_user_study, user_study
from xdpo.study.analysis import ALL, vote_rows
from xdpo.study.findings import (
    NO_DISPUTES,
    StudyFindings,
    attention_text,
    by_group,
    checks_grid,
    disputed_pairs,
    overview,
)
from xdpo.study.page import page

PUBLISHED = "xDPO, published"  # this label is used whichever model the study tests


def write(findings: StudyFindings, folder: Path) -> Path:
    """Write report.html, report.md, figures and votes.parquet to `folder`; returns the page's path.

    Raises StorageError.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    _, figure = save(win_rate_bars(findings), folder / "win_rates")
    if rows := vote_rows(findings.study, findings.key, findings.votes):
        with replacing(folder / "votes.parquet", "wb") as file:
            pq.write_table(pa.Table.from_pylist(rows), file)
    write_text(folder / "report.md", markdown(findings))
    path = folder / "report.html"
    write_text(path, page(findings, figure))
    return path


def markdown(findings: StudyFindings) -> str:
    """The report as text."""
    study = findings.study
    blocks = [
        f"# {study.title}",
        findings.summary,
        findings.explanation,
        to_markdown(overview(study, findings.results)),
        "![Win rates](win_rates.png)",
        user_study(),
        "## By benchmark and style",
        to_markdown(by_group(study, findings.results)),
        "## Disputed pairs",
        to_markdown(disputed_pairs(findings)) if findings.disputes else NO_DISPUTES,
        "## Attention",
        attention_text(findings),
        to_markdown(checks_grid(findings.checks, findings.excluded)),
    ]
    if findings.excluded:
        blocks += ["## Without the inattentive", to_markdown(overview(study, findings.without_inattentive))]
    return "\n\n".join(blocks) + "\n"


def win_rate_bars(findings: StudyFindings) -> Figure:
    """Win rates by question and baseline with intervals, published ones as diamonds (as the paper's Figure 3, top)."""
    shown = [result for result in findings.results if result.category == ALL]
    questions = [question["id"] for question in findings.study.form.questions]
    benchmarks = list(dict.fromkeys(result.benchmark for result in shown))
    with rc_context(STYLE):
        height = 1.2 + 0.34 * len(questions) * len(findings.key.baselines) + 0.3 * len(findings.key.baselines)
        figure = Figure(figsize=(1.5 + 4.2 * len(benchmarks), height), layout="constrained")
        panels = figure.subplots(1, len(benchmarks), squeeze=False, sharey=True)[0]
        for axes, benchmark in zip(panels, benchmarks, strict=True):
            _bars(axes, findings, benchmark, questions)
        # Gathered from all panels: some lack the published numbers, or a question that nobody answered there.
        shown_as: dict = {}
        for axes in panels:
            handles, names = axes.get_legend_handles_labels()
            shown_as |= dict(zip(names, handles, strict=True))
        names = [name for name in (*questions, PUBLISHED) if name in shown_as]
        handles = [shown_as[name] for name in names]
        figure.legend(handles, names, loc="outside lower center", ncols=len(handles) or 1, frameon=False)
    return figure


def _bars(axes: Axes, findings: StudyFindings, benchmark: str, questions: Sequence[str]) -> None:
    by_place = {(r.question, r.baseline): r for r in findings.results if r.benchmark == benchmark and r.category == ALL}
    row, ticks = 0.0, []
    for baseline in findings.key.baselines:
        ticks.append((row + (len(questions) - 1) / 2, f"against {baseline}"))
        for position, question in enumerate(questions):
            result = by_place.get((question, baseline))
            if result is not None and result.win_rate is not None and result.interval is not None:
                low, high = result.interval
                axes.barh(row, result.win_rate, color=COLOURS[position % len(COLOURS)], height=0.8, label=question)
                reach = [[result.win_rate - low], [high - result.win_rate]]
                axes.errorbar(result.win_rate, row, xerr=reach, color="#222222", linewidth=1, capsize=2)
                beside = dict(xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points")
                text = percent(result.win_rate, decimals=0)
                axes.annotate(text, (1, row), va="center", fontsize=8, color="#333333", **beside)
            published = published_user_study(benchmark, question, baseline)
            if published is not None:
                style = dict(color="white", markeredgecolor=BASELINE_COLOUR, linestyle="", label=PUBLISHED)
                axes.plot(published, row, marker="D", **style)
            row += 1
        row += 0.8
    axes.axvline(0.5, color="#222222", linestyle=(0, (3, 2)), linewidth=1)
    axes.set(xlim=(0, 1), ylim=(row - 1.1, -0.7))
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(f"{findings.key.model}: {'all prompts' if benchmark == ALL else benchmark}")
