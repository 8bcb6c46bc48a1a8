"""Pairs per second of every mode against recomputing everything and against the bare networks, and of the switches."""

import io
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial

from benchmarks import modes, steps
from benchmarks.modes import BASE_CONFIG, MODES
from benchmarks.results import time_in_turn

from gpu_checks import children
from gpu_checks.context import Context, forget_accelerator
from gpu_checks.rows import Finding, Row, at_least, at_most
from xdpo import recording
from xdpo.compute import build_accelerator
from xdpo.config import Config, load_config

Times = dict[tuple[str, int], list[float]]  # seconds of every round by mode or bare network, and micro-batch
MICRO_BATCHES = (1, 2)
PAIRS = 4  # of a round
GAIN = 1.8  # of both caches, over recomputing everything: what the FLOPs promise
OVERHEAD = 1.05
LAUNCHES = (
    "more train.micro_batch_pairs if two are much faster than one: kernels start more slowly than they run, and the "
    "caches and LoRA save arithmetic, not starts; else scripts/benchmark.py step shows which network takes the time"
)
TRAINED = "full-examples"  # nothing but policy and reference: what compute's switches act on


def fill_caches(settings: Config) -> None:
    with redirect_stdout(io.StringIO()):  # what it says is none of the table's
        recording.fill(settings, build_accelerator(settings))


def training_bench(context: Context, *extra: str) -> modes.Bench:
    workers = f"data.num_workers={context.size.workers}"
    return modes.Bench(context.working, context.pipeline(), context.pairs(), context.size.resolution, (workers, *extra))


def times(context: Context) -> Times:
    """All modes and bare networks in turn, on filled caches."""

    def measure() -> Times:
        forget_accelerator()
        rounds = context.size.rounds + 1  # and one to warm up
        training = training_bench(context)
        caches = training.overrides(MODES["full-cached"], micro_batch=1, total_batch=PAIRS, max_steps=rounds)
        children.run(fill_caches, load_config(BASE_CONFIG, caches))
        return time_in_turn(steps.build_jobs(training, list(MODES), list(MICRO_BATCHES), PAIRS, rounds), rounds - 1)

    return context.share("times", measure)


def times_with(context: Context, switch: str) -> list[float]:
    """Seconds of the rounds of TRAINED, at one pair, with an override."""
    forget_accelerator()
    rounds = context.size.rounds + 1
    overrides = training_bench(context, switch).overrides(
        MODES[TRAINED], micro_batch=1, total_batch=PAIRS, max_steps=rounds
    )
    settings = load_config(BASE_CONFIG, overrides)
    accelerator = build_accelerator(settings)
    job = steps.training_job(settings, accelerator, steps.build_networks(settings, accelerator, {"full"}))
    return time_in_turn({switch: job}, rounds - 1)[switch]


def pairs_per_second(seconds: list[float]) -> float:
    return PAIRS / statistics.median(seconds)


def check_gain(context: Context, mode: str, micro_batch: int, least: float) -> Finding:
    """Pairs per second of a mode beside those of the full fine-tune that recomputes everything."""
    measured = times(context)
    speed, plain = (pairs_per_second(measured[name, micro_batch]) for name in (mode, "full"))
    return at_least(speed, least * plain, LAUNCHES, judged=context.is_judged)


def check_overhead(context: Context, mode: str, parts: tuple[str, ...], micro_batch: int) -> Finding:
    """Seconds of a mode beside those of the networks that it runs."""
    measured = times(context)
    bare = [sum(seconds) for seconds in zip(*(measured[part, micro_batch] for part in parts), strict=True)]
    seconds, most = statistics.median(measured[mode, micro_batch]), OVERHEAD * statistics.median(bare)
    remedy = "profile Learner.micro_step: something in it waits for the device, or for data"
    return at_most(seconds, most, remedy, judged=context.is_judged)


def check_micro_batch(context: Context, mode: str) -> Finding:
    """Pairs per second with two pairs in a pass beside those with one."""
    one, two = (pairs_per_second(times(context)[mode, micro_batch]) for micro_batch in MICRO_BATCHES)
    return at_least(two, one, "train.micro_batch_pairs=1", judged=context.is_judged)


def check_switch(context: Context, switch: str, within: Callable[[Context], AbstractContextManager]) -> Finding:
    """Pairs per second with a switch of `compute` beside those without."""
    plain = pairs_per_second(times(context)[TRAINED, 1])  # first: it fills the caches
    with within(context):
        switched = pairs_per_second(times_with(context, f"{switch}=true"))
    return at_least(switched, plain, f"{switch}=false", judged=context.is_judged)


def _rows() -> Iterator[Row]:
    for mode, size in [*((mode, 1) for mode in MODES if mode != "full"), ("full-cached", 2)]:
        least = GAIN if mode == "full-cached" else 1.0
        claim = f"pairs/s, {least:g} times those of full, recompute everything (micro-batch {size}): {MODES[mode]}"
        yield Row(claim, partial(check_gain, mode=mode, micro_batch=size, least=least))
    for size in MICRO_BATCHES:
        for mode, parts in (("full", steps.BARE_PARTS), ("full-cached", steps.BARE_PARTS[:1])):
            claim = f"seconds, {OVERHEAD:g} times the bare networks' (micro-batch {size}): {MODES[mode]}"
            yield Row(claim, partial(check_overhead, mode=mode, parts=parts, micro_batch=size))
    for mode in ("full", "lora"):
        claim = f"pairs/s with micro-batch 2, those with 1: {MODES[mode]}"
        yield Row(claim, partial(check_micro_batch, mode=mode))
    for switch, within in SWITCHES.items():
        claim = f"pairs/s with {switch}, those without: {MODES[TRAINED]}"
        yield Row(claim, partial(check_switch, switch=switch, within=within))


SWITCHES: dict[str, Callable[[Context], AbstractContextManager]] = {
    "compute.compile": Context.compiling,
    "compute.channels_last": nullcontext,
}
ROWS = tuple(_rows())
