"""Pairs per second that the loader delivers from each kind of source and from the example cache, in turn.

Files and cache are in the system's memory after the warm-up round. The cache's records have the pipeline's sizes;
"thin" is a nearly empty pipeline whose latents and text states are as large as Stable Diffusion 1.5's.
"""

import argparse
from collections.abc import Callable

from benchmarks.arguments import add_number, add_pipeline
from benchmarks.folders import working_folder
from benchmarks.modes import BASE_CONFIG, call
from benchmarks.pairs import WRITERS, make_pairs
from benchmarks.pipelines import pipeline_folder
from benchmarks.results import Criterion, Outcome, Spread, time_in_turn
from xdpo.compute import build_accelerator
from xdpo.config import Config, load_config
from xdpo.data import Split, StepSampler, make_loader
from xdpo.families import load_parts
from xdpo.precompute import make_dataset, open_pairs
from xdpo.report.grids import Cell, Grid

CACHE = "example cache"
CACHE_EPOCHS = 16  # of the pairs in one of its rounds: one alone is over too soon to be timed
PAIRS_PER_SECOND = 2000  # of a reader process from a warm cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser, "thin")
    add_number(parser, "--pairs", 128, "pairs in each source")
    add_number(parser, "--image-side", 768, "of the encoded images, in pixels")
    add_number(parser, "--resolution", 512, "of the training, in pixels")
    add_number(parser, "--micro-batch", 4, "pairs in a batch")
    parser.add_argument("--workers", nargs="+", type=int, default=[0], help="loading processes; 0: this one (default)")
    add_number(parser, "--rounds", 5, "rounds")


def run(options: argparse.Namespace) -> Outcome:
    if options.pairs % options.micro_batch:
        raise ValueError(f"--pairs {options.pairs} is no multiple of --micro-batch {options.micro_batch}")
    with working_folder() as working:
        pipeline = pipeline_folder(options.pipeline, working)
        pairs = make_pairs(options.pairs, options.image_side)
        common = [
            f"output_dir={working / 'run'}",
            f"model.pipeline={pipeline}",
            f"data.resolution={options.resolution}",
            f"train.micro_batch_pairs={options.micro_batch}",
            f"train.total_batch_pairs={options.pairs}",
            "eval.every=0",
            "log.trackers=[]",
        ]
        overrides = {
            source: [*common, f"data.source={source}", f"data.path={write(working / source, pairs)}"]
            for source, write in WRITERS.items()
        }
        overrides[CACHE] = [*overrides["parquet"], f"cache.examples={working / 'cache'}"]
        call("scripts/cache_examples.py", "--config", str(BASE_CONFIG), *overrides[CACHE])
        jobs = {}
        for workers in options.workers:
            for source, own in overrides.items():
                settings = load_config(BASE_CONFIG, [*own, f"data.num_workers={workers}"])
                jobs[source, workers] = loading_job(settings, epochs=CACHE_EPOCHS if source == CACHE else 1)
        seconds = time_in_turn(jobs, options.rounds)
    return summarise(options, seconds)


def loading_job(settings: Config, epochs: int) -> Callable[[], None]:
    """Load all pairs `epochs` times with the training's loader; every call continues where the last one ended."""
    accelerator = build_accelerator(settings)
    tokenize = load_parts(settings.model, encoders=False).tokenize
    dataset = make_dataset(open_pairs(settings, accelerator, Split.TRAIN), tokenize, settings, Split.TRAIN)
    total, size = settings.train.total_batch_pairs, settings.train.micro_batch_pairs
    sampler = StepSampler(start_step=0, total_batch_pairs=total, micro_batch_pairs=size)
    batches = iter(make_loader(dataset, sampler, num_workers=settings.data.num_workers))

    def load() -> None:
        for _ in range(epochs * total // size):
            next(batches)

    return load


def summarise(options: argparse.Namespace, seconds: dict[tuple[str, int], list[float]]) -> Outcome:
    rows, criteria, rounds = [], [], {}
    for (source, workers), times in seconds.items():
        pairs = options.pairs * (CACHE_EPOCHS if source == CACHE else 1)
        speed = Spread.of([pairs / value for value in times])
        rows.append((Cell(source), Cell(str(workers)), speed.cell()))
        rounds.setdefault(source, {})[workers] = {"pairs_per_round": pairs, "seconds_per_round": times}
        if source == CACHE and workers == 0:
            claim = f"one process reads at least {PAIRS_PER_SECOND} pairs/s from a warm cache"
            criteria.append(Criterion(claim, speed.median, speed.median >= PAIRS_PER_SECOND))
    title = (
        f"Loading at {options.resolution} pixels from JPEGs of {options.image_side}, {options.micro_batch} pairs a "
        f"batch; median of {options.rounds} rounds (lowest–highest)"
    )
    return Outcome(Grid(title, ("source", "workers", "pairs/s"), tuple(rows)), rounds, tuple(criteria))
