"""Images for prompt sets from one model, the same on any number of processes.

    accelerate launch generate.py --model sd15 --prompts partiprompts hpsv2 --output images/sd15
    accelerate launch generate.py --model runs/xdpo_sd15 --prompts hpsv2 --output images/xdpo
    python generate.py grid --images images/sd15 images/xdpo --prompts paper_figures --output figures.png

The same command resumes: finished images are skipped. `generate.py grid --help` explains sheets side by side.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from xdpo import ending, files, models, processes, sampling
from xdpo.compute import check_compiler
from xdpo.data.images import UnreadableImageError, decode_rgb
from xdpo.paths import expanded, user_path
from xdpo.prompts import PROMPT_SETS, PromptSet, load_prompts
from xdpo.sampling import ImageTask, SamplingSettings

SAVING_THREADS = 4  # encoding a 512-pixel PNG takes some 80 ms, one after another they would be felt


@dataclass(frozen=True)
class Job:
    """The images of one prompt set: where they go, all of them in chunks, and everything that decides their pixels."""

    prompt_set: PromptSet
    folder: Path
    settings: dict
    chunks: list[list[ImageTask]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `generate.py` with its command-line arguments. Returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["grid"]:
            return grid(build_grid_parser().parse_args(arguments[1:]))
        return generate(build_parser().parse_args(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        required=True,
        type=expanded,
        help="a name or file of configs/models, a hub id, a pipeline folder, or a run of train_xdpo.py: its folder or "
        "one of its checkpoints",
    )
    replacing = model.add_mutually_exclusive_group()
    replacing.add_argument(
        "--unet", type=expanded, help="hub id or folder of a UNet that takes the place of the pipeline's"
    )
    replacing.add_argument("--lora", type=expanded, help="file, folder or hub id of LoRA weights on the pipeline")
    what = parser.add_argument_group("prompts and images")
    what.add_argument("--prompts", required=True, nargs="+", help=f"{', '.join(PROMPT_SETS)}, or files of your own")
    what.add_argument("--prompts-path", help="file or folder of the one set in --prompts, in place of the cache")
    what.add_argument("--limit", type=_positive, help="the first so many prompts")
    what.add_argument("--categories", nargs="+", default=(), help="only these categories or styles")
    what.add_argument("--sample", type=_positive, help="so many prompts at random")
    what.add_argument("--sample-seed", type=int, default=0, help="which ones (default: 0)")
    what.add_argument("--images-per-prompt", type=_positive, default=1, help="default: 1")
    what.add_argument("--output", required=True, type=user_path, help="images go to OUTPUT/SET/CATEGORY/00000.png")
    what.add_argument("--format", choices=("png", "jpg"), default="png", help="default: png")
    what.add_argument("--quality", type=int, default=75, help="of JPEGs; 75, Pillow's default, if not given")
    how = parser.add_argument_group("sampling")
    default = SamplingSettings()
    how.add_argument("--seed", type=int, default=default.seed, help="the prompt at position p starts from seed + p")
    how.add_argument("--steps", type=_positive, default=default.num_inference_steps, help="default: 50")
    how.add_argument("--guidance", type=float, default=default.guidance_scale, help="default: 7.5; 1: none")
    how.add_argument(
        "--scheduler",
        choices=("pipeline", *sampling.SCHEDULERS),
        default="pipeline",
        help="default: the pipeline's own",
    )
    how.add_argument("--image-size", type=_positive, help="in pixels; default: the pipeline's, 512 for SD 1.5")
    how.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32")
    how.add_argument("--compile", action="store_true", help="torch.compile of the whole UNet")
    how.add_argument(
        "--batch-size", type=_positive, default=default.batch_size, help="images at once; part of what decides pixels"
    )
    how.add_argument(
        "--allow-oom-halving",
        action="store_true",
        help="go on with half the batch size when memory is short, which changes the last bits of those images",
    )
    return parser


def build_grid_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="generate.py grid", description="Sheets side by side: models as columns, prompts as rows."
    )
    parser.add_argument(
        "--images", required=True, nargs="+", type=user_path, help="outputs of generate.py, one per model"
    )
    parser.add_argument("--titles", nargs="+", help="of the columns; default: the names of the folders")
    parser.add_argument("--prompts", required=True, help="name of the prompt set")
    parser.add_argument("--output", required=True, type=user_path, help="PNG or JPEG; further sheets get _2, _3, …")
    parser.add_argument("--categories", nargs="+", default=(), help="only these")
    parser.add_argument("--indices", nargs="+", type=int, help="only images of these numbers")
    parser.add_argument("--limit", type=_positive, help="the first so many prompts")
    parser.add_argument("--rows", type=_positive, default=6, help="prompts on a sheet (default: 6)")
    parser.add_argument("--cell", type=_positive, help="side of an image on the sheet, in pixels; default: its own")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


# --- images --------------------------------------------------------------------------------------------


def generate(options: argparse.Namespace) -> int:
    """Check everything that is cheap to check, load the model, make what is missing."""
    settings = build_settings(options)
    if options.prompts_path and len(options.prompts) != 1:
        raise ValueError(f"--prompts-path is for one set, but --prompts names {len(options.prompts)}")
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=processes.COLLECTIVE_TIMEOUT)
    if settings.precision == "fp16" and state.device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if settings.compile:
        check_compiler("--compile")
    processes.connect()
    with ending.together():
        return make_missing(options, settings, state)


def make_missing(options: argparse.Namespace, settings: SamplingSettings, state: PartialState) -> int:
    """Make the images that aren't there. Returns 0; every process calls it."""
    # Prompts, model, folders: all checked before any weight is loaded.
    with processes.one_first(state.is_main_process):  # it downloads, the others find it done
        prompt_sets = [
            load_prompts(
                name,
                path=options.prompts_path,
                limit=options.limit,
                categories=options.categories,
                sample=options.sample,
                sample_seed=options.sample_seed,
            )
            for name in options.prompts
        ]
        model = models.resolve_model(*models.read_model_spec(options.model, unet=options.unet, lora=options.lora))
    jobs = [build_job(prompt_set, model, settings, options) for prompt_set in prompt_sets]
    if len({job.folder for job in jobs}) < len(jobs):
        raise ValueError(f"--prompts names a set twice: {', '.join(options.prompts)}")
    for job in jobs:
        sampling.check_image_folder(job.folder, job.settings)
    processes.wait()

    with files.only_run([job.folder for job in jobs], "generate.py", is_main=state.is_main_process):
        make_images_of(jobs, model, settings, state, options)
    return 0


def make_images_of(
    jobs: Sequence["Job"],
    model: models.ResolvedModel,
    settings: SamplingSettings,
    state: PartialState,
    options: argparse.Namespace,
) -> None:
    """Load the model and make what is missing of all jobs; every process calls it."""
    # What is missing. One process collects the manifests, and says what is in them.
    finished: list[set[str]] = []
    if state.is_main_process:
        for job in jobs:
            facts = {"device": device_name(state.device), "processes": state.num_processes}
            for difference in sampling.open_image_folder(job.folder, job.settings, facts):
                if not difference.startswith("processes"):  # their number changes nothing
                    print(f"note: {job.folder} was begun with another {difference}; last bits of pixels may differ")
            finished.append({row["file"] for row in sampling.read_manifest(job.folder)})
    finished = processes.agree(finished)
    missing = [
        [chunk for chunk in job.chunks if any(task.file not in done for task in chunk)]
        for job, done in zip(jobs, finished, strict=True)
    ]

    # The model, and the images.
    if any(missing):
        quieten_diffusers()
        with processes.one_first(state.is_main_process):
            pipeline = models.load_model(model)
        sampling.prepare_pipeline(pipeline, settings, state.device)
        for job, chunks, done in zip(jobs, missing, finished, strict=True):
            if state.is_main_process:
                print(describe(job, chunks, done, pipeline.tokenizer))
            make_images(job, chunks, done, model, pipeline, settings, state, options)
    processes.wait()
    if state.is_main_process:
        for job in jobs:
            rows = sampling.collect_manifest(job.folder)
            print(f"{job.prompt_set.name}: {len(rows)} images in {job.folder}")
    processes.wait()


def build_settings(options: argparse.Namespace) -> SamplingSettings:
    if not 1 <= options.quality <= 100:
        raise ValueError(f"--quality must lie between 1 and 100, got {options.quality}")
    if not 0 <= options.guidance < float("inf"):
        raise ValueError(f"--guidance must be 0 or more, got {options.guidance}")
    if options.image_size is not None and options.image_size % 8:
        raise ValueError(f"--image-size must be a multiple of 8, got {options.image_size}")
    return SamplingSettings(
        seed=options.seed,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        scheduler=options.scheduler,
        image_size=options.image_size,
        precision=options.precision,
        compile=options.compile,
        batch_size=options.batch_size,
    )


def build_job(
    prompt_set: PromptSet, model: models.ResolvedModel, settings: SamplingSettings, options: argparse.Namespace
) -> Job:
    sections = {
        "model": model.identity,
        "prompts": {"set": prompt_set.name, "sha256": prompt_set.sha256, **prompt_set.selection},
        "sampling": asdict(settings),
        "file": {"format": options.format, "quality": options.quality if options.format == "jpg" else None},
    }
    flat = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    chunks = sampling.plan_chunks(
        prompt_set.prompts, options.images_per_prompt, settings.seed, settings.batch_size, f".{options.format}"
    )
    return Job(prompt_set, options.output / prompt_set.name, flat, chunks)


def describe(job: Job, missing: list[list[ImageTask]], done: set[str], tokenizer) -> str:
    """A line on a prompt set: how many prompts, how many of them odd, how many images are there and are not."""
    prompts = job.prompt_set.prompts
    tasks = [task for chunk in job.chunks for task in chunk]
    to_do = sum(task.file not in done for task in tasks)
    truncated = sum(sampling.is_truncated(tokenizer, prompt.text) for prompt in prompts)
    return (
        f"{job.prompt_set.name}: {len(prompts)} of {job.prompt_set.total} prompts, "
        f"{sum(not prompt.text.strip() for prompt in prompts)} empty, "
        f"{truncated} longer than the {tokenizer.model_max_length} tokens that are read; "
        f"{len(tasks) - to_do} images are there, {to_do} to make in {len(missing)} chunks"
    )


def make_images(
    job: Job,
    missing: list[list[ImageTask]],
    done: set[str],
    model: models.ResolvedModel,
    pipeline,
    settings: SamplingSettings,
    state: PartialState,
    options: argparse.Namespace,
) -> None:
    """Make missing chunks until none is left to take, each recorded once its images are on the disk."""
    batch_size = settings.batch_size
    before = [0, *itertools.accumulate(sum(task.file not in done for task in chunk) for chunk in missing)]
    progress = tqdm(total=before[-1], desc=job.prompt_set.name, unit="image", disable=not state.is_main_process)
    with progress, ThreadPoolExecutor(SAVING_THREADS) as savers:
        for number in processes.deal(f"images/{job.folder}", range(len(missing))):
            progress.update(before[number] - progress.n)  # those before are done, or in work on another process
            chunk = missing[number]
            try:
                images, batch_size = sample_fitting(pipeline, chunk, settings, batch_size, options.allow_oom_halving)
            except sampling.NotFiniteError as error:
                raise ValueError(f"model {model.name!r}: {error}. Nothing of these is recorded as finished") from error
            new = [(task, image) for task, image in zip(chunk, images, strict=True) if task.file not in done]
            paths = [job.folder / task.file for task, _ in new]
            checksums = savers.map(partial(sampling.save_image, quality=options.quality), paths, [i for _, i in new])
            rows = [
                {
                    **describe_image(task, model, settings, pipeline.tokenizer),
                    "set": job.prompt_set.name,
                    "batch_size": batch_size,
                    "sha256": checksum,
                }
                for (task, _), checksum in zip(new, checksums, strict=True)
            ]
            sampling.record(job.folder, state.process_index, rows)
            progress.update(len(rows))
        progress.update(progress.total - progress.n)


def describe_image(task: ImageTask, model: models.ResolvedModel, settings: SamplingSettings, tokenizer) -> dict:
    """What a manifest's row says of an image before it is made."""
    return {
        "file": task.file,
        "category": task.prompt.category,
        "index": task.prompt.index,
        "position": task.prompt.position,
        "image": task.number,
        "prompt": task.prompt.text,
        "truncated": sampling.is_truncated(tokenizer, task.prompt.text),
        "seed": task.seed,
        "model": model.name,
        "revision": model.revision or model.base_revision,
        "settings": asdict(settings),
    }


def sample_fitting(
    pipeline, chunk: list[ImageTask], settings: SamplingSettings, batch_size: int, allow_halving: bool
) -> tuple[list[Image.Image], int]:
    """The images of a chunk, and the batch size they were made with: halved until it fits, where that is allowed."""
    while True:
        try:
            images = []
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


def quieten_diffusers() -> None:
    """No line per chunk on prompts that are too long (they are counted), nor on a LoRA for the UNet alone."""
    from diffusers.utils import logging

    logging.set_verbosity_error()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# --- sheets --------------------------------------------------------------------------------------------


def grid(options: argparse.Namespace) -> int:
    """Sheets of the prompts that all folders have images of."""
    if options.output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"--output must end in .png or .jpg, got {str(options.output)!r}")
    titles = options.titles or [folder.resolve().name for folder in options.images]
    if len(titles) != len(options.images) or len(set(titles)) != len(titles):
        raise ValueError(f"--titles must name each of the {len(options.images)} columns differently, got {titles}")
    manifests = {}
    for title, folder in zip(titles, options.images, strict=True):
        rows = sampling.read_manifest(folder / options.prompts)
        if not rows:
            sets = ", ".join(sorted(path.parent.name for path in folder.glob("*/manifest.jsonl"))) or "none"
            raise ValueError(f"no images of {options.prompts!r} in {folder}; sets there: {sets}")
        manifests[title] = {
            (row["position"], row["prompt"]): (row, folder / options.prompts / row["file"])
            for row in rows
            if row["image"] == 0
        }
    shared = sorted(set.intersection(*(set(manifest) for manifest in manifests.values())))
    wanted = [key for key in shared if _is_wanted(manifests[titles[0]][key][0], options)][: options.limit]
    if not wanted:
        raise ValueError("no prompt is left that all folders have images of; check --categories and --indices")
    for number, start in enumerate(range(0, len(wanted), options.rows), start=1):
        keys = wanted[start : start + options.rows]
        columns = {title: [_open(manifests[title][key][1]) for key in keys] for title in titles}
        sheet = sampling.contact_sheet(columns, [text for _, text in keys], cell=options.cell, caption_lines=3)
        path = options.output
        if number > 1:
            path = path.with_stem(f"{path.stem}_{number}")
        sampling.save_image(path, sheet)
        print(f"{path}: {len(keys)} prompts × {len(titles)} models")
    everywhere = max(len(manifest) for manifest in manifests.values())
    print(f"{len(wanted)} of {everywhere} prompts shown; {len(shared)} have an image in every folder")
    return 0


def _is_wanted(row: dict, options: argparse.Namespace) -> bool:
    in_category = not options.categories or row["category"] in options.categories
    return in_category and (options.indices is None or row["index"] in options.indices)


def _open(path: Path) -> Image.Image:
    try:
        return decode_rgb(str(path))
    except UnreadableImageError as error:
        raise ValueError(f"an image can't be read: {error}; remove it and make it again") from None


if __name__ == "__main__":
    sys.exit(main())
