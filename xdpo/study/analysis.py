"""Analyse the votes: majorities and win rates by question, baseline, benchmark and style; agreement; checks.

A pair goes to the side with more than half of its planned votes (the paper: 3 of 5). Without such a majority it is
undecided. Repeats and obvious pairs are checks and count in no result.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xdpo.scores.statistics import sign_test, wilson_interval
from xdpo.study.folder import Key, Study
from xdpo.study.votes import Vote

ALL = "all"


@dataclass(frozen=True)
class Judgement:
    """One annotator's answer to one question on one pair, as a model instead of a side."""

    item: str
    annotator: int
    question: str
    prefers_model: bool  # the tested model's image over the baseline's
    baseline: str
    benchmark: str
    category: str
    key: str
    prompt: str


@dataclass(frozen=True)
class Result:
    """A question on the pairs of one baseline, in one benchmark and style or in all ("all").

    wins, losses: pairs that the tested model won or lost by majority. win_rate: the share of wins among decided pairs,
    with Wilson's 95 % interval; both None without decided pairs. vote_rate: the share of single votes for the tested
    model. kappa: Fleiss' κ over pairs that have all their planned votes; None where it isn't defined.
    """

    question: str
    baseline: str
    benchmark: str
    category: str
    wins: int
    losses: int
    undecided: int
    votes: int
    win_rate: float | None
    interval: tuple[float, float] | None
    sign_test: float
    vote_rate: float | None
    kappa: float | None


@dataclass(frozen=True)
class Checks:
    """An annotator's attention: failures of the checks that were answered.

    An obvious pair fails if the wrong image is said to match the text. A repeat fails a question if the other image is
    chosen the second time.
    """

    annotator: int
    votes: int
    obvious: int
    obvious_failed: int
    repeats: int
    repeats_failed: int

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
            chosen = item.images[getattr(task, side)]
            facts = (item.baseline, item.benchmark, item.category, item.key, item.prompt)
            judged.append(Judgement(task.item, vote.annotator, question, chosen == key.model, *facts))
    return judged


def results(study: Study, key: Key, given: Sequence[Judgement]) -> list[Result]:
    """Results for each question and baseline: over all prompts, over each benchmark, and over each of its styles."""
    all_results = []
    for question in [question["id"] for question in study.questions]:
        for baseline in key.baselines:
            pairs = [item for item in key.items.items() if item[1].kind == "pair" and item[1].baseline == baseline]
            groups: dict[tuple[str, str], list[str]] = defaultdict(list)
            for name, item in pairs:
                for group in ((ALL, ALL), (item.benchmark, ALL), (item.benchmark, item.category)):
                    groups[group].append(name)
            if len({item.benchmark for _, item in pairs}) == 1:
                del groups[ALL, ALL]  # a single benchmark's results are the same
            asked: dict[str, list[bool]] = defaultdict(list)
            for judgement in given:
                if judgement.question == question and judgement.baseline == baseline:
                    asked[judgement.item].append(judgement.prefers_model)
            for (benchmark, category), names in groups.items():
                votes = [asked[name] for name in names]
                all_results.append(_result(question, baseline, benchmark, category, votes, study.votes_per_pair))
    return all_results


def _result(
    question: str, baseline: str, benchmark: str, category: str, votes: Sequence[Sequence[bool]], votes_per_pair: int
) -> Result:
    wins = sum(2 * sum(each) > votes_per_pair for each in votes)
    losses = sum(2 * (len(each) - sum(each)) > votes_per_pair for each in votes)
    single = [vote for each in votes for vote in each]
    complete = np.array([[sum(each), len(each) - sum(each)] for each in votes if len(each) == votes_per_pair])
    return Result(
        question=question,
        baseline=baseline,
        benchmark=benchmark,
        category=category,
        wins=wins,
        losses=losses,
        undecided=len(votes) - wins - losses,
        votes=len(single),
        win_rate=wins / (wins + losses) if wins + losses else None,
        interval=wilson_interval(wins, wins + losses) if wins + losses else None,
        sign_test=sign_test(wins, losses),
        vote_rate=sum(single) / len(single) if single else None,
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
        wrong = [vote for vote in obvious if _chosen(study, key, vote, "alignment") == "wrong"]
        changed = [
            (vote, question)
            for vote in repeats
            for question in vote.answers
            if _image(study, vote, question) != _image(study, by_task[key.repeats[vote.task]], question)
        ]
        asked = len(study.questions) * len(repeats)
        checks.append(Checks(number, len(own_votes), len(obvious), len(wrong), asked, len(changed)))
    return checks


def _image(study: Study, vote: Vote, question: str) -> str:
    return getattr(study.owner_of[vote.task][1], vote.answers[question])


def _chosen(study: Study, key: Key, vote: Vote, question: str) -> str:
    return key.items[study.owner_of[vote.task][1].item].images[_image(study, vote, question)]


def vote_rows(study: Study, key: Key, votes: Iterable[Vote]) -> list[dict[str, Any]]:
    """A row for each vote and question: what it was on, with models by name and checks marked."""
    rows = []
    for vote in votes:
        _, task = study.owner_of[vote.task]
        item = key.items[task.item]
        for question, side in vote.answers.items():
            other = "right" if side == "left" else "left"
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
                    "chosen": item.images[getattr(task, side)],
                    "rejected": item.images[getattr(task, other)],
                    "side": side,
                    "seconds": vote.seconds,
                    "at": vote.at,
                    "task": vote.task,
                    "item": task.item,
                }
            )
    return rows


def left_share(votes: Iterable[Vote]) -> Mapping[str, float]:
    """By question, the share of votes for the left image; far from ½, somebody may always press the same key."""
    sides: dict[str, list[bool]] = defaultdict(list)
    for vote in votes:
        for question, side in vote.answers.items():
            sides[question].append(side == "left")
    return {question: sum(found) / len(found) for question, found in sides.items()}
