"""The results of micro-steps, of an optimizer step or of an evaluation, summed over all processes."""

from typing import NamedTuple

import torch
from accelerate import Accelerator

from xdpo import step
from xdpo.batch import Batch
from xdpo.config import Config
from xdpo.loss import PairErrors


class Counts(NamedTuple):
    """Of all processes."""

    truncated_captions: float
    unreadable_rows: float
    signals: float  # 0: nobody asked the run to stop


class Tally:
    """Adds up the outcomes of `num_pairs` pairs without waiting for the device, and exchanges the sums once."""

    def __init__(self, settings: Config, accelerator: Accelerator, num_pairs: int):
        self.settings, self.accelerator, self.num_pairs = settings, accelerator, num_pairs
        # Each micro-step's pair ids and errors: where a sum is not finite, the message names the pairs that made it so.
        self.window: list[tuple[list[str], PairErrors]] = []
        self._sums = torch.zeros(len(step.Statistics._fields), device=accelerator.device)
        self._truncated = self._unreadable = 0

    def add(self, batch: Batch, output: step.StepOutput) -> None:
        self._sums += torch.stack(output.statistics)
        self._truncated += batch.truncated
        self._unreadable += len(batch.unreadable)
        self.window.append((batch.pair_ids, step.detached(output.errors)))

    def exchange(self, signal_received: int = 0) -> tuple[dict[str, float], Counts]:
        """Means over the pairs of all processes, and their counts. Waits for the device and for all processes."""
        counts = [self._truncated, self._unreadable, signal_received]
        of_process = torch.cat([self._sums, torch.tensor(counts, dtype=torch.float32, device=self._sums.device)])
        sums = self.accelerator.reduce(of_process, "sum").tolist()
        statistics = step.Statistics(*sums[: -len(counts)])
        return step.means(statistics, self.num_pairs, self.settings.loss), Counts(*sums[-len(counts) :])
