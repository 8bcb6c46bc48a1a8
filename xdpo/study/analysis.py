"""Analyse the votes: majorities and win rates by question, baseline, benchmark and style; agreement; checks.

A pair goes to the side with more than half of its planned votes (the paper: 3 of 5). Without such a majority it is
undecided. A tie is a vote for neither side, and half a vote for each in shares of single votes. Repeats and obvious
pairs are checks and count in no result.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xdpo.scores.statistics import sign_test, wilson_interval
from xdpo.study.folder import Item, Key, Study
from xdpo.study.form import TIE
from xdpo.study.votes import Vote

ALL = "all"
DISPUTED = 2 / 3  # of a pair's votes: no answer has more
HASTY = 1 / 3  # of the usual time


@dataclass(frozen=True)
class Judgement:
    """One annotator's answer to one question on one pair, as a model instead of a side."""

    item: str
    annotator: int
    question: str
    prefers_model: bool | None  # the tested model's image over the baseline's; None: a tie
    baseline: str
    benchmark: str
    category: str
    key: str
    prompt: str


@dataclass(frozen=True)
class Result:
    """A question on the pairs of one baseline, in one benchmark and style or in all ("all").

    wins, losses: pairs that the tested model won or lost by majority. win_rate: the share of wins among decided pairs,
    with Wilson's 95 % interval; both None without decided pairs. ties: of the votes. vote_rate: the share of single
    votes for the tested model. kappa: Fleiss' κ over pairs that have all their planned votes; None where it isn't
    defined.
    """

    question: str
    baseline: str
    benchmark: str
    category: str
    wins: int
    losses: int
    undecided: int
    votes: int
    ties: int
    win_rate: float | None
    interval: tuple[float, float] | None
    sign_test: float
    vote_rate: float | None
    kappa: float | None


@dataclass(frozen=True)
class Checks:
    """An annotator's attention: failures of the checks that were answered.

    An obvious pair fails unless the right image is said to match the text. A repeat fails a question if the answer is
    another the second time. seconds: the median time of a pair; width: the median width of an image on the screen, in
    CSS pixels.
    """

    annotator: int
    votes: int
    obvious: int
    obvious_failed: int
    repeats: int
    repeats_failed: int
    seconds: float | None = None
    width: float | None = None

    def is_inattentive(self, allowed_share: float) -> bool:
        """Whether more than that share of all checks failed."""
        checks, failed = self.obvious + self.repeats, self.obvious_failed + self.repeats_failed
        return checks > 0 and failed > allowed_share * checks


def judgements(study: Study, key: Key, votes: Iterable[Vote]) -> list[Judgement]:
    """The answers on pairs as models, one for each vote and question; checks are left out."""
    judged = []
    for vote in votes:
        _, task = study.owner_of[vote.task]
        item = key.items[task.item]
        if item.baseline is None or vote.task in key.repeats:  # a check
            continue
        for question, side in vote.answers.items():
            prefers_model = None if side == TIE else item.images[getattr(task, side)] == key.model
            facts = (item.baseline, item.benchmark, item.category, item.key, item.prompt)
            judged.append(Judgement(task.item, vote.annotator, question, prefers_model, *facts))
    return judged


def results(study: Study, key: Key, given: Sequence[Judgement]) -> list[Result]:
    """Results for each question and baseline: over all prompts, over each benchmark, and over each of its styles."""
    all_results = []
    for question in [question["id"] for question in study.form.questions]:
        for baseline in key.baselines:
            pairs = [item for item in key.items.items() if item[1].kind == "pair" and item[1].baseline == baseline]
            groups: dict[tuple[str, str], list[str]] = defaultdict(list)
            for name, item in pairs:
                for group in ((ALL, ALL), (item.benchmark, ALL), (item.benchmark, item.category)):
                    groups[group].append(name)
            if len({item.benchmark for _, item in pairs}) == 1:
                del groups[ALL, ALL]  # a single benchmark's results are the same
            asked: dict[str, list[bool | None]] = defaultdict(list)
            for judgement in given:
                if judgement.question == question and judgement.baseline == baseline:
                    asked[judgement.item].append(judgement.prefers_model)
            for (benchmark, category), names in groups.items():
                votes = [asked[name] for name in names]
                all_results.append(_result(question, baseline, benchmark, category, votes, study.votes_per_pair))
    return all_results


def _result(
    question: str,
    baseline: str,
    benchmark: str,
    category: str,
    votes: Sequence[Sequence[bool | None]],
    votes_per_pair: int,
) -> Result:
    counts = [(each.count(True), each.count(False), each.count(None)) for each in map(list, votes)]
    wins = sum(2 * ours > votes_per_pair for ours, _, _ in counts)
    losses = sum(2 * theirs > votes_per_pair for _, theirs, _ in counts)
    ours, theirs, ties = (sum(column) for column in zip(*counts, strict=True))
    single = ours + theirs + ties
    complete = np.array([each for each in counts if sum(each) == votes_per_pair])
    return Result(
        question=question,
        baseline=baseline,
        benchmark=benchmark,
        category=category,
        wins=wins,
        losses=losses,
        undecided=len(votes) - wins - losses,
        votes=single,
        ties=ties,
        win_rate=wins / (wins + losses) if wins + losses else None,
        interval=wilson_interval(wins, wins + losses) if wins + losses else None,
        sign_test=sign_test(wins, losses),
        vote_rate=(ours + ties / 2) / single if single else None,
        kappa=fleiss_kappa(complete) if len(complete) else None,
    )


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Fleiss' κ (1971) of counts (items, answers), every row with the same sum ≥ 2.

    None where it isn't defined: with a single vote an item, or with all votes the same, which chance also gives.
    """
    raters = counts.sum(axis=1)[0]
    if raters < 2:
        return None
    agreement = ((counts**2).sum(axis=1) - raters) / (raters * (raters - 1))
    by_chance = ((counts.sum(axis=0) / counts.sum()) ** 2).sum()
    return None if by_chance == 1 else float((agreement.mean() - by_chance) / (1 - by_chance))


def attention(study: Study, key: Key, votes: Sequence[Vote]) -> list[Checks]:
    """The checks of every annotator in order of number, also of those without a vote."""
    by_task = {vote.task: vote for vote in votes}
    checks = []
    for number in range(1, len(study.tasks) + 1):
        own_votes = [vote for vote in votes if vote.annotator == number]
        obvious = [vote for vote in own_votes if key.items[study.owner_of[vote.task][1].item].kind == "obvious"]
        repeats = [vote for vote in own_votes if vote.task in key.repeats and key.repeats[vote.task] in by_task]
        wrong = [vote for vote in obvious if _chosen(study, key, vote, study.form.check) != "right"]
        changed = [
            (vote, question)
            for vote in repeats
            for question in vote.answers
            if _image(study, vote, question) != _image(study, by_task[key.repeats[vote.task]], question)
        ]
        asked = len(study.form.questions) * len(repeats)
        seconds = _median(vote.seconds for vote in own_votes)
        width = _median(vote.display.width if vote.display else None for vote in own_votes)
        failed = (len(obvious), len(wrong), asked, len(changed))
        checks.append(Checks(number, len(own_votes), *failed, seconds, width))
    return checks


def _image(study: Study, vote: Vote, question: str) -> str:
    """The chosen image's name; "tie" for a tie."""
    answer = vote.answers[question]
    return answer if answer == TIE else getattr(study.owner_of[vote.task][1], answer)


def _chosen(study: Study, key: Key, vote: Vote, question: str | None) -> str | None:
    """What the chosen image of a check is: right or wrong; None for a tie."""
    assert question is not None, "build_study refuses checks without such a question"
    return key.items[study.owner_of[vote.task][1].item].images.get(_image(study, vote, question))


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def hasty(checks: Sequence[Checks]) -> list[int]:
    """The annotators whose median time is below a third of all annotators' median."""
    usual = _median(each.seconds for each in checks)
    return [each.annotator for each in checks if usual and each.seconds is not None and each.seconds < HASTY * usual]


@dataclass(frozen=True)
class Dispute:
    """A pair and a question on which annotators disagree, with the votes for each image and for a tie."""

    item: str
    question: str
    model: int
    ties: int
    baseline: int

    @property
    def agreement(self) -> float:
        """The share of the most frequent answer."""
        return max(self.model, self.ties, self.baseline) / (self.model + self.ties + self.baseline)


def disputes(given: Sequence[Judgement]) -> list[Dispute]:
    """The pairs on which no answer has more than two thirds of the votes, those with least agreement first."""
    counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for judgement in given:
        counts[judgement.item, judgement.question][judgement.prefers_model] += 1
    found = [Dispute(*which, votes[True], votes[None], votes[False]) for which, votes in counts.items()]
    disputed = [each for each in found if each.agreement <= DISPUTED]
    return sorted(disputed, key=lambda each: (each.agreement, -(each.model + each.ties + each.baseline)))


def order_of(item: Item, model: str) -> tuple[str, str]:
    """The names of a pair's images: the tested model's, the baseline's."""
    names = {label: name for name, label in item.images.items()}
    return names[model], names[str(item.baseline)]


def vote_rows(study: Study, key: Key, votes: Iterable[Vote]) -> list[dict[str, Any]]:
    """A row for each vote and question: what it was on, with models by name and checks marked."""
    rows = []
    for vote in votes:
        _, task = study.owner_of[vote.task]
        item = key.items[task.item]
        for question, side in vote.answers.items():
            is_tie, other = side == TIE, "right" if side == "left" else "left"
            rows.append(
                {
                    "annotator": vote.annotator,
                    "question": question,
                    "kind": "repeat" if vote.task in key.repeats else item.kind,
                    "benchmark": item.benchmark,
                    "category": item.category,
                    "key": item.key,
                    "prompt": item.prompt,
                    "baseline": item.baseline,
                    "chosen": None if is_tie else item.images[getattr(task, side)],
                    "rejected": None if is_tie else item.images[getattr(task, other)],
                    "side": side,
                    "seconds": vote.seconds,
                    "at": vote.at,
                    "shown_width": vote.display and vote.display.width,
                    "shown_height": vote.display and vote.display.height,
                    "pixel_ratio": vote.display and vote.display.ratio,
                    "task": vote.task,
                    "item": task.item,
                }
            )
    return rows


def left_share(votes: Iterable[Vote]) -> Mapping[str, float]:
    """By question, the share of votes for the left image among those for either; far from ½, somebody may always press
    the same key."""
    sides: dict[str, list[bool]] = defaultdict(list)
    for vote in votes:
        for question, side in vote.answers.items():
            if side != TIE:
                sides[question].append(side == "left")
    return {question: sum(found) / len(found) for question, found in sides.items()}
