"""Generate the images of prompt sets: check their folders, share out the work, save and record the images."""

import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from PIL import Image

from xdpo import models, processes
from xdpo.images import folder as image_folder
from xdpo.images.manifest import ManifestRow
from xdpo.progress import Progress
from xdpo.prompts import PromptSet
from xdpo.sampling import images as sampling
from xdpo.sampling.images import ImageTask
from xdpo.sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SAVING_THREADS = 4  # encoding a 512-pixel PNG takes some 80 ms; sequentially they would slow generation noticeably


@dataclass(frozen=True)
class Job:
    """The images of one prompt set: their folder, their chunks, and everything that decides their pixels.

    `identity` is everything that decides pixels, flat, as the folder keeps it. `quality` is for JPEGs.
    """

    prompt_set: PromptSet
    model: models.ResolvedModel
    settings: SamplingSettings
    quality: int
    folder: Path
    identity: dict
    chunks: list[list[ImageTask]]


def plan_job(
    prompt_set: PromptSet,
    model: models.ResolvedModel,
    settings: SamplingSettings,
    output: Path,
    *,
    images_per_prompt: int,
    format: str,
    quality: int,
) -> Job:
    """A job whose images go to `output`/{set}. format: png or jpg. Raises ValueError for seeds beyond 32 bits."""
    sections = {
        "model": model.identity,
        "prompts": {"set": prompt_set.name, "sha256": prompt_set.sha256, **prompt_set.selection},
        "sampling": asdict(settings),
        "file": {"format": format, "quality": quality if format == "jpg" else None},
    }
    flat = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    chunks = sampling.plan_chunks(
        prompt_set.prompts, images_per_prompt, settings.seed, settings.batch_size, f".{format}"
    )
    return Job(prompt_set, model, settings, quality, output / prompt_set.name, flat, chunks)


def make_missing_images(jobs: Sequence[Job], state: PartialState, allow_oom_halving: bool) -> None:
    """Load the model that all jobs share and make their missing images. Every process calls it.

    Raises ValueError for images that are not finite or if memory is short, StorageError if a folder fails.
    """
    # What is missing. One process collects the manifests and sends the others the finished files.
    finished: list[set[str]] = []
    if state.is_main_process:
        for job in jobs:
            facts = {"device": _device_name(state.device), "processes": state.num_processes}
            for difference in image_folder.open_image_folder(job.folder, job.identity, facts):
                if not difference.startswith("processes"):  # the number of processes changes nothing
                    print(f"note: {job.folder} was begun with another {difference}; last bits of pixels may differ")
            finished.append({row.file for row in image_folder.read_manifest(job.folder)})
    finished = processes.agree(finished)
    missing = [
        [chunk for chunk in job.chunks if any(task.file not in done for task in chunk)]
        for job, done in zip(jobs, finished, strict=True)
    ]

    # The model, and the images.
    if any(missing):
        _quieten_diffusers()
        with processes.one_first(state.is_main_process):
            pipeline = models.load_model(jobs[0].model, sampling.DTYPES[jobs[0].settings.precision])
        sampling.prepare_pipeline(pipeline, jobs[0].settings, state.device)
        for job, chunks, done in zip(jobs, missing, finished, strict=True):
            if state.is_main_process:
                print(_describe(job, chunks, done, pipeline))
            _make_images(job, chunks, done, pipeline, state, allow_oom_halving)
    processes.wait()
    if state.is_main_process:
        for job in jobs:
            rows = image_folder.collect_manifest(job.folder)
            print(f"{job.prompt_set.name}: {len(rows)} images in {job.folder}")
    processes.wait()


def _describe(job: Job, missing: list[list[ImageTask]], done: set[str], pipeline: "DiffusionPipeline") -> str:
    """A line on a prompt set: counts of prompts, of empty and truncated ones, of finished and of missing images."""
    prompts = job.prompt_set.prompts
    tasks = [task for chunk in job.chunks for task in chunk]
    to_do = sum(task.file not in done for task in tasks)
    truncated = sum(sampling.is_truncated(pipeline, prompt.text) for prompt in prompts)
    return (
        f"{job.prompt_set.name}: {len(prompts)} of {job.prompt_set.total} prompts, "
        f"{sum(not prompt.text.strip() for prompt in prompts)} empty, "
        f"{truncated} longer than the {pipeline.tokenizer.model_max_length} tokens that are read; "
        f"{len(tasks) - to_do} images are there, {to_do} to make in {len(missing)} chunk{'s' * (len(missing) != 1)}"
    )


def _make_images(
    job: Job,
    missing: list[list[ImageTask]],
    done: set[str],
    pipeline: "DiffusionPipeline",
    state: PartialState,
    allow_oom_halving: bool,
) -> None:
    """Make missing chunks until none is left; record each one once its images are on the disk."""
    batch_size = job.settings.batch_size
    before = [0, *itertools.accumulate(sum(task.file not in done for task in chunk) for chunk in missing)]
    progress = Progress(total=before[-1], desc=job.prompt_set.name, unit="image", disable=not state.is_main_process)
    with progress, ThreadPoolExecutor(SAVING_THREADS) as savers:
        for number in processes.deal(f"images/{job.folder}", range(len(missing))):
            progress.update(before[number] - progress.n)  # earlier ones are done, or another process is working on them
            chunk = missing[number]
            try:
                images, batch_size = _sample_fitting(pipeline, chunk, job.settings, batch_size, allow_oom_halving)
            except sampling.NotFiniteError as error:
                raise ValueError(
                    f"model {job.model.name!r}: {error}. Nothing of these is recorded as finished"
                ) from error
            new = [(task, image) for task, image in zip(chunk, images, strict=True) if task.file not in done]
            paths = [job.folder / task.file for task, _ in new]
            save = partial(image_folder.save_image, quality=job.quality)
            checksums = savers.map(save, paths, [image for _, image in new])
            rows = [
                _manifest_row(job, task, sampling.is_truncated(pipeline, task.prompt.text), batch_size, checksum)
                for (task, _), checksum in zip(new, checksums, strict=True)
            ]
            image_folder.record(job.folder, state.process_index, rows)
            progress.update(len(rows))
        progress.update(progress.total - progress.n)


def _manifest_row(job: Job, task: ImageTask, truncated: bool, batch_size: int, sha256: str) -> ManifestRow:
    return ManifestRow(
        file=task.file,
        category=task.prompt.category,
        index=task.prompt.index,
        position=task.prompt.position,
        image=task.number,
        prompt=task.prompt.text,
        truncated=truncated,
        seed=task.seed,
        model=job.model.name,
        revision=job.model.revision or job.model.base_revision,
        settings=asdict(job.settings),
        set=job.prompt_set.name,
        batch_size=batch_size,
        sha256=sha256,
    )


def _sample_fitting(
    pipeline: "DiffusionPipeline",
    chunk: list[ImageTask],
    settings: SamplingSettings,
    batch_size: int,
    allow_halving: bool,
) -> tuple[list[Image.Image], int]:
    """The images of a chunk and their batch size, which is halved until it fits if that is allowed."""
    while True:
        try:
            images: list[Image.Image] = []
            for start in range(0, len(chunk), batch_size):
                batch = chunk[start : start + batch_size]
                texts, seeds = [task.prompt.text for task in batch], [task.seed for task in batch]
                images += sampling.sample_chunk(pipeline, texts, seeds, settings, batch_size)
            return images, batch_size
        except torch.OutOfMemoryError as error:
            if not allow_halving or batch_size == 1:
                raise ValueError(
                    f"out of memory with {batch_size} images at once: {str(error).splitlines()[0]}\n"
                    "Use a smaller --batch-size with another --output, or --precision bf16; --allow-oom-halving goes "
                    "on with smaller batches, whose pixels differ in the last bits"
                ) from error
        batch_size //= 2
        print(f"out of memory; going on with {batch_size} images at once", file=sys.stderr)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _quieten_diffusers() -> None:
    """Suppress diffusers' warnings on too long prompts, which are counted."""
    from diffusers.utils import logging

    logging.set_verbosity_error()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
