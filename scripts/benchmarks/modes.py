"""The compared ways to train, as configs, on one set of pairs with filled caches."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.pairs import make_pairs, write_parquet
from benchmarks.pipelines import pipeline_folder

ROOT = Path(__file__).resolve().parent.parent.parent
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes the C library give freed memory back at once, so that a process's peak is what it used at one time."""
BASE_CONFIG = ROOT / "configs" / "base.yaml"


class Mode(NamedTuple):
    """Which weights are trained, and which inputs come from a cache."""

    trainable: str
    examples: bool
    reference: bool

    def __str__(self) -> str:
        trained = {"full": "full", "lora": "LoRA"}[self.trainable]
        cached = "examples and reference cached" if self.reference else "examples cached"
        return f"{trained}, {cached if self.examples else 'recompute everything'}"


MODES = {
    "full": Mode("full", examples=False, reference=False),
    "full-examples": Mode("full", examples=True, reference=False),
    "full-cached": Mode("full", examples=True, reference=True),
    "lora": Mode("lora", examples=False, reference=False),
    "lora-examples": Mode("lora", examples=True, reference=False),
    "lora-cached": Mode("lora", examples=True, reference=True),
}


@dataclass(frozen=True)
class Bench:
    """A pipeline, pairs and caches in a working folder; `extra` are overrides of the user's."""

    working: Path
    pipeline: str
    pairs_path: str
    resolution: int
    extra: tuple[str, ...]

    def overrides(self, mode: Mode, *, micro_batch: int, total_batch: int, max_steps: int) -> list[str]:
        """Overrides of configs/base.yaml for a training in this mode, without evaluations and samples."""
        caches = {"cache.examples": mode.examples, "cache.reference": mode.reference}
        settings = {
            "output_dir": self.working / "run",
            "model.pipeline": self.pipeline,
            "model.trainable": mode.trainable,
            "data.source": "parquet",
            "data.path": self.pairs_path,
            "data.resolution": self.resolution,
            "data.num_workers": 0,
            **{key: self.working / key for key, wanted in caches.items() if wanted},
            "train.micro_batch_pairs": micro_batch,
            "train.total_batch_pairs": total_batch,
            "train.max_steps": max_steps,
            "eval.every": 0,
            "samples.every": 0,
            "log.trackers": "[]",
        }
        return [*(f"{key}={value}" for key, value in settings.items()), *self.extra]

    def fill_caches(self, micro_batch: int, num_pairs: int) -> None:
        """Encode all pairs, and record the reference's errors on the first `num_pairs` of the training order."""
        overrides = self.overrides(
            MODES["full-cached"], micro_batch=micro_batch, total_batch=micro_batch, max_steps=num_pairs // micro_batch
        )
        call("scripts/cache_reference.py", "--config", str(BASE_CONFIG), *overrides)

    def train_peak_memory_gb(self, mode: Mode, micro_batch: int) -> float:
        """Peak memory of train_xdpo.py in a separate process, over two optimizer steps of one micro-batch.

        The second step decides: only then do the optimizer's moments exist together with activations.
        """
        steps = 2
        overrides = self.overrides(mode, micro_batch=micro_batch, total_batch=micro_batch, max_steps=steps)
        call("train_xdpo.py", "--config", str(BASE_CONFIG), *overrides, environment=RETURN_MEMORY)
        run = self.working / "run"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        shutil.rmtree(run)
        return next(row["peak_memory_gb"] for row in rows if row["step"] == steps and "loss" in row)


def set_up(working: Path, pipeline: str, *, resolution: int, num_pairs: int, extra: Sequence[str]) -> Bench:
    """Build everything that a benchmark of the training needs. pipeline: as in pipelines.pipeline_folder."""
    folder = pipeline_folder(pipeline, working)
    pairs_path = write_parquet(working / "pairs", make_pairs(num_pairs, resolution))
    return Bench(working, folder, pairs_path, resolution, tuple(extra))


def call(script: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
    """Run one of this repository's programs. Raises ValueError with the end of its output where it fails."""
    command = [sys.executable, str(ROOT / script), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | (environment or {}))
    if finished.returncode:
        killed = "; it was killed, which a machine short of memory does" if finished.returncode == -9 else ""
        said = "\n".join((finished.stdout + finished.stderr).strip().splitlines()[-10:])
        raise ValueError(f"{script} ended with status {finished.returncode}{killed}:\n{said}")
