"""A training stage: a module, its optimizers, a log, and checkpoints from which the same command goes on."""

import json
import math
import time
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from xdpo.files import replacing
from xdpo.runlog import keep_rows_until

WARMUP_STEPS = 100
LOG_EVERY = 100
SAVE_EVERY = 200


class Stage:
    """One training stage: a module, its optimizers with warm-up and cosine decay, a log, and checkpoints.

    The learning rate falls over the last `decay` of the steps; before that it doesn't depend on their number, so a
    stage that was stopped there goes on with another number of steps as if it had been asked for at once.

    Muon takes every weight as a matrix of outputs × the rest, AdamW takes biases, norms and embeddings. On the
    autoencoder Muon needs less than half of AdamW's steps (assets/tiny/README.md).
    """

    def __init__(self, name: str, module: nn.Module, work: Path, steps: int, learning_rate: float, decay: float = 1):
        self.name, self.module, self.steps, self.decay, self.step = name, module, steps, decay, 0
        self.path, self.log_path = work / f"{name}.pt", work / f"{name}.jsonl"
        embeddings = {layer.weight for layer in module.modules() if isinstance(layer, nn.Embedding)}
        self.weights = [weight for weight in module.parameters() if weight.ndim >= 2 and weight not in embeddings]
        self.matrices = [nn.Parameter(weight.data.flatten(1)) for weight in self.weights]  # the same memory
        others = [weight for weight in module.parameters() if weight.ndim < 2 or weight in embeddings]
        self.optimizers = (
            torch.optim.Muon(
                self.matrices, lr=learning_rate, weight_decay=0.0, momentum=0.9, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99)),
        )
        self.peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.ema = EMAModel(module.parameters(), decay=0.999, foreach=True)
        self.smoothed: torch.Tensor | None = None
        self.started = time.time()
        if self.path.exists():
            device = next(module.parameters()).device
            state = torch.load(self.path, weights_only=True, map_location=device)
            module.load_state_dict(state["module"])
            for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
            self.ema.load_state_dict(state["ema"])
            self.step, self.smoothed = state["step"], state["smoothed"]
        keep_rows_until(self.log_path, self.step)

    @property
    def is_to_log(self) -> bool:
        return self.step % LOG_EVERY == 0 or self.step == self.steps

    def update(self, loss: torch.Tensor) -> None:
        """One optimizer step on `loss`."""
        fallen = max(0.0, 1 - (self.steps - self.step) / (self.decay * self.steps))
        share = min((self.step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * fallen)) + 1e-3, 1.0)
        self.module.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()
        self.ema.step(self.module.parameters())
        detached = loss.detach()
        self.smoothed = detached if self.smoothed is None else 0.99 * self.smoothed + 0.01 * detached
        self.step += 1
        if self.step % SAVE_EVERY == 0 or self.step == self.steps:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema.state_dict(),
            "step": self.step,
            "smoothed": self.smoothed,
        }
        with replacing(self.path, "wb") as file:
            torch.save(state, file)

    def log(self, **metrics: float | torch.Tensor) -> None:
        """Write one line of metrics to the log file and the screen."""
        row = {"step": self.step, **{name: round(float(value), 5) for name, value in metrics.items()}}
        row["seconds"] = round(time.time() - self.started)
        print(f"{self.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        with self.log_path.open("a") as file:
            file.write(json.dumps(row) + "\n")
