"""A run's metrics.jsonl, trackers, page and progress bar. Only the first process writes."""

import json
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from xdpo.files import StorageError, reading, write_text, writing
from xdpo.progress import Progress

HELD_OUT = "eval/"  # before the name of a metric on held-out pairs
WARNED = f"{HELD_OUT}both_errors_above_reference"  # a metric: 1 in the evaluation at which a run warned
_GROUPS = {  # in the trackers, of metrics whose name has no group
    "optim": ("learning_rate", "gradient_norm", "effective_beta", "loss_scale", "skipped_steps"),
    "speed": ("pairs_per_second", "data_wait_share", "peak_memory_gb"),
    "data": ("pairs_seen", "truncated_captions", "unreadable_rows"),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}


class Page(Protocol):
    """What shows a run's rows to people."""

    def add(self, row: Mapping[str, float]) -> None: ...

    def write_if_due(self) -> None: ...

    def close(self) -> None: ...

    def fail(self, error: BaseException) -> None: ...


class RunLog:
    """Logs one row of metrics per optimizer step.

    Rows go to `folder`/metrics.jsonl (flushed at once, so that a kill loses none), to the run's page and to the
    trackers that the accelerator was built with. The progress bar shows the most important metrics. A resumed run drops
    the rows after its checkpoint and writes them again. Raises StorageError where a row or the page can't be written.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        *,
        project: str,
        config: dict,
        start_step: int,
        max_steps: int,
        run_id: str | None = None,
        page: Page | None = None,
    ):
        """`config` maps dotted keys to plain values, for the trackers; `project` is their name for the work.

        run_id: the run's name for a tracker that can resume a run (W&B), the same at every start.
        page: the first process's.
        """
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.path = folder / "metrics.jsonl"
        self.page = page
        if self.is_main:
            rows = keep_rows_until(self.path, start_step)
            if page is not None:
                for row in rows:
                    page.add(row)
                page.write_if_due()
        accelerator.init_trackers(project, init_kwargs={"wandb": {"id": run_id, "resume": "allow"}})
        for tracker in accelerator.trackers:  # one page of text, not an hparams folder for every start
            if tracker.name == "tensorboard":
                tracker.tracker.add_text("config", "\n".join(f"    {k}: {v}" for k, v in config.items()), start_step)
            else:
                tracker.store_init_configuration(config)
        self.bar = Progress(
            total=max_steps,
            initial=start_step,
            unit="step",
            disable=not self.is_main,
            dynamic_ncols=True,
            smoothing=0.1,
        )

    def say(self, text: str) -> None:
        """Print one line, on a terminal above the progress bar."""
        if self.is_main:
            self.bar.say(text)

    def row(self, step: int, metrics: dict[str, float], advance: bool = False) -> None:
        """Log `metrics` at `step`; `advance` moves the bar by one optimizer step."""
        if self.is_main:
            row = {"step": step, **metrics}
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if self.page is not None:
                self.page.add(row)
                self.page.write_if_due()
            if advance:
                shown = {"loss": "loss", "acc": "implicit_accuracy", "lr": "learning_rate"}
                self.bar.set_postfix({short: f"{metrics[name]:.3g}" for short, name in shown.items()}, refresh=False)
                self.bar.update()
        self.accelerator.log({tracker_name(name): value for name, value in metrics.items()}, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Give an image file to the trackers."""
        if self.is_main and self.accelerator.trackers:
            with reading(path), Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))[None]
            for tracker in self.accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: pixels}, step=step, **layout)

    def fail(self, error: BaseException) -> None:
        """Say on the page that the run ended with an error."""
        if self.page is not None:
            with suppress(StorageError):  # the error itself is more important
                self.page.fail(error)

    def close(self) -> None:
        if self.page is not None:
            self.page.close()
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()  # end_training() would also disconnect the processes, one by one


def tracker_name(metric: str) -> str:
    """A metric's name in the trackers, which show what comes before a slash as a group."""
    return metric if "/" in metric else f"{_GROUP_OF.get(metric, 'train')}/{metric}"


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, oldest first. A last line that a kill cut short is left out.

    Raises ValueError naming any other line that is no row: those after it must not be lost.
    """
    with reading(path):
        lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("it has no step")
            rows.append(row)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path} line {number} is damaged ({error}); remove that line") from None
    return rows


def keep_rows_until(path: Path, step: int) -> list[dict]:
    """Drop a file's rows after a step. Returns the others."""
    kept = [row for row in read_rows(path) if row["step"] <= step]
    if path.is_file():
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far, in GB (1e9 bytes): the GPU's on a GPU, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Linux hands a parent's ru_maxrss on to the program that it starts; the high-water mark is the program's own.
    status = Path("/proc/self/status")
    if status.is_file():
        (kibibytes,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kibibytes) * 1024 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
