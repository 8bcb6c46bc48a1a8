"""Align a text-to-image UNet to preference pairs with xDPO or Diffusion-DPO.

    accelerate launch train_xdpo.py --config configs/xdpo_sd15.yaml [section.key=value …]
    python train_xdpo.py --config configs/tiny/xdpo.yaml          (the embedded default, minutes on a CPU)

The same command resumes a run that was stopped or killed.
"""

import argparse
import hashlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from xdpo import (
    checkpoint,
    config,
    data,
    ending,
    files,
    models,
    optimizer_state,
    precompute,
    processes,
    selfplay,
    step,
)
from xdpo.cache import ReferenceCache
from xdpo.compute import build_accelerator
from xdpo.config import Config, ConfigError
from xdpo.images.sheets import contact_sheet
from xdpo.noise import HELD_OUT_SEED, NoiseSchedule
from xdpo.non_finite import NonFiniteError, SkippedSteps, refuse_non_finite
from xdpo.precompute import Pairs, latent_shape, make_dataset, open_pairs, open_reference
from xdpo.runlog import RunLog, peak_memory_gb
from xdpo.sampling.images import sample_images

TIMED_STEPS = 4  # micro-steps behind each figure of --find-batch
SAMPLE_CHUNK = 4  # images sampled at once
# Relative, of the largest difference in a batch. In the embedded world bf16 moves an error by at most 2 % from that of
# float32, another image by 44 % in the median and 3 % at the fifth percentile; recorded and measured are of one kind.
RECORDED_ERROR_TOLERANCE = 0.02


def main(arguments: list[str] | None = None) -> int:
    """Parse, check everything that is cheap to check, build, train. Returns the exit status."""
    options = config.build_parser(__doc__).parse_intermixed_args(arguments)
    try:
        settings = config.load_config(options.config, options.overrides)
        check_optional_packages(settings)
        accelerator = build_accelerator(settings)
        with ending.together():
            return run(settings, accelerator, options)
    except (ConfigError, data.DataError, checkpoint.CheckpointError, NonFiniteError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted before the training began; nothing was lost", file=sys.stderr)
        return 128 + signal.SIGINT


def run(settings: Config, accelerator: Accelerator, options: argparse.Namespace) -> int:
    """Everything behind the config: check, open, load, train. Returns the exit status."""
    plan = config.describe(settings, accelerator.num_processes)
    if options.dry_run:
        accelerator.print(config.dump_config(settings) + "\n" + plan)
        return 0
    digest = hashlib.sha256(config.dump_config(settings).encode()).hexdigest()[:16]
    processes.refuse_differences({"config": digest}, "Start the same command, with the same files, on every machine")
    optimizer_state.check(lambda parameters: build_optimizer(settings, parameters), accelerator.device)
    folder = Path(settings.output_dir)
    checkpoint.check_run_folder(folder, settings, options.allow_config_change)
    resume_from = checkpoint.agree_on_checkpoint(folder)
    if settings.loss.name == "seppo":
        selfplay.check_snapshots(settings, folder, checkpoint.step_of(resume_from) if resume_from else 0)
    models.check_pipeline_folder(settings.model.pipeline, settings.model.revision)
    if settings.cache.examples and settings.cache.build:
        precompute.build_missing_examples(settings, accelerator, accelerator.print)
    train_pairs = open_pairs(settings, accelerator, held_out=False)
    held_out_pairs = open_pairs(settings, accelerator, held_out=True) if settings.eval.every else None
    if accelerator.num_processes > 1:
        facts = {"training pairs": train_pairs.fingerprint}
        processes.refuse_differences(facts, "Give every machine the same data")
    if resume_from:
        checkpoint.check_pairs(folder, train_pairs.fingerprint, options.allow_config_change, accelerator.print)
    if settings.loss.is_unpaired:
        data.label_images(*train_pairs.image_names())  # refuses data of one label alone
    weights = data.weigh_pairs(settings.loss.margin_weight, train_pairs, held_out_pairs)
    accelerator.print(config.describe(settings, accelerator.num_processes, len(train_pairs)))
    accelerator.print(f"training pairs: {data.PairCounts(**vars(train_pairs.counts))}")
    if weights.train is not None:
        accelerator.print(f"margin weights: {weights.train}")
    if held_out_pairs and accelerator.is_main_process:
        note_shared_pairs(train_pairs, held_out_pairs)
    parts = models.load_parts(settings.model, encoders=not settings.cache.examples or settings.samples.every > 0)
    processes.wait()  # for whoever downloads more slowly
    if options.find_batch:
        return find_batch(settings, accelerator, parts, train_pairs, weights.train)
    with files.only_run([folder], "a training", is_main=accelerator.is_main_process):
        if checkpoint.agree_on_checkpoint(folder) != resume_from:
            raise ValueError(f"output_dir: another process has just saved in {folder}; run the same command again")
        return train(settings, accelerator, folder, resume_from, parts, train_pairs, held_out_pairs, weights)


def check_optional_packages(settings: Config) -> None:
    """Refuse a config that asks for a package that isn't installed: ValueError naming the key and the package."""
    wanted = {f"log.trackers: {name}": name for name in settings.log.trackers}
    if settings.optim.name == "adamw8bit":
        wanted["optim.name: adamw8bit"] = "bitsandbytes"
    for key, package in wanted.items():
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{key} needs {package}, which is not installed; pip install {package}")


def note_shared_pairs(train_pairs: Pairs, held_out_pairs: Pairs) -> None:
    """Say where held-out pairs are trained on."""
    shared, count = precompute.count_shared(train_pairs, held_out_pairs), len(held_out_pairs)
    if shared:
        print(
            f"note: {shared} of the {count} held-out pairs are training pairs too, and eval/ says little of others; "
            "name others with eval.path or eval.split"
        )


class KnownReference(NamedTuple):
    """The reference's recorded errors on both kinds of pairs; None where the config keeps none."""

    train: ReferenceCache | None
    held_out: ReferenceCache | None
    is_complete: bool  # all that the run still needs is there


def open_known_reference(
    settings: Config, accelerator: Accelerator, train_pairs: Pairs, held_out_pairs: Pairs | None, start_step: int
) -> KnownReference:
    """What is recorded of the reference under this config, and whether that is enough from `start_step` on."""
    precision, total_batch = accelerator.mixed_precision, settings.train.total_batch_pairs
    train = open_reference(settings, train_pairs, held_out=False, precision=precision)
    if train is None:
        return KnownReference(None, None, is_complete=False)
    is_complete = train.has(range(start_step * total_batch, settings.train.max_steps * total_batch))
    held_out = None
    if held_out_pairs:
        held_out = open_reference(settings, held_out_pairs, held_out=True, precision=precision)
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
    return KnownReference(train, held_out, is_complete)


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
    resume_from: Path | None,
    parts: models.PipelineParts,
    train_pairs: Pairs,
    held_out_pairs: Pairs | None,
    weights: data.PairWeights,
) -> int:
    """The training loop. Returns 0 when the run is finished, 128 + signal when it was asked to stop."""
    is_main, device = accelerator.is_main_process, accelerator.device
    total_batch, max_steps = settings.train.total_batch_pairs, settings.train.max_steps

    # Policy, reference, optimizer.
    set_seed(settings.seed)
    start_step = checkpoint.step_of(resume_from) if resume_from else 0
    schedule = NoiseSchedule.from_scheduler(parts.scheduler).to(device)
    known = open_known_reference(settings, accelerator, train_pairs, held_out_pairs, start_step)
    reference = None
    if settings.loss.needs_reference and not known.is_complete:
        reference = models.make_reference(parts.unet, settings.model, settings.compute)
    policy = models.make_policy(parts.unet, settings.model, settings.compute)
    if not settings.cache.examples:
        for module in (parts.vae, parts.text_encoder):
            module.to(device)
    optimizer = build_optimizer(settings, models.trainable_parameters(policy))
    policy, optimizer = accelerator.prepare(policy, optimizer)
    if reference is not None:  # the policy's autocast and float32 output, so that nothing but weights tells them apart
        reference = accelerator.prepare_model(reference, evaluation_mode=True)
    bare_policy = accelerator.unwrap_model(policy)
    parameters = models.trainable_parameters(policy)
    ema = build_ema(settings, parameters)
    moving_reference = reference if settings.model.reference_decay else None
    z0 = torch.zeros((), device=device)  # Diffusion-KTO's reference point: the mean gain of the step before
    skipped_steps = SkippedSteps(accelerator.scaler)
    make_example = step.ExampleMaker(parts, schedule, settings, device)
    sampler = data.StepSampler(
        start_step=start_step,
        total_batch_pairs=total_batch,
        micro_batch_pairs=settings.train.micro_batch_pairs,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    dataset = make_dataset(train_pairs, parts.tokenizer, settings, held_out=False)
    first_batch = dataset.batch(next(iter(sampler)))
    settle_gradients(accelerator, policy, optimizer, make_example, first_batch)
    if known.train is not None:  # the policy is still the reference
        refuse_errors_of_others(accelerator, bare_policy, make_example, first_batch, known.train)

    # Resume.
    if resume_from:
        progress = checkpoint.load_checkpoint(resume_from, bare_policy, optimizer, ema, moving_reference)
        skipped_steps.load_state_dict(progress["extra"])
        z0.fill_(progress["extra"].get("z0", 0.0))
    refuse_other_weights(start_step, bare_policy, reference)
    run_id = None
    if is_main:
        run_id = checkpoint.describe_run(
            folder,
            settings,
            pairs_fingerprint=train_pairs.fingerprint,
            training_pairs=vars(train_pairs.counts),
            held_out_pairs=vars(held_out_pairs.counts) if held_out_pairs else None,
            score_range=weights.train.score_range if weights.train is not None else None,
            processes=accelerator.num_processes,
            device=str(device),
            precision=accelerator.mixed_precision,
        )
    log = RunLog(
        accelerator,
        folder,
        run_id=run_id,
        project=settings.log.project,
        config=config.flatten(settings),
        start_step=start_step,
        max_steps=max_steps,
    )
    if resume_from:
        log.say(f"resumed from {resume_from}")
    stop = ending.StopRequest()
    if (grace := ending.launcher_grace_seconds()) is not None:
        log.say(f"asked to stop, the run finishes its step and saves; the launcher leaves it {grace} s for both")

    # Data.
    self_play = None
    if settings.loss.name == "seppo":
        shape = latent_shape(train_pairs, parts, settings)
        self_play = selfplay.SelfPlay(
            settings,
            accelerator,
            parts,
            dataset,
            shape,
            reference,
            folder,
            say=log.say,
            is_asked_to_stop=lambda: bool(stop.received),
        )
    loader = data.make_loader(
        dataset,
        sampler,
        num_workers=settings.data.num_workers,
        pin_memory=device.type == "cuda",
    )
    batches: Iterator[dict] = iter(loader)
    unreadable = data.UnreadableTracker(train_pairs, settings.data.max_unreadable_share)

    def save(step_number: int) -> float:
        """Save, and return the seconds that it took."""
        started = time.perf_counter()
        checkpoint.save_checkpoint(
            folder,
            step_number,
            bare_policy,
            optimizer,
            is_main=is_main,
            keep=settings.checkpoint.keep,
            ema=ema,
            reference=moving_reference,
            extra={**skipped_steps.state_dict(), "z0": z0.item()},
        )
        processes.wait()
        return time.perf_counter() - started

    longest_look = 0.0

    def look(step_number: int) -> None:
        """Held-out pairs and sample images."""
        nonlocal longest_look
        started = time.perf_counter()
        if held_out_pairs and (step_number % settings.eval.every == 0 or step_number == max_steps):
            networks = (policy, reference, make_example)
            numbers = evaluate(settings, accelerator, *networks, held_out_pairs, known.held_out, z0, weights.held_out)
            log.row(step_number, numbers)
            log.say(
                f"step {step_number}: held-out implicit accuracy {numbers['eval/implicit_accuracy']:.3f}, "
                f"margin {numbers['eval/margin']:.4g} over {len(held_out_pairs)} pairs × {settings.eval.draws} draws"
            )
        if settings.samples.every and (step_number % settings.samples.every == 0 or step_number == max_steps):
            if is_main:
                path = draw_samples(settings, accelerator, parts, bare_policy, reference, folder, step_number)
                log.say(f"step {step_number}: samples in {path}")
            processes.wait()
        longest_look = max(longest_look, time.perf_counter() - started)

    if start_step == 0:
        look(0)
    stop_is_described = False
    for step_number in range(start_step, max_steps):
        started = time.perf_counter()
        totals, counts, data_seconds = torch.zeros(len(step.STATISTICS), device=device), [0, 0], 0.0
        window: list[tuple[dict, step.PairErrors]] = []
        if self_play is not None and not self_play.begin_step(step_number, bare_policy):
            if step_number > start_step:
                save(step_number)
            log.say(
                f"stopped before step {step_number + 1} as asked; what was sampled is kept, the same command resumes"
            )
            log.close()
            return 128 + (stop.received or signal.SIGTERM)

        # Accumulate gradients over the window; nothing here waits for the device.
        for _ in range(accelerator.gradient_accumulation_steps):
            waiting = time.perf_counter()
            batch = next(batches)
            data_seconds += time.perf_counter() - waiting
            unreadable.update(len(batch["rows"]), batch["unreadable"])
            counts[0] += batch["truncated"]
            counts[1] += len(batch["unreadable"])
            with accelerator.accumulate(policy):
                with accelerator.autocast():
                    opponents = self_play.opponents(batch["positions"]) if self_play is not None else None
                    example = make_example(batch, settings.seed, batch["positions"], opponents)
                    from_cache = known.train.get(batch["positions"], device) if known.train is not None else None
                    measured = step.measure(policy, bare_policy, reference, example, settings.loss, from_cache)
                inputs = measured.inputs
                if settings.loss.is_unpaired:
                    inputs |= {"z0": z0, "desirable": batch["desirable"].to(device, non_blocking=True)}
                if weights.train is not None:
                    inputs["margin_weights"] = weights.train.get(batch["rows"], device)
                output = step.preference_loss(measured.errors, settings.loss, inputs)
                accelerator.backward(output.loss.mean())
            totals += output.statistics
            batch = {"pair_ids": batch["pair_ids"], "positions": batch["positions"], "is_known": from_cache is not None}
            window.append((batch, step.detached(measured.errors)))

        # One exchange between processes and one wait for the device per optimizer step.
        limit = settings.optim.max_grad_norm or float("inf")
        gradient_norm = accelerator.clip_grad_norm_(parameters, limit)
        own = torch.tensor([*counts, stop.received], dtype=torch.float32, device=device)
        *sums, truncated, substituted, stopped = accelerator.reduce(torch.cat([totals, own]), "sum").tolist()
        numbers = step.averages(sums, total_batch, settings.loss)
        numbers["gradient_norm"] = float(gradient_norm)
        refuse_non_finite(step_number, numbers, window, is_scaled=accelerator.scaler is not None)
        if known.train is not None:
            for batch, errors in window:
                if not batch["is_known"]:
                    known.train.record(batch["positions"], torch.stack(errors[2:]))

        # Update.
        if settings.loss.is_unpaired:
            numbers["z0"] = z0.item()
        numbers["learning_rate"] = learning_rate_at(settings, step_number)
        for group in optimizer.param_groups:
            group["lr"] = numbers["learning_rate"]
        with skipped_steps.watching():
            optimizer.step()
        # Several processes: the gradients stay in DDP's buckets. New ones would lie beside them, as large again.
        optimizer.zero_grad(set_to_none=accelerator.num_processes == 1)
        if not skipped_steps.in_a_row:
            if settings.loss.is_unpaired:
                z0.fill_(max(numbers["gain"], 0.0))
            if ema is not None:
                ema.step(parameters)
            if moving_reference is not None:
                models.follow(moving_reference, bare_policy, settings.model.reference_decay)

        # Log.
        numbers["clamped"] *= total_batch
        if (effective_beta := config.effective_beta(settings)) is not None:
            numbers["effective_beta"] = effective_beta
        numbers["pairs_seen"] = (step_number + 1) * total_batch
        numbers["truncated_captions"], numbers["unreadable_rows"] = truncated, substituted
        seconds = time.perf_counter() - started
        numbers["pairs_per_second"] = total_batch / seconds
        numbers["data_wait_share"] = data_seconds / seconds  # of this process
        numbers["peak_memory_gb"] = peak_memory_gb(device)
        numbers |= skipped_steps.numbers()
        log.row(step_number + 1, numbers, advance=True)
        if skipped_steps.in_a_row:
            log.say(f"step {step_number + 1}: gradients overflowed in fp16; skipped, the loss scale is lowered")
            skipped_steps.refuse_too_many(step_number)

        # Save it, look at it, or leave. Whoever is asked to stop saves first: the launcher may not wait for a look.
        is_last = step_number + 1 == max_steps
        if stopped:
            save(step_number + 1)
        look(step_number + 1)
        if not stopped and (is_last or (step_number + 1) % settings.checkpoint.every == 0):
            saving = save(step_number + 1)
            if not stop_is_described:
                log.say(describe_stop(seconds, saving, longest_look))
                stop_is_described = True
        if stopped and not is_last:
            log.say(f"stopped after step {step_number + 1} as asked and saved; the same command resumes")
            log.close()
            return 128 + (stop.received or signal.SIGTERM)

    exported = checkpoint.export_model(
        folder, policy, settings, is_main=is_main, unwrap=accelerator.unwrap_model, ema=ema
    )
    if self_play is not None and is_main:
        self_play.close()
    log.say(f"finished: {max_steps} steps; the model is in {exported}, everything else in {folder}")
    processes.wait()
    log.close()
    return 0


def settle_gradients(
    accelerator: Accelerator,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    make_example: step.ExampleMaker,
    batch: dict,
) -> None:
    """Have DDP lay its buckets out for good, and the gradients in them, by two backward passes of nothing.

    DDP chooses its buckets' order in the first pass that exchanges, and moves everything in the second. Left to the
    training, gradients would lie beside the buckets until then, as large again, when a resumed run already has its
    moments; and its first step would be summed in another order than that of an uninterrupted run.
    """
    if accelerator.num_processes == 1:
        return
    for _ in range(2):
        with accelerator.autocast():
            example = make_example(batch, make_example.config.seed, batch["positions"])
            residuals = step.residuals(policy, example)
        (0 * residuals).sum().backward()
    optimizer.zero_grad(set_to_none=False)


@torch.no_grad()
def refuse_errors_of_others(
    accelerator: Accelerator,
    reference: nn.Module,
    make_example: step.ExampleMaker,
    batch: dict,
    known: ReferenceCache,
) -> None:
    """Raise ValueError where the reference's errors on a batch are not those that were recorded."""
    recorded = known.get(batch["positions"], accelerator.device)
    if recorded is None:
        return
    with accelerator.autocast():
        example = make_example(batch, make_example.config.seed, batch["positions"])
        measured = step.denoising_errors(reference, example).view(2, -1)
    difference = ((measured - recorded).abs() / recorded).max().item()
    if not difference < RECORDED_ERROR_TOLERANCE:
        raise ValueError(
            f"cache.reference: {known.folder} says that the reference's errors on the first pairs are "
            f"{recorded.flatten().tolist()}, and they are {measured.flatten().tolist()}. They were recorded on other "
            "images or with another model; remove that folder, or name another one"
        )


def refuse_other_weights(start_step: int, policy: nn.Module, reference: nn.Module | None) -> None:
    """Raise ValueError where the processes start from different steps or weights."""
    if processes.count() == 1:
        return
    facts = {"optimizer step": start_step, "policy": checkpoint.weights_checksum(policy)}
    if reference is not None:
        facts["reference"] = checkpoint.weights_checksum(reference)
    processes.refuse_differences(facts, "Give every machine the same model and the same run folder")


def describe_stop(step_seconds: float, saving_seconds: float, looking_seconds: float) -> str:
    """How long a stop takes, and what to do where the launcher would not wait for it."""
    needed = step_seconds + saving_seconds + looking_seconds
    text = f"a stop takes up to {needed:.0f} s: a step {step_seconds:.0f} s, saving {saving_seconds:.0f} s"
    text += f", after an evaluation or samples that are in work, {looking_seconds:.0f} s"
    grace = ending.launcher_grace_seconds()
    if grace is not None and grace < 2 * needed:
        text += f"; the launcher leaves {grace} s: start it with {ending.GRACE_VARIABLE}={60 + 4 * round(needed)}"
    return text


def find_batch(
    settings: Config,
    accelerator: Accelerator,
    parts: models.PipelineParts,
    pairs: Pairs,
    weights: data.MarginWeights | None,
) -> int:
    """Time micro-steps of growing size on this device and say which is fastest. Writes nothing but caches.

    Sizes are those that divide a process' share of the total batch. It stops where memory ends, or where a size is
    no faster than half of it. Loading is left out, encoding is in where no cache holds the examples.
    """
    total, processes, device = settings.train.total_batch_pairs, accelerator.num_processes, accelerator.device
    config.accumulation_steps(settings, processes)  # refuses what cannot be split
    schedule = NoiseSchedule.from_scheduler(parts.scheduler).to(device)
    known = open_known_reference(settings, accelerator, pairs, None, start_step=0)
    reference = None
    if settings.loss.needs_reference and not known.is_complete:
        reference = models.make_reference(parts.unet, settings.model, settings.compute)
    policy = models.make_policy(parts.unet, settings.model, settings.compute)
    if not settings.cache.examples:
        for module in (parts.vae, parts.text_encoder):
            module.to(device)
    optimizer = build_optimizer(settings, models.trainable_parameters(policy))  # its learning rate is 0
    policy, optimizer = accelerator.prepare(policy, optimizer)
    if reference is not None:
        reference = accelerator.prepare_model(reference, evaluation_mode=True)
    bare_policy = accelerator.unwrap_model(policy)
    make_example = step.ExampleMaker(parts, schedule, settings, device)
    dataset = make_dataset(pairs, parts.tokenizer, settings, held_out=False)
    settle_gradients(accelerator, policy, optimizer, make_example, dataset.batch([0]))

    def micro_step(batch: dict) -> None:
        inputs = {}
        if settings.loss.is_unpaired:
            inputs = {"z0": torch.zeros((), device=device), "desirable": batch["desirable"].to(device)}
        if weights is not None:
            inputs["margin_weights"] = weights.get(batch["rows"], device)
        with accelerator.no_sync(policy):
            with accelerator.autocast():
                example = make_example(batch, settings.seed, batch["positions"])
                from_cache = known.train.get(batch["positions"], device) if known.is_complete else None
                measured = step.measure(policy, bare_policy, reference, example, settings.loss, from_cache)
            output = step.preference_loss(measured.errors, settings.loss, measured.inputs | inputs)
            accelerator.backward(output.loss.mean())

    speeds: dict[int, float] = {}
    accelerator.print(f"{'micro batch':>11}  {'accumulation':>12}  {'pairs/s':>9}  {'peak memory':>11}")
    for size in (size for size in range(1, total // processes + 1) if total // processes % size == 0):
        try:
            if settings.compute.compile:
                torch.compiler.reset()  # one graph per size is more than it keeps
            batch = dataset.batch(list(range(size)))
            for _ in range(2):  # the first one compiles, chooses kernels and fills the optimizer's moments
                micro_step(batch)
                optimizer.step()
            wait_for(device)
            start = time.perf_counter()
            for _ in range(TIMED_STEPS):
                micro_step(batch)
            wait_for(device)
        except torch.OutOfMemoryError:
            accelerator.print(f"{size:>11}  does not fit")
            break
        speeds[size] = processes * TIMED_STEPS * size / (time.perf_counter() - start)
        accelerator.print(
            f"{size:>11}  {total // processes // size:>12}  {speeds[size]:>9.3g}  {peak_memory_gb(device):>8.2f} GB"
        )
        if speeds[size] < max((speed for other, speed in speeds.items() if other <= size / 2), default=0.0):
            break
    if not speeds:
        raise ValueError(
            "not even one pair fits; compute.gradient_checkpointing=true or model.trainable=lora need less"
        )
    best = max(speeds, key=speeds.get)
    accelerator.print(
        f"fastest here: train.micro_batch_pairs={best}; the total batch stays {total}, and so does the result"
    )
    return 0


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def build_ema(settings: Config, parameters: list[nn.Parameter]):
    """A moving average of the trained weights, or None."""
    if settings.model.ema_decay is None:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=settings.model.ema_decay)


@torch.no_grad()
def evaluate(
    settings: Config,
    accelerator: Accelerator,
    policy: nn.Module,
    reference: nn.Module | None,
    make_example: step.ExampleMaker,
    pairs: Pairs,
    known: ReferenceCache | None,
    z0: Tensor,
    weights: data.MarginWeights | None,
) -> dict[str, float]:
    """Statistics over held-out pairs at fixed (t, ε), shared out over the processes.

    z0 is of an unpaired objective alone; here it too sees pairs, a desirable and an undesirable image each.
    """
    draws = settings.eval.draws
    held_out = make_dataset(pairs, make_example.parts.tokenizer, settings, held_out=True)
    batches = data.held_out_batches(
        len(pairs),
        draws,
        settings.train.micro_batch_pairs,
        accelerator.process_index,
        accelerator.num_processes,
    )
    bare_policy = accelerator.unwrap_model(policy)
    totals = torch.zeros(len(step.STATISTICS), device=accelerator.device)
    for number, positions in enumerate(batches):
        with accelerator.autocast():
            if number % draws == 0:  # the draws of a batch of pairs come in a row: read and encode it once
                batch = make_example.encoded(held_out.batch(positions))
            from_cache = known.get(positions, accelerator.device) if known is not None else None
            example = make_example(batch, HELD_OUT_SEED, positions)
            measured = step.measure(bare_policy, bare_policy, reference, example, settings.loss, from_cache)
        if known is not None and from_cache is None:
            known.record(positions, torch.stack(measured.errors[2:]))
        inputs = measured.inputs | ({"z0": z0} if settings.loss.is_unpaired else {})
        if weights is not None:
            inputs["margin_weights"] = weights.get(batch["rows"], accelerator.device)
        totals += step.preference_loss(measured.errors, settings.loss, inputs).statistics
    sums: Tensor = accelerator.reduce(totals, "sum")
    means = step.averages(sums.tolist(), len(pairs) * draws, settings.loss)
    return {f"eval/{name}": mean for name, mean in means.items()}


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
    """A sheet of sample images for the configured prompts and seeds: reference beside policy, where it is loaded."""
    wanted = settings.samples
    encoders = (parts.vae, parts.text_encoder)
    for module in encoders:
        module.to(accelerator.device)
    columns = {}
    has_reference = reference is not None or settings.model.trainable == "lora"
    for title in ("reference", "policy") if has_reference else ("policy",):
        unet = reference if title == "reference" and reference is not None else policy
        is_adapter_off = title == "reference" and reference is None
        with accelerator.autocast(), models.adapter_off(policy) if is_adapter_off else nullcontext():
            parts.vae.enable_slicing()  # one image at a time: decoding several would take more memory than a step
            columns[title] = sample_images(
                models.pipeline_with(parts, unet),
                wanted.prompts,
                seed=wanted.seed,
                num_inference_steps=wanted.num_inference_steps,
                guidance_scale=wanted.guidance_scale,
                image_size=settings.data.resolution,
                chunk_size=SAMPLE_CHUNK,
            )
    parts.vae.disable_slicing()  # it would round the encoding of training images differently
    if settings.cache.examples:  # training itself needs no encoders: their memory is the batch's
        for module in encoders:
            module.to("cpu")
    path = folder / "samples" / f"step_{step_number:08d}.png"
    path.parent.mkdir(exist_ok=True)
    contact_sheet(columns, wanted.prompts).save(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
