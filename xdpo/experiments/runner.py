"""Training cells: each in a process of its own, what is finished skipped, what was interrupted gone on with."""

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from xdpo.experiments.cells import Cell
from xdpo.report.grids import Cell as TableCell
from xdpo.report.grids import Grid

ROOT = Path(__file__).resolve().parents[2]


class Interrupted(Exception):
    """A signal asked to stop; the training in work has saved and left."""


def launch_command(cell: Cell, num_processes: int) -> list[str]:
    """How a cell is started: plainly, through accelerate on GPUs, through torchrun on a CPU.

    (accelerate's launcher silently starts one process where several are asked of a CPU.)
    """
    training = [str(ROOT / "train_xdpo.py"), "--config", str(cell.config), *cell.overrides]
    if num_processes == 1:
        return [sys.executable, *training]
    if torch.accelerator.is_available():
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_processes)]
    else:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    return [sys.executable, "-m", *launcher, *training]


def train(cell: Cell, num_processes: int = 1) -> int:
    """Train a cell to its end; its output is appended to the log. Returns the exit status.

    SIGINT and SIGTERM are handed on; the training then saves and leaves, and Interrupted is raised.
    """
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    asked: list[int] = []
    with cell.log.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            launch_command(cell, num_processes), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

        def hand_on(number: int, frame: object) -> None:
            asked.append(number)
            process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if asked:
        raise Interrupted
    return status


def train_all(
    cells: Sequence[Cell], num_processes: int = 1, say: Callable[[str], None] = print, table: bool = True
) -> dict[str, str]:
    """Train all cells that are not finished, in order. Returns those that failed, with the end of what they said."""
    from xdpo.report.grids import to_text

    failed: dict[str, str] = {}
    for cell in cells:
        if cell.is_finished:
            continue
        say(f"{'goes on' if cell.steps_done else 'starts'}: {cell.name}")
        status = train(cell, num_processes)
        if status or not cell.is_finished:
            failed[cell.name] = end_of(cell.log)
            say(f"failed: {cell.name}, exit status {status}; the end of {cell.log}:\n{failed[cell.name]}")
        if table:
            say(to_text(progress(cells, failed)))
    return failed


def end_of(log: Path, lines: int = 12) -> str:
    """The last lines of a log, without the progress bars that they overwrote."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join([line.rpartition("\r")[2] for line in text.splitlines() if line.strip()][-lines:])


def progress(cells: Sequence[Cell], failed: Sequence[str] | dict[str, str] = ()) -> Grid:
    """A row for each cell: how far it is, how fast, what its held-out pairs say; and how long the rest may take."""
    rows, speeds, left_pairs = [], [], 0
    for cell in cells:
        train_section, logged = cell.settings.train, cell.rows()
        speed = median([row["pairs_per_second"] for row in logged if "pairs_per_second" in row] or [0.0])
        steps = max((row["step"] for row in logged if "loss" in row), default=0)
        accuracy = [row["eval/implicit_accuracy"] for row in logged if "eval/implicit_accuracy" in row]
        state = "finished" if cell.is_finished else "failed" if cell.name in failed else "begun" if logged else ""
        if state != "finished":
            left_pairs += (train_section.max_steps - steps) * train_section.total_batch_pairs
        if speed:
            speeds.append(speed)
        rows.append(
            (
                TableCell(cell.name),
                TableCell(state),
                TableCell(f"{steps:,} of {train_section.max_steps:,}", steps),
                TableCell(f"{speed:.3g}" if speed else "", speed or None),
                TableCell(f"{accuracy[-1]:.3f}" if accuracy else "", accuracy[-1] if accuracy else None),
            )
        )
    note = ""
    if speeds and left_pairs:
        speed = median(speeds)
        note = f"about {left_pairs / speed / 3600:.1f} hours of optimizer steps left, at {speed:.3g} pairs/s"
    return Grid("Cells", ("cell", "state", "steps", "pairs/s", "held-out accuracy"), tuple(rows), note)
