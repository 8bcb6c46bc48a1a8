"""NaN and infinity: a run stops before they reach its weights; in fp16 a few steps may be skipped instead."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from xdpo.loss import PairErrors

MAX_SKIPPED = 20  # optimizer steps that may overflow in fp16 one after another; a scale settles within a few


class NonFiniteError(RuntimeError):
    """The loss or its gradient is not a finite number; the message names pairs and values."""


def refuse_non_finite(
    step_number: int, metrics: dict[str, float], window: list[tuple[list[str], PairErrors]], is_scaled: bool
) -> None:
    """Raise NonFiniteError if the loss or margin is not finite, or, without loss scaling, the gradient.

    window: pair ids and errors of each micro-step of this process, as Tally.window has them. is_scaled: fp16, whose
    scaler skips overflowing steps itself.
    """
    watched = ["loss", "margin"] if is_scaled else ["loss", "margin", "gradient_norm"]
    bad = [name for name in watched if not torch.isfinite(torch.tensor(metrics[name]))]
    if not bad:
        return
    rows = []
    for pair_ids, errors in window:
        measured = torch.stack([error.float() for error in errors if error is not None], dim=1).cpu()  # (B, 4 or 2)
        for pair_id, values in zip(pair_ids, measured, strict=True):
            if bad == ["gradient_norm"] or not torch.isfinite(values).all():
                chosen, rejected, *reference = values.tolist()
                line = f"pair {pair_id}: e policy {chosen:.6g}/{rejected:.6g}"
                if reference:
                    line += ", reference {:.6g}/{:.6g}".format(*reference)
                    line += f", d {chosen - reference[0]:.6g}/{rejected - reference[1]:.6g}"
                rows.append(line + " (chosen/rejected)")
    pairs = "\n  ".join(rows[:8]) or "none of this process's pairs; see the other processes"
    raise NonFiniteError(
        f"{' and '.join(bad)} not finite in optimizer step {step_number + 1}; the weights were not touched.\n"
        f"  {pairs}\n"
        "Lower optim.learning_rate or loss.beta, or set compute.precision=fp32, and go on from the last checkpoint"
    )


class SkippedSteps:
    """Counts the optimizer steps that the fp16 scaler skipped because gradients overflowed; none without a scaler.

    A skipped step is recognised by the scale, which falls: what optimizers report is not reliable.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None):
        self.scaler, self.total, self.in_a_row = scaler, 0, 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context for the optimizer's step, which notes whether it is skipped."""
        before = self._scale()
        yield
        was_skipped = self._scale() < before
        self.total += was_skipped
        self.in_a_row = self.in_a_row + 1 if was_skipped else 0

    def metrics(self) -> dict[str, float]:
        return {} if self.scaler is None else {"loss_scale": self._scale(), "skipped_steps": self.total}

    def refuse_too_many(self, step_number: int) -> None:
        """Raise NonFiniteError after MAX_SKIPPED in a row, or where the scale no longer enlarges the loss."""
        if self.in_a_row >= MAX_SKIPPED or self._scale() < 1:
            raise NonFiniteError(
                f"gradients were not finite in {self.in_a_row} optimizer steps in a row, up to step {step_number + 1}, "
                f"and the fp16 loss scale has fallen to {self._scale():g}; these steps changed no weight. Lower "
                "optim.learning_rate or loss.beta, or set compute.precision=bf16 or fp32, and go on from the last "
                "checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        scaler = self.scaler.state_dict() if self.scaler is not None else None
        return {"scaler": scaler, "skipped_steps": self.total, "skipped_in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row = state.get("skipped_steps", 0), state.get("skipped_in_a_row", 0)
        if self.scaler is not None and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])

    def _scale(self) -> float:
        return 1.0 if self.scaler is None else self.scaler.get_scale()
