"""Turn configs × values × seeds into runs, all checked before the first one starts."""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from xdpo.cache.examples import is_finished
from xdpo.config import KEYS, Config, ConfigError, changed_keys, load_config
from xdpo.data import Split
from xdpo.experiments.tasks import Task, launcher, print_line, run_all
from xdpo.precompute.keys import examples_folder
from xdpo.report.grids import Cell, Grid
from xdpo.runlog import read_rows
from xdpo.runs import finished_checkpoints, step_of

ROOT = Path(__file__).resolve().parents[2]
_ENCODES = {"pipeline", "revision", "family", "vae", "empty_caption", "t5_tokens", "frozen_precision"}
"""Keys of `model` that decide what images and captions are encoded to."""


def enter_root(*paths: Path) -> list[Path]:
    """Work in the repository from here on, where configs and plans name files from. Returns the paths, valid there.

    Started in it, they stay as they are, and so do the commands by which finished work is recognised.
    """
    if Path.cwd() == ROOT:
        return list(paths)
    absolute = [path.absolute() for path in paths]
    os.chdir(ROOT)
    return absolute


@dataclass(frozen=True)
class Run:
    """One run: `overrides` on `config` give `settings`, whose output_dir is the run's folder."""

    name: str
    config: Path
    overrides: tuple[str, ...]
    settings: Config

    @property
    def folder(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def log(self) -> Path:
        """The file with the training's output, beside the run's folder."""
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the newest checkpoint."""
        finished = finished_checkpoints(self.folder)
        return step_of(finished[-1]) if finished else 0

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done and the model is exported, with exactly this config."""
        if self.steps_done < self.settings.train.max_steps or not (self.folder / "export").is_dir():
            return False
        return not changed_keys(load_config(self.folder / "config.yaml"), self.settings)

    @property
    def reference_moves(self) -> bool:
        """Whether the reference that d is measured against isn't the base model all the time."""
        from xdpo.learner import reference_moves

        settings = self.settings
        plays = settings.loss.samples_rejected and settings.self_play.reference != "base"
        return plays or reference_moves(settings)

    def rows(self) -> list[dict]:
        """The rows logged so far."""
        return read_rows(self.folder / "metrics.jsonl")

    def task(self, num_processes: int = 1) -> Task:
        """The task that trains it, or resumes its training."""
        training = (str(ROOT / "train_xdpo.py"), "--config", str(self.config), *self.overrides)
        return Task(self.name, (*launcher(num_processes), *training), self.log, lambda: self.is_finished)


def make_run(name: str, config: Path, overrides: Sequence[str], output: Path) -> Run:
    """A run of `config` in the folder `output`/`name`, with shared caches below `output` if possible.

    Raises ConfigError.
    """
    all_overrides = (*overrides, f"output_dir={output / name}")
    all_overrides += shared_caches(load_config(config, all_overrides), output / "cache")
    return Run(name, config, all_overrides, load_config(config, all_overrides))


def make_runs(
    configs: Sequence[Path],
    output: Path,
    *,
    seeds: Sequence[int] = (0,),
    grid: Mapping[str, Sequence[str]] | None = None,
    common: Sequence[str] = (),
) -> list[Run]:
    """All runs, config by config, then value by value, then seed by seed, in folders below `output`.

    grid: key → values as on the command line. common: overrides of all runs. Caches are shared below `output`, unless a
    config names its own or can't have one. Raises ConfigError with every problem of every run, and for two runs with
    the same name.
    """
    grid = dict(grid or {})
    runs, problems = [], []
    for key, values in grid.items():
        if key not in KEYS:
            problems.append(f"--grid {key}: unknown key")
        if repeated := [value for value, count in Counter(values).items() if count > 1]:
            problems.append(f"--grid {key}: {repeated[0]} is there twice")
    if problems:
        raise ConfigError("\n".join(problems))
    for config in configs:
        for values in itertools.product(*grid.values()):
            for seed in seeds:
                chosen = tuple(f"{key}={value}" for key, value in zip(grid, values, strict=True))
                shown = [f"{key.rpartition('.')[2]}={value}" for key, value in zip(grid, values, strict=True)]
                name = "-".join([config.stem, *shown, f"seed={seed}"]).replace("/", "_").replace(" ", "")
                try:
                    runs.append(make_run(name, config, (*common, *chosen, f"seed={seed}"), output))
                except ConfigError as error:
                    problems.append(f"{name}: {error}")
    if repeated := [name for name, count in Counter(run.name for run in runs).items() if count > 1]:
        problems.append(f"two runs are called {repeated[0]}: rename one of the config files")
    if problems:
        raise ConfigError("\n".join(problems))
    return runs


def shared_caches(settings: Config, folder: Path) -> tuple[str, ...]:
    """Overrides by which runs of the same data share caches: those that a config can have and does not name itself."""
    data, overrides = settings.data, []
    if settings.cache.examples is None and data.crop == "center":
        sections = {
            "data": data.model_dump(mode="json", exclude={"caption_dropout", "num_workers", "max_unreadable_share"}),
            "eval": settings.eval.model_dump(mode="json", include={"path", "split", "columns", "pairs"}),
            "filter": settings.filter.model_dump(mode="json"),
            "model": settings.model.model_dump(mode="json", include=_ENCODES),
            "dtype": settings.cache.dtype,
        }
        digest = hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:8]
        overrides.append(f"cache.examples={folder / f'examples-{digest}'}")
    stays = settings.loss.objective.can_reuse_reference and settings.model.reference_decay is None
    if settings.cache.reference is None and stays and not settings.feed.is_online:
        overrides.append(f"cache.reference={folder / 'reference'}")
    return tuple(overrides)


def train_all(
    runs: Sequence[Run], jobs: int = 1, num_processes: int = 1, report: Callable[[str], None] = print_line
) -> dict[str, str]:
    """Train all unfinished runs, `jobs` at a time. Returns the failed ones, with the end of their log.

    For each example cache that doesn't exist yet, one run fills it before other runs start.
    """
    builders = {run.settings.cache.examples: run for run in reversed(runs) if _builds_examples(run.settings)}
    failed = run_all([run.task(num_processes) for run in builders.values()], 1, num_processes, report)
    rest = [run.task(num_processes) for run in runs if run.name not in failed]
    return failed | run_all(rest, jobs, num_processes, report)


def _builds_examples(settings: Config) -> bool:
    return settings.cache.examples is not None and not all(
        is_finished(examples_folder(settings, split)) for split in Split.of(settings)
    )


def progress(runs: Sequence[Run], failed: Collection[str] = ()) -> Grid:
    """A row for each run: its progress, speed and held-out accuracy; and an estimate of the remaining time."""
    rows, speeds, left_pairs = [], [], 0
    for run in runs:
        train, logged = run.settings.train, run.rows()
        speed = median([row["pairs_per_second"] for row in logged if "pairs_per_second" in row] or [0.0])
        steps = max((row["step"] for row in logged if "loss" in row), default=0)
        accuracy = [row["eval/implicit_accuracy"] for row in logged if "eval/implicit_accuracy" in row]
        state = "finished" if run.is_finished else "failed" if run.name in failed else "begun" if logged else ""
        if state != "finished":
            left_pairs += (train.max_steps - steps) * train.total_batch_pairs
        if speed:
            speeds.append(speed)
        rows.append(
            (
                Cell(run.name),
                Cell(state),
                Cell(f"{steps:,} of {train.max_steps:,}", steps),
                Cell(f"{speed:.3g}" if speed else "", speed or None),
                Cell(f"{accuracy[-1]:.3f}" if accuracy else "", accuracy[-1] if accuracy else None),
            )
        )
    note = ""
    if speeds and left_pairs:
        speed = median(speeds)
        note = f"about {left_pairs / speed / 3600:.1f} hours of optimizer steps left at {speed:.3g} pairs/s, one by one"
    return Grid("Runs", ("run", "state", "steps", "pairs/s", "held-out accuracy"), tuple(rows), note)
