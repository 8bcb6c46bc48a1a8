"""What training carries: the policy, what it is measured against, and the optimizer; and the micro-step.

The loop of training.py, held-out evaluation, --find-batch and the benchmark all run `Learner.measure`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from xdpo import config, models, processes, runs, step
from xdpo.batch import Batch
from xdpo.cache import ReferenceCache
from xdpo.config import Config
from xdpo.data import PairWeights, Split
from xdpo.families import PipelineParts
from xdpo.noisy import NoisyBatch, NoisyBatchMaker, denoising_errors, residuals
from xdpo.non_finite import SkippedSteps
from xdpo.precompute import Pairs, open_reference
from xdpo.reference import AdapterOff, Frozen, Moving, Recorded, Reference

# Relative, of the largest difference in a batch. In the embedded world bf16 moves an error by at most 2 % from that of
# float32, another image by 44 % in the median and 3 % at the fifth percentile; recorded and measured are of one kind.
RECORDED_ERROR_TOLERANCE = 0.02


class RecordedErrors(NamedTuple):
    """The reference's recorded errors on both kinds of pairs; None where the config keeps none."""

    train: ReferenceCache | None
    held_out: ReferenceCache | None
    is_complete: bool  # all that the run still needs is there


def open_recorded_errors(
    settings: Config, accelerator: Accelerator, train_pairs: Pairs, held_out_pairs: Pairs | None, start_step: int
) -> RecordedErrors:
    """What is recorded of the reference under this config, and whether that is enough from `start_step` on."""
    precision, total_batch = accelerator.mixed_precision, settings.train.total_batch_pairs
    train = open_reference(settings, train_pairs, Split.TRAIN, precision)
    if train is None:
        return RecordedErrors(None, None, is_complete=False)
    is_complete = train.has(range(start_step * total_batch, settings.train.max_steps * total_batch))
    held_out = None
    if held_out_pairs:
        held_out = open_reference(settings, held_out_pairs, Split.HELD_OUT, precision)
        is_complete = is_complete and held_out.has(range(len(held_out_pairs) * settings.eval.draws))
    is_complete = all(processes.gather(is_complete))  # another run may be recording there
    if not is_complete:
        for cache in (train, held_out):
            if cache is not None:
                cache.check_writable()
    accelerator.print(
        f"reference cache: {train.folder}, {len(train):,} samples known"
        + ("; all that this run needs, so the reference is not loaded" if is_complete else "")
    )
    return RecordedErrors(train, held_out, is_complete)


@dataclass
class Learner:
    """One training: networks, optimizer, and what else changes from step to step."""

    settings: Config
    accelerator: Accelerator
    parts: PipelineParts
    policy: nn.Module  # as accelerate prepared it
    bare_policy: nn.Module  # outside its distributed wrapper
    optimizer: torch.optim.Optimizer
    make_noisy: NoisyBatchMaker
    references: dict[Split, Reference]  # they share the network, and differ in what is recorded
    margin_weights: PairWeights
    ema: Any  # diffusers' EMAModel, or None
    z0: Tensor  # Diffusion-KTO's reference point: the mean gain of the step before
    skipped_steps: SkippedSteps
    parameters: list[nn.Parameter] = field(init=False)  # the trained ones

    def __post_init__(self) -> None:
        self.parameters = models.trainable_parameters(self.policy)

    @property
    def reference(self) -> Reference:
        return self.references[Split.TRAIN]

    def measure(self, batch: Batch, split: Split = Split.TRAIN, positions: Any = None) -> step.StepOutput:
        """Loss and statistics of a batch; `positions` (B,) give the pairs their draws, instead of the batch's own."""
        return self.outcome(batch, self.noisy(batch, split, positions), split)

    def noisy(self, batch: Batch, split: Split = Split.TRAIN, positions: Any = None) -> NoisyBatch:
        """The batch as the networks are given it: the first half of `measure`."""
        with self.accelerator.autocast():
            return self.make_noisy(batch, split.seed(self.settings), positions)

    def outcome(self, batch: Batch, noisy: NoisyBatch, split: Split = Split.TRAIN) -> step.StepOutput:
        """Loss and statistics of a noisy batch: the second half of `measure`.

        Held-out pairs are measured outside the distributed wrapper: processes may have different numbers of them.
        """
        settings, device = self.settings, self.accelerator.device
        policy = self.policy if split is Split.TRAIN else self.bare_policy
        with self.accelerator.autocast():
            measured = step.measure(policy, self.references[split], noisy, settings.loss)
        inputs = dict(measured.inputs)
        if self._has_reference_point:
            inputs["z0"] = self.z0
        if batch.single is not None:
            inputs["desirable"] = batch.single.desirable.to(device, non_blocking=True)
        if (weights := self.margin_weights.of(split)) is not None:
            inputs["margin_weights"] = weights.get(batch.rows, device)
        return step.preference_loss(measured.errors, settings.loss, inputs)

    def micro_step(self, batch: Batch) -> step.StepOutput:
        """Measure a batch and add its gradients to those that are there."""
        with self.accelerator.accumulate(self.policy):
            output = self.measure(batch)
            self.accelerator.backward(output.loss.mean())
        return output

    def clip_gradients(self) -> Tensor:
        """Clip the gradients to optim.max_grad_norm. Returns their norm before, 0-d on the device."""
        limit = self.settings.optim.max_grad_norm or float("inf")
        return torch.as_tensor(self.accelerator.clip_grad_norm_(self.parameters, limit))

    def update(self, step_number: int, gain: float | None) -> dict[str, float]:
        """Take an optimizer step, and move what follows the policy; in fp16 neither where gradients overflowed.

        gain: the mean of the step's statistics, where there is a reference. Returns metrics of the update.
        """
        metrics = {"z0": self.z0.item()} if self._has_reference_point else {}
        metrics["learning_rate"] = learning_rate_at(self.settings, step_number)
        for group in self.optimizer.param_groups:
            group["lr"] = metrics["learning_rate"]
        with self.skipped_steps.watching():
            self.optimizer.step()
        # Several processes: the gradients stay in DDP's buckets. New ones would lie beside them, as large again.
        self.optimizer.zero_grad(set_to_none=self.accelerator.num_processes == 1)
        if not self.skipped_steps.in_a_row:
            if self._has_reference_point:
                self.z0.fill_(max(gain, 0.0))
            if self.ema is not None:
                self.ema.step(self.parameters)
            self.reference.after_update(self.bare_policy)
        return metrics | self.skipped_steps.numbers()

    def settle_gradients(self, batch: Batch) -> None:
        """Have DDP lay its buckets out for good, and the gradients in them, by two backward passes of nothing.

        DDP chooses its buckets' order in the first pass that exchanges, and moves everything in the second. Left to the
        training, gradients would lie beside the buckets until then, as large again, when a resumed run already has its
        moments; and its first step would be summed in another order than that of an uninterrupted run.
        """
        if self.accelerator.num_processes == 1:
            return
        for _ in range(2):
            noisy = self.noisy(batch)
            with self.accelerator.autocast():
                found = residuals(self.policy, noisy)
            (0 * found).sum().backward()
        self.optimizer.zero_grad(set_to_none=False)

    @torch.no_grad()
    def refuse_errors_of_others(self, batch: Batch) -> None:
        """Raise ValueError where the recorded errors of a batch are not those of the policy, still the base model."""
        if not isinstance(self.reference, Recorded):
            return
        cache = self.reference.cache
        recorded = cache.get(batch.positions, self.accelerator.device)
        if recorded is None:
            return
        noisy = self.noisy(batch)
        with self.accelerator.autocast():
            measured = denoising_errors(self.bare_policy, noisy).view(2, -1)
        difference = ((measured - recorded).abs() / recorded).max().item()
        if not difference < RECORDED_ERROR_TOLERANCE:
            raise ValueError(
                f"cache.reference: {cache.folder} says that the reference's errors on the first pairs are "
                f"{recorded.flatten().tolist()}, and they are {measured.flatten().tolist()}. They were recorded on "
                "other images or with another model; remove that folder, or name another one"
            )

    def refuse_other_weights(self, start_step: int) -> None:
        """Raise ValueError where the processes start from different steps or weights."""
        if processes.count() == 1:
            return
        facts = {"optimizer step": start_step, "policy": runs.weights_checksum(self.bare_policy)}
        if self.reference.network is not None:
            facts["reference"] = runs.weights_checksum(self.reference.network)
        processes.refuse_differences(facts, "Give every machine the same model and the same run folder")

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        moving = self._moving_network()
        progress = runs.load_checkpoint(folder, self.bare_policy, self.optimizer, self.ema, moving)
        self.skipped_steps.load_state_dict(progress["extra"])
        self.z0.fill_(progress["extra"].get("z0", 0.0))

    def save(self, folder: Path, step_number: int) -> None:
        """Save a checkpoint in a run's folder. Every process calls it."""
        runs.save_checkpoint(
            folder,
            step_number,
            self.bare_policy,
            self.optimizer,
            is_main=self.accelerator.is_main_process,
            keep=self.settings.checkpoint.keep,
            ema=self.ema,
            reference=self._moving_network(),
            extra={**self.skipped_steps.state_dict(), "z0": self.z0.item()},
        )
        processes.wait()

    def export(self, folder: Path) -> Path:
        """Write a run's model in diffusers' format. Every process calls it."""
        return runs.export_model(
            folder,
            self.policy,
            self.settings,
            is_main=self.accelerator.is_main_process,
            unwrap=self.accelerator.unwrap_model,
            ema=self.ema,
        )

    @contextmanager
    def encoders_on_device(self) -> Iterator[None]:
        """The encoders on the training's device; where it takes its examples from a cache, only in here."""
        for module in self.parts.encoders:
            module.to(self.accelerator.device)
        yield
        if self.settings.cache.examples:  # training itself needs no encoders: their memory is the batch's
            for module in self.parts.encoders:
                module.to("cpu")

    @property
    def _has_reference_point(self) -> bool:
        return "z0" in self.settings.loss.objective.inputs

    def _moving_network(self) -> nn.Module | None:
        """The reference's network where it changes, and a checkpoint has to keep it."""
        return self.reference.network if self.settings.model.reference_decay else None


def build_learner(
    settings: Config,
    accelerator: Accelerator,
    parts: PipelineParts,
    recorded: RecordedErrors,
    margin_weights: PairWeights,
) -> Learner:
    """Make the parts' denoiser the policy, and whatever the objective needs beside it.

    The reference is left out where all of its errors are recorded. Networks go to the training's device.
    """
    process = parts.process().to(accelerator.device)
    network = None
    if settings.loss.needs_reference and not recorded.is_complete:
        network = models.make_reference(parts, settings.model, settings.compute)
    policy = models.make_policy(parts, settings.model, settings.compute)
    if not settings.cache.examples:
        for module in parts.encoders:
            module.to(accelerator.device)
    optimizer = build_optimizer(settings, models.trainable_parameters(policy))
    policy, optimizer = accelerator.prepare(policy, optimizer)
    bare_policy = accelerator.unwrap_model(policy)
    if network is not None:  # the policy's autocast and float32 output, so that nothing but weights tells them apart
        network = accelerator.prepare_model(network, evaluation_mode=True)
    reference = build_reference(settings, network, bare_policy)
    references = {
        split: reference if cache is None else Recorded(reference, cache, accelerator.device)
        for split, cache in ((Split.TRAIN, recorded.train), (Split.HELD_OUT, recorded.held_out))
    }
    return Learner(
        settings=settings,
        accelerator=accelerator,
        parts=parts,
        policy=policy,
        bare_policy=bare_policy,
        optimizer=optimizer,
        make_noisy=NoisyBatchMaker(parts, process, settings, accelerator.device),
        references=references,
        margin_weights=margin_weights,
        ema=build_ema(settings, models.trainable_parameters(policy)),
        z0=torch.zeros((), device=accelerator.device),
        skipped_steps=SkippedSteps(accelerator.scaler),
    )


def build_reference(settings: Config, network: nn.Module | None, bare_policy: nn.Module) -> Reference:
    """The reference of a config: `network`, where there is one, or the policy without its adapter."""
    if network is not None and settings.model.reference_decay:
        return Moving(network, settings.model.reference_decay)
    if network is not None:
        return Frozen(network)
    return AdapterOff(bare_policy) if settings.model.trainable == "lora" else Reference()


def build_optimizer(settings: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, fused where the device has it, or bitsandbytes' 8-bit AdamW; its learning rate is 0 until it is set."""
    optim = settings.optim
    options = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    if optim.name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def learning_rate_at(settings: Config, step_number: int) -> float:
    """The effective learning rate of optimizer step `step_number`, counted from 0; a function of the step alone."""
    from diffusers.optimization import get_scheduler

    optim = settings.optim
    name = "constant_with_warmup" if optim.schedule == "constant" else optim.schedule
    probe = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = get_scheduler(
        name, probe, num_warmup_steps=optim.warmup_steps, num_training_steps=settings.train.max_steps
    )
    return config.effective_learning_rate(settings) * schedule.lr_lambdas[0](step_number)


def build_ema(settings: Config, parameters: list[nn.Parameter]) -> Any:
    """A moving average of the trained weights, or None."""
    if settings.model.ema_decay is None:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=settings.model.ema_decay)
