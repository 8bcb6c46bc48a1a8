"""Images per second of generate.py against a plain loop over the diffusers pipeline, in turn in one process.

Both load the pipeline from its folder, sample the same prompts from the same seeds in the same batches, and write PNGs;
both must give the same pixels. generate.py also checks its images and records them with checksums.
"""

import argparse
import io
import itertools
import runpy
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.arguments import add_number, add_pipeline
from benchmarks.folders import working_folder
from benchmarks.modes import ROOT
from benchmarks.pairs import make_caption
from benchmarks.pipelines import pipeline_folder
from benchmarks.results import Outcome, Spread, ratios, time_in_turn
from xdpo.report.grids import Cell, Grid

OURS, PLAIN = "generate.py", "plain loop"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser, "quarter")
    add_number(parser, "--images", 8, "images of a round")
    add_number(parser, "--image-size", 256, "in pixels")
    add_number(parser, "--batch-size", 4, "images at once")
    add_number(parser, "--steps", 20, "sampler steps")
    parser.add_argument("--guidance", type=float, default=7.5, help="default: 7.5")
    add_number(parser, "--rounds", 3, "rounds")


def run(options: argparse.Namespace) -> Outcome:
    if options.images % options.batch_size:
        raise ValueError(f"--images {options.images} is no multiple of --batch-size {options.batch_size}")
    with working_folder() as working:
        pipeline = pipeline_folder(options.pipeline, working)
        rng = np.random.default_rng(0)
        prompts = [make_caption(rng) for _ in range(options.images)]
        (working / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        generate = runpy.run_path(str(ROOT / "generate.py"))["main"]
        outputs = (working / f"images {number}" for number in itertools.count())
        made: dict[str, Path] = {}

        def ours() -> None:
            made[OURS] = next(outputs)
            run_generate(generate, pipeline, working / "prompts.txt", made[OURS], options)

        def plain() -> None:
            made[PLAIN] = next(outputs)
            run_plain_loop(pipeline, prompts, made[PLAIN], options)

        seconds = time_in_turn({OURS: ours, PLAIN: plain}, options.rounds)
        refuse_other_pixels(made[OURS], made[PLAIN])
    rows = [
        (Cell(name), Spread.of([options.images / value for value in times]).cell()) for name, times in seconds.items()
    ]
    ratio = ratios(seconds[OURS], seconds[PLAIN])
    title = (
        f"Sampling, {options.pipeline} at {options.image_size} pixels, {options.steps} steps, batches of "
        f"{options.batch_size}; median of {options.rounds} rounds (lowest–highest)"
    )
    note = f"time of generate.py over the plain loop's: {ratio}"
    measurements = {"seconds_per_round": seconds, "images_per_round": options.images, "time_ratio": ratio.median}
    return Outcome(Grid(title, ("", "images/s"), tuple(rows), note), measurements)


def run_generate(generate, pipeline: str, prompts: Path, output: Path, options: argparse.Namespace) -> None:
    """generate.py's main function, from the pipeline's folder to images on the disk. Raises ValueError if it fails."""
    arguments = {
        "--model": pipeline,
        "--prompts": prompts,
        "--output": output,
        "--image-size": options.image_size,
        "--batch-size": options.batch_size,
        "--steps": options.steps,
        "--guidance": options.guidance,
    }
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = generate([str(word) for argument in arguments.items() for word in argument])
    if status:
        raise ValueError(f"generate.py ended with status {status}:\n{said.getvalue()}")


@torch.no_grad()
def run_plain_loop(folder: str, prompts: list[str], output: Path, options: argparse.Namespace) -> None:
    """The loop that one would write without this project."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    output.mkdir()
    for start in range(0, len(prompts), options.batch_size):
        batch = prompts[start : start + options.batch_size]
        images = pipeline(
            batch,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=[torch.Generator("cpu").manual_seed(start + number) for number in range(len(batch))],
            height=options.image_size,
            width=options.image_size,
        ).images
        for number, image in enumerate(images, start):
            image.save(output / f"{number:05d}.png")


def refuse_other_pixels(ours: Path, plain: Path) -> None:
    """Raise ValueError where the two made different images, so that their times can't be compared."""
    pairs = zip(sorted(ours.rglob("*.png")), sorted(plain.rglob("*.png")), strict=True)
    for our_file, plain_file in pairs:
        with Image.open(our_file) as image, Image.open(plain_file) as other:
            if not np.array_equal(np.asarray(image), np.asarray(other)):
                raise ValueError(f"generate.py and the plain loop made different images: {our_file.name}")
