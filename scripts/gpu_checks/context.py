"""What all checks stand on: a size, a pipeline of random weights, pairs, learners, and results that rows share."""

import functools
import gc
import shutil
import traceback
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from benchmarks.modes import BASE_CONFIG
from benchmarks.pairs import make_pairs, write_parquet
from benchmarks.pipelines import PIPELINES, save_pipeline
from benchmarks.true_models import TRUE_MODELS, save_model

from gpu_checks import children
from gpu_checks.rows import NotPossible
from xdpo.batch import Batch
from xdpo.compute import build_accelerator, check_compiler
from xdpo.config import Config, load_config
from xdpo.data import PairWeights, Split, make_loader
from xdpo.families import load_parts
from xdpo.learner import Learner, RecordedErrors, build_learner
from xdpo.precompute import make_dataset, open_pairs
from xdpo.tally import Tally
from xdpo.training import build_sampler

Shared = TypeVar("Shared")


@dataclass(frozen=True)
class Size:
    """How large everything is. passes: micro-batches of an optimizer step where a training's memory is measured."""

    pipeline: str  # one of benchmarks.pipelines.PIPELINES
    resolution: int
    pairs: int
    passes: int
    rounds: int
    workers: int
    sampler_steps: int
    scored_images: int
    is_true: bool = False


SIZES = {
    "true": Size("sd15", 512, 32, 16, rounds=3, workers=4, sampler_steps=20, scored_images=128, is_true=True),
    "quick": Size("quarter", 256, 16, 4, rounds=1, workers=2, sampler_steps=5, scored_images=32),
    "tiny": Size("tiny", 32, 4, 2, rounds=1, workers=0, sampler_steps=2, scored_images=2),
}


class Context:
    """A working folder with pipelines and pairs, and everything that several rows share."""

    def __init__(self, size: Size, working: Path, on_gpu: bool):
        self.size, self.working, self.on_gpu = size, working, on_gpu
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self._shared: dict[Hashable, Any] = {}

    @property
    def is_judged(self) -> bool:
        """Whether speed and memory are judged: at another size, or on a CPU, they say nothing of the claims."""
        return self.size.is_true and self.on_gpu

    def share(self, key: Hashable, make: Callable[[], Shared]) -> Shared:
        """What `make` returned when it was first asked for under this key; its exception likewise, every time."""
        if key not in self._shared:
            try:
                self._shared[key] = make()
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # whose tensors would stay as long as the error is kept
                self._shared[key] = error
        if isinstance(found := self._shared[key], Exception):
            raise found
        return found

    def pipeline(self, name: str | None = None) -> str:
        """The folder of one of PIPELINES or TRUE_MODELS with random weights, by default of the size's pipeline.

        Of TRUE_MODELS, which are large, only the last one is kept.
        """
        name, folder = name or self.size.pipeline, self.working / (name or self.size.pipeline)
        if name in PIPELINES:
            self.share(folder, lambda: children.run(save_pipeline, name, folder))
        elif not folder.is_dir():
            for other in TRUE_MODELS.keys() - PIPELINES.keys():
                shutil.rmtree(self.working / other, ignore_errors=True)
            children.run(save_model, TRUE_MODELS[name], folder, self.device.type)
        return str(folder)

    def pairs(self) -> str:
        """What `data.path` should be."""
        return self.share(
            "pairs", lambda: write_parquet(self.working / "pairs", make_pairs(self.size.pairs, self.size.resolution))
        )

    def overrides(self, *more: str, pipeline: str | None = None) -> list[str]:
        """Overrides of any config for a small training on this size's pipeline and pairs."""
        return [
            f"output_dir={self.working / 'run'}",
            f"model.pipeline={self.pipeline(pipeline)}",
            "data.source=parquet",
            f"data.path={self.pairs()}",
            f"eval.path={self.pairs()}",
            f"data.resolution={self.size.resolution}",
            "data.num_workers=0",
            "optim.warmup_steps=0",
            "log.trackers=[]",
            *more,
        ]

    def settings(self, *more: str, pipeline: str | None = None) -> Config:
        """configs/base.yaml for steps of two pairs that move the weights visibly, without evaluation and samples."""
        steps = ("train.total_batch_pairs=2", "train.max_steps=100", "optim.learning_rate=1e-4", "optim.scale_lr=false")
        return load_config(
            BASE_CONFIG, [*self.overrides(*steps, pipeline=pipeline), "eval.every=0", "samples.every=0", *more]
        )

    def refuse_precision(self, precision: str) -> None:
        """Raise NotPossible where this machine has not this precision."""
        if precision == "fp16" and not self.on_gpu:
            raise NotPossible("fp16 needs a GPU")
        if precision == "bf16" and self.on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise NotPossible("this card has no bf16")

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """A context for what compiles. On a CPU graphs are traced and not turned into kernels.

        Raises NotPossible where a GPU's machine has no compiler.
        """
        torch.compiler.reset()
        with ExitStack() as stack:
            stack.callback(torch.compiler.reset)
            if self.on_gpu:
                try:
                    check_compiler("compute.compile")
                except ValueError as error:
                    raise NotPossible(str(error)) from None
            else:
                traced = functools.partial(torch.compile, backend="eager")
                stack.enter_context(patch("torch.compile", traced))
                stack.enter_context(patch("xdpo.compute.check_compiler", lambda setting: None))
            yield


class Trainee(NamedTuple):
    """A learner and its batches, in the training order."""

    learner: Learner
    batches: Iterator[Batch]

    def accumulate(self) -> dict[str, float]:
        """The micro-batches of one optimizer step, and the means and gradient norm of it, as training logs them."""
        learner, train = self.learner, self.learner.settings.train
        tally = Tally(learner.settings, learner.accelerator, train.total_batch_pairs)
        for _ in range(train.total_batch_pairs // train.micro_batch_pairs):
            batch = next(self.batches)
            tally.add(batch, learner.micro_step(batch))
        norm = learner.clip_gradients()
        metrics, _ = tally.exchange()
        return metrics | {"gradient_norm": norm.item()}

    def step(self, number: int) -> dict[str, float]:
        metrics = self.accumulate()
        return metrics | self.learner.update(number, metrics)


def forget_accelerator() -> None:
    """Let the next Accelerator have another precision; and free the memory of what came before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_trainee(settings: Config, *, scaled_on_cpu: bool = False) -> Trainee:
    """The learner of a config. scaled_on_cpu: in float32, but with fp16's loss scaling, which a CPU lacks."""
    forget_accelerator()
    accelerator = build_accelerator(settings)
    if scaled_on_cpu:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    set_seed(settings.seed)
    parts = load_parts(settings.model)
    pairs = open_pairs(settings, accelerator, Split.TRAIN)
    learner = build_learner(
        settings, accelerator, parts, RecordedErrors(None, None, is_complete=False), PairWeights(None, None)
    )
    if scaled_on_cpu:
        accelerator.native_amp, accelerator.autocast = True, nullcontext
        accelerator.state._mixed_precision = "fp16"
    dataset = make_dataset(pairs, parts.tokenize, settings, Split.TRAIN)
    return Trainee(learner, iter(make_loader(dataset, build_sampler(settings, accelerator, start_step=0))))
