"""The results of a finished reproduction: scores as arrays, logged metrics by seed, answers to the plan's questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from xdpo.experiments import measures
from xdpo.experiments.measures import Estimate
from xdpo.experiments.plan import BASE, COSTS, Plan, Question
from xdpo.experiments.runs import Run
from xdpo.experiments.stages import model_name
from xdpo.report.curves import progress_by_step
from xdpo.scores.image_statistics import DISTANCE

BOTH_ERRORS = "eval/d"
"""Mean of d of chosen and of rejected held-out images: how much more than the base's is the policy's bound on the KL
divergence of held-out images from what it draws."""
ZERO_FOR_BASE = (*COSTS, DISTANCE, BOTH_ERRORS, "eval/d_chosen", "eval/d_rejected")
"""Quantities that are zero before training, by what they mean."""


@dataclass(frozen=True)
class Findings:
    """Everything that the results page needs.

    candidates: (method, value) → the tuning's training. tuning: (method, value) → its mean score on the tuning's
    prompts, NaN if it failed. scores: guidance → (model's name or BASE, quantity) → (prompts,). failed: run → the end
    of its log. timed: method → the run that its speed was measured with.
    """

    plan: Plan
    candidates: Mapping[tuple[str, str], Run]
    tuning: Mapping[tuple[str, str], float]
    chosen: Mapping[str, str]
    runs: Mapping[tuple[str, int], Run]
    scores: Mapping[float, Mapping[tuple[str, str], np.ndarray]]
    failed: Mapping[str, str]
    timed: Mapping[str, Run]

    @cached_property
    def methods(self) -> list[str]:
        """The methods with results for all their seeds, in the plan's order."""
        scored = self.scores.get(self.plan.guidance, {})
        return [
            name
            for name in self.plan.methods
            if all((self.model(name, seed), self.plan.score) in scored for seed in self.plan.seeds_of(name))
        ]

    @cached_property
    def with_curves(self) -> list[str]:
        return [name for name in self.methods if self.plan.methods[name].curves]

    @cached_property
    def with_errors(self) -> list[str]:
        """The methods that log d from the base; an objective without a reference has none."""
        return [
            name
            for name in self.methods
            if self.logged_curve(name, "eval/d_chosen")[0]
            and not any(self.runs[name, seed].reference_moves for seed in self.plan.seeds_of(name))
        ]

    def model(self, method: str, seed: int, step: int | None = None) -> str:
        if (method, seed) not in self.runs:
            return ""
        return model_name(self.runs[method, seed], step or self.plan.steps)

    def of(self, method: str, quantity: str, step: int | None = None, guidance: float | None = None) -> np.ndarray:
        """A quantity of a method, (seeds, prompts); NaN where it was not measured.

        BASE has the same for every seed. Metrics and costs are the same for every prompt. step: None for the plan's
        steps, 0 for the base. guidance: None for the plan's first.
        """
        scores = self.scores[self.plan.guidance if guidance is None else guidance]
        seeds = self.plan.seeds if method == BASE else self.plan.seeds_of(method)
        prompts = len(scores[BASE, self.plan.score])
        step = self.plan.steps if step is None else step
        is_base = method == BASE or step == 0
        if is_base and quantity in ZERO_FOR_BASE:
            return np.zeros((len(seeds), prompts))
        if method != BASE and (quantity in COSTS or quantity.startswith("eval/")):
            values = [self._of_run(method, seed, quantity, step) for seed in seeds]
            return np.broadcast_to(np.array(values)[:, None], (len(seeds), prompts))
        models = [BASE if is_base else self.model(method, seed, step) for seed in seeds]
        return np.stack([scores.get((model, quantity), np.full(prompts, np.nan)) for model in models])

    def _of_run(self, method: str, seed: int, quantity: str, step: int) -> float:
        """A metric or a cost of a run at an optimizer step; NaN for a metric that it didn't log there."""
        run = self.runs[method, seed]
        rows = self._rows_of(run)
        if quantity in COSTS:
            pairs = progress_by_step(rows)[step].pairs
            # Not the run's own seconds, which are more where it recorded the reference's errors or shared the machine.
            return pairs if quantity == "pairs" else pairs * self.seconds_per_pair(method)
        if quantity == BOTH_ERRORS:  # from the policy's own errors: the reference may have moved away from the base
            return _logged(rows, "eval/policy_error", step) - _logged(rows, "eval/policy_error", 0)
        if quantity.startswith("eval/d_") and run.reference_moves:
            return float("nan")
        return _logged(rows, quantity, step)

    def curve(self, method: str, quantity: str, last: int | None = None) -> np.ndarray:
        """A quantity (points, seeds, prompts) at step 0 and at the method's measured steps, up to `last` if given."""
        steps = [step for step in self.plan.measured_steps(method) if last is None or step <= last]
        return np.stack([self.of(method, quantity, step) for step in (0, *steps)])

    def changes(self, method: str, quantity: str) -> list[Estimate]:
        """The change from the base at each point of a method's curve."""
        which = (method, quantity)
        if which not in self._changes:
            curve = self.curve(method, quantity)
            self._changes[which] = [measures.difference(point, curve[0]) for point in curve]
        return self._changes[which]

    @cached_property
    def _changes(self) -> dict[tuple[str, str], list[Estimate]]:
        """Kept, because several panels draw the same ones and each takes thousands of resamples."""
        return {}

    def _rows_of(self, run: Run) -> list[dict]:
        """A run's log, read once: each figure asks for it with every quantity, seed and step."""
        if run.name not in self._logs:
            self._logs[run.name] = run.rows()
        return self._logs[run.name]

    @cached_property
    def _logs(self) -> dict[str, list[dict]]:
        return {}

    def logged_curve(self, method: str, key: str) -> tuple[list[int], np.ndarray]:
        """Optimizer steps, and a logged metric at them, (seeds, steps)."""
        series = [
            {row["step"]: row[key] for row in self._rows_of(self.runs[method, seed]) if key in row}
            for seed in self.plan.seeds_of(method)
        ]
        steps = sorted(set.intersection(*map(set, series)))
        return steps, np.array([[values[step] for step in steps] for values in series])

    def seconds_per_pair(self, method: str) -> float:
        """Seconds of optimizer steps per pair, sampling and scoring included where they are part of the training.

        They are means over the last two thirds of a run that had the machine to itself. NaN if there was none.
        """
        if method not in self.timed:
            return float("nan")
        speeds = [row["pairs_per_second"] for row in self.timed[method].rows() if "pairs_per_second" in row]
        return float(np.mean(1 / np.array(speeds[len(speeds) // 3 :])))

    def speed_up(self, method: str) -> Estimate:
        """The baseline's pairs to its score after the plan's steps, divided by the method's pairs to that score."""
        score, baseline, steps = self.plan.score, self.plan.baseline, self.plan.steps
        pairs, baseline_pairs = (
            self.curve(name, "pairs", last).mean(axis=(1, 2)) for name, last in ((method, None), (baseline, steps))
        )
        return measures.speed_up(pairs, self.curve(method, score), baseline_pairs, self.curve(baseline, score, steps))

    def difference_at_equal(self, method: str, other: str, quantity: str, progress: str) -> Estimate:
        """The difference of two methods' quantity where their `progress` is the same; NaN where it never is."""
        ours, others = ((self.curve(name, quantity), self.curve(name, progress)) for name in (method, other))
        return measures.difference_at_equal(*ours, *others)

    def answer(self, question: Question) -> tuple[str, Estimate]:
        """The answer in words, which follows from the interval of the difference; and the difference."""
        quantity = question.quantity or self.plan.score
        if question.at_equal:
            difference = self.difference_at_equal(question.method, question.than, quantity, question.at_equal)
        else:
            values = self.of(question.method, quantity, question.step, question.guidance)
            others = self.of(question.than, quantity, question.than_step or question.step, question.guidance)
            difference = measures.difference(values, others)
        if not np.isfinite([difference.value, difference.low, difference.high]).all():
            return "cannot be told: it was not measured, on one seed alone, or never equal", difference
        words = {
            "better": {1: "yes", 0: "not resolved", -1: "no, it is worse"},
            "differs": {1: "yes, higher", 0: "no difference resolved", -1: "yes, lower"},
            "holds": {1: "yes, it rises", 0: "no change resolved", -1: "no, it falls"},
        }
        return words[question.kind][difference.sign], difference

    def can_answer(self, question: Question) -> bool:
        return all(name in (BASE, *self.methods) for name in (question.method, question.than))


def _logged(rows: Sequence[Mapping[str, float]], metric: str, step: int) -> float:
    """A metric's last value at an optimizer step, NaN without one."""
    found = [row[metric] for row in rows if row["step"] == step and metric in row]
    return found[-1] if found else float("nan")
