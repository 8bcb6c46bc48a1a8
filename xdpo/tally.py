"""The results of one optimizer step's micro-steps, summed over all processes."""

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
        # Each micro-step's pair ids and errors: where a sum is not finite, the message names the pairs that made it so.
        self.window: list[tuple[list[str], PairErrors]] = []
        self._sums = torch.zeros(len(step.Statistics._fields), device=accelerator.device)
        self._truncated = self._unreadable = 0

    def add(self, batch: Batch, output: step.StepOutput) -> None:
        self._sums += torch.stack(output.statistics)
        self._truncated += batch.truncated
        self._unreadable += len(batch.unreadable)
        self.window.append((batch.pair_ids, step.detached(output.errors)))

    def exchange(self, signal_received: int) -> tuple[dict[str, float], bool]:
        """Metrics over all processes, and whether one of them received a signal. Waits for device and processes."""
        counts = [self._truncated, self._unreadable, signal_received]
        of_process = torch.cat([self._sums, torch.tensor(counts, dtype=torch.float32, device=self._sums.device)])
        *sums, truncated, unreadable, stopped = self.accelerator.reduce(of_process, "sum").tolist()
        total = self.settings.train.total_batch_pairs
        metrics = step.means(step.Statistics(*sums), total, self.settings.loss)
        return metrics | {"truncated_captions": truncated, "unreadable_rows": unreadable}, bool(stopped)
