"""Pairs per second of every training mode, in turn in one process, beside the bare networks on ready tensors.

Micro-steps are run as in train_xdpo.py: loader, examples, errors of policy and reference, loss, backward. Neither they
nor the bare networks include the optimizer's update, of which the configs have one per 256 pairs.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks.arguments import add_number, add_overrides, add_pipeline, positive
from benchmarks.folders import working_folder
from benchmarks.modes import BASE_CONFIG, MODES, Bench, Mode, set_up
from benchmarks.results import Criterion, Outcome, Spread, ratios, time_in_turn
from xdpo.batch import Tokens
from xdpo.compute import build_accelerator
from xdpo.config import Config, load_config
from xdpo.data import PairWeights, Split, StepSampler, make_loader
from xdpo.families import PipelineParts, load_parts
from xdpo.learner import Learner, build_reference
from xdpo.models import make_policy, make_reference, trainable_parameters
from xdpo.noisy import NoisyBatchMaker
from xdpo.non_finite import SkippedSteps
from xdpo.precompute import make_dataset, open_pairs, open_reference
from xdpo.reference import Recorded
from xdpo.report.grids import Cell, Grid

Job = Callable[[], None]
BARE_PARTS = ("bare policy", "bare reference", "bare autoencoder", "bare text encoder")
PAIRS_IN_SOURCE = 8  # the training order goes round them again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser, "quarter")
    add_number(parser, "--resolution", 256, "side of the images in pixels")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--micro-batches", nargs="+", type=positive, default=[1, 4], help="pairs in one pass (default: 1 4)"
    )
    add_number(parser, "--pairs", 4, "pairs of each mode in a round")
    add_number(parser, "--rounds", 5, "rounds")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of each mode")
    add_overrides(parser)


def run(options: argparse.Namespace) -> Outcome:
    if uneven := [size for size in options.micro_batches if options.pairs % size]:
        raise ValueError(f"--pairs {options.pairs} is no multiple of the micro-batch {uneven[0]}")
    with working_folder() as working:
        bench = set_up(
            working,
            options.pipeline,
            resolution=options.resolution,
            num_pairs=PAIRS_IN_SOURCE,
            extra=options.overrides,
        )
        rounds_with_warm_up = options.rounds + 1
        if any(MODES[name].examples for name in options.modes):
            bench.fill_caches(1, max(rounds_with_warm_up * options.pairs, 2 * max(options.micro_batches)))
        peaks = {}
        if not options.no_memory:  # first: what this process holds would count as the peak of those that it starts
            for size in options.micro_batches:
                for name in options.modes:
                    peaks[name, size] = bench.train_peak_memory_gb(MODES[name], size)
        jobs = build_jobs(bench, options.modes, options.micro_batches, options.pairs, rounds_with_warm_up)
        seconds = time_in_turn(jobs, options.rounds)
    return summarise(options, seconds, peaks)


@dataclass(frozen=True)
class Networks:
    """The networks that the modes share, whose weights never change; policies by the mode's trainable weights."""

    parts: PipelineParts
    policies: dict[str, nn.Module]
    reference: nn.Module


def build_jobs(
    bench: Bench, modes: list[str], micro_batches: list[int], num_pairs: int, rounds: int
) -> dict[tuple[str, int], Job]:
    """One round of each mode and of each bare part, by (name, micro-batch): `num_pairs` pairs."""

    def settings_of(mode: Mode, micro_batch: int) -> Config:
        overrides = bench.overrides(mode, micro_batch=micro_batch, total_batch=num_pairs, max_steps=rounds)
        return load_config(BASE_CONFIG, overrides)

    settings = settings_of(MODES["full"], micro_batches[0])
    accelerator = build_accelerator(settings)
    networks = build_networks(settings, accelerator, {MODES[name].trainable for name in modes} | {"full"})
    jobs: dict[tuple[str, int], Job] = {}
    for size in micro_batches:
        for name in modes:
            jobs[name, size] = training_job(settings_of(MODES[name], size), accelerator, networks)
        for name, job in bare_jobs(settings_of(MODES["full"], size), accelerator, networks).items():
            jobs[name, size] = job
    return jobs


def build_networks(settings: Config, accelerator: Accelerator, trainables: set[str]) -> Networks:
    parts = load_parts(settings.model)
    for module in parts.encoders:
        module.to(accelerator.device)
    reference = make_reference(parts, settings.model, settings.compute).to(accelerator.device)
    policies = {}
    for trainable in sorted(trainables):
        model = settings.model.model_copy(update={"trainable": trainable})
        copied = replace(parts, modules={**parts.modules, parts.family.denoiser: copy.deepcopy(parts.denoiser)})
        policies[trainable] = accelerator.prepare(make_policy(copied, model, settings.compute))
    return Networks(parts, policies, reference)


def build_learner(settings: Config, accelerator: Accelerator, networks: Networks) -> Learner:
    """A learner of shared networks. Raises ValueError where the reference cache lacks pairs."""
    policy, parts = networks.policies[settings.model.trainable], networks.parts
    bare_policy = accelerator.unwrap_model(policy)
    network = networks.reference if settings.model.trainable == "full" else None
    reference = build_reference(settings, network, bare_policy)
    pairs = open_pairs(settings, accelerator, Split.TRAIN)
    cache = open_reference(settings, pairs, Split.TRAIN, accelerator.mixed_precision)
    if cache is not None:
        if not cache.has(range(settings.train.total_batch_pairs * settings.train.max_steps)):
            raise ValueError("the reference cache lacks pairs of this benchmark, and computing them would be slower")
        reference = Recorded(reference, cache, accelerator.device)
    process = parts.process(settings.noise).to(accelerator.device)
    return Learner(
        settings=settings,
        accelerator=accelerator,
        parts=parts,
        policy=policy,
        bare_policy=bare_policy,
        optimizer=torch.optim.SGD(trainable_parameters(policy), lr=0.0),  # never stepped
        make_noisy=NoisyBatchMaker(parts, process, settings, accelerator.device),
        references={Split.TRAIN: reference},
        margin_weights=PairWeights(None, None),
        ema=None,
        z0=torch.zeros((), device=accelerator.device),
        skipped_steps=SkippedSteps(None),
    )


def training_job(settings: Config, accelerator: Accelerator, networks: Networks) -> Job:
    """The micro-steps of one optimizer step in a mode; every call takes the next pairs."""
    learner = build_learner(settings, accelerator, networks)
    batches = iter(_loader(settings, accelerator, networks.parts))

    def one_optimizer_step() -> None:
        for _ in range(settings.train.total_batch_pairs // settings.train.micro_batch_pairs):
            learner.micro_step(next(batches))

    return one_optimizer_step


def bare_jobs(settings: Config, accelerator: Accelerator, networks: Networks) -> dict[str, Job]:
    """Each network on prepared tensors, as many times as one optimizer step runs it."""
    learner, parts = build_learner(settings, accelerator, networks), networks.parts
    policy, predict = learner.bare_policy, parts.family.predict
    batch = next(iter(_loader(settings, accelerator, parts)))
    pixels = batch.images.to(accelerator.device)
    tokens = Tokens({name: ids.to(accelerator.device) for name, ids in batch.captions.items()})
    noisy = learner.noisy(batch)
    inputs = (noisy.latents, noisy.timesteps, noisy.conditioning)

    def policy_job() -> None:
        predict(policy, *inputs).float().sum().backward()

    @torch.no_grad()
    def reference_job() -> None:
        predict(networks.reference, *inputs)

    def repeated(work: Job) -> Job:
        def job() -> None:
            for _ in range(settings.train.total_batch_pairs // settings.train.micro_batch_pairs):
                with accelerator.autocast():
                    work()

        return job

    works = (policy_job, reference_job, lambda: parts.encode_images(pixels), lambda: parts.encode_captions(tokens))
    return {name: repeated(work) for name, work in zip(BARE_PARTS, works, strict=True)}


def _loader(settings: Config, accelerator: Accelerator, parts: PipelineParts):
    train = settings.train
    return make_loader(
        make_dataset(open_pairs(settings, accelerator, Split.TRAIN), parts.tokenize, settings, Split.TRAIN),
        StepSampler(start_step=0, total_batch_pairs=train.total_batch_pairs, micro_batch_pairs=train.micro_batch_pairs),
        num_workers=settings.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def summarise(
    options: argparse.Namespace, seconds: dict[tuple[str, int], list[float]], peaks: dict[tuple[str, int], float]
) -> Outcome:
    """The table, and the criteria at every micro-batch whose modes were run."""
    rows, criteria = [], []
    for size in options.micro_batches:
        bare_sum = [sum(times) for times in zip(*(seconds[part, size] for part in BARE_PARTS), strict=True)]
        for name in [*options.modes, *BARE_PARTS]:
            speed = Spread.of([options.pairs / value for value in seconds[name, size]])
            against = seconds.get(("full", size))
            ratio = ratios(against, seconds[name, size]).cell() if against and name in MODES else Cell("")
            peak = peaks.get((name, size))
            rows.append(
                (
                    Cell(str(MODES.get(name, f"{name} alone"))),
                    Cell(str(size)),
                    speed.cell(),
                    ratio,
                    Cell("" if peak is None else f"{peak:.2f}", peak),
                )
            )
        criteria += _criteria(seconds, size, bare_sum)
    title = (
        f"Training, {options.pipeline} at {options.resolution} pixels; "
        f"median of {options.rounds} rounds (lowest–highest)"
    )
    columns = ("mode", "micro-batch", "pairs/s", "speed-up", "peak GB")
    note = "speed-up: over the full fine-tune that recomputes everything, at the same micro-batch, round by round"
    measurements = {
        "seconds_per_round": _nested(seconds),
        "pairs_per_round": options.pairs,
        "peak_memory_gb": _nested(peaks),
    }
    return Outcome(Grid(title, columns, tuple(rows), note), measurements, tuple(criteria))


def _criteria(seconds: dict[tuple[str, int], list[float]], size: int, bare_sum: list[float]) -> list[Criterion]:
    found, at = [], f" (micro-batch {size})"
    recompute, cached = seconds.get(("full", size)), seconds.get(("full-cached", size))
    if recompute and cached:
        gain = ratios(recompute, cached).median
        claim = "training from both caches is at least 1.55 times as fast as recomputing everything"
        found.append(Criterion(claim + at, gain, gain >= 1.55))
    if recompute:
        overhead = ratios(recompute, bare_sum).median
        claim = "recomputing everything takes at most 1.05 of the bare sum of its parts"
        found.append(Criterion(claim + at, overhead, overhead <= 1.05))
    if cached:
        overhead = ratios(cached, seconds["bare policy", size]).median
        claim = "training from both caches takes at most 1.05 of the bare policy's forward and backward"
        found.append(Criterion(claim + at, overhead, overhead <= 1.05))
    return found


def _nested(values: dict[tuple[str, int], Any]) -> dict[str, dict[int, Any]]:
    nested: dict[str, dict[int, Any]] = {}
    for (name, size), value in values.items():
        nested.setdefault(name, {})[size] = value
    return nested
