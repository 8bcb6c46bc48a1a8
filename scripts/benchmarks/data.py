"""Time and memory of the way from a large source to its batches: index, plan, cache, first batch, resume at the end.

The source is made up: parquet files in Pick-a-Pic's columns whose images are a few pixels, each in two pairs, with a
caption for every 17 pairs. The cache's records are zeros, which no network encoded. Every row of the table is a process
of its own, measured from after the libraries' import. Linux only.
"""

import argparse
import gc
import io
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.arguments import add_number
from benchmarks.folders import working_folder
from benchmarks.modes import BASE_CONFIG
from benchmarks.pipelines import pipeline_folder
from benchmarks.results import Criterion, Outcome
from xdpo.compute import build_accelerator
from xdpo.config import Config, load_config
from xdpo.data import Split, StepSampler, load_pairs, make_loader
from xdpo.families import load_parts
from xdpo.precompute import examples_folder, make_dataset, open_pairs
from xdpo.precompute.build import begin
from xdpo.report.grids import Cell, Grid

PAIRS_OF_A_CAPTION = 17  # as in Pick-a-Pic v2
CACHE_FILES = 450  # of latents: as many as a cache of Pick-a-Pic v2 has
RESOLUTION = 16
OPENING = "opening the cache"
MEGABYTE = 1e6
MOST_SECONDS, MOST_MEMORY = 3.0, 500.0  # s, MB: of opening a cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_number(parser, "--rows", 1_000_000, "rows of the source")
    add_number(parser, "--files", 100, "files of the source")
    add_number(parser, "--image-bytes", 100, "bytes of each image's file")
    add_number(parser, "--workers", 2, "loading processes")
    add_number(parser, "--micro-batch", 4, "pairs in a batch")


def run(options: argparse.Namespace) -> Outcome:
    with working_folder() as working:
        write_source(working / "pairs", options.rows, options.files, options.image_bytes)
        keys = {
            "output_dir": working / "run",
            "model.pipeline": pipeline_folder("tiny", working),
            "data.source": "parquet",
            "data.path": working / "pairs",
            "data.resolution": RESOLUTION,
            "data.num_workers": options.workers,
            "data.horizontal_flip": "false",
            "data.sample_latents": "false",
            "train.micro_batch_pairs": options.micro_batch,
            "train.total_batch_pairs": options.micro_batch,
            "eval.every": 0,
            "log.trackers": "[]",
        }
        source = [f"{key}={value}" for key, value in keys.items()]
        cache = [*source, f"cache.examples={working / 'cache'}"]
        jobs = {
            "index of a new source": (index, source),
            "opening the source, fingerprint": (index, source),
            "first batch from the source": (first_batch, source),
            "resume at the end of the source": (last_batch, source),
            "plan of a cache": (plan, cache),
            OPENING: (open_cache, cache),
            "first batch from the cache": (first_batch, cache),
            "resume at the end of the cache": (last_batch, cache),
        }
        measured = {}
        for name, (job, overrides) in jobs.items():
            measured[name] = apart(job, overrides)
            if job is plan:
                apart(fill, overrides)
    return summarise(options, measured)


def write_source(folder: Path, rows: int, files: int, image_bytes: int) -> None:
    """Parquet files, in row groups of 1,000 rows, or of 16 MB of a side's images.

    Image n is at side 0 of pair n and at side 1 of the pair before.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "lime").save(buffer, "PNG")
    image = buffer.getvalue()  # what follows it is ignored
    image += np.random.default_rng(0).bytes(max(0, image_bytes - len(image)))
    group = max(1, min(1000, 16_000_000 // image_bytes))
    folder.mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(rows), files)):
        images = {
            name: [f"image {place % rows}" for place in (part + side).tolist()]
            for side, name in enumerate(("image_0_uid", "image_1_uid"))
        }
        content = {
            "jpg_0": [image + name.encode() for name in images["image_0_uid"]],
            "jpg_1": [image + name.encode() for name in images["image_1_uid"]],
            "label_0": (part % 2).astype(np.float64),
            "label_1": (1 - part % 2).astype(np.float64),
            "caption": [
                f"a photo of castle {row // PAIRS_OF_A_CAPTION} on the moon, digital art" for row in part.tolist()
            ],
            "ranking_id": part,
            **images,
        }
        pq.write_table(pa.table(content), folder / f"train-{number:05d}.parquet", row_group_size=group)


# --- what is measured: prepares, and returns the job ------------------------------------------------------


def index(settings: Config) -> Callable[[], Any]:
    def job() -> Any:
        table = load_pairs(settings.data, in_order=True)
        return table, table.fingerprint

    return job


def plan(settings: Config) -> Callable[[], Any]:
    """Which images and captions are distinct, written as a cache's tables."""
    parts = load_parts(settings.model)
    folder = examples_folder(settings, Split.TRAIN)

    def job() -> Any:
        table = load_pairs(settings.data, in_order=True)
        record_bytes = 2 * int(np.prod(parts.latent_shape(RESOLUTION)))
        shard_bytes = record_bytes * -(-len(table) // CACHE_FILES)
        return begin(folder, table, parts, settings, Split.TRAIN, shard_bytes=shard_bytes)

    return job


def fill(settings: Config) -> Callable[[], Any]:
    """The records of a planned cache: zeros."""
    from xdpo.cache.examples import ExamplePlan, finish

    def job() -> None:
        folder = examples_folder(settings, Split.TRAIN)
        planned = ExamplePlan.load(folder)
        assert planned is not None
        for shards in planned.shards(folder):
            for shard in range(len(shards)):
                shards.write(shard, np.zeros((len(shards.records_of(shard)), *shards.shape), shards.dtype))
        finish(folder, planned)

    return job


def open_cache(settings: Config) -> Callable[[], Any]:
    accelerator = build_accelerator(settings)
    return lambda: open_pairs(settings, accelerator, Split.TRAIN)


def first_batch(settings: Config) -> Callable[[], Any]:
    return batch_from(settings, step=0)


def last_batch(settings: Config) -> Callable[[], Any]:
    """As a run does that resumes at the end of its first epoch."""
    return batch_from(settings, step=None)


def batch_from(settings: Config, step: int | None) -> Callable[[], Any]:
    accelerator = build_accelerator(settings)
    tokenize = load_parts(settings.model, encoders=False).tokenize
    dataset = make_dataset(open_pairs(settings, accelerator, Split.TRAIN), tokenize, settings, Split.TRAIN)
    size = settings.train.micro_batch_pairs
    start = len(dataset) // size - 1 if step is None else step

    def job() -> Any:
        sampler = StepSampler(start_step=start, total_batch_pairs=size, micro_batch_pairs=size)
        batches = iter(make_loader(dataset, sampler, num_workers=settings.data.num_workers))
        return batches, next(batches)

    return job


# --- measuring -----------------------------------------------------------------------------------------


def apart(prepare: Callable[[Config], Callable[[], Any]], overrides: list[str]) -> dict[str, float]:
    """A job's measures in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, prepare, overrides).result()


def measure(prepare: Callable[[Config], Callable[[], Any]], overrides: list[str]) -> dict[str, float]:
    """Seconds; MB of this process above what it had before, at its peak; of each worker's own; its open files."""
    import datasets  # noqa: F401 - they count as loaded
    import pyarrow.parquet  # noqa: F401

    multiprocessing.set_start_method("fork", force=True)  # of workers, as in training; this process was spawned
    job = prepare(load_config(BASE_CONFIG, overrides))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = _of_status("VmRSS"), time.perf_counter()
    result = job()
    seconds = time.perf_counter() - started
    peak = _of_status("VmHWM") - before
    workers = [str(process.pid) for process in multiprocessing.active_children()]
    measured = {
        "seconds": seconds,
        "peak": peak,
        "worker": max(map(_own_memory, workers), default=0.0),
        "files": max(len(os.listdir(f"/proc/{pid}/fd")) for pid in (workers or ["self"])),
    }
    del result
    return measured


def _of_status(name: str) -> float:
    """MB, from the system's status of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024 / MEGABYTE


def _own_memory(pid: str) -> float:
    """MB that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / MEGABYTE


def summarise(options: argparse.Namespace, measured: dict[str, dict[str, float]]) -> Outcome:
    rows = tuple(
        (
            Cell(name),
            Cell(f"{each['seconds']:.2f}"),
            Cell(f"{each['peak']:.0f}"),
            Cell(f"{each['worker']:.0f}" if each["worker"] else "–"),
            Cell(f"{each['files']:.0f}"),
        )
        for name, each in measured.items()
    )
    opening, batch = measured[OPENING], measured["first batch from the cache"]
    memory = opening["peak"] + options.workers * batch["worker"]
    criteria = (
        Criterion(
            f"opening a cache takes at most {MOST_SECONDS:g} s", opening["seconds"], opening["seconds"] <= MOST_SECONDS
        ),
        Criterion(
            f"its {options.workers} workers and the process that opened it take at most {MOST_MEMORY:g} MB for it",
            memory,
            memory <= MOST_MEMORY,
        ),
    )
    images = f"images of {options.image_bytes:,} bytes"
    title = f"{options.rows:,} rows in {options.files} files, {images}, {options.workers} workers"
    columns = ("what", "seconds", "MB at the peak", "MB of each worker alone", "open files")
    return Outcome(Grid(title, columns, rows), measured, criteria)
