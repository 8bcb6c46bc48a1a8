"""Write a study's results: Markdown, a bar chart with the published numbers, and a table of votes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from xdpo.files import replacing, write_text
from xdpo.report.figures import BASELINE_COLOUR, COLOURS, STYLE, save
from xdpo.report.grids import Cell, Grid, p_value, percent, to_markdown
from xdpo.report.published import published_user_study, user_study
from xdpo.study.analysis import ALL, Checks, Result, attention, judgements, left_share, results, vote_rows
from xdpo.study.folder import Key, Study
from xdpo.study.votes import Vote

PUBLISHED = "xDPO, published"  # this label is used whichever model the study tests


@dataclass(frozen=True)
class StudyFindings:
    """Everything that the report shows. `without_inattentive`: the results without the annotators in `excluded`."""

    study: Study
    key: Key
    votes: Sequence[Vote]
    results: Sequence[Result]
    checks: Sequence[Checks]
    excluded: Sequence[int]
    without_inattentive: Sequence[Result]


def find(study: Study, key: Key, votes: Sequence[Vote], allowed_share: float) -> StudyFindings:
    """Analyse the votes, with everybody and without those who failed more than `allowed_share` of their checks."""
    given, checks = judgements(study, key, votes), attention(study, key, votes)
    excluded = [each.annotator for each in checks if each.is_inattentive(allowed_share)]
    kept = [judgement for judgement in given if judgement.annotator not in excluded]
    without = results(study, key, kept) if excluded else ()
    return StudyFindings(study, key, votes, results(study, key, given), checks, excluded, without)


def write(findings: StudyFindings, folder: Path) -> Path:
    """Write report.md, figures and votes.parquet to `folder`; returns the report's path. Raises StorageError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    save(win_rate_bars(findings), folder / "win_rates")
    if rows := vote_rows(findings.study, findings.key, findings.votes):
        with replacing(folder / "votes.parquet", "wb") as file:
            pq.write_table(pa.Table.from_pylist(rows), file)
    path = folder / "report.md"
    write_text(path, markdown(findings))
    return path


def markdown(findings: StudyFindings) -> str:
    """The report as text."""
    study, key = findings.study, findings.key
    planned = sum(map(len, study.tasks))
    blocks = [
        f"# {study.title}",
        f"{key.model} against {', '.join(key.baselines)}; {len(findings.votes)} of {planned} votes, checks among them; "
        f"{study.votes_per_pair} votes wanted of every pair. Study {study.id}.",
        "Win rates are of pairs decided by majority, with Wilson's 95 % interval; p is the two-sided sign test's. "
        "Fleiss' κ is over pairs that have all their votes.",
        to_markdown(overview(study, findings.results)),
        "![Win rates](win_rates.png)",
        user_study(),
        "## By benchmark and style",
        to_markdown(by_group(study, findings.results)),
        "## Attention",
        _attention_text(findings),
        to_markdown(checks_grid(findings.checks, findings.excluded)),
    ]
    if findings.excluded:
        blocks += ["## Without the inattentive", to_markdown(overview(study, findings.without_inattentive))]
    return "\n\n".join(blocks) + "\n"


def overview(study: Study, results: Sequence[Result]) -> Grid:
    """A row for each question and baseline, over all prompts of a benchmark or of all of them."""
    return _grid(study, "Results", [result for result in results if result.category == ALL])


def by_group(study: Study, results: Sequence[Result]) -> Grid:
    """A row for each style of each benchmark."""
    return _grid(study, "By style", [result for result in results if result.category != ALL], with_category=True)


def _grid(study: Study, title: str, results: Sequence[Result], with_category: bool = False) -> Grid:
    columns = ("question", "against", "benchmark", *(["style"] if with_category else []))
    columns += ("wins", "losses", "undecided", "win rate", "p", "votes", "single votes", "κ")
    rows = []
    for result in results:
        rate = Cell("")
        if result.win_rate is not None and result.interval is not None:
            low, high = result.interval
            rate = Cell(percent(result.win_rate), result.win_rate, f"[{percent(low)}, {percent(high)}]")
        single = Cell("") if result.vote_rate is None else Cell(percent(result.vote_rate), result.vote_rate)
        kappa = Cell("") if result.kappa is None else Cell(f"{result.kappa:.2f}", result.kappa)
        names = [result.question, result.baseline, result.benchmark, *([result.category] if with_category else [])]
        counts = [Cell(str(count), count) for count in (result.wins, result.losses, result.undecided)]
        p = Cell("") if result.win_rate is None else Cell(p_value(result.sign_test), result.sign_test)
        votes = Cell(str(result.votes), result.votes)
        rows.append((*map(Cell, names), *counts, rate, p, votes, single, kappa))
    return Grid(title, columns, tuple(rows))


def checks_grid(checks: Sequence[Checks], excluded: Sequence[int]) -> Grid:
    """Each voting annotator's checks, a row each."""
    rows = tuple(
        (
            Cell(str(each.annotator), each.annotator),
            Cell(str(each.votes), each.votes),
            Cell(f"{each.obvious_failed} of {each.obvious}"),
            Cell(f"{each.repeats_failed} of {each.repeats}"),
            Cell("left out" if each.annotator in excluded else ""),
        )
        for each in checks
        if each.votes
    )
    return Grid("Checks", ("annotator", "votes", "obvious failed", "repeats changed", ""), rows)


def _attention_text(findings: StudyFindings) -> str:
    shares = ", ".join(f"{question} {percent(share)}" for question, share in left_share(findings.votes).items())
    sides = f"Share of votes for the left image: {shares}. " if shares else ""
    if not any(each.obvious + each.repeats for each in findings.checks):
        return sides + "No checks were answered."
    if not findings.excluded:
        return sides + "Nobody failed so many checks as to be left out."
    excluded = ", ".join(map(str, findings.excluded))
    return sides + f"Annotators {excluded} failed too many checks; the last table leaves them out."


def win_rate_bars(findings: StudyFindings) -> Figure:
    """Win rates by question and baseline with intervals, published ones as diamonds (as the paper's Figure 3, top)."""
    shown = [result for result in findings.results if result.category == ALL]
    questions = [question["id"] for question in findings.study.questions]
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
                axes.barh(row, result.win_rate, color=COLOURS[position], height=0.8, label=question)
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
