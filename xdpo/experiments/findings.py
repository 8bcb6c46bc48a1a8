"""The results of a finished reproduction: scores as arrays, logged metrics by seed, answers to the plan's questions."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from xdpo.experiments import measures
from xdpo.experiments.measures import Estimate
from xdpo.experiments.plan import BASE, Plan, Question
from xdpo.experiments.runs import Run
from xdpo.experiments.stages import model_name


@dataclass(frozen=True)
class Findings:
    """Everything that the results page needs.

    candidates: (method, value) → the tuning's training. tuning: (method, value) → its mean score on the tuning's
    prompts, NaN if it failed. scores: (model's name or BASE, scorer) → (prompts,). failed: run → the end of its log.
    """

    plan: Plan
    candidates: Mapping[tuple[str, str], Run]
    tuning: Mapping[tuple[str, str], float]
    chosen: Mapping[str, str]
    runs: Mapping[tuple[str, int], Run]
    scores: Mapping[tuple[str, str], np.ndarray]
    failed: Mapping[str, str]

    @cached_property
    def methods(self) -> list[str]:
        """The methods with results for all seeds, in the plan's order."""
        return [
            name
            for name in self.plan.methods
            if all((self.model(name, seed), self.plan.score) in self.scores for seed in self.plan.seeds)
        ]

    def model(self, method: str, seed: int, step: int | None = None) -> str:
        if (method, seed) not in self.runs:
            return ""
        return model_name(self.runs[method, seed], step or self.plan.steps)

    def of(self, method: str, scorer: str, step: int | None = None) -> np.ndarray:
        """Scores (seeds, prompts) of a method; BASE has the same scores for every seed."""
        if method == BASE or step == 0:
            return np.broadcast_to(self.scores[BASE, scorer], (len(self.plan.seeds), len(self.scores[BASE, scorer])))
        return np.stack([self.scores[self.model(method, seed, step), scorer] for seed in self.plan.seeds])

    def curve(self, method: str, scorer: str) -> np.ndarray:
        """Scores (points, seeds, prompts) at step 0 and at the plan's checkpoints."""
        return np.stack([self.of(method, scorer, step) for step in (0, *self.plan.checkpoints)])

    def pairs_at(self, method: str) -> list[int]:
        """Training pairs seen at the points of `curve`."""
        batch = self.runs[method, self.plan.seeds[0]].settings.train.total_batch_pairs
        return [step * batch for step in (0, *self.plan.checkpoints)]

    def logged(self, method: str, key: str) -> np.ndarray:
        """The last value of a logged metric, (seeds, 1); zeros for BASE, NaN if a method doesn't log it."""
        if method == BASE:
            return np.zeros((len(self.plan.seeds), 1))
        last_values = []
        for seed in self.plan.seeds:
            values = [row[key] for row in self.runs[method, seed].rows() if key in row]
            last_values.append([values[-1] if values else np.nan])
        return np.array(last_values)

    def logged_curve(self, method: str, key: str) -> tuple[list[int], np.ndarray]:
        """Optimizer steps, and a logged metric at them, (seeds, steps)."""
        series = [
            {row["step"]: row[key] for row in self.runs[method, seed].rows() if key in row} for seed in self.plan.seeds
        ]
        steps = sorted(set.intersection(*map(set, series)))
        return steps, np.array([[values[step] for step in steps] for values in series])

    def seconds_per_pair(self, method: str) -> float:
        """Seconds of optimizer steps per pair in the method's fastest run, tuning runs included.

        The fastest run counts, because slower ones record the reference's errors for later runs or share the machine.
        """
        runs = [run for (name, _), run in [*self.candidates.items(), *self.runs.items()] if name == method]
        speeds = [[row["pairs_per_second"] for row in run.rows() if "pairs_per_second" in row] for run in runs]
        return min(float(np.mean(1 / np.array(each))) for each in speeds if len(each) >= self.plan.steps)

    def speed_up(self, method: str) -> Estimate:
        """The baseline's pairs to its final score, divided by the method's pairs to that score."""
        score, baseline = self.plan.score, self.plan.baseline
        return measures.speed_up(self.pairs_at(method), self.curve(method, score), self.curve(baseline, score))

    def answer(self, question: Question) -> tuple[str, Estimate]:
        """The answer in words, which follows from the interval of the difference; and the difference."""
        if question.logged:
            values, others = (self.logged(name, question.logged) for name in (question.method, question.than))
            difference = measures.difference(values, others)
            better, what = -difference.sign, ("lower", "higher")
        else:
            score = question.score or self.plan.score
            difference = measures.difference(self.of(question.method, score), self.of(question.than, score))
            better, what = difference.sign, ("higher", "lower")
        words = {
            "better": {1: "yes", 0: "not resolved", -1: "no, it is worse"},
            "differs": {1: f"yes, {what[0]}", 0: "no difference resolved", -1: f"yes, {what[1]}"},
            "holds": {1: "yes, it rises", 0: "no change resolved", -1: "no, it falls"},
        }
        return words[question.kind][better], difference

    def can_answer(self, question: Question) -> bool:
        return all(name in (BASE, *self.methods) for name in (question.method, question.than))
