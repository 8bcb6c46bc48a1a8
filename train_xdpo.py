"""Align a text-to-image UNet to preference pairs with xDPO or Diffusion-DPO.

    accelerate launch train_xdpo.py --config configs/xdpo_sd15.yaml [section.key=value …]
    python train_xdpo.py --config configs/tiny/xdpo.yaml          (the embedded default, minutes on a CPU)

The same command resumes a run that was stopped or killed.
"""

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, set_seed
from torch import Tensor, nn

from xdpo import checkpoint, config, data, models, sampling, step
from xdpo.config import Config, ConfigError
from xdpo.noise import NoiseSchedule
from xdpo.runlog import RunLog, peak_memory_gb

EVAL_SEED = 0  # held-out pairs meet the same (t, ε) in every run, so that runs can be compared
SAMPLE_CHUNK = 4  # images sampled at once


class NonFiniteError(RuntimeError):
    """The loss or its gradient is not a finite number; the message names pairs and values."""


class StopRequest:
    """SIGTERM or SIGINT asks the run to save and leave after this optimizer step; a second one ends it at once."""

    def __init__(self) -> None:
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number


def main(arguments: list[str] | None = None) -> int:
    """Parse, check everything that is cheap to check, build, train. Returns the exit status."""
    options = config.build_parser(__doc__).parse_intermixed_args(arguments)
    try:
        settings = config.load_config(options.config, options.overrides)
        check_optional_packages(settings)
        accelerator = build_accelerator(settings)
        plan = config.describe(settings, accelerator.num_processes)
        if options.dry_run:
            accelerator.print(config.dump_config(settings) + "\n" + plan)
            return 0
        folder = Path(settings.output_dir)
        checkpoint.check_run_folder(folder, settings, options.allow_config_change)
        models.check_pipeline_folder(settings.model.pipeline)
        with accelerator.main_process_first():  # the first process converts the files, the others find them converted
            train_table = data.load_pairs(settings.data)
            eval_table = load_eval_pairs(settings)
        accelerator.print(config.describe(settings, accelerator.num_processes, len(train_table)))
        accelerator.print(f"training pairs: {train_table.counts}")
        parts = models.load_parts(settings.model)
        return train(settings, accelerator, folder, parts, train_table, eval_table)
    except (ConfigError, data.DataError, checkpoint.CheckpointError, NonFiniteError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def check_optional_packages(settings: Config) -> None:
    """Refuse a config that asks for a package that isn't installed: ValueError naming the key and the package."""
    wanted = {f"log.trackers: {name}": name for name in settings.log.trackers}
    if settings.optim.name == "adamw8bit":
        wanted["optim.name: adamw8bit"] = "bitsandbytes"
    for key, package in wanted.items():
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{key} needs {package}, which is not installed; pip install {package}")


def build_accelerator(settings: Config) -> Accelerator:
    """Devices, precision, accumulation and trackers, as the config has them."""
    compute = settings.compute
    has_device = torch.accelerator.is_available()
    precision = compute.precision
    if precision == "auto":
        precision = "fp32"
        if torch.cuda.is_available():
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and not has_device:
        raise ValueError("compute.precision: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if compute.tf32 and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        cpu=not has_device,
        mixed_precision={"fp32": "no"}.get(precision, precision),
        log_with=list(settings.log.trackers) or None,
        project_config=ProjectConfiguration(
            project_dir=settings.output_dir, logging_dir=str(Path(settings.output_dir) / "tensorboard")
        ),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    accelerator.gradient_accumulation_steps = config.accumulation_steps(settings, accelerator.num_processes)
    return accelerator


def load_eval_pairs(settings: Config) -> data.PairTable | None:
    """The held-out pairs, or None where the config asks for no evaluation."""
    if not settings.eval.every:
        return None
    chosen = settings.eval
    return data.load_pairs(settings.data, path=chosen.path, split=chosen.split, max_pairs=chosen.pairs)


def build_optimizer(settings: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, fused where the device has it, or bitsandbytes' 8-bit AdamW."""
    optim = settings.optim
    numbers = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    if optim.name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **numbers)
    return torch.optim.AdamW(parameters, fused=True, **numbers)


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


def train(
    settings: Config,
    accelerator: Accelerator,
    folder: Path,
    parts: models.PipelineParts,
    train_table: data.PairTable,
    eval_table: data.PairTable | None,
) -> int:
    """The training loop. Returns 0 when the run is finished, 128 + signal when it was asked to stop."""
    is_main, device = accelerator.is_main_process, accelerator.device
    total_batch, max_steps = settings.train.total_batch_pairs, settings.train.max_steps

    # Policy, reference, optimizer.
    set_seed(settings.seed)
    schedule = NoiseSchedule.from_scheduler(parts.scheduler).to(device)
    reference = models.make_reference(parts.unet, settings.model, settings.compute)
    policy = models.make_policy(parts.unet, settings.model, settings.compute)
    for module in (parts.vae, parts.text_encoder, reference):
        if module is not None:
            module.to(device)
    optimizer = build_optimizer(settings, models.trainable_parameters(policy))
    policy, optimizer = accelerator.prepare(policy, optimizer)
    bare_policy = accelerator.unwrap_model(policy)
    parameters = models.trainable_parameters(policy)
    ema = build_ema(settings, parameters)
    make_example = step.ExampleMaker(parts, schedule, settings, device)

    # Resume.
    start_step = 0
    if finished := checkpoint.checkpoints(folder):
        progress = checkpoint.load_checkpoint(finished[-1], policy, optimizer, ema)
        start_step = progress["step"]
        if accelerator.scaler is not None and progress["extra"].get("scaler"):
            accelerator.scaler.load_state_dict(progress["extra"]["scaler"])
    if is_main:
        checkpoint.describe_run(
            folder,
            settings,
            training_pairs=vars(train_table.counts),
            held_out_pairs=vars(eval_table.counts) if eval_table else None,
            processes=accelerator.num_processes,
            device=str(device),
            precision=accelerator.mixed_precision,
        )
    accelerator.wait_for_everyone()
    log = RunLog(
        accelerator,
        folder,
        project=settings.log.project,
        config=config.flatten(settings),
        start_step=start_step,
        max_steps=max_steps,
    )
    if start_step:
        log.say(f"resumed from {finished[-1]}")
    stop = StopRequest()

    # Data.
    train_set = data.PairDataset(train_table, parts.tokenizer, settings.seed, settings.data)
    loader = data.make_loader(
        train_set,
        start_step=start_step,
        total_batch_pairs=total_batch,
        micro_batch_pairs=settings.train.micro_batch_pairs,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=settings.data.num_workers,
        pin_memory=device.type == "cuda",
    )
    batches: Iterator[dict] = iter(loader)
    unreadable = data.UnreadableTracker(train_table, settings.data.max_unreadable_share)

    def save(step_number: int) -> None:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        checkpoint.save_checkpoint(
            folder,
            step_number,
            policy,
            optimizer,
            is_main=is_main,
            keep=settings.checkpoint.keep,
            ema=ema,
            extra={"scaler": scaler},
        )
        accelerator.wait_for_everyone()

    def look(step_number: int) -> None:
        """Held-out pairs and sample images."""
        if eval_table and (step_number % settings.eval.every == 0 or step_number == max_steps):
            numbers = evaluate(settings, accelerator, policy, reference, make_example, eval_table)
            log.row(step_number, numbers)
            log.say(
                f"step {step_number}: held-out implicit accuracy {numbers['eval/implicit_accuracy']:.3f}, "
                f"margin {numbers['eval/margin']:.4g} over {len(eval_table)} pairs × {settings.eval.draws} draws"
            )
        if settings.samples.every and (step_number % settings.samples.every == 0 or step_number == max_steps):
            if is_main:
                path = draw_samples(settings, accelerator, parts, bare_policy, reference, folder, step_number)
                log.say(f"step {step_number}: samples in {path}")
            accelerator.wait_for_everyone()

    if start_step == 0:
        look(0)
    for step_number in range(start_step, max_steps):
        started = time.perf_counter()
        totals, counts = torch.zeros(len(step.STATISTICS), device=device), [0, 0]
        window: list[tuple[list[str], step.PairErrors]] = []

        # Accumulate gradients over the window; nothing here waits for the device.
        for _ in range(accelerator.gradient_accumulation_steps):
            batch = next(batches)
            unreadable.update(len(batch["rows"]), batch["unreadable"])
            counts[0] += batch["truncated"]
            counts[1] += len(batch["unreadable"])
            with accelerator.accumulate(policy):
                with accelerator.autocast():
                    example = make_example(batch, settings.seed, batch["positions"])
                    errors = step.pair_errors(policy, bare_policy, reference, example)
                output = step.preference_loss(errors, settings.loss)
                accelerator.backward(output.loss.mean())
            totals += output.statistics
            window.append((batch["pair_ids"], step.PairErrors(*(error.detach() for error in errors))))

        # One exchange between processes and one wait for the device per optimizer step.
        limit = settings.optim.max_grad_norm or float("inf")
        gradient_norm = accelerator.clip_grad_norm_(parameters, limit)
        own = torch.tensor([*counts, stop.received], dtype=torch.float32, device=device)
        *sums, truncated, substituted, stopped = accelerator.reduce(torch.cat([totals, own]), "sum").tolist()
        numbers = {name: total / total_batch for name, total in zip(step.STATISTICS, sums, strict=True)}
        numbers["gradient_norm"] = float(gradient_norm)
        refuse_non_finite(step_number, numbers, window, skipped_by_scaler=accelerator.scaler is not None)

        # Update.
        numbers["learning_rate"] = learning_rate_at(settings, step_number)
        for group in optimizer.param_groups:
            group["lr"] = numbers["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(parameters)

        # Log.
        numbers["clamped"] *= total_batch
        numbers["effective_beta"] = config.effective_beta(settings)
        numbers["pairs_seen"] = (step_number + 1) * total_batch
        numbers["truncated_captions"], numbers["unreadable_rows"] = truncated, substituted
        numbers["pairs_per_second"] = total_batch / (time.perf_counter() - started)
        numbers["peak_memory_gb"] = peak_memory_gb(device)
        if accelerator.optimizer_step_was_skipped:
            log.say(f"step {step_number + 1}: gradients overflowed in fp16; skipped, the loss scale is halved")
        log.row(step_number + 1, numbers, advance=True)

        # Look at it, save it, or leave.
        look(step_number + 1)
        if stopped or (step_number + 1) % settings.checkpoint.every == 0 or step_number + 1 == max_steps:
            save(step_number + 1)
        if stopped and step_number + 1 < max_steps:
            log.say(f"stopped after step {step_number + 1} as asked and saved; the same command resumes")
            log.close()
            return 128 + (stop.received or signal.SIGTERM)

    exported = checkpoint.export_model(
        folder, policy, settings, is_main=is_main, unwrap=accelerator.unwrap_model, ema=ema
    )
    log.say(f"finished: {max_steps} steps; the model is in {exported}, everything else in {folder}")
    accelerator.wait_for_everyone()
    log.close()
    return 0


def build_ema(settings: Config, parameters: list[nn.Parameter]):
    """A moving average of the trained weights, or None."""
    if settings.model.ema_decay is None:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=settings.model.ema_decay)


def refuse_non_finite(step_number: int, numbers: dict[str, float], window: list, skipped_by_scaler: bool) -> None:
    """Stop before the weights are touched if the loss, or without loss scaling the gradient, is not finite."""
    watched = ["loss", "margin"] if skipped_by_scaler else ["loss", "margin", "gradient_norm"]
    bad = [name for name in watched if not torch.isfinite(torch.tensor(numbers[name]))]
    if not bad:
        return
    rows = []
    for pair_ids, errors in window:
        stacked = torch.stack([error.float() for error in errors], dim=1).cpu()  # (B, 4)
        for pair_id, values in zip(pair_ids, stacked, strict=True):
            if bad == ["gradient_norm"] or not torch.isfinite(values).all():
                policy_chosen, policy_rejected, reference_chosen, reference_rejected = values.tolist()
                rows.append(
                    f"pair {pair_id}: e policy {policy_chosen:.6g}/{policy_rejected:.6g}, reference "
                    f"{reference_chosen:.6g}/{reference_rejected:.6g}, d {policy_chosen - reference_chosen:.6g}/"
                    f"{policy_rejected - reference_rejected:.6g} (chosen/rejected)"
                )
    found = "\n  ".join(rows[:8]) or "none of this process's pairs; see the other processes"
    raise NonFiniteError(
        f"{' and '.join(bad)} not finite in optimizer step {step_number + 1}; the weights were not touched.\n"
        f"  {found}\n"
        "Lower optim.learning_rate or loss.beta, or set compute.precision=fp32, and go on from the last checkpoint"
    )


@torch.no_grad()
def evaluate(
    settings: Config,
    accelerator: Accelerator,
    policy: nn.Module,
    reference: nn.Module | None,
    make_example: step.ExampleMaker,
    table: data.PairTable,
) -> dict[str, float]:
    """Statistics over held-out pairs at fixed (t, ε), shared out over the processes."""
    draws, size = settings.eval.draws, settings.train.micro_batch_pairs
    held_out = data.PairDataset(
        table, make_example.parts.tokenizer, EVAL_SEED, settings.data, augment=False, shuffle=False
    )
    mine = list(range(accelerator.process_index, len(table) * draws, accelerator.num_processes))
    bare_policy = accelerator.unwrap_model(policy)
    totals = torch.zeros(len(step.STATISTICS), device=accelerator.device)
    for start in range(0, len(mine), size):
        positions = mine[start : start + size]  # draw k of pair i has position i + k · pairs
        batch = data.collate_pairs([held_out[position] for position in positions])
        with accelerator.autocast():
            example = make_example(batch, EVAL_SEED, positions)
            errors = step.pair_errors(bare_policy, bare_policy, reference, example)
        totals += step.preference_loss(errors, settings.loss).statistics
    sums: Tensor = accelerator.reduce(totals, "sum")
    means = (sums / (len(table) * draws)).tolist()
    return {f"eval/{name}": mean for name, mean in zip(step.STATISTICS, means, strict=True)}


@torch.no_grad()
def draw_samples(
    settings: Config,
    accelerator: Accelerator,
    parts: models.PipelineParts,
    policy: nn.Module,
    reference: nn.Module | None,
    folder: Path,
    step_number: int,
) -> Path:
    """A sheet of sample images, reference beside policy, for the configured prompts and seeds."""
    wanted = settings.samples
    columns = {}
    for title in ("reference", "policy"):
        unet = reference if title == "reference" and reference is not None else policy
        is_adapter_off = title == "reference" and reference is None
        with accelerator.autocast(), models.adapter_off(policy) if is_adapter_off else nullcontext():
            columns[title] = sampling.sample_images(
                models.pipeline_with(parts, unet),
                wanted.prompts,
                seed=wanted.seed,
                num_inference_steps=wanted.num_inference_steps,
                guidance_scale=wanted.guidance_scale,
                image_size=settings.data.resolution,
                chunk_size=SAMPLE_CHUNK,
            )
    path = folder / "samples" / f"step_{step_number:08d}.png"
    path.parent.mkdir(exist_ok=True)
    sampling.contact_sheet(columns, wanted.prompts).save(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
