"""Run processes, some at a time: skip those that are done, pass a stop on to them, name those that fail.

A process holds a lock on its log as long as it lives. If this program is killed and started again, it waits for the
processes that are still running, so that no two processes write to one folder.
"""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from xdpo.files import write_text

POLL_SECONDS = 0.1


class Interrupted(Exception):
    """Raised after SIGINT or SIGTERM, once the running tasks have saved and exited."""


class StageError(RuntimeError):
    """A stage failed as a whole; the message has the end of its log."""


@dataclass(frozen=True)
class Task:
    """A process: its name, its command, the log to which its output is appended, and whether it is done."""

    name: str
    command: tuple[str, ...]
    log: Path
    is_done: Callable[[], bool]
    finish: Callable[[], None] = lambda: None  # called after exit status 0


def once(name: str, command: Sequence[str], result: Path, inputs: Sequence[Path]) -> Task:
    """A task that makes `result`, a file or folder with the log beside it.

    It is done once this exact command has succeeded, while the result is there and none of its `inputs` is newer.
    """
    log = result.with_name(result.name + ".log")
    marker = marker_of(log)
    text = shlex.join(command) + "\n"

    def is_done() -> bool:
        if not result.exists() or not marker.is_file() or marker.read_text(encoding="utf-8") != text:
            return False
        finished = marker.stat().st_mtime_ns
        return all(path.exists() and path.stat().st_mtime_ns <= finished for path in inputs)

    return Task(name, tuple(command), log, is_done, lambda: write_text(marker, text))


def marker_of(log: Path) -> Path:
    """The file that holds the command with which a task of `once` was done, and is as old as its result."""
    return log.with_name(log.name + ".done")


def launcher(num_processes: int) -> tuple[str, ...]:
    """The command that starts one of our programs: plain Python, accelerate on GPUs, or torchrun on a CPU.

    (On a CPU accelerate's launcher silently starts one process where several are requested.)
    """
    if num_processes == 1:
        return (sys.executable,)
    if torch.accelerator.is_available():
        options = ("--multi_gpu", "--num_processes", str(num_processes), "--main_process_port", "0")
        return (sys.executable, "-m", "accelerate.commands.launch", *options)
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}")


def print_line(text: str) -> None:
    """Print a line and flush it, so that somebody can follow a file."""
    print(text, flush=True)


def run_all(
    tasks: Sequence[Task], jobs: int = 1, num_processes: int = 1, report: Callable[[str], None] = print_line
) -> dict[str, str]:
    """Run the unfinished tasks in order, `jobs` at a time. Returns the failed ones, with the end of their log.

    Each job has `num_processes` GPUs of its own, or its share of the CPU's cores as threads. Raises ValueError if there
    are too few GPUs. After SIGINT or SIGTERM the running tasks get SIGTERM, and Interrupted is raised.
    """
    if jobs < 1 or num_processes < 1:
        raise ValueError(f"jobs and processes must be at least 1, got {jobs} and {num_processes}")
    _wait_for_earlier_starts(tasks, report)
    environments = [_environment(job, jobs, num_processes) for job in range(jobs)]
    waiting = [task for task in tasks if not task.is_done()]
    total, ended, failed = len(waiting), 0, {}
    running: dict[int, tuple[Task, subprocess.Popen, float]] = {}
    asked: list[int] = []
    handed_on = 0
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in signals}
    try:
        while running or (waiting and not asked):
            while waiting and len(running) < jobs and not asked:
                job, task = min(set(range(jobs)) - running.keys()), waiting.pop(0)
                running[job] = (task, _start(task, environments[job]), time.monotonic())
            if len(asked) > handed_on:
                handed_on = len(asked)
                for _, process, _ in running.values():
                    process.send_signal(signal.SIGTERM)
            for job, (task, process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                ended += 1
                how = f"{time.monotonic() - started:.0f} s"
                if process.returncode == 0:
                    task.finish()
                if asked:
                    how = "stopped" if not task.is_done() else how
                elif process.returncode or not task.is_done():
                    failed[task.name] = end_of(task.log)
                    how = f"failed with exit status {process.returncode}; the end of {task.log}:\n{failed[task.name]}"
                report(f"[{ended}/{total}] {task.name}: {how}")
            time.sleep(POLL_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise Interrupted
    return failed


def finish(tasks: Sequence[Task], jobs: int = 1, num_processes: int = 1) -> None:
    """Run tasks that later stages need. Raises StageError if one fails."""
    for name, end in run_all(tasks, jobs, num_processes).items():
        raise StageError(f"{name} failed:\n{end}")


def _wait_for_earlier_starts(tasks: Sequence[Task], report: Callable[[str], None]) -> None:
    """Wait until no process of an earlier start is running any of the tasks."""
    for task in tasks:
        if task.log.exists():
            with task.log.open("a") as log:
                try:
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    report(f"{task.name}: a process of an earlier start is still at work on it; waiting for its end")
                    fcntl.flock(log, fcntl.LOCK_EX)


def end_of(log: Path, lines: int = 12) -> str:
    """The last lines of a log, without overwritten progress bars."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join([line.rpartition("\r")[2] for line in text.splitlines() if line.strip()][-lines:])


def _start(task: Task, environment: dict[str, str]) -> subprocess.Popen:
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("a", encoding="utf-8") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # the process inherits the lock with its output
        # A session of its own: Ctrl-C reaches it only through this program.
        return subprocess.Popen(
            task.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _environment(job: int, jobs: int, num_processes: int) -> dict[str, str]:
    """The environment of one of `jobs` concurrent processes, so that they share neither GPUs nor cores."""
    environment = dict(os.environ)
    if torch.cuda.is_available():
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        if jobs * num_processes > len(gpus):
            raise ValueError(f"{jobs} jobs of {num_processes} GPUs need {jobs * num_processes}, there are {len(gpus)}")
        mine = gpus[job * num_processes : (job + 1) * num_processes]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    elif "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // (jobs * num_processes)))
    return environment
