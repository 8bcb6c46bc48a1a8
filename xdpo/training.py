"""A training from its config to its exported model, and its loop."""

import argparse
import hashlib
import os
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

from accelerate import Accelerator
from accelerate.utils import set_seed

from xdpo import config, data, ending, families, feeds, files, precompute, processes, runs
from xdpo.compute import build_accelerator
from xdpo.config import Config
from xdpo.dashboard import RunPage
from xdpo.data import Split
from xdpo.families import PipelineParts
from xdpo.feeds import build_feed
from xdpo.find_batch import find_batch
from xdpo.learner import Learner, build_learner, build_optimizer, open_recorded_errors
from xdpo.non_finite import NonFiniteError, refuse_non_finite
from xdpo.precompute import Examples, Pairs, make_dataset, open_pairs
from xdpo.runlog import RunLog, peak_memory_gb
from xdpo.tally import Tally
from xdpo.watch import Watch


def main(settings: Config, options: argparse.Namespace) -> int:
    """Train, with all processes. Returns the exit status: 0 finished, 1 an error, 128 + signal asked to stop."""
    try:
        accelerator = build_accelerator(settings)
        with ending.together():
            return run(settings, accelerator, options)
    except (ValueError, runs.CheckpointError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted before the training began; nothing was lost", file=sys.stderr)
        return 128 + signal.SIGINT


def run(settings: Config, accelerator: Accelerator, options: argparse.Namespace) -> int:
    """Check everything that is cheap to check, open the data, load the model, train. Returns the exit status."""
    digest = hashlib.sha256(config.dump_config(settings).encode()).hexdigest()[:16]
    processes.refuse_differences({"config": digest}, "Start the same command, with the same files, on every machine")
    _ = settings.loss.objective.function  # a declaration without its function is told before anything is loaded
    runs.check_optimizer(lambda parameters: build_optimizer(settings, parameters), accelerator.device)
    folder = Path(settings.output_dir)
    runs.check_run_folder(folder, settings, options.allow_config_change)
    resume_from = runs.agree_on_checkpoint(folder)
    if settings.loss.samples_rejected:
        feeds.check_snapshots(settings, folder, runs.step_of(resume_from) if resume_from else 0)
    families.check_config(settings)
    if settings.feed.is_online:
        feeds.check_online(settings)
    if settings.cache.examples and settings.cache.build:
        precompute.build_missing_examples(settings, accelerator, accelerator.print)
    train_pairs = open_pairs(settings, accelerator, Split.TRAIN)
    held_out_pairs = open_pairs(settings, accelerator, Split.HELD_OUT) if settings.eval.every else None
    if accelerator.num_processes > 1:
        facts = {"training pairs": train_pairs.fingerprint}
        processes.refuse_differences(facts, "Give every machine the same data")
    if resume_from:
        runs.check_pairs(folder, train_pairs.fingerprint, options.allow_config_change, accelerator.print)
    margin_weights = data.weigh_pairs(settings.loss.margin_weight, train_pairs, held_out_pairs)
    accelerator.print(config.describe(settings, accelerator.num_processes, len(train_pairs)))
    accelerator.print(f"training pairs: {data.PairCounts(**vars(train_pairs.counts))}")
    if margin_weights.train is not None:
        accelerator.print(f"margin weights: {margin_weights.train}")
    if held_out_pairs and accelerator.is_main_process:
        note_shared_pairs(train_pairs, held_out_pairs)
    parts = families.load_parts(settings.model, encoders=needs_encoders(settings, accelerator.is_main_process))
    processes.wait()  # some may still be downloading
    if options.find_batch:
        return find_batch(settings, accelerator, parts, train_pairs, margin_weights)
    with files.only_run([folder], "a training", is_main=accelerator.is_main_process):
        if runs.agree_on_checkpoint(folder) != resume_from:
            raise ValueError(f"output_dir: another process has just saved in {folder}; run the same command again")
        return train(settings, accelerator, folder, resume_from, parts, train_pairs, held_out_pairs, margin_weights)


def needs_encoders(settings: Config, is_main: bool) -> bool:
    """Whether a process encodes examples, decodes images of rounds or sample sheets, or exports a whole pipeline.

    is_main: whether it is the process that draws the sheets and exports.
    """
    if not settings.cache.examples or settings.feed.is_online:
        return True
    return is_main and (settings.samples.every > 0 or settings.exports_encoders)


def note_shared_pairs(train_pairs: Pairs, held_out_pairs: Pairs) -> None:
    """Print a note where held-out pairs are also training pairs."""
    shared, count = precompute.count_shared(train_pairs, held_out_pairs), len(held_out_pairs)
    if shared:
        print(
            f"note: {shared} of the {count} held-out pairs are training pairs too, and eval/ says little of others; "
            "name others with eval.path or eval.split, or set filter.held_out_captions=true"
        )


def train(
    settings: Config,
    accelerator: Accelerator,
    folder: Path,
    resume_from: Path | None,
    parts: PipelineParts,
    train_pairs: Pairs,
    held_out_pairs: Pairs | None,
    margin_weights: data.PairWeights,
) -> int:
    """Build, then train. Returns 0 when the run is finished, 128 + signal when it was asked to stop."""
    start_step = runs.step_of(resume_from) if resume_from else 0

    # What is trained, and what it is measured against.
    set_seed(settings.seed)
    recorded = open_recorded_errors(settings, accelerator, train_pairs, held_out_pairs, start_step)
    learner = build_learner(settings, accelerator, parts, recorded, margin_weights)
    dataset = make_dataset(train_pairs, parts.tokenize, settings, Split.TRAIN)
    sampler = build_sampler(settings, accelerator, start_step)
    first_batch = dataset.batch(next(iter(sampler)))
    learner.settle_gradients(first_batch)
    learner.refuse_errors_of_others(first_batch)  # before a checkpoint is loaded the policy is still the reference
    if resume_from:
        learner.load(resume_from)
    learner.refuse_other_weights(start_step)

    # What it trains on, and how it is watched.
    log = open_log(settings, accelerator, folder, start_step, train_pairs, held_out_pairs, margin_weights)
    if resume_from:
        log.say(f"resumed from {resume_from}")
    try:
        return take_steps(learner, train_pairs, held_out_pairs, dataset, sampler, folder, log, start_step)
    except BaseException as error:
        log.fail(error)
        raise


def take_steps(
    learner: Learner,
    train_pairs: Pairs,
    held_out_pairs: Pairs | None,
    dataset: Examples,
    sampler: data.StepSampler,
    folder: Path,
    log: RunLog,
    start_step: int,
) -> int:
    """The steps of the training, and its end. Returns what `train` does."""
    settings, accelerator = learner.settings, learner.accelerator
    total_batch, max_steps = settings.train.total_batch_pairs, settings.train.max_steps
    stop = ending.StopRequest()
    if (grace := ending.launcher_grace_seconds()) is not None:
        log.say(f"asked to stop, the run finishes its step and saves; the launcher leaves it {grace} s for both")
    feed = build_feed(learner, train_pairs, dataset, sampler, folder, log, lambda: bool(stop.received))
    watch = Watch(learner, held_out_pairs, folder, log)
    if start_step == 0:
        watch.evaluate_and_sample(0)

    stop_is_described = False
    for step_number in range(start_step, max_steps):
        started = time.perf_counter()
        if not feed.begin_step(step_number, learner.bare_policy):
            if step_number > start_step:
                learner.save(folder, step_number)
            log.say(
                f"stopped before step {step_number + 1} as asked; what was sampled is kept, the same command resumes"
            )
            return leave(log, stop)

        # Accumulate gradients. Nothing here waits for the device: the tally keeps sums on it, and each micro-step's
        # pair ids and errors, so that the pairs behind a non-finite sum can be named.
        tally = Tally(settings, accelerator, total_batch)
        for batch in feed.micro_batches():
            tally.add(batch, learner.micro_step(batch))

        # One exchange between processes and one wait for the device per optimizer step.
        gradient_norm = learner.clip_gradients()
        metrics, counts = tally.exchange(stop.received)
        metrics["gradient_norm"] = gradient_norm.item()
        refuse_non_finite(step_number, metrics, tally.window, is_scaled=accelerator.scaler is not None)
        learner.reference.commit()

        # Update and log.
        metrics |= learner.update(step_number, metrics)
        seconds = time.perf_counter() - started
        if (effective_beta := config.effective_beta(settings)) is not None:
            metrics["effective_beta"] = effective_beta
        metrics["truncated_captions"], metrics["unreadable_rows"] = counts.truncated_captions, counts.unreadable_rows
        metrics["pairs_seen"] = (step_number + 1) * total_batch
        metrics["pairs_per_second"] = total_batch / seconds
        metrics["data_wait_share"] = feed.wait_seconds / seconds  # of this process
        metrics["peak_memory_gb"] = peak_memory_gb(accelerator.device)
        log.row(step_number + 1, metrics, advance=True)
        if learner.skipped_steps.in_a_row:
            log.say(f"step {step_number + 1}: gradients overflowed in fp16; skipped, the loss scale is lowered")
            learner.skipped_steps.refuse_too_many(step_number)

        # Save, evaluate, or leave. A run that is asked to stop saves first, as its launcher may kill it any moment.
        is_last, is_asked_to_stop = step_number + 1 == max_steps, bool(counts.signals)
        if is_asked_to_stop:
            learner.save(folder, step_number + 1)
        watch.evaluate_and_sample(step_number + 1)
        if not is_asked_to_stop and (is_last or (step_number + 1) % settings.checkpoint.every == 0):
            saving = time.perf_counter()
            learner.save(folder, step_number + 1)
            if not stop_is_described:
                saving = time.perf_counter() - saving
                log.say(ending.describe_stop(seconds, saving, watch.longest_seconds))
                stop_is_described = True
        if is_asked_to_stop and not is_last:
            log.say(f"stopped after step {step_number + 1} as asked and saved; the same command resumes")
            return leave(log, stop)

    exported = learner.export(folder)
    if accelerator.is_main_process:
        feed.close()
    log.say(f"finished: {max_steps} steps; the model is in {exported}, everything else in {folder}")
    processes.wait()
    log.close()
    return 0


def leave(log: RunLog, stop: ending.StopRequest) -> int:
    """Close the log of a run that was asked to stop. Returns 128 + signal."""
    log.close()
    return 128 + (stop.received or signal.SIGTERM)  # another process may have received the signal


def build_sampler(settings: Config, accelerator: Accelerator, start_step: int) -> data.StepSampler:
    """The positions of this process's micro-batches."""
    return data.StepSampler(
        start_step=start_step,
        total_batch_pairs=settings.train.total_batch_pairs,
        micro_batch_pairs=settings.train.micro_batch_pairs,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def open_log(
    settings: Config,
    accelerator: Accelerator,
    folder: Path,
    start_step: int,
    train_pairs: Pairs,
    held_out_pairs: Pairs | None,
    margin_weights: data.PairWeights,
) -> RunLog:
    """Describe the run in its folder, and open its metrics and trackers."""
    run_id, page, train_weights = None, None, margin_weights.train
    if accelerator.is_main_process:
        run_id = runs.describe_run(
            folder,
            settings,
            pairs_fingerprint=train_pairs.fingerprint,
            training_pairs=data.PairCounts(**vars(train_pairs.counts)).by_name(),
            held_out_pairs=data.PairCounts(**vars(held_out_pairs.counts)).by_name() if held_out_pairs else None,
            score_range=train_weights.score_range if train_weights is not None else None,
            processes=accelerator.num_processes,
            device=str(accelerator.device),
            precision=accelerator.mixed_precision,
        )
        description = config.describe(settings, accelerator.num_processes, len(train_pairs))
        page = RunPage(folder, max_steps=settings.train.max_steps, description=description)
        accelerator.print(f"curves and samples, while it trains: {page.path}")
    return RunLog(
        accelerator,
        folder,
        run_id=run_id,
        project=settings.log.project,
        config=config.flatten(settings),
        start_step=start_step,
        max_steps=settings.train.max_steps,
        page=page,
    )
