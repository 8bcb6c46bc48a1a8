"""Configs × values × seeds → cells, each a run of its own; checked all together before the first one starts."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xdpo.checkpoint import checkpoints, step_of
from xdpo.config import KEYS, Config, ConfigError, changed_keys, load_config
from xdpo.runlog import read_rows


@dataclass(frozen=True)
class Cell:
    """One run: `overrides` on `config` give `settings`, whose output_dir is the cell's own folder."""

    name: str
    config: Path
    overrides: tuple[str, ...]
    settings: Config

    @property
    def folder(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def log(self) -> Path:
        """What the training printed, beside the run's folder."""
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the newest checkpoint."""
        found = checkpoints(self.folder)
        return step_of(found[-1]) if found else 0

    @property
    def is_finished(self) -> bool:
        """Whether all its steps are done and the model is exported, under this very config."""
        if self.steps_done < self.settings.train.max_steps or not (self.folder / "export").is_dir():
            return False
        return not changed_keys(load_config(self.folder / "config.yaml"), self.settings)

    def rows(self) -> list[dict]:
        """What it has logged so far."""
        path = self.folder / "metrics.jsonl"
        return read_rows(path) if path.is_file() else []


def make_cells(
    configs: Sequence[Path],
    output: Path,
    *,
    seeds: Sequence[int] = (0,),
    grid: Mapping[str, Sequence[str]] | None = None,
    common: Sequence[str] = (),
) -> list[Cell]:
    """All cells, config by config, then value by value, then seed by seed, in folders below `output`.

    grid: key → values as on the command line; common: overrides of all cells. Caches are shared below `output`, unless
    a config names its own or can't have one. Raises ConfigError with every problem of every cell, and for two cells
    of one name.
    """
    grid = dict(grid or {})
    cells, problems = [], []
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
                name = "-".join([config.stem, *(each.rpartition(".")[2] for each in chosen), f"seed={seed}"])
                name = name.replace("/", "_").replace(" ", "")
                own = (*common, *chosen, f"seed={seed}", f"output_dir={output / name}")
                try:
                    settings = load_config(config, own)
                    shared = shared_caches(settings, output / "cache")
                    cells.append(Cell(name, config, (*own, *shared), load_config(config, [*own, *shared])))
                except ConfigError as error:
                    problems.append(f"{name}: {error}")
    if repeated := [name for name, count in Counter(cell.name for cell in cells).items() if count > 1]:
        problems.append(f"two cells are called {repeated[0]}: rename one of the config files")
    if problems:
        raise ConfigError("\n".join(problems))
    return cells


def shared_caches(settings: Config, folder: Path) -> tuple[str, ...]:
    """Overrides that let a run share its caches with others of the same data; none of what it can't or has itself."""
    data, found = settings.data, []
    if settings.cache.examples is None and data.crop == "center":
        decides = {**data.model_dump(mode="json"), "pipeline": settings.model.pipeline, "dtype": settings.cache.dtype}
        decides |= {"eval": settings.eval.model_dump(mode="json", include={"path", "split", "pairs"})}
        for key in ("caption_dropout", "num_workers", "max_unreadable_share"):
            decides.pop(key)
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
        found.append(f"cache.examples={folder / f'examples-{digest}'}")
    moves = settings.loss.name in ("seppo", "dspo") or settings.model.reference_decay is not None
    if settings.cache.reference is None and settings.loss.needs_reference and not moves:
        found.append(f"cache.reference={folder / 'reference'}")
    return tuple(found)
