"""Quality against training: find which checkpoint of a run an evaluated model is, and how far training was then."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xdpo.scores.results import Benchmark


@dataclass(frozen=True)
class Progress:
    """How far a run was at an optimizer step: training pairs seen, and hours spent in optimizer steps."""

    pairs: int
    hours: float


@dataclass(frozen=True)
class Curve:
    """A run's evaluated models by progress, least first."""

    run: str
    points: tuple[tuple[Progress, str], ...]


def progress_by_step(rows: Sequence[Mapping]) -> dict[int, Progress]:
    """Progress after each optimizer step, from the rows of a run's metrics.jsonl. Step 0 is the start."""
    progress, pairs, hours = {0: Progress(0, 0.0)}, 0, 0.0
    for row in rows:
        if "pairs_seen" in row and "pairs_per_second" in row:
            hours += (row["pairs_seen"] - pairs) / row["pairs_per_second"] / 3600
            pairs = row["pairs_seen"]
            progress[row["step"]] = Progress(pairs, hours)
    return progress


def curve(
    run: Path, rows: Sequence[Mapping], sources: Mapping[str, str | None], baseline: str | None = None
) -> Curve | None:
    """The evaluated models that are this run's checkpoints, with `baseline` as its start; None without any.

    A model is recognised by its name or by its source, which is its name in the manifest: the run folder's name (for
    the end of training), "xdpo_step_00000200" or "xdpo@200". Raises ValueError for a run without a log, and for a step
    that the log does not have.
    """
    progress = progress_by_step(rows)
    if len(progress) == 1:
        raise ValueError(f"{run / 'metrics.jsonl'} has no training steps to draw a curve over")
    points = []
    for model, source in sources.items():
        step = _step_of(source, run, last=max(progress))
        step = _step_of(model, run, last=max(progress)) if step is None else step
        if step is not None and model != baseline:
            if step not in progress:
                raise ValueError(f"{model} is step {step} of {run}, which its metrics.jsonl does not have")
            points.append((progress[step], model))
    if not points:
        return None
    if baseline is not None:
        points.append((progress[0], baseline))
    return Curve(run.resolve().name, tuple(sorted(points, key=lambda point: (point[0].pairs, point[1]))))


def first_reached(pairs: Sequence[float], means: Sequence[float], score: float) -> float | None:
    """Pairs seen when a curve of mean scores first reaches `score`, linear between points; None if it never does."""
    previous = None
    for seen, mean in zip(pairs, means, strict=True):
        if mean >= score:
            if previous is None:
                return float(seen)
            (before, below) = previous
            return float(before + (seen - before) * (score - below) / (mean - below))
        previous = (seen, mean)
    return None


def pairs_to_reach(benchmark: Benchmark, scorer: str, curve: Curve, score: float) -> float | None:
    """`first_reached` of a run's evaluated models."""
    points = [(progress.pairs, model) for progress, model in curve.points if model in benchmark.models]
    means = [float(benchmark.of(model, scorer).mean()) for _, model in points]
    return first_reached([pairs for pairs, _ in points], means, score)


def _step_of(name: str | None, run: Path, last: int) -> int | None:
    if name == run.resolve().name:
        return last
    checkpoint = re.fullmatch(rf"{re.escape(run.resolve().name)}(?:_step_|@)(\d+)", name or "")
    return int(checkpoint[1]) if checkpoint else None
