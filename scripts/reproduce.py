"""Make the paper's tables and answer its open questions from one plan: tune, train, sample, score, write.

    python scripts/reproduce.py --scale tiny                      the embedded world, on a CPU in some hours
    python scripts/reproduce.py --scale tiny --only tuning        a part of it; the next start adds another one
    python scripts/reproduce.py --scale sd15                      prints the GPU plan; --go runs it

A scale is a plan in configs/experiments/, or the path of your own. After a stop or a kill the same command resumes.
The results are in OUTPUT/results.md with figures, or in --page; OUTPUT/results/guidance…/report.html shows every image.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from xdpo.experiments import page
from xdpo.experiments.findings import Findings
from xdpo.experiments.plan import BASE, Parts, load_plan
from xdpo.experiments.runs import ROOT, Run, enter_root, train_all
from xdpo.experiments.stages import Reproduction, choose, model_name
from xdpo.experiments.tasks import Interrupted, StageError, Task, finish, print_line
from xdpo.paths import user_path

PLANS = ROOT / "configs" / "experiments"
STARTED_AT_ONCE = ("tiny", "tiny_flow", "tiny_online")  # the scales that need no --go


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a plan, or print what it would run. Returns the exit status, 130 after a request to stop."""
    options = build_parser().parse_args(arguments)
    try:
        path = user_path(options.scale)
        output = options.output or Path("runs") / f"reproduce_{path.stem}"
        path, output, results = enter_root(path, output, options.page or output / "results.md")
        plan = load_plan(path if path.suffix in (".yaml", ".yml") else PLANS / f"{options.scale}.yaml")
        reproduction = Reproduction(plan, output, options.processes)
        parts = reproduction.with_finished(plan.parts(options.only))
        if options.dry_run or not (options.go or options.scale in STARTED_AT_ONCE):
            print(what_would_run(reproduction, parts))
            return 0
        findings = reproduce(reproduction, parts, options.jobs)
        command = shlex.join(["python", "scripts/reproduce.py", *(arguments or sys.argv[1:])])
        for written in page.write(findings, results, command):
            print(written)
        reproduction.record_finished(parts)
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
    parser.add_argument("--go", action="store_true", help=f"run it; {', '.join(STARTED_AT_ONCE)} need no --go")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PART",
        help="groups or methods of the plan, or tuning, which is that of all methods and nothing else; the baseline, "
        "what a part is tuned as, and parts that are finished come along (default: all)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    parser.add_argument("--output", type=user_path, metavar="DIR", help="default: runs/reproduce_SCALE")
    parser.add_argument("--page", type=user_path, metavar="FILE", help="default: OUTPUT/results.md")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at once (default: 1)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="GPUs for each (default: 1)")
    return parser


def reproduce(reproduction: Reproduction, parts: Parts, jobs: int) -> Findings:
    """Run all stages of these parts. A failed training is left out and reported.

    Raises StageError if a preparation, images or scores fail.
    """
    plan, processes = reproduction.plan, reproduction.num_processes
    candidates = reproduction.tuning_runs(parts.tuned)  # checks all configs that are tuned
    reproduction.runs(parts.methods, any_values(reproduction))  # and all others
    finish(reproduction.preparations(parts))

    # Tuning: one run for each value, on prompts of its own.
    print_line(f"tuning: {len(candidates)} trainings")
    failed = train_all(list(candidates.values()), jobs, processes)
    trained = {candidate: run for candidate, run in candidates.items() if run.name not in failed}
    images = [reproduction.images(run, plan.steps, plan.tuning.prompts, plan.guidance) for run in trained.values()]
    finish(images, jobs, processes)
    finish([reproduction.evaluation("tuning", images)], 1, processes)
    names = {candidate: model_name(run, plan.steps) for candidate, run in trained.items()}
    scores = reproduction.scores("tuning", list(names.values()))
    means = {candidate: float(scores[name, plan.score].mean()) for candidate, name in names.items()}
    chosen = choose(means)

    # The methods, with every seed.
    runs = reproduction.runs(parts.methods, chosen)
    print_line(f"methods: {len(runs)} trainings")
    failed |= train_all(list(runs.values()), jobs, processes)
    timed = reproduction.timed_runs(parts.methods, chosen)
    failed |= train_all(list(timed.values()), 1, processes)
    by_guidance: dict[float, dict[str, Task]] = {guidance: {} for guidance in plan.guidances if runs}
    for guidance, images_of in by_guidance.items():
        images_of[BASE] = reproduction.base_images(next(iter(candidates.values())), guidance)
    for (method, _), run in runs.items():
        for step, guidance in plan.measurements(method) if run.name not in failed else ():
            images_of_run = reproduction.images(run, step, plan.prompts, guidance)
            by_guidance[guidance][model_name(run, step)] = images_of_run
    finish([task for images_of in by_guidance.values() for task in images_of.values()], jobs, processes)
    evaluations = [
        reproduction.evaluation(reproduction.results(guidance), list(images_of.values()))
        for guidance, images_of in by_guidance.items()
    ]
    finish(evaluations, 1, processes)
    results = {
        guidance: reproduction.scores(reproduction.results(guidance), list(images_of))
        for guidance, images_of in by_guidance.items()
    }
    tuning = {candidate: means.get(candidate, float("nan")) for candidate in candidates}
    timed = {method: run for method, run in timed.items() if run.name not in failed}
    return Findings(plan, candidates, tuning, chosen, runs, results, failed, timed)


def any_values(reproduction: Reproduction) -> dict[str, str]:
    """A value for each tuned method, where the best ones are not known yet."""
    plan = reproduction.plan
    return dict.fromkeys(plan.tuned, plan.tuning.values[0])


def what_would_run(reproduction: Reproduction, parts: Parts) -> str:
    """Every command that a run would start, and the amount of work."""
    plan = reproduction.plan
    tuning = list(reproduction.tuning_runs(parts.tuned).values())
    runs = reproduction.runs(parts.methods, any_values(reproduction))
    lines = [shlex.join(task.command) for task in reproduction.preparations(parts)]
    lines.append(f"# Tuning: {len(tuning)} trainings, then their images of {', '.join(plan.tuning.prompts)}")
    for run in tuning:
        lines += commands(reproduction, run, [(plan.steps, plan.guidance)], plan.tuning.prompts)
    lines.append(f"# Methods: {len(runs)} trainings, with the best {plan.tuning.key} in place of the first one")
    bases = [reproduction.base_images(tuning[0], guidance) for guidance in plan.guidances if runs]
    lines += [shlex.join(task.command) for task in bases]
    for (method, _), run in runs.items():
        lines += commands(reproduction, run, plan.measurements(method), plan.prompts)
    timed = reproduction.timed_runs(parts.methods, any_values(reproduction))
    if timed:
        lines.append("# Speeds, with nothing else on the machine")
        lines += [shlex.join(run.task(reproduction.num_processes).command) for run in timed.values()]
    trains = [run.settings.train for run in [*tuning, *runs.values(), *timed.values()]]
    pairs = sum(train.max_steps * train.total_batch_pairs for train in trains)
    sets = sum(len(plan.measurements(method)) for method, _ in runs) + len(bases)
    lines.append(
        f"# In all {len(trains)} trainings with {pairs:,} pairs seen, and {len(tuning)} sets of images for the tuning "
        f"and {sets} for the results. docs/performance.md tells what a pair costs. --go runs it"
    )
    return "\n".join(lines)


def commands(
    reproduction: Reproduction, run: Run, measurements: Sequence[tuple[int, float]], prompts: Sequence[str]
) -> list[str]:
    """The commands of a training and of its images, at each (step, guidance)."""
    images = [reproduction.images(run, step, prompts, guidance) for step, guidance in measurements]
    return [shlex.join(task.command) for task in (run.task(reproduction.num_processes), *images)]


if __name__ == "__main__":
    sys.exit(main())
