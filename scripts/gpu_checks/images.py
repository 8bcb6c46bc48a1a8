"""Images per second compiled and not, images that don't depend on the others of their chunk, and scoring."""

import statistics
import time
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from benchmarks import scoring
from benchmarks.pairs import make_caption

from gpu_checks.context import Context, forget_accelerator
from gpu_checks.rows import Finding, Row, at_least, equal
from xdpo.compute import precision_of
from xdpo.config import ComputeConfig
from xdpo.families import load_parts, pipeline_with
from xdpo.sampling.images import prepare_pipeline, sample_chunk
from xdpo.sampling.settings import SamplingSettings

CHUNK = 4
SCORING_OVERHEAD = 1.1


@dataclass(frozen=True)
class Sampled:
    """Speed of sampling, and how many pixels of two images changed when the others of their chunk did."""

    images_per_second: float
    changed_pixels: int


def sample(context: Context, compiled: bool) -> Sampled:
    def measure() -> Sampled:
        forget_accelerator()
        settings = SamplingSettings(
            num_inference_steps=context.size.sampler_steps,
            image_size=context.size.resolution,
            precision=precision_of(ComputeConfig()),
            compile=compiled,
            batch_size=CHUNK,
        )
        parts = load_parts(context.settings().model)
        pipeline = prepare_pipeline(pipeline_with(parts, parts.denoiser), settings, context.device)
        rng = np.random.default_rng(0)
        prompts, seeds = [make_caption(rng) for _ in range(CHUNK)], list(range(CHUNK))
        images = sample_chunk(pipeline, prompts, seeds, settings)  # warms up, and compiles
        started = time.perf_counter()
        for _ in range(context.size.rounds):
            sample_chunk(pipeline, prompts, seeds, settings)  # images on the CPU: it has waited for the device
        seconds = time.perf_counter() - started
        padded = sample_chunk(pipeline, prompts[:2], seeds[:2], settings)
        changed = sum(
            int((np.asarray(one) != np.asarray(other)).sum()) for one, other in zip(images, padded, strict=False)
        )
        return Sampled(context.size.rounds * CHUNK / seconds, changed)

    def within() -> Sampled:
        with context.compiling() if compiled else nullcontext():
            return measure()

    return context.share(("sampled", compiled), within)


def check_images_per_second(context: Context) -> Finding:
    plain, compiled = sample(context, False).images_per_second, sample(context, True).images_per_second
    return at_least(compiled, plain, "generate.py without --compile", judged=context.is_judged)


def check_chunks(context: Context, compiled: bool) -> Finding:
    changed = sample(context, compiled).changed_pixels
    return equal(changed, 0, "--batch-size 1, or without --compile" if compiled else "--batch-size 1")


def check_scoring(context: Context) -> Finding:
    """A scorer's images per second beside bare decoding and forward passes, on a CLIP of ViT-B/32's size."""
    forget_accelerator()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    size = context.size
    options = Namespace(
        images=size.scored_images,
        batch_size=min(16, size.scored_images),
        rounds=size.rounds,
        device=context.device.type,
    )
    seconds = scoring.run(options).measurements["seconds_per_round"]
    ours, bare = (size.scored_images / statistics.median(seconds[name]) for name in (scoring.OURS, scoring.BARE))
    remedy = "more cores: decoding and resizing take the time"
    return at_least(ours, bare / SCORING_OVERHEAD, remedy, judged=context.is_judged)


ROWS = (
    Row("images/s compiled, those uncompiled", check_images_per_second),
    Row("pixels that depend on a chunk's other images", partial(check_chunks, compiled=False)),
    Row("pixels that depend on a chunk's other images, compiled", partial(check_chunks, compiled=True)),
    Row(f"images/s scored, those of bare decoding and networks / {SCORING_OVERHEAD}", check_scoring),
)
