"""Sampling: one CPU generator per image, and chunks of one fixed size.

Kernels round differently at different batch sizes and at different slots of a batch. Therefore the whole prompt list is
cut into chunks before they are shared out, and the last chunk is padded. Processes take whole chunks, and an
interrupted run repeats whole chunks.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from xdpo.families import choices_of_loaded, family_of_loaded
from xdpo.prompts import Prompt
from xdpo.sampling.settings import SCHEDULERS, SamplingSettings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEED_STRIDE = 1_000_000  # between the images of one prompt: more than any set has prompts
SEED_LIMIT = 2**32  # torch's CPU generator uses no more bits of a seed


@dataclass(frozen=True)
class ImageTask:
    """One image to make: number `number` of its prompt, from 0, with its seed and its file in the set's folder."""

    prompt: Prompt
    number: int
    seed: int
    file: str


def plan_chunks(
    prompts: Sequence[Prompt], images_per_prompt: int, seed: int, batch_size: int, suffix: str
) -> list[list[ImageTask]]:
    """Every image of a list of prompts, in chunks of batch_size.

    All first images come first, so that more images per prompt or a longer list move no image to another slot of its
    chunk. Image k of the prompt at position p has seed + p + k · 1,000,000. Raises ValueError if that exceeds 32 bits.
    """
    last = seed + max(prompt.position for prompt in prompts) + (images_per_prompt - 1) * SEED_STRIDE
    if seed < 0 or last >= SEED_LIMIT:
        raise ValueError(f"seeds must lie between 0 and 2³² − 1; these would go from {seed} to {last}")
    chunks = []
    for number in range(images_per_prompt):
        ending = f"_{number}{suffix}" if number else suffix
        tasks = [
            ImageTask(
                prompt,
                number,
                seed + prompt.position + number * SEED_STRIDE,
                f"{prompt.folder}/{prompt.index:05d}{ending}",
            )
            for prompt in prompts
        ]
        chunks += [tasks[start : start + batch_size] for start in range(0, len(tasks), batch_size)]
    return chunks


def prepare_pipeline(
    pipeline: "DiffusionPipeline", settings: SamplingSettings, device: torch.device
) -> "DiffusionPipeline":
    """Move a pipeline to its device and precision, set its scheduler, and compile its denoiser if the settings say so.

    Raises ValueError for more steps than the scheduler has timesteps.
    """
    import diffusers

    if settings.scheduler != "pipeline":
        name, options = SCHEDULERS[settings.scheduler]
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **options)
    if settings.num_inference_steps > (most := pipeline.scheduler.config.num_train_timesteps):
        raise ValueError(
            f"{settings.num_inference_steps} sampling steps are more than the {most} timesteps that the model was "
            "trained on; use fewer"
        )
    pipeline.to(device, DTYPES[settings.precision])
    if device.type == "cuda":
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means float32
    if settings.compile:
        getattr(pipeline, family_of_loaded(pipeline).denoiser).compile(fullgraph=True, dynamic=False)  # one chunk size
    return pipeline


def is_truncated(pipeline: "DiffusionPipeline", text: str) -> bool:
    """Whether a text encoder won't see a prompt's end: SD 1.5 reads 77 tokens, two of which mark start and end."""
    family = family_of_loaded(pipeline)
    tokenizers = {name: getattr(pipeline, name) for name in family.tokenizers}
    return family.tokenize(tokenizers, choices_of_loaded(pipeline), text)[1]


class NotFiniteError(ValueError):
    """Sampled latents or pixels are not finite, so there is no image. The message names prompts and precision."""


def sample_chunk(
    pipeline: "DiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    batch_size: int | None = None,
) -> list[Image.Image]:
    """Sample one image per prompt in one batch of `batch_size`, padded with the last prompt if there are fewer.

    Raises NotFiniteError where latents or pixels are not finite.
    """
    images, faults = _sample(pipeline, prompts, seeds, settings, batch_size or settings.batch_size)
    if bad := [(prompt, fault) for prompt, fault in zip(prompts, faults, strict=True) if fault]:
        prompt, fault = bad[0]
        advice = (
            "the model's weights hold numbers that are not finite, or are too large"
            if settings.precision == "fp32"
            else f"{settings.precision} may be too narrow for this model: try --precision fp32"
        )
        raise NotFiniteError(
            f"{len(bad)} of {len(prompts)} images sampled at once are none: the {fault} of {prompt!r} are not finite "
            f"numbers, in {settings.precision}; {advice}"
        )
    return images


@torch.no_grad()
def _sample(
    pipeline: "DiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    size: int,
) -> tuple[list[Image.Image], list[str]]:
    """One image per prompt, and its part that is not finite: "latents", "pixels" or "". Waits for the device once."""
    assert 0 < len(prompts) == len(seeds) <= size, "a chunk has one seed per prompt and no more than fit a batch"
    padding, family = size - len(prompts), family_of_loaded(pipeline)
    latents = pipeline(
        [*prompts, *[prompts[-1]] * padding],
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in [*seeds, *[seeds[-1]] * padding]],
        height=settings.image_size,
        width=settings.image_size,
        output_type="latent",  # decoded here; the pipeline would hide infinite values by clamping them to white
        **family.sampling_arguments(choices_of_loaded(pipeline)),
    ).images
    pixels = family.decode(pipeline, latents)
    finite = torch.stack([tensors.isfinite().flatten(1).all(1) for tensors in (latents, pixels)]).tolist()
    faults = [("" if pixel else "pixels") if latent else "latents" for latent, pixel in zip(*finite, strict=True)]
    images = pipeline.image_processor.postprocess(pixels.nan_to_num(), "pil", [True] * size)
    return images[: len(prompts)], faults[: len(prompts)]


def sample_images(
    pipeline: "DiffusionPipeline",
    prompts: Sequence[str],
    *,
    seed: int,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    image_size: int | None = None,
    chunk_size: int = 4,
) -> list[Image.Image]:
    """Sample one image per prompt with a family's pipeline as it is; image i uses seed `seed + i`.

    This is for samples during training, which a bad image must not end: images that aren't finite are reported on the
    console.
    """
    settings = SamplingSettings(
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        image_size=image_size,
        batch_size=chunk_size,
    )
    images: list[Image.Image] = []
    faults: list[str] = []
    for start in range(0, len(prompts), chunk_size):
        chunk = list(prompts[start : start + chunk_size])
        seeds = range(seed + start, seed + start + len(chunk))
        new_images, new_faults = _sample(pipeline, chunk, seeds, settings, chunk_size)
        images += new_images
        faults += new_faults
    if bad := [f"{fault} of {prompt!r}" for prompt, fault in zip(prompts, faults, strict=True) if fault]:
        print(f"note: {len(bad)} of {len(prompts)} sample images are not finite: {', '.join(bad)}", file=sys.stderr)
    return images
