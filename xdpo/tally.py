"""What the micro-steps of one optimizer step gave, on all processes."""

import torch
from accelerate import Accelerator

from xdpo import step
from xdpo.batch import Batch
from xdpo.config import Config
from xdpo.loss import PairErrors


class Tally:
    """Adds up micro-steps without waiting for the device, and exchanges the sums once."""

    def __init__(self, settings: Config, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        self.window: list[tuple[list[str], PairErrors]] = []  # this process's micro-steps: pair ids, errors
        self._sums = torch.zeros(len(step.Statistics._fields), device=accelerator.device)
        self._truncated = self._unreadable = 0

    def add(self, batch: Batch, output: step.StepOutput) -> None:
        self._sums += torch.stack(output.statistics)
        self._truncated += batch.truncated
        self._unreadable += len(batch.unreadable)
        self.window.append((batch.pair_ids, step.detached(output.errors)))

    def exchange(self, signal_received: int) -> tuple[dict[str, float], bool]:
        """Metrics over all processes, and whether any of them received a signal; waits for the device and for them."""
        counts = [self._truncated, self._unreadable, signal_received]
        own = torch.tensor(counts, dtype=torch.float32, device=self.accelerator.device)
        *sums, truncated, unreadable, stopped = self.accelerator.reduce(torch.cat([self._sums, own]), "sum").tolist()
        total = self.settings.train.total_batch_pairs
        metrics = step.means(step.Statistics(*sums), total, self.settings.loss)
        return metrics | {"truncated_captions": truncated, "unreadable_rows": unreadable}, bool(stopped)
