"""Make the paper's tables and answer its open questions from one plan: tune, train, sample, score, write.

    python scripts/reproduce.py --scale tiny                 the embedded world, on a CPU in about two hours
    python scripts/reproduce.py --scale sd15                 prints the GPU plan; --go runs it

A scale is a plan in configs/experiments/, or the path of your own. After a stop or a kill the same command resumes.
The results are in OUTPUT/results.md with figures, or in --page; OUTPUT/results/report.html shows every image.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from xdpo.experiments import page
from xdpo.experiments.findings import Findings
from xdpo.experiments.plan import BASE, load_plan
from xdpo.experiments.runs import ROOT, Run, train_all
from xdpo.experiments.stages import Reproduction, choose, model_name
from xdpo.experiments.tasks import Interrupted, Task, print_line, run_all
from xdpo.paths import user_path

PLANS = ROOT / "configs" / "experiments"
STARTED_AT_ONCE = "tiny"  # the scale that needs no --go


class StageError(RuntimeError):
    """A stage failed as a whole; the message has the end of its log."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a plan, or print what it would run. Returns the exit status, 130 after a request to stop."""
    options = build_parser().parse_args(arguments)
    try:
        path = user_path(options.scale)
        plan = load_plan(path if path.suffix in (".yaml", ".yml") else PLANS / f"{options.scale}.yaml")
        output = options.output or Path("runs") / f"reproduce_{path.stem}"
        reproduction = Reproduction(plan, output, options.processes)
        if options.dry_run or not (options.go or options.scale == STARTED_AT_ONCE):
            print(what_would_run(reproduction))
            return 0
        findings = reproduce(reproduction, options.jobs)
        command = shlex.join(["python", "scripts/reproduce.py", *(arguments or sys.argv[1:])])
        for written in page.write(findings, options.page or output / "results.md", command):
            print(written)
    except (ValueError, OSError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt):
        print("stopped; what was in work has saved, and the same command goes on", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plans = ", ".join(sorted(file.stem for file in PLANS.glob("*.yaml")))
    parser.add_argument("--scale", required=True, help=f"{plans}, or a plan's file")
    parser.add_argument("--go", action="store_true", help=f"run it; {STARTED_AT_ONCE} needs no --go")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    parser.add_argument("--output", type=user_path, metavar="DIR", help="default: runs/reproduce_SCALE")
    parser.add_argument("--page", type=user_path, metavar="FILE", help="default: OUTPUT/results.md")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at once (default: 1)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="GPUs for each (default: 1)")
    return parser


def reproduce(reproduction: Reproduction, jobs: int) -> Findings:
    """Run all stages. A failed training is left out and reported. Raises StageError if images or scores fail."""
    plan, processes = reproduction.plan, reproduction.num_processes
    candidates = reproduction.tuning_runs()  # checks all configs that are tuned
    reproduction.runs(dict.fromkeys(plan.tuned, plan.tuning.values[0]))  # and all others

    # Tuning: one run for each value, on prompts of its own.
    print_line(f"tuning: {len(candidates)} trainings")
    failed = train_all(list(candidates.values()), jobs, processes)
    trained = {candidate: run for candidate, run in candidates.items() if run.name not in failed}
    images = [reproduction.images(run, plan.steps, plan.tuning.prompts) for run in trained.values()]
    finish(images, jobs, processes)
    finish([reproduction.evaluation("tuning", images)], 1, 1)
    names = {candidate: model_name(run, plan.steps) for candidate, run in trained.items()}
    scores = reproduction.scores("tuning", list(names.values()))
    means = {candidate: float(scores[name, plan.score].mean()) for candidate, name in names.items()}
    chosen = choose(means)

    # The methods, with every seed.
    runs = reproduction.runs(chosen)
    print_line(f"methods: {len(runs)} trainings")
    failed |= train_all(list(runs.values()), jobs, processes)
    pipeline = next(iter(candidates.values())).settings.model.pipeline
    images = [reproduction.base_images(pipeline, plan.prompts)]
    models = [BASE]
    for (method, _), run in runs.items():
        for step in plan.measured_steps(method) if run.name not in failed else ():
            images.append(reproduction.images(run, step, plan.prompts))
            models.append(model_name(run, step))
    finish(images, jobs, processes)
    finish([reproduction.evaluation("results", images)], 1, 1)
    tuning = {candidate: means.get(candidate, float("nan")) for candidate in candidates}
    return Findings(plan, candidates, tuning, chosen, runs, reproduction.scores("results", models), failed)


def finish(tasks: Sequence[Task], jobs: int, processes: int) -> None:
    """Run tasks that later stages need. Raises StageError if one fails."""
    for name, end in run_all(tasks, jobs, processes).items():
        raise StageError(f"{name} failed:\n{end}")


def what_would_run(reproduction: Reproduction) -> str:
    """Every command that a run would start, and the amount of work."""
    plan = reproduction.plan
    tuning = list(reproduction.tuning_runs().values())
    runs = reproduction.runs(dict.fromkeys(plan.tuned, plan.tuning.values[0]))
    lines = [f"# Tuning: {len(tuning)} trainings, then their images of {', '.join(plan.tuning.prompts)}"]
    for run in tuning:
        lines += commands(reproduction, run, (plan.steps,), plan.tuning.prompts)
    lines.append(f"# Methods: {len(runs)} trainings, with the best {plan.tuning.key} in place of the first one")
    pipeline = tuning[0].settings.model.pipeline
    lines.append(shlex.join(reproduction.base_images(pipeline, plan.prompts).command))
    for (method, _), run in runs.items():
        lines += commands(reproduction, run, plan.measured_steps(method), plan.prompts)
    trains = [run.settings.train for run in [*tuning, *runs.values()]]
    pairs = sum(train.max_steps * train.total_batch_pairs for train in trains)
    sets = sum(len(plan.measured_steps(method)) for method, _ in runs) + 1
    lines.append(
        f"# In all {len(trains)} trainings with {pairs:,} pairs seen, and images of {len(tuning)} models for "
        f"the tuning and of {sets} for the results. docs/performance.md tells what a pair costs. --go runs it"
    )
    return "\n".join(lines)


def commands(reproduction: Reproduction, run: Run, steps: Sequence[int], prompts: Sequence[str]) -> list[str]:
    training = shlex.join(run.task(reproduction.num_processes).command)
    return [training, *(shlex.join(reproduction.images(run, step, prompts).command) for step in steps)]


if __name__ == "__main__":
    sys.exit(main())
