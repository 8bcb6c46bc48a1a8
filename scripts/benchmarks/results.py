"""The results of a benchmark: times taken in turn, a table, criteria; and the saved record."""

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from xdpo.files import write_text
from xdpo.progress import Progress
from xdpo.provenance import git_commit, library_versions
from xdpo.report.grids import Cell, Grid, to_markdown, to_text

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g}–{self.high:.4g})"

    def cell(self) -> Cell:
        return Cell(f"{self.median:.4g}", self.median, f"({self.low:.4g}–{self.high:.4g})")


@dataclass(frozen=True)
class Criterion:
    """A claim about a measured value, and whether the measurement confirms it."""

    claim: str
    value: float
    holds: bool

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'DOES NOT HOLD'}: {self.claim}; measured {self.value:.3f}"


@dataclass(frozen=True)
class Outcome:
    """A benchmark's result. measurements: everything that was counted or timed, in every round, as JSON values."""

    table: Grid
    measurements: Mapping[str, Any]
    criteria: tuple[Criterion, ...] = ()


def time_in_turn(jobs: Mapping[Name, Callable[[], object]], rounds: int) -> dict[Name, list[float]]:
    """Seconds of every job in every round.

    The jobs take turns, so that a slow minute of the machine affects all of them. A first round warms up, uncounted.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in jobs}
    for round_number in Progress(range(rounds + 1), desc="rounds, the first to warm up", unit="round"):
        for name, job in jobs.items():
            _wait_for_device()
            started = time.perf_counter()
            job()
            _wait_for_device()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """One job's time divided by another's, in each round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def show(outcome: Outcome) -> None:
    print(to_text(outcome.table))
    for criterion in outcome.criteria:
        print(criterion)


def save(path: Path, name: str, settings: Mapping[str, Any], outcome: Outcome) -> None:
    """Write a result as JSON, with everything that is needed to repeat it."""
    record = {
        "benchmark": name,
        "command": shlex.join(["python", *sys.argv]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": library_versions(),
        "git_commit": git_commit(),
        "settings": dict(settings),
        "measurements": outcome.measurements,
        "criteria": [asdict(criterion) for criterion in outcome.criteria],
        "table": to_markdown(outcome.table),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")


def describe_machine() -> dict[str, Any]:
    """The machine's properties that times depend on."""
    device = "cpu"
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
    return {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }


def _processor_name() -> str:
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
