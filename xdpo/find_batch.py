"""Which micro-batch is fastest on this device."""

import time
from functools import partial

import torch
from accelerate import Accelerator

from xdpo.batch import Batch
from xdpo.config import Config, accumulation_steps
from xdpo.data import PairWeights, Split
from xdpo.families import PipelineParts
from xdpo.learner import Learner, RecordedErrors, build_learner, open_recorded_errors
from xdpo.precompute import Pairs, make_dataset
from xdpo.runlog import peak_memory_gb

TIMED_STEPS = 4  # micro-steps timed for each size


def find_batch(
    settings: Config, accelerator: Accelerator, parts: PipelineParts, pairs: Pairs, margin_weights: PairWeights
) -> int:
    """Time micro-steps of growing size on this device and print which is fastest. Writes nothing but caches.

    The sizes are the divisors of a process's share of the total batch. It stops where memory is exhausted, or at a size
    that is slower than one of at most half of it. Loading is not timed; encoding is, unless examples are cached.
    The memory is that of the training, model.ema_decay included.
    Raises ValueError where not even one pair fits.
    """
    total, processes, device = settings.train.total_batch_pairs, accelerator.num_processes, accelerator.device
    accumulation_steps(settings, processes)  # raises where the batch cannot be split
    recorded = open_recorded_errors(settings, accelerator, pairs, None, start_step=0)
    if not recorded.is_complete:  # a mixture of recorded and measured errors would be timed
        recorded = RecordedErrors(None, None, is_complete=False)
    learner = build_learner(settings, accelerator, parts, recorded, margin_weights)
    dataset = make_dataset(pairs, parts.tokenize, settings, Split.TRAIN)
    learner.settle_gradients(dataset.batch([0]))

    say = partial(accelerator.print, flush=True)  # a line is seen when it is measured, in a log file too
    speeds: dict[int, float] = {}
    say(f"{'micro batch':>11}  {'accumulation':>12}  {'pairs/s':>9}  {'peak memory':>11}")
    for size in (size for size in range(1, total // processes + 1) if total // processes % size == 0):
        try:
            seconds = _time_micro_steps(learner, dataset.batch(list(range(size))))
        except torch.OutOfMemoryError:
            say(f"{size:>11}  does not fit")
            break
        speeds[size] = processes * TIMED_STEPS * size / seconds
        say(f"{size:>11}  {total // processes // size:>12}  {speeds[size]:>9.3g}  {peak_memory_gb(device):>8.2f} GB")
        if speeds[size] < max((speed for other, speed in speeds.items() if other <= size / 2), default=0.0):
            break
    if not speeds:
        raise ValueError(
            "not even one pair fits; compute.gradient_checkpointing=true or model.trainable=lora need less"
        )
    best = max(speeds, key=lambda size: speeds[size])
    say(f"fastest here: train.micro_batch_pairs={best}; the total batch stays {total}, and so does the result")
    return 0


def _time_micro_steps(learner: Learner, batch: Batch) -> float:
    """Seconds of TIMED_STEPS micro-steps. The learning rate is 0 throughout, so no weight changes."""
    if learner.settings.compute.compile:
        torch.compiler.reset()  # or it would give up compiling after a few sizes

    def micro_step() -> None:
        with learner.accelerator.no_sync(learner.policy):
            learner.accelerator.backward(learner.measure(batch).loss.mean())

    for _ in range(2):  # the first one compiles, chooses kernels and fills the optimizer's moments
        micro_step()
        learner.optimizer.step()
    _wait_for(learner.accelerator.device)
    start = time.perf_counter()
    for _ in range(TIMED_STEPS):
        micro_step()
    _wait_for(learner.accelerator.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
