"""What a study found, as tables and sentences that its report and its page share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xdpo.report.grids import Cell, Grid, p_value, percent
from xdpo.study.analysis import (
    ALL,
    Checks,
    Dispute,
    Result,
    attention,
    disputes,
    hasty,
    judgements,
    left_share,
    results,
)
from xdpo.study.folder import Key, Study
from xdpo.study.votes import Vote

NO_DISPUTES = "None: on every pair with several votes, some answer has more than two thirds of them."


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
    disputes: Sequence[Dispute]

    @property
    def summary(self) -> str:
        study, planned = self.study, sum(map(len, self.study.tasks))
        return (
            f"{self.key.model} against {', '.join(self.key.baselines)}; {len(self.votes)} of {planned} votes, checks "
            f"among them; {study.votes_per_pair} votes wanted of every pair. Study {study.id}."
        )

    @property
    def explanation(self) -> str:
        text = (
            "Win rates are of pairs decided by majority, with Wilson's 95 % interval; p is the two-sided sign test's. "
            "Fleiss' κ is over pairs that have all their votes."
        )
        return text if self.study.form.tie is None else f"{text} In single votes, a tie is half a vote for each."


def find(study: Study, key: Key, votes: Sequence[Vote], allowed_share: float) -> StudyFindings:
    """Analyse the votes, with everybody and without those who failed more than `allowed_share` of their checks."""
    given, checks = judgements(study, key, votes), attention(study, key, votes)
    excluded = [each.annotator for each in checks if each.is_inattentive(allowed_share)]
    kept = [judgement for judgement in given if judgement.annotator not in excluded]
    without = results(study, key, kept) if excluded else ()
    return StudyFindings(study, key, votes, results(study, key, given), checks, excluded, without, disputes(given))


def overview(study: Study, results: Sequence[Result]) -> Grid:
    """A row for each question and baseline, over all prompts of a benchmark or of all of them."""
    return _grid(study, "Results", [result for result in results if result.category == ALL])


def by_group(study: Study, results: Sequence[Result]) -> Grid:
    """A row for each style of each benchmark."""
    return _grid(study, "By style", [result for result in results if result.category != ALL], with_category=True)


def _grid(study: Study, title: str, results: Sequence[Result], with_category: bool = False) -> Grid:
    columns = ("question", "against", "benchmark", *(["style"] if with_category else []))
    has_ties = study.form.tie is not None
    columns += ("wins", "losses", "undecided", "win rate", "p", "votes", *(["ties"] if has_ties else []))
    columns += ("single votes", "κ")
    rows = []
    for result in results:
        rate = Cell("")
        if result.win_rate is not None and result.interval is not None:
            low, high = result.interval
            rate = Cell(percent(result.win_rate), result.win_rate, f"[{percent(low)}, {percent(high)}]")
        single = Cell("") if result.vote_rate is None else Cell(percent(result.vote_rate), result.vote_rate)
        kappa = Cell("") if result.kappa is None else Cell(f"{result.kappa:.2f}".replace("-", "−"), result.kappa)
        names = [result.question, result.baseline, result.benchmark, *([result.category] if with_category else [])]
        counts = [Cell(str(count), count) for count in (result.wins, result.losses, result.undecided)]
        p = Cell("") if result.win_rate is None else Cell(p_value(result.sign_test), result.sign_test)
        votes = [Cell(str(result.votes), result.votes), *([Cell(str(result.ties), result.ties)] if has_ties else [])]
        rows.append((*map(Cell, names), *counts, rate, p, *votes, single, kappa))
    return Grid(title, columns, tuple(rows))


def checks_grid(checks: Sequence[Checks], excluded: Sequence[int]) -> Grid:
    """Each voting annotator's checks, times and size of images on the screen, a row each."""
    fast = hasty(checks)

    def number(value: float | None, decimals: int) -> Cell:
        return Cell("–") if value is None else Cell(f"{value:.{decimals}f}", value)

    rows = tuple(
        (
            Cell(str(each.annotator), each.annotator),
            Cell(str(each.votes), each.votes),
            Cell(f"{each.obvious_failed} of {each.obvious}"),
            Cell(f"{each.repeats_failed} of {each.repeats}"),
            number(each.seconds, 1),
            number(each.width, 0),
            Cell(
                ", ".join(
                    [
                        *(["left out"] if each.annotator in excluded else []),
                        *(["fast"] if each.annotator in fast else []),
                    ]
                )
            ),
        )
        for each in checks
        if each.votes
    )
    columns = ("annotator", "votes", "obvious failed", "repeats changed", "seconds a pair", "image width, px", "")
    note = "Medians; fast: in less than a third of the usual time. Widths are in CSS pixels, as the image was shown."
    return Grid("Checks", columns, rows, note)


def disputed_pairs(findings: StudyFindings) -> Grid:
    """The pairs on which no answer has more than two thirds of the votes, least agreement first."""
    has_ties = findings.study.form.tie is not None
    rows = []
    for each in findings.disputes:
        item = findings.key.items[each.item]
        names = (each.question, item.benchmark, item.key, item.prompt, str(item.baseline))
        counts = (each.model, *((each.ties,) if has_ties else ()), each.baseline)
        rows.append((*map(Cell, names), *(Cell(str(count), count) for count in counts)))
    columns = ("question", "benchmark", "image", "prompt", "against")
    counted = (f"for {findings.key.model}", *(("ties",) if has_ties else ()), "for the other")
    note = "No answer has more than two thirds of the votes; those with least agreement come first."
    return Grid("Disputed pairs", (*columns, *counted), tuple(rows), note)


def attention_text(findings: StudyFindings) -> str:
    times = [vote.seconds for vote in findings.votes if vote.seconds is not None]
    text = ""
    if times:
        low, middle, high = np.quantile(times, (0.25, 0.5, 0.75))
        text = f"A pair was on the screen for {middle:.1f} s (median; half of them {low:.1f} to {high:.1f} s). "
    return text + _checks_text(findings)


def _checks_text(findings: StudyFindings) -> str:
    shares = ", ".join(f"{question} {percent(share)}" for question, share in left_share(findings.votes).items())
    sides = f"Share of votes for the left image: {shares}. " if shares else ""
    if not any(each.obvious + each.repeats for each in findings.checks):
        return sides + "No checks were answered."
    if not findings.excluded:
        return sides + "Nobody failed so many checks as to be left out."
    excluded = ", ".join(map(str, findings.excluded))
    return sides + f"Annotators {excluded} failed too many checks; the last table leaves them out."
