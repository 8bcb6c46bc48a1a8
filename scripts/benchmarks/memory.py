"""Peak memory of train_xdpo.py: measured in a process for each mode, or with --count counted for a GPU.

Measured: two optimizer steps of one micro-batch, on random weights that are built for it. On a CPU it is the process's
resident memory, on a GPU what is allocated there. At the true size the working folder takes 18 GB of disk for a while:
the pipeline, a checkpoint and the exported model.

    python scripts/benchmark.py memory --count configs/xdpo_sd15.yaml --processes 2
    python scripts/benchmark.py memory --count configs/*.yaml --grid train.micro_batch_pairs=1,2,4

Counted: what lies on one GPU of a training under these configs, op by op on tensors without contents, in every phase of
it. It takes half a minute for each config and no memory to speak of. Not counted are CUDA's context and libraries
(about 0.5 GB), NCCL's buffers (0.1 to 0.3 GB), workspaces of kernels, and what the allocator loses to fragments.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.arguments import add_number, add_overrides, add_pipeline
from benchmarks.folders import working_folder
from benchmarks.modes import BASE_CONFIG, MODES, Bench, Mode, set_up
from benchmarks.pipelines import PIPELINES
from benchmarks.results import Criterion, Outcome
from benchmarks.true_models import COUNTABLE
from xdpo.arguments import positive
from xdpo.config import load_config
from xdpo.paths import user_path
from xdpo.report.grids import Cell, Grid

PAIRS = 4
LIMIT_GB = 20.5  # of the 24.6 GB or so that can be allocated on a 24 GB card; the rest is for what is not counted
STEP = ("encoding", "forward", "backward", "update")  # phases of an optimizer step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser, "sd15")
    add_number(parser, "--resolution", 256, "side of the images in pixels, where it is measured")
    add_number(parser, "--micro-batch", 1, "pairs in one pass, where it is measured")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["full", "full-cached", "lora", "lora-cached"])
    parser.add_argument("--count", nargs="+", type=user_path, metavar="CONFIG", help="count for these configs")
    parser.add_argument(
        "--processes", nargs="+", type=positive, default=[1], help="GPUs of the run that is counted (default: 1)"
    )
    parser.add_argument(
        "--grid", nargs="+", type=_values, default=[], metavar="KEY=V,V,…", help="count each with each of these"
    )
    add_overrides(parser)


def run(options: argparse.Namespace) -> Outcome:
    return count(options) if options.count else measure(options)


def measure(options: argparse.Namespace) -> Outcome:
    """Every mode's measured peak, with its counted one where the pipeline's shapes are known here.

    The program's own memory is that of the same training with nearly no weights, minus what is counted for it.
    """
    known = options.pipeline in PIPELINES
    pipelines = [options.pipeline, *(["thin"] if known else [])]
    peaks, counted = {}, {}
    with working_folder() as working:
        benches = {pipeline: _set_up(working / pipeline.replace("/", "-"), pipeline, options) for pipeline in pipelines}
        for pipeline, bench in benches.items():
            for name in options.modes:
                peaks[pipeline, name] = bench.train_peak_memory_gb(MODES[name], options.micro_batch)
        if known:  # last: what this process holds would count as the peak of those that it starts
            for pipeline, bench in benches.items():
                for name in options.modes:
                    counted[pipeline, name] = _counted_gb(bench, pipeline, MODES[name], options.micro_batch)
    rows, criteria = [], []
    for name in options.modes:
        key = options.pipeline, name
        cells = [Cell(str(MODES[name])), Cell(f"{peaks[key]:.2f}", peaks[key])]
        if known:
            alone = peaks["thin", name] - counted["thin", name]
            ratio = (peaks[key] - alone) / counted[key]
            cells += [Cell(f"{value:.2f}", value) for value in (alone, counted[key], ratio)]
            claim = f"measured, less the program alone, and counted differ by at most 10 % ({MODES[name]})"
            criteria.append(Criterion(claim, ratio, abs(ratio - 1) <= 0.1))
        rows.append(tuple(cells))
    title = (
        f"Peak memory of training, {options.pipeline} at {options.resolution} pixels, micro-batch {options.micro_batch}"
    )
    columns = ("mode", "GB", "the program alone", "counted", "(GB − program) / counted")
    measurements = {
        "peak_memory_gb": {name: peaks[options.pipeline, name] for name in options.modes},
        "counted_gb": {name: gigabytes for (pipeline, name), gigabytes in counted.items() if pipeline != "thin"},
    }
    return Outcome(Grid(title, columns[: len(rows[0])], tuple(rows)), measurements, tuple(criteria))


def _set_up(working: Path, pipeline: str, options: argparse.Namespace) -> Bench:
    """Make the pairs and the pipeline, and the caches if a mode reads them."""
    working.mkdir()
    bench = set_up(working, pipeline, resolution=options.resolution, num_pairs=PAIRS, extra=options.overrides)
    if any(MODES[name].examples for name in options.modes):
        bench.fill_caches(options.micro_batch, 2 * options.micro_batch)
    return bench


def _counted_gb(bench: Bench, pipeline: str, mode: Mode, micro_batch: int) -> float:
    """The highest peak of the phases that `train_peak_memory_gb` runs, in this machine's precision."""
    from benchmarks import counting

    overrides = bench.overrides(mode, micro_batch=micro_batch, total_batch=micro_batch, max_steps=2)
    if not torch.accelerator.is_available():
        overrides.append("compute.precision=fp32")
    phases = counting.count_apart(load_config(BASE_CONFIG, overrides), pipeline)
    return max(phases[name].peak for name in STEP) / 1e9


def count(options: argparse.Namespace) -> Outcome:
    """A row for every config, number of processes and choice of the grid; if there is only one, a row for each phase.

    Configs that need the same memory share a row. Raises ValueError for a pipeline whose shapes are not known here.
    """
    from benchmarks import counting

    if options.pipeline not in COUNTABLE:
        raise ValueError(f"--count knows the shapes of {', '.join(COUNTABLE)} and not of {options.pipeline!r}")
    grid = [[f"{key}={value}" for value in values] for key, values in options.grid]
    names: dict[tuple, list[str]] = {}  # of the configs that count alike, by what the count depends on
    jobs = {}
    for config, processes, chosen in itertools.product(options.count, options.processes, itertools.product(*grid)):
        settings = load_config(config, [*options.overrides, *chosen])
        key = (counting.shape_of(settings, processes), processes)
        names.setdefault(key, []).append(" ".join([config.stem, *chosen]))
        jobs.setdefault(key, settings)
    for name in sorted({name for settings in jobs.values() for name in counting.uncounted_scorers(settings)}):
        print(f"note: the scorer {name} is not counted: its shapes are not known here", file=sys.stderr)
    counted = {}
    for key, settings in jobs.items():
        label = ", ".join(names[key])
        counted[label, key[1]] = counting.count_apart(settings, options.pipeline, key[1])
    ((label, processes), phases), *others = counted.items()
    table = _rows_table(options.pipeline, counted) if others else _phases_table(label, processes, phases)
    criteria = []
    for (label, processes), phases in counted.items():
        peak = max(phase.peak for phase in phases.values()) / 1e9
        claim = f"{label} on {_gpus(processes)} takes at most {LIMIT_GB} GB at any moment"
        criteria.append(Criterion(claim, peak, peak <= LIMIT_GB))
    measurements = [
        {"configs": label, "processes": processes, "bytes": {name: asdict(phase) for name, phase in phases.items()}}
        for (label, processes), phases in counted.items()
    ]
    return Outcome(table, {"counted": measurements}, tuple(criteria))


def _phases_table(label: str, processes: int, phases: dict) -> Grid:
    rows = [
        (Cell(name), _gigabytes(phase.at_rest), _gigabytes(phase.peak), Cell(phase.op))
        for name, phase in phases.items()
    ]
    highest = max(phases.values(), key=lambda phase: phase.peak)
    rows.append((Cell("any moment"), Cell(""), _gigabytes(highest.peak), Cell(highest.op)))
    title = f"Bytes on one GPU of {processes}, counted: {label}"
    return Grid(title, ("phase", "GB left after it", "peak GB", "at the op"), tuple(rows))


def _rows_table(pipeline: str, counted: dict) -> Grid:
    others = ("start", "evaluation", "samples", "self-play", "online", "save", "resume")
    present = {name for phases in counted.values() for name in phases}
    columns = tuple(name for name in others if name in present)
    rows = []
    for (label, processes), phases in counted.items():
        step = max(phases[name].peak for name in STEP)
        highest = max(phases, key=lambda name: phases[name].peak)
        cells = [_gigabytes(phases[name].peak) if name in phases else Cell("") for name in columns]
        rows.append(
            (
                Cell(label),
                Cell(str(processes)),
                cells[0],
                _gigabytes(step),
                *cells[1:],
                _gigabytes(phases[highest].peak),
                Cell(highest),
            )
        )
    title = f"Peak GB on one GPU by phase, {pipeline}, counted"
    return Grid(title, ("config", "GPUs", "start", "step", *columns[1:], "any moment", "in"), tuple(rows))


def _gigabytes(size: int) -> Cell:
    return Cell(f"{size / 1e9:.2f}", size / 1e9)


def _gpus(processes: int) -> str:
    return "1 GPU" if processes == 1 else f"each of {processes} GPUs"


def _values(text: str) -> tuple[str, Sequence[str]]:
    """`key=value,value,…`, for argparse."""
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE,VALUE,…, got {text!r}")
    return key, values.split(",")
