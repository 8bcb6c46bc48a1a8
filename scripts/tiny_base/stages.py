"""A training stage: a module, its optimizers, a log, and checkpoints from which the same command goes on."""

import json
import math
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from xdpo.files import replacing
from xdpo.runlog import keep_rows_until

WARMUP_STEPS = 100
LOG_EVERY = 100
SAVE_EVERY = 200
MUONS = 12  # optimizers that share the matrices
EAGER_CALLS = 3  # of a graph, before it is recorded


class Graph:
    """A function of CUDA tensors whose kernels are recorded in one call and replayed in all later ones.

    The first few calls run as they are, so that the libraries and the optimizers set up what they need.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.calls, self.stream = function, 0, torch.cuda.Stream()
        self.inputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= EAGER_CALLS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if not self.inputs:
            self.inputs, self.graph = [each.clone() for each in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.function(*self.inputs)
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.result.clone()


class Stage:
    """One training stage: a module, its loss, its optimizers with warm-up and cosine decay, a log, and checkpoints.

    The learning rate falls over the last `decay` of the steps; before that it doesn't depend on their number, so a
    stage that was stopped there goes on with another number of steps as if it had been asked for at once.

    Muon takes every weight as a matrix of outputs × the rest, AdamW takes biases, norms and embeddings. On the
    autoencoder Muon needs less than half of AdamW's steps (assets/tiny/README.md).

    On a GPU a step is recorded once as a CUDA graph and then replayed: its thousands of small kernels would otherwise
    take longer to start than to run.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        loss: Callable[..., Tensor],
        work: Path,
        steps: int,
        learning_rate: float,
        decay: float = 1,
    ):
        self.name, self.module, self.loss, self.steps, self.decay, self.step = name, module, loss, steps, decay, 0
        self.path, self.log_path = work / f"{name}.pt", work / f"{name}.jsonl"
        self.device = next(module.parameters()).device
        embeddings = {layer.weight for layer in module.modules() if isinstance(layer, nn.Embedding)}
        self.weights = [weight for weight in module.parameters() if weight.ndim >= 2 and weight not in embeddings]
        self.matrices = [nn.Parameter(weight.data.flatten(1)) for weight in self.weights]  # the same memory
        others = [weight for weight in module.parameters() if weight.ndim < 2 or weight in embeddings]
        is_graphed = self.device.type == "cuda"
        muons = [
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, momentum=0.9, adjust_lr_fn="match_rms_adamw")
            for matrices in (self.matrices[part::MUONS] for part in range(MUONS))
            if matrices
        ]
        adamw = torch.optim.AdamW(others, lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99), capturable=is_graphed)
        self.optimizers = [*muons, adamw]
        self.streams = [torch.cuda.Stream() for _ in self.optimizers] if is_graphed else []
        self.share = torch.zeros((), device=self.device)  # of the peak learning rates
        self.graph = Graph(self._learn) if is_graphed else None
        self.ema = EMAModel(module.parameters(), decay=0.999, foreach=True)
        self.smoothed: Tensor | None = None
        self.started = time.time()
        if self.path.exists():
            state = torch.load(self.path, weights_only=True, map_location=self.device)
            module.load_state_dict(state["module"])
            for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
            self.ema.load_state_dict(state["ema"])
            self.step, self.smoothed = state["step"], state["smoothed"]
        keep_rows_until(self.log_path, self.step)

    @property
    def is_to_log(self) -> bool:
        return self.step % LOG_EVERY == 0 or self.step == self.steps

    def take_step(self, *inputs: Tensor) -> None:
        """One optimizer step on the loss of `inputs`, whose shapes are the same in every step."""
        fallen = max(0.0, 1 - (self.steps - self.step) / (self.decay * self.steps))
        share = min((self.step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * fallen)) + 1e-3, 1.0)
        self.share.fill_(share)
        loss = (self.graph or self._learn)(*(each.to(self.device) for each in inputs))
        self.ema.step(self.module.parameters())
        self.smoothed = loss if self.smoothed is None else 0.99 * self.smoothed + 0.01 * loss
        self.step += 1
        if self.step % SAVE_EVERY == 0 or self.step == self.steps:
            self.save()

    def _learn(self, *inputs: Tensor) -> Tensor:
        """The step's arithmetic, which is the same in every step: a graph can hold it. Returns the loss."""
        self.module.zero_grad()
        loss = self.loss(*inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        before = [weight.detach().clone() for weight in self.module.parameters()]
        self._step_optimizers()
        # Without weight decay a change is in proportion to the learning rate. Muon would take that as a number, which a
        # graph can't change; so both optimizers step at their peak, and the change is scaled.
        with torch.no_grad():
            for weight, old in zip(self.module.parameters(), before, strict=True):
                weight.copy_(old.lerp(weight, self.share))
        return loss.detach()

    def _step_optimizers(self) -> None:
        """Step all optimizers, on a GPU side by side: Muon's kernels are too small to fill it."""
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream())
        for optimizer, stream in zip_longest(self.optimizers, self.streams):
            with torch.cuda.stream(stream):
                optimizer.step()
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)

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

    def log(self, **metrics: float | Tensor) -> None:
        """Write one line of metrics to the log file and the screen."""
        row = {"step": self.step, **{name: round(float(value), 5) for name, value in metrics.items()}}
        row["seconds"] = round(time.time() - self.started)
        print(f"{self.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        with self.log_path.open("a") as file:
            file.write(json.dumps(row) + "\n")
