"""The state of a training (policy, reference, optimizer), its micro-step and its update.

The loop of training.py, held-out evaluation, --find-batch and the benchmark all run `Learner.measure`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

# Largest relative difference in a batch. In the embedded world, bf16 changes an error by at most 2 % from float32's,
# and another image by 44 % (median), 3 % (fifth percentile). Recorded and measured errors have the same precision.
RECORDED_ERROR_TOLERANCE = 0.02


class RecordedErrors(NamedTuple):
    """The reference's recorded errors on training and held-out pairs; None where the config keeps none."""

    train: ReferenceCache | None
    held_out: ReferenceCache | None
    is_complete: bool  # they hold everything that the run still needs


def open_recorded_errors(
    settings: Config, accelerator: Accelerator, train_pairs: Pairs, held_out_pairs: Pairs | None, start_step: int
) -> RecordedErrors:
    """Open the recorded errors of this config's reference, and check whether they suffice from `start_step` on."""
    precision, total_batch = accelerator.mixed_precision, settings.train.total_batch_pairs
    train = open_reference(settings, train_pairs, Split.TRAIN, precision)
    if train is None:
        return RecordedErrors(None, None, is_complete=False)
    is_complete = train.has(range(start_step * total_batch, settings.train.max_steps * total_batch))
    held_out = None
    if held_out_pairs:
        held_out = open_reference(settings, held_out_pairs, Split.HELD_OUT, precision)
        needed = range(len(held_out_pairs) * settings.eval.draws)
        is_complete = is_complete and held_out is not None and held_out.has(needed)
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
    """One training: its networks, its optimizer, and all other state that changes from step to step."""

    settings: Config
    accelerator: Accelerator
    parts: PipelineParts
    policy: nn.Module  # as accelerate prepared it
    bare_policy: nn.Module  # outside its distributed wrapper
    optimizer: torch.optim.Optimizer
    make_noisy: NoisyBatchMaker
    references: dict[Split, Reference]  # they share a network; each has its own recorded errors
    margin_weights: PairWeights
    ema: "EMAModel | None"  # moving average of the trained weights
    z0: Tensor  # Diffusion-KTO's reference point: the mean gain of the previous step
    skipped_steps: SkippedSteps
    base: Reference | None = None  # what loss.kl_weight pulls to, where that isn't the reference
    parameters: list[nn.Parameter] = field(init=False)  # the trained ones

    def __post_init__(self) -> None:
        self.parameters = models.trainable_parameters(self.policy)

    @property
    def reference(self) -> Reference:
        return self.references[Split.TRAIN]

    def measure(
        self, batch: Batch, split: Split = Split.TRAIN, positions: Sequence[int] | Tensor | None = None
    ) -> step.StepOutput:
        """Loss and statistics of a batch. positions: (B,) that decide the draws, instead of the batch's own."""
        return self.outcome(batch, self.noisy(batch, split, positions), split)

    def noisy(
        self, batch: Batch, split: Split = Split.TRAIN, positions: Sequence[int] | Tensor | None = None
    ) -> NoisyBatch:
        """The networks' inputs for a batch: the first half of `measure`."""
        with self.accelerator.autocast():
            return self.make_noisy(batch, split.seed(self.settings), positions)

    def outcome(self, batch: Batch, noisy: NoisyBatch, split: Split = Split.TRAIN) -> step.StepOutput:
        """Loss and statistics of a noisy batch: the second half of `measure`.

        Held-out pairs are measured outside the distributed wrapper, because processes may have different numbers of
        them.
        """
        settings, device = self.settings, self.accelerator.device
        policy = self.policy if split is Split.TRAIN else self.bare_policy
        with self.accelerator.autocast():
            measured = step.measure(policy, self.references[split], noisy, settings.loss, self.base)
        inputs = dict(measured.inputs)
        if self._has_reference_point:
            inputs["z0"] = self.z0
        if batch.single is not None:
            inputs["desirable"] = batch.single.desirable.to(device, non_blocking=True)
        if "optimality" in settings.loss.objective.inputs:
            inputs["optimality"] = step.optimality_of(batch).to(device, non_blocking=True)
        if (weights := self.margin_weights.of(split)) is not None:
            inputs["margin_weights"] = weights.get(batch.rows, device)
        return step.preference_loss(measured.errors, settings.loss, inputs)

    def micro_step(self, batch: Batch) -> step.StepOutput:
        """Measure a batch and accumulate its gradients."""
        with self.accelerator.accumulate(self.policy):
            output = self.measure(batch)
            self.accelerator.backward(output.loss.mean())
        return output

    def clip_gradients(self) -> Tensor:
        """Clip the gradients to optim.max_grad_norm. Returns their norm before, 0-d on the device."""
        limit = self.settings.optim.max_grad_norm or float("inf")
        return torch.as_tensor(self.accelerator.clip_grad_norm_(self.parameters, limit))

    def update(self, step_number: int, step_metrics: Mapping[str, float]) -> dict[str, float]:
        """Take an optimizer step, then update z0, the moving average and the reference; return the update's metrics.

        step_metrics: of this step, from Tally.exchange. In fp16 all of it is skipped where gradients overflowed.
        """
        metrics = {"z0": self.z0.item()} if self._has_reference_point else {}
        metrics["learning_rate"] = learning_rate_at(self.settings, step_number)
        for group in self.optimizer.param_groups:
            group["lr"] = metrics["learning_rate"]
        with self.skipped_steps.watching():
            self.optimizer.step()
        # With several processes the gradients stay in DDP's buckets: new tensors would take their memory a second time.
        self.optimizer.zero_grad(set_to_none=self.accelerator.num_processes == 1)
        if not self.skipped_steps.in_a_row:
            if self._has_reference_point:
                self.z0.fill_(max(step_metrics["gain"], 0.0))
            if self.ema is not None:
                self.ema.step(self.parameters)
            self.reference.after_update(self.bare_policy)
        return metrics | self.skipped_steps.metrics()

    def settle_gradients(self, batch: Batch) -> None:
        """Make DDP arrange its buckets, and the gradients in them, by two backward passes whose gradients are 0.

        DDP chooses its buckets' order in the first pass that exchanges gradients, and moves everything in the second.
        If that happened during training, gradients would take their memory twice until then, while a resumed run
        already holds its moments; and a resumed run's first step would be summed in another order.
        """
        if self.accelerator.num_processes == 1:
            return
        for _ in range(2):
            noisy = self.noisy(batch)
            with self.accelerator.autocast():
                difference = residuals(self.policy, noisy)
            (0 * difference).sum().backward()
        self.optimizer.zero_grad(set_to_none=False)

    @torch.no_grad()
    def refuse_errors_of_others(self, batch: Batch) -> None:
        """Raise ValueError where a batch's recorded errors were made with another model or other images.

        To be called while the policy is still the base model, and therefore equal to the reference.
        """
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
        facts: dict[str, object] = {"optimizer step": start_step, "policy": runs.weights_checksum(self.bare_policy)}
        if self.reference.network is not None:
            facts["reference"] = runs.weights_checksum(self.reference.network)
        processes.refuse_differences(facts, "Give every machine the same model and the same run folder")

    def load(self, folder: Path) -> None:
        """Restore a checkpoint."""
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
            self.parts,
            self.settings,
            is_main=self.accelerator.is_main_process,
            unwrap=self.accelerator.unwrap_model,
            ema=self.ema,
        )

    @contextmanager
    def encoders_on_device(self) -> Iterator[None]:
        """A context in which the encoders are on the training's device; with cached examples they leave it again."""
        for module in self.parts.encoders:
            module.to(self.accelerator.device)
        yield
        if self.settings.cache.examples:  # training needs no encoders then: their memory is for the batch
            for module in self.parts.encoders:
                module.to("cpu")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the policy has the moving average of its weights, which must be kept."""
        assert self.ema is not None, "the config asks for no moving average"
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    @property
    def _has_reference_point(self) -> bool:
        return "z0" in self.settings.loss.objective.inputs

    def _moving_network(self) -> nn.Module | None:
        """The reference's network if it changes, so that checkpoints must hold it."""
        return self.reference.network if reference_moves(self.settings) else None


def build_learner(
    settings: Config,
    accelerator: Accelerator,
    parts: PipelineParts,
    recorded: RecordedErrors,
    margin_weights: PairWeights,
) -> Learner:
    """Make a learner whose policy is the parts' denoiser, with all else that the objective needs.

    No reference is made where all of its errors are recorded. Networks are moved to the training's device.
    """
    process = parts.process(settings.noise).to(accelerator.device)
    parts.denoiser.to(accelerator.device)  # before a reference is copied from it, for which the machine may lack memory
    network, base_network = None, None
    if settings.loss.needs_reference and not recorded.is_complete:
        network = models.make_reference(parts, settings.model, settings.compute)
    if needs_base(settings):
        base_network = models.make_reference(parts, settings.model, settings.compute)
    policy = models.make_policy(parts, settings.model, settings.compute)
    if not settings.cache.examples:
        for module in parts.encoders:
            module.to(accelerator.device)
    optimizer = build_optimizer(settings, models.trainable_parameters(policy))
    policy, optimizer = accelerator.prepare(policy, optimizer)
    bare_policy = accelerator.unwrap_model(policy)
    # With the policy's autocast and float32 output: only weights may differ.
    network, base_network = (
        None if each is None else accelerator.prepare_model(each, evaluation_mode=True)
        for each in (network, base_network)
    )
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
        base=None if base_network is None else Frozen(base_network),
    )


def reference_moves(settings: Config) -> bool:
    """Whether the reference's network changes while training."""
    return bool(settings.model.reference_decay) or settings.online.renew_reference


def needs_base(settings: Config) -> bool:
    """Whether the base model needs a network of its own, because the loss pulls to it and the reference moves away."""
    return settings.loss.kl_weight > 0 and reference_moves(settings)


def build_reference(settings: Config, network: nn.Module | None, bare_policy: nn.Module) -> Reference:
    """The reference of a config: `network`, where one is given, else the policy without its adapter, else none."""
    if network is not None and settings.model.reference_decay:
        return Moving(network, settings.model.reference_decay)
    if network is not None:
        return Frozen(network)
    return AdapterOff(bare_policy) if settings.model.trainable == "lora" else Reference()


def build_optimizer(settings: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Fused AdamW, bitsandbytes' 8-bit AdamW, or Adafactor. The learning rate is 0 until `Learner.update` sets it."""
    optim = settings.optim
    if optim.name == "adafactor":
        from transformers.optimization import Adafactor

        # At a learning rate of its own, as Diffusion-DPO's public launcher trains Stable Diffusion XL.
        absolute = {"scale_parameter": False, "relative_step": False}
        return Adafactor(parameters, lr=0.0, weight_decay=optim.weight_decay, **absolute)
    options: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
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


def build_ema(settings: Config, parameters: list[nn.Parameter]) -> "EMAModel | None":
    """A moving average of the trained weights, or None."""
    if settings.model.ema_decay is None:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=settings.model.ema_decay)
