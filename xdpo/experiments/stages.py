"""The stages of a plan: trainings, their images, their scores. Each stage is a list of tasks that can be interrupted.

OUTPUT/{preparation}                         what some trainings need, such as a reward model
OUTPUT/runs/{run}, OUTPUT/runs/cache         trainings; caches of examples and of the reference's errors
OUTPUT/runs/timed-{method}, OUTPUT/timed     short trainings that measure speeds, and what they recorded
OUTPUT/images/guidance{g}/{run}-step{step}   generate.py's folders, and …/base
OUTPUT/tuning, OUTPUT/results/guidance{g}    evaluate.py's folders
OUTPUT/parts.json                            the parts of the plan that were finished
"""

import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xdpo.config import Config, ConfigError
from xdpo.experiments.plan import BASE, Parts, Plan
from xdpo.experiments.runs import ROOT, Run, make_run
from xdpo.experiments.tasks import Task, launcher, marker_of, once
from xdpo.files import write_text
from xdpo.runs import checkpoint_path
from xdpo.scores import image_statistics
from xdpo.scores.results import benchmarks_of
from xdpo.scores.table import ScoreTable

TIMED_ROUNDS = 3  # of sampling, in the run by which a method's speed is measured
TIMED_STEPS = 20  # in each of them where nothing is sampled


@dataclass(frozen=True)
class Reproduction:
    """A plan, its output folder, and the number of GPUs for a training or a sampling."""

    plan: Plan
    output: Path
    num_processes: int = 1

    def with_finished(self, parts: Parts) -> Parts:
        """These parts and those that earlier starts have finished, as far as the plan still has them."""
        record = self.output / "parts.json"
        if not record.is_file():
            return parts
        finished = Parts(**json.loads(record.read_text(encoding="utf-8")))
        return Parts(
            [name for name in self.plan.tuned if name in (*parts.tuned, *finished.tuned)],
            [name for name in self.plan.methods if name in (*parts.methods, *finished.methods)],
        )

    def record_finished(self, parts: Parts) -> None:
        write_text(self.output / "parts.json", json.dumps(parts._asdict(), indent=2) + "\n")

    def preparations(self, parts: Parts) -> list[Task]:
        """The programs whose results the parts' trainings use."""
        used = " ".join(word for name in {*parts.tuned, *parts.methods} for word in self.plan.methods[name].set)
        return [
            once(name, (*launcher(1), str(ROOT / program), *self._filled(words)), self.output / name, [])
            for name, (program, *words) in self.plan.prepare.items()
            if f"{{{name}}}" in used
        ]

    def tuning_runs(self, tuned: Collection[str]) -> dict[tuple[str, str], Run]:
        """A training for each of these methods and each value. Raises ConfigError."""
        tuning, steps = self.plan.tuning, self.plan.steps
        return {
            (method, value): self._run(f"tuning-{method}-{value}", method, value, tuning.seed, [steps])
            for method in tuned
            for value in tuning.values
        }

    def runs(self, methods: Collection[str], chosen: Mapping[str, str]) -> dict[tuple[str, int], Run]:
        """A training for each of these methods and each seed, at the values `chosen` for the tuned ones.

        Methods without a chosen value are left out. Raises ConfigError, also where a metric of held-out pairs would be
        missing that the results are to have, and where methods start from different models.
        """
        runs: dict[tuple[str, int], Run] = {}
        for name in methods:
            value = self.plan.value_of(name, chosen)
            if value is None:
                continue
            for seed in self.plan.seeds_of(name):
                run = self._run(f"{name}-seed{seed}", name, value, seed, self.plan.measured_steps(name))
                self._refuse_unevaluated(name, run)
                runs[name, seed] = run
        bases = {name: " ".join(base_model(run.settings)) for (name, _), run in runs.items()}
        for (first, shared), (name, base) in itertools.pairwise(bases.items()):
            if base != shared:
                raise ConfigError(
                    f"{name} starts from {base}, and {first} from {shared}; all methods of a plan are compared with "
                    "one base"
                )
        return runs

    def timed_runs(self, methods: Collection[str], chosen: Mapping[str, str]) -> dict[str, Run]:
        """A short training for each of these methods that is compared at equal seconds, to be run one by one.

        Each computes the reference's errors itself, as a training does that nobody has run before.
        """
        runs = {}
        for name in self.plan.timed:
            value = self.plan.value_of(name, chosen)
            if name not in methods or value is None:
                continue
            which = (f"timed-{name}", name, value, self.plan.tuning.seed)
            settings = self._run(*which, [self.plan.steps]).settings
            overrides = ["eval.every=0"]
            if settings.cache.reference is not None:
                overrides.append(f"cache.reference={self.output / 'timed' / name}")
            runs[name] = self._run(*which, [TIMED_ROUNDS * _steps_of_a_round(settings)], *overrides)
        return runs

    def _refuse_unevaluated(self, method: str, run: Run) -> None:
        every, last = run.settings.eval.every, run.settings.train.max_steps
        missed = [s for s in self.plan.measured_steps(method) if s != last and every and s % every]
        if missed:
            raise ConfigError(
                f"{run.name}: eval.every={every} leaves out step {missed[0]}, where the plan measures {method}; let it "
                "divide all checkpoints"
            )
        for question in self.plan.questions:
            asks = [quantity for quantity in (question.quantity, question.at_equal) if quantity]
            if not every and method in (question.method, question.than) and any(q.startswith("eval/") for q in asks):
                raise ConfigError(f"{run.name}: eval.every=0, and {question.ask!r} is about held-out pairs")

    def _run(self, name: str, method: str, value: str, seed: int, steps: Sequence[int], *besides: str) -> Run:
        plan = self.plan
        overrides = keeping(steps)
        set_here = (*self._filled(plan.methods[method].set), f"{plan.tuning.key}={value}", f"seed={seed}")
        everything = (*overrides, *plan.common, *set_here, *besides)
        return make_run(name, plan.methods[method].config, everything, self.output / "runs")

    def _filled(self, words: Sequence[str]) -> list[str]:
        """Words with the folders of preparations in place of their names in braces."""
        for name in self.plan.prepare:
            words = [word.replace(f"{{{name}}}", str(self.output / name)) for word in words]
        return list(words)

    # --- images and scores -----------------------------------------------------------------------------

    def images(self, run: Run, step: int, prompts: Sequence[str], guidance: float) -> Task:
        """The images of a run's model after `step` optimizer steps."""
        checkpoint = checkpoint_path(run.folder, step)
        inputs = (checkpoint / "policy.safetensors",)
        return self._images(model_name(run, step), [str(checkpoint)], prompts, guidance, inputs)

    def base_images(self, run: Run, guidance: float) -> Task:
        """The images of the model that a run starts from."""
        return self._images(BASE, base_model(run.settings), self.plan.prompts, guidance, ())

    def _images(
        self, name: str, model: Sequence[str], prompts: Sequence[str], guidance: float, inputs: Sequence[Path]
    ) -> Task:
        folder = self.output / "images" / f"guidance{guidance:g}" / name
        shown = f"images of {name} at guidance {guidance:g}"
        arguments = ("--guidance", f"{guidance:g}", *self.plan.generate)
        return sampling(shown, model, folder, prompts, arguments, inputs, self.num_processes)

    def results(self, guidance: float) -> str:
        """The name of the folder of the scores at a guidance."""
        return f"results/guidance{guidance:g}"

    def evaluation(self, folder: str, images: Sequence[Task]) -> Task:
        """The scores and report of images, in OUTPUT/`folder`."""
        return scoring(images, self.plan.scorers, self.output / folder, self.plan.title, self.num_processes)

    def scores(self, folder: str, models: Sequence[str]) -> dict[tuple[str, str], np.ndarray]:
        """(model, scorer or statistic of images) → scores (prompts,), with the prompts of all sets in sequence.

        Raises ValueError if a model has no scores.
        """
        return scores_in(self.output / folder, models, [*self.plan.scorers, *image_statistics.NAMES])


def _steps_of_a_round(settings: Config) -> int:
    """Optimizer steps from one sampling by the policy to the next."""
    if settings.feed.is_online:
        return settings.online.every
    return settings.self_play.every if settings.loss.samples_rejected else TIMED_STEPS


def keeping(steps: Sequence[int]) -> list[str]:
    """Overrides of a training to the last of these optimizer steps, by which the checkpoint of each is kept."""
    last = max(steps)
    if len(steps) == 1:
        return [f"train.max_steps={last}", "checkpoint.keep=1"]
    # Keep all: a stopped run saves one more checkpoint, and must not remove a measured one for it.
    return [f"train.max_steps={last}", f"checkpoint.every={math.gcd(*steps)}", f"checkpoint.keep={last}"]


def base_model(settings: Config) -> list[str]:
    """The model that a training starts from, as generate.py's --model takes it, and what has to be said of it besides.

    Its images show what training changed only if autoencoder and captions are those of the training.
    """
    model = settings.model
    besides = {"--base-revision": model.revision, "--vae": model.vae, "--t5-tokens": model.t5_tokens}
    return [model.pipeline, *(str(word) for item in besides.items() if item[1] is not None for word in item)]


def sampling(
    name: str,
    model: Sequence[str],
    folder: Path,
    prompts: Sequence[str],
    arguments: Sequence[str],
    inputs: Sequence[Path],
    num_processes: int = 1,
) -> Task:
    """The images of a model in `folder`, by generate.py with further arguments.

    model: what follows --model. inputs: files of a trained model.
    """
    command = (*launcher(num_processes), str(ROOT / "generate.py"), "--model", *model, "--prompts", *prompts)
    return once(name, (*command, "--output", str(folder), *arguments), folder, inputs)


def scoring(images: Sequence[Task], scorers: Sequence[str], folder: Path, title: str, num_processes: int = 1) -> Task:
    """The scores and report of images that `sampling` made, in `folder`; the first model's are the baseline."""
    names = [task.command[task.command.index("--output") + 1] for task in images]
    command = (*launcher(num_processes), str(ROOT / "evaluate.py"), "--images", *names, "--scorers", ",".join(scorers))
    command += ("--output", str(folder), "--title", title)
    return once(f"scores in {folder}", command, folder, [marker_of(task.log) for task in images])


def scores_in(folder: Path, models: Sequence[str], quantities: Sequence[str]) -> dict[tuple[str, str], np.ndarray]:
    """(model, scorer or statistic of images) → scores (prompts,), with the prompts of all sets in sequence.

    Quantities that some prompt set lacks are left out. Raises ValueError if a model has no scores.
    """
    named = set(models)
    rows = [row for row in ScoreTable(folder).placed if row.placement.model in named]
    if absent := sorted(named - {row.placement.model for row in rows}):
        raise ValueError(f"no scores of {absent[0]} in {folder}")
    benchmarks = benchmarks_of(rows, list(models), list(quantities))
    return {
        (model, quantity): np.concatenate([benchmark.of(model, quantity) for benchmark in benchmarks])
        for model in models
        for quantity in benchmarks[0].scorers
        if all(quantity in benchmark.scores for benchmark in benchmarks)
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
