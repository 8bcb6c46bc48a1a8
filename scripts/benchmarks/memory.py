"""Peak memory of train_xdpo.py in each mode, a process for each, by default at Stable Diffusion 1.5's true size.

Two optimizer steps of one micro-batch, on random weights that are built for it. On a CPU it is the process's resident
memory, on a GPU what is allocated there. At the true size the working folder takes 18 GB of disk for a while: the
pipeline, a checkpoint and the exported model.
"""

import argparse

from benchmarks.arguments import add_number, add_overrides, add_pipeline
from benchmarks.folders import working_folder
from benchmarks.modes import MODES, set_up
from benchmarks.results import Outcome
from xdpo.report.grids import Cell, Grid

PAIRS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser, "sd15")
    add_number(parser, "--resolution", 256, "side of the images in pixels")
    add_number(parser, "--micro-batch", 1, "pairs in one pass")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["full", "full-cached", "lora", "lora-cached"])
    add_overrides(parser)


def run(options: argparse.Namespace) -> Outcome:
    with working_folder() as working:
        bench = set_up(
            working,
            options.pipeline,
            resolution=options.resolution,
            num_pairs=PAIRS,
            extra=options.overrides,
        )
        if any(MODES[name].examples for name in options.modes):
            bench.fill_caches(options.micro_batch, 2 * options.micro_batch)
        peaks = {name: bench.train_peak_memory_gb(MODES[name], options.micro_batch) for name in options.modes}
    rows = tuple((Cell(str(MODES[name])), Cell(f"{peak:.2f}", peak)) for name, peak in peaks.items())
    title = (
        f"Peak memory of training, {options.pipeline} at {options.resolution} pixels, micro-batch {options.micro_batch}"
    )
    return Outcome(Grid(title, ("mode", "GB"), rows), {"peak_memory_gb": peaks})
