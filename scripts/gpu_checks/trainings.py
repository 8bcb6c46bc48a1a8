"""A training killed and resumed, two processes on one card, and one process on each of two cards."""

from functools import partial
from pathlib import Path

import torch
from benchmarks.modes import BASE_CONFIG
from safetensors.numpy import load_file

from gpu_checks import children
from gpu_checks.children import Launch
from gpu_checks.context import Context, forget_accelerator
from gpu_checks.rows import Finding, NotPossible, Row, equal, near
from xdpo import runs
from xdpo.runlog import read_rows

STEPS, KILLED_AFTER = 4, 3  # a checkpoint every other step: the kill loses one
GRADIENT_TOLERANCE = 1e-3  # relative, of the first step's gradient, which is summed in another order


def launches(context: Context, name: str, ranks: list[dict[str, str]] | None = None, **how) -> list[Launch]:
    """A LoRA training of a few steps in the folder `name`: the same pairs on any number of processes."""
    keys = context.overrides(
        f"output_dir={context.working / name}",
        "compute.deterministic=true",
        "model.trainable=lora",  # whose checkpoints are small
        "optim.learning_rate=1e-4",
        "optim.scale_lr=false",
        "train.total_batch_pairs=4",
        f"train.max_steps={STEPS}",
        "checkpoint.every=2",
        "eval.every=0",
        "samples.every=0",
    )
    arguments = ["--config", str(BASE_CONFIG), *keys]
    environments = ranks or [{}]
    return [
        Launch(arguments, context.working / f"{name}.{rank}.log", environment=environment, **how)
        for rank, environment in enumerate(environments)
    ]


def whole(context: Context) -> Path:
    """The folder of the uninterrupted run of one process."""

    def train() -> Path:
        forget_accelerator()
        children.train(*launches(context, "whole"))
        return context.working / "whole"

    return context.share("whole", train)


def differing(one: Path, other: Path) -> int:
    """How many tensors of two runs' last checkpoints, weights and moments, are not the same to the bit."""
    count = 0
    for name in ("policy", "optimizer"):
        first, second = (load_file(runs.finished_checkpoints(run)[-1] / f"{name}.safetensors") for run in (one, other))
        names = first.keys() | second.keys()
        count += sum(
            key not in first or key not in second or first[key].tobytes() != second[key].tobytes() for key in names
        )
    return count


def check_killed(context: Context) -> Finding:
    """Killed after a step that is in no checkpoint, then resumed by the same command."""
    forget_accelerator()
    children.train(*launches(context, "killed", killed_after=KILLED_AFTER))
    saved = runs.step_of(runs.finished_checkpoints(context.working / "killed")[-1])
    if saved >= KILLED_AFTER:
        raise ValueError(f"the killed run has a checkpoint of step {saved}: it lost nothing that a resume could show")
    children.train(*launches(context, "killed"))
    count = differing(whole(context), context.working / "killed")
    return equal(count, 0, "compute.attention=eager beside compute.deterministic=true")


def check_two_processes(context: Context, backend: str | None, one_card: bool) -> Finding:
    """The gradient norm of two processes' first step beside that of one process's."""
    if not one_card and torch.cuda.device_count() < 2:
        raise NotPossible("there is one card" if context.on_gpu else "there is no card")
    name = f"two on {'one card' if one_card else 'two cards'}".replace(" ", "_")
    alone = read_rows(whole(context) / "metrics.jsonl")
    children.train(*launches(context, name, children.two_ranks(one_card=one_card), backend=backend))
    together = read_rows(context.working / name / "metrics.jsonl")
    first, last = together[0]["gradient_norm"], together[-1]["step"]
    if last != STEPS:
        raise ValueError(f"two processes logged {last} steps of {STEPS}")
    remedy = "train on one card, or NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1"
    return near(first, alone[0]["gradient_norm"], GRADIENT_TOLERANCE, remedy)


ROWS = (
    Row("tensors that differ after a kill and a resume: LoRA, compute.deterministic=true", check_killed),
    Row(
        "gradient norm as of one process: two on one card, over gloo",
        partial(check_two_processes, backend="gloo", one_card=True),
    ),
    Row(
        "gradient norm as of one process: one on each of two cards, over NCCL",
        partial(check_two_processes, backend=None, one_card=False),
    ),
)
