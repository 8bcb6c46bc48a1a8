"""The data's own pairs or single images, in the training order."""

import time
from collections.abc import Iterator

from torch import nn

from xdpo.batch import Batch
from xdpo.config import Config
from xdpo.data import StepSampler, UnreadableTracker, make_loader
from xdpo.precompute import Examples, Pairs


class OfflineFeed:
    """Batches of a data set. Loading processes start with it.

    accumulation: micro-batches of an optimizer step in this process.
    """

    def __init__(
        self,
        settings: Config,
        pairs: Pairs,
        dataset: Examples,
        sampler: StepSampler,
        accumulation: int,
        *,
        pin_memory: bool,
    ):
        self.accumulation = accumulation
        self.wait_seconds = 0.0
        self._unreadable = UnreadableTracker(pairs, settings.data.max_unreadable_share)
        self._batches = iter(
            make_loader(dataset, sampler, num_workers=settings.data.num_workers, pin_memory=pin_memory)
        )

    def begin_step(self, step_number: int, policy: nn.Module) -> bool:
        self.wait_seconds = 0.0
        return True

    def micro_batches(self) -> Iterator[Batch]:
        for _ in range(self.accumulation):
            started = time.perf_counter()
            batch = next(self._batches)
            self.wait_seconds += time.perf_counter() - started
            self._unreadable.update(len(batch.rows), batch.unreadable)
            yield batch

    def close(self) -> None:
        """There is nothing to remove."""
