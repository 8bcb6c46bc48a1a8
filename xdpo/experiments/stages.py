"""The stages of a plan: trainings, their images, their scores. Each stage is a list of tasks that can be interrupted.

OUTPUT/runs/{run}, OUTPUT/runs/cache         trainings; caches of examples and of the reference's errors
OUTPUT/images/{run}-step{step}, …/base       generate.py's folders
OUTPUT/tuning, OUTPUT/results                evaluate.py's folders
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xdpo.experiments.plan import BASE, Plan
from xdpo.experiments.runs import ROOT, Run, make_run
from xdpo.experiments.tasks import Task, launcher, once
from xdpo.runs import checkpoint_path
from xdpo.scores.results import benchmarks_of
from xdpo.scores.table import ScoreTable


@dataclass(frozen=True)
class Reproduction:
    """A plan, its output folder, and the number of GPUs for a training or a sampling."""

    plan: Plan
    output: Path
    num_processes: int = 1

    def tuning_runs(self) -> dict[tuple[str, str], Run]:
        """A training for each tuned method and value. Raises ConfigError."""
        tuning = self.plan.tuning
        return {
            (method, value): self._run(f"tuning-{method}-{value}", method, value, tuning.seed, (self.plan.steps,))
            for method in self.plan.tuned
            for value in tuning.values
        }

    def runs(self, chosen: Mapping[str, str]) -> dict[tuple[str, int], Run]:
        """A training for each method and seed, at the values `chosen` for the tuned ones. Raises ConfigError.

        Methods without a chosen value are left out.
        """
        runs = {}
        for name, method in self.plan.methods.items():
            value = chosen.get(method.tuned_as or name)
            if value is None:
                continue
            for seed in self.plan.seeds:
                steps = self.plan.measured_steps(name)
                runs[name, seed] = self._run(f"{name}-seed{seed}", name, value, seed, steps)
        return runs

    def _run(self, name: str, method: str, value: str, seed: int, steps: Sequence[int]) -> Run:
        plan = self.plan
        overrides = [f"train.max_steps={plan.steps}", "checkpoint.keep=1"]
        if len(steps) > 1:  # keep the measured checkpoints
            every = math.gcd(*steps)
            # Keep all: a stopped run saves one more checkpoint, and must not remove a measured one for it.
            overrides = [overrides[0], f"checkpoint.every={every}", f"checkpoint.keep={plan.steps}"]
        set_here = (*plan.methods[method].set, f"{plan.tuning.key}={value}", f"seed={seed}")
        return make_run(name, plan.methods[method].config, (*overrides, *plan.common, *set_here), self.output / "runs")

    # --- images and scores -----------------------------------------------------------------------------

    def images(self, run: Run, step: int, prompts: Sequence[str]) -> Task:
        """The images of a run's model after `step` optimizer steps."""
        checkpoint = checkpoint_path(run.folder, step)
        name = model_name(run, step)
        return self._images(name, str(checkpoint), prompts, (checkpoint / "policy.safetensors",))

    def base_images(self, pipeline: str, prompts: Sequence[str], name: str = BASE) -> Task:
        """The images of the model before training."""
        return self._images(name, pipeline, prompts, ())

    def _images(self, name: str, model: str, prompts: Sequence[str], inputs: Sequence[Path]) -> Task:
        folder = self.output / "images" / name
        arguments = ("--model", model, "--prompts", *prompts, "--output", str(folder), *self.plan.generate)
        command = (*launcher(self.num_processes), str(ROOT / "generate.py"), *arguments)
        return once(f"images of {name}", command, folder.with_name(name + ".log"), inputs)

    def evaluation(self, folder: str, images: Sequence[Task]) -> Task:
        """The scores and report of images, in OUTPUT/`folder`."""
        output = self.output / folder
        names = [task.command[task.command.index("--output") + 1] for task in images]
        command = (*launcher(1), str(ROOT / "evaluate.py"), "--images", *names, "--scorers")
        command += (",".join(self.plan.scorers), "--output", str(output), "--title", self.plan.title)
        inputs = [task.log.with_name(task.log.name + ".done") for task in images]
        return once(f"scores in {output}", command, output.with_name(folder + ".log"), inputs)

    def scores(self, folder: str, models: Sequence[str]) -> dict[tuple[str, str], np.ndarray]:
        """(model, scorer) → scores (prompts,), with the prompts of all sets in sequence.

        Raises ValueError if a model has no scores.
        """
        rows = [row for row in ScoreTable(self.output / folder).placed if row.placement.model in set(models)]
        if absent := sorted(set(models) - {row.placement.model for row in rows}):
            raise ValueError(f"no scores of {absent[0]} in {self.output / folder}")
        benchmarks = benchmarks_of(rows, list(models), list(self.plan.scorers))
        return {
            (model, scorer): np.concatenate([benchmark.of(model, scorer) for benchmark in benchmarks])
            for model in models
            for scorer in self.plan.scorers
        }


def model_name(run: Run, step: int) -> str:
    return f"{run.name}-step{step}"


def choose(scores: Mapping[tuple[str, str], float]) -> dict[str, str]:
    """The value with the highest mean score for each method, from (method, value) → score. A tie goes to the first."""
    best: dict[str, str] = {}
    for (method, value), score in scores.items():
        if method not in best or score > scores[method, best[method]]:
            best[method] = value
    return best
