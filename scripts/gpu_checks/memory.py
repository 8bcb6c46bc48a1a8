"""Peak memory of shipped configs with evaluation, samples and resume, under a card's limit, beside counted bytes."""

import importlib.util
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from benchmarks import counting
from benchmarks.modes import ROOT
from benchmarks.true_models import COUNTABLE, TRUE_MODELS

from gpu_checks import children
from gpu_checks.children import Launch
from gpu_checks.context import Context, forget_accelerator
from gpu_checks.rows import Finding, NotPossible, Row, at_most, near
from xdpo.config import Config, load_config
from xdpo.runlog import read_rows

OUTSIDE_GIB = 1.0  # of a card that its driver and CUDA's context take, before anything is allocated
COUNT_TOLERANCE = 0.1
DATA_WAIT_SHARE = 0.05
MODEL_PASSES = 2  # of the families' models, whose passes take seconds
STEPS = 3  # evaluation and samples after the second; the fourth is a resumed run's
LESS = "compute.gradient_checkpointing=true, fewer train.micro_batch_pairs, optim.name=adamw8bit, model.trainable=lora"


@dataclass(frozen=True)
class Limited:
    """A config, overrides, and the card that it shall fit, in GiB.

    package: what must be installed. model: one of TRUE_MODELS, at its true size alone; None: the size's pipeline.
    """

    config: str
    overrides: tuple[str, ...]
    card_gib: int
    package: str | None = None
    model: str | None = None

    @property
    def limit_gb(self) -> float:
        return (self.card_gib - OUTSIDE_GIB) * 2**30 / 1e9

    def __str__(self) -> str:
        return " ".join([self.config, *self.overrides, *([f"({self.model})"] if self.model else [])])


LIMITED = (
    Limited("xdpo_sd15", (), 24),
    Limited("xdpo_sd15_lora", (), 24),
    Limited("xdpo_sd15_lora", ("train.micro_batch_pairs=2",), 16),
    Limited("xdpo_sd15", ("optim.name=adamw8bit",), 16, package="bitsandbytes"),
    Limited("xdpo_sdxl_lora", (), 24, model="sdxl"),
    Limited("xdpo_sdxl_lora", ("model.frozen_precision=bf16",), 16, model="sdxl"),
    Limited("xdpo_sd35_lora", (), 40, model="sd35_medium"),
    Limited("xdpo_sd35_lora", (), 40, model="sd35_large"),
    Limited("xdpo_flux_lora", (), 80, model="flux"),
    Limited("xdpo_sdxl", (), 80, model="sdxl"),
)


@dataclass(frozen=True)
class Taken:
    """What a training took: its highest peak in GB, infinite where memory ran out, and its logged second step."""

    peak_gb: float
    second_step: dict


def overrides(context: Context, limited: Limited) -> list[str]:
    size = context.size
    settings = load_config(ROOT / "configs" / f"{limited.config}.yaml", list(limited.overrides))
    passes = MODEL_PASSES if limited.model else size.passes
    resolution = [f"data.resolution={TRUE_MODELS[limited.model].resolution}"] if limited.model else []
    return context.overrides(
        f"output_dir={context.working / 'limited'}",
        f"data.num_workers={size.workers}",
        *resolution,
        f"train.total_batch_pairs={passes * settings.train.micro_batch_pairs}",
        "eval.every=2",
        "eval.pairs=4",
        "eval.draws=1",
        "samples.every=2",
        "samples.num_inference_steps=2",
        "checkpoint.keep=1",
        *limited.overrides,
        pipeline=limited.model,
    )


def take(context: Context, limited: Limited) -> Taken:
    """Train and resume under the limit. Raises NotPossible without the package, on a smaller card, at another size."""
    if limited.model and not context.is_judged:
        raise NotPossible("it is for a GPU and the true size")
    if _missing(limited):
        raise NotPossible(f"{limited.package} is not installed")
    if context.on_gpu and torch.cuda.get_device_properties(0).total_memory / 1e9 < limited.limit_gb:
        raise NotPossible(f"the card has less than {limited.card_gib} GB")

    def train() -> Taken:
        forget_accelerator()
        folder, log = context.working / "limited", context.working / "limited.log"
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink(missing_ok=True)
        common = ["--config", str(ROOT / "configs" / f"{limited.config}.yaml"), *overrides(context, limited)]
        rows: list[dict] = []
        try:
            for steps in (STEPS, STEPS + 1):
                children.train(Launch([*common, f"train.max_steps={steps}"], log, card_gb=limited.limit_gb))
                rows += [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
        except ValueError as error:
            if "OutOfMemoryError" not in str(error):
                raise
            return Taken(math.inf, {})
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return Taken(max(row["peak_memory_gb"] for row in rows), next(row for row in rows if row["step"] == 2))

    return context.share(limited, train)


def counted_gb(context: Context, limited: Limited) -> float:
    """The highest peak of any phase, counted; of all configs at once, as each takes half a minute of one core.

    Those of a model are counted together too, after its trainings.
    """

    def count_all() -> dict[Limited, float]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            possible = [each for each in LIMITED if each.model == limited.model and not _missing(each)]
            return dict(zip(possible, pool.map(partial(_count, context), possible), strict=True))

    return context.share(("counted", limited.model), count_all)[limited]


def _missing(limited: Limited) -> bool:
    return limited.package is not None and importlib.util.find_spec(limited.package) is None


def _count(context: Context, limited: Limited) -> float:
    precision = [] if context.on_gpu else ["compute.precision=fp32"]
    settings = load_config(ROOT / "configs" / f"{limited.config}.yaml", [*overrides(context, limited), *precision])
    return children.run(_highest_peak_gb, settings, limited.model or context.size.pipeline)


def _highest_peak_gb(settings: Config, pipeline: str) -> float:
    fake = pipeline != "tiny"  # whose tensors have contents: the same count, sooner
    return max(phase.peak for phase in counting.count(settings, COUNTABLE[pipeline], fake=fake).values()) / 1e9


def check_fits(context: Context, limited: Limited) -> Finding:
    return at_most(take(context, limited).peak_gb, limited.limit_gb, LESS, judged=context.is_judged)


def check_counted(context: Context, limited: Limited) -> Finding:
    peak, counted = take(context, limited).peak_gb, counted_gb(context, limited)
    remedy = "trust the measured one, and look which phase of scripts/benchmark.py memory --count is off"
    return near(peak, counted, COUNT_TOLERANCE, remedy, judged=context.is_judged)


def check_data_wait(context: Context) -> Finding:
    share = take(context, LIMITED[0]).second_step["data_wait_share"]
    return at_most(share, DATA_WAIT_SHARE, "raise data.num_workers, or fill cache.examples", judged=context.is_judged)


def _rows() -> Iterator[Row]:
    for limited in LIMITED:
        yield Row(f"peak GB on {limited.card_gib} GB: {limited}", partial(check_fits, limited=limited))
        yield Row(f"peak GB is what is counted: {limited}", partial(check_counted, limited=limited))


ROWS = (*_rows(), Row("data_wait_share of xdpo_sd15", check_data_wait))
