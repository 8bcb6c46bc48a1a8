"""Work in processes of their own: trainings under a memory limit, several on one card, killed ones; and byte counts."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.modes import ROOT

IMPORTED_ONCE = [
    "gpu_checks.children",
    "benchmarks.counting",
    "diffusers.optimization",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "datasets",
    "peft",
    "xdpo.recording",
    "xdpo.training",
]
TIMEOUT = 900  # seconds of one training, which none needs unless it hangs


def start_method() -> Any:
    """How processes are started: new ones on a GPU, as CUDA does not survive a fork.

    On a CPU they are forked from one that has imported the libraries, which takes longer than what they do.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(IMPORTED_ONCE)
    return forking


def run(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own. Its exception is raised here."""
    with ProcessPoolExecutor(1, start_method()) as pool:
        return pool.submit(work, *arguments).result()


@dataclass(frozen=True)
class Launch:
    """A call of train_xdpo.py, and what its process meets.

    card_gb: the most that it may allocate on the GPU, in 1e9 bytes. backend: torch.distributed's, in place of the
    launcher's choice. killed_after: the logged optimizer step after which it meets SIGKILL.
    """

    arguments: Sequence[str]
    log: Path
    card_gb: float | None = None
    backend: str | None = None
    killed_after: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self) -> Any:
        process = start_method().Process(target=_train, args=(self,))
        process.start()
        return process


def train(*launches: Launch) -> None:
    """Run trainings side by side to their end. Raises ValueError with the end of what a failing one said."""
    started = [launch.start() for launch in launches]
    try:
        for process in started:
            process.join(TIMEOUT)
    finally:
        for process in started:
            process.kill()
            process.join()
    for launch, process in zip(launches, started, strict=True):
        expected = -signal.SIGKILL if launch.killed_after else 0
        if process.exitcode != expected:
            said = "\n".join(launch.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:])
            raise ValueError(f"a training ended with status {process.exitcode}:\n{said}")


def two_ranks(*, one_card: bool) -> list[dict[str, str]]:
    """The environment of two processes that train together, as a launcher sets it.

    one_card: each believes to be alone on its machine, so that both take the same card.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places = [("0", "1"), ("0", "1")] if one_card else [("0", "2"), ("1", "2")]
    return [
        address | {"RANK": str(rank), "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
        for rank, (local_rank, local_size) in enumerate(places)
    ]


def _train(launch: Launch) -> None:
    """The process of a training; it ends here."""
    from xdpo import compute, runlog

    os.environ.update(launch.environment)
    log = os.open(launch.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    if launch.card_gb is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, launch.card_gb * 1e9 / total))
    with ExitStack() as stack:
        if launch.backend is not None:
            chosen = partial(compute.InitProcessGroupKwargs, backend=launch.backend)
            stack.enter_context(patch.object(compute, "InitProcessGroupKwargs", chosen))
        if launch.killed_after is not None:
            write = runlog.RunLog.row

            def write_and_die(self: runlog.RunLog, step: int, *arguments: Any, **named: Any) -> None:
                write(self, step, *arguments, **named)
                if step == launch.killed_after:
                    os.kill(os.getpid(), signal.SIGKILL)

            stack.enter_context(patch.object(runlog.RunLog, "row", write_and_die))
        sys.exit(runpy.run_path(str(ROOT / "train_xdpo.py"))["main"](list(launch.arguments)))
