"""The interface of what an optimizer step trains on."""

from collections.abc import Iterator
from typing import Protocol

from torch import nn

from xdpo.batch import Batch


class Feed(Protocol):
    """Gives the micro-batches of each optimizer step, in order, beginning at the step for which it was made."""

    @property
    def wait_seconds(self) -> float:
        """How long this process has waited for the batches of the step."""
        ...

    def begin_step(self, step_number: int, policy: nn.Module) -> bool:
        """Prepare an optimizer step; every process calls it. `policy` is outside its distributed wrapper.

        Returns False where the run was asked to stop before all was ready.
        """
        ...

    def micro_batches(self) -> Iterator[Batch]:
        """The micro-batches of the step, on the CPU. Raises DataError where the data are damaged."""
        ...

    def close(self) -> None:
        """Remove what is not needed after the last step; the first process calls it."""
        ...
