"""Images for prompt sets from one model, the same on any number of processes.

    accelerate launch generate.py --model sd15 --prompts partiprompts hpsv2 --output images/sd15
    accelerate launch generate.py --model runs/xdpo_sd15 --prompts hpsv2 --output images/xdpo
    python generate.py grid --images images/sd15 images/xdpo --prompts paper_figures --output figures.png

The same command resumes and skips finished images. `generate.py grid --help` explains sheets of models side by side.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

from xdpo.arguments import positive
from xdpo.paths import expanded, user_path
from xdpo.prompts import PROMPT_SETS, load_prompts
from xdpo.sampling.settings import SCHEDULERS, SamplingSettings

if TYPE_CHECKING:
    from accelerate import PartialState

    from xdpo.families import Family
    from xdpo.images.manifest import ManifestRow

# What needs torch is imported after the arguments are read, so that --help and a bad argument answer at once.


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
    model.add_argument(
        "--vae", type=expanded, help="hub id or folder of an autoencoder that takes the place of the model's"
    )
    model.add_argument("--base-revision", help="hub revision of a pipeline (default: its main branch's)")
    model.add_argument(
        "--t5-tokens", type=positive, help="how many tokens of a prompt T5 reads (default: as the pipeline or the run)"
    )
    what = parser.add_argument_group("prompts and images")
    what.add_argument("--prompts", required=True, nargs="+", help=f"{', '.join(PROMPT_SETS)}, or files of your own")
    what.add_argument("--prompts-path", help="file or folder of the one set in --prompts, in place of the cache")
    what.add_argument("--limit", type=positive, help="the first so many prompts")
    what.add_argument("--categories", nargs="+", default=(), help="only these categories or styles")
    what.add_argument("--sample", type=positive, help="so many prompts at random")
    what.add_argument("--sample-seed", type=int, default=0, help="which ones (default: 0)")
    what.add_argument("--images-per-prompt", type=positive, default=1, help="default: 1")
    what.add_argument("--output", required=True, type=user_path, help="images go to OUTPUT/SET/CATEGORY/00000.png")
    what.add_argument("--format", choices=("png", "jpg"), default="png", help="default: png")
    what.add_argument("--quality", type=int, default=75, help="of JPEGs; 75, Pillow's default, if not given")
    how = parser.add_argument_group("sampling")
    default = SamplingSettings()
    how.add_argument("--seed", type=int, default=default.seed, help="the prompt at position p starts from seed + p")
    how.add_argument("--steps", type=positive, default=default.num_inference_steps, help="default: 50")
    how.add_argument(
        "--guidance",
        type=float,
        help="default: the pipeline's, 7.5; for Stable Diffusion XL 5, 3 and 3.5 7, for FLUX 3.5; 1: none",
    )
    how.add_argument(
        "--scheduler",
        choices=("pipeline", *SCHEDULERS),
        default="pipeline",
        help="default: the pipeline's own",
    )
    how.add_argument("--image-size", type=positive, help="in pixels; default: the pipeline's, 512 for SD 1.5")
    how.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32")
    how.add_argument("--compile", action="store_true", help="torch.compile of the whole UNet")
    how.add_argument(
        "--batch-size", type=positive, default=default.batch_size, help="images at once; part of what decides pixels"
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
    parser.add_argument("--limit", type=positive, help="the first so many prompts")
    parser.add_argument("--rows", type=positive, default=6, help="prompts on a sheet (default: 6)")
    parser.add_argument("--cell", type=positive, help="side of an image on the sheet, in pixels; default: its own")
    return parser


# --- images --------------------------------------------------------------------------------------------


def generate(options: argparse.Namespace) -> int:
    """Check everything that is cheap to check, load the model, make the missing images. Returns 0."""
    settings = build_settings(options)
    if options.prompts_path and len(options.prompts) != 1:
        raise ValueError(f"--prompts-path is for one set, but --prompts names {len(options.prompts)}")

    import torch
    from accelerate import PartialState

    from xdpo import ending, processes
    from xdpo.compute import check_compiler

    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=processes.COLLECTIVE_TIMEOUT)
    if settings.precision == "fp16" and state.device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if settings.compile:
        check_compiler("--compile")
    processes.connect()
    with ending.together():
        return make_missing(options, settings, state)


def make_missing(options: argparse.Namespace, settings: SamplingSettings, state: "PartialState") -> int:
    """Make the missing images. Returns 0. Every process calls it."""
    from xdpo import families, files, models, processes
    from xdpo.images.folder import check_image_folder
    from xdpo.sampling.generation import make_missing_images, plan_job

    # Prompts, model, folders: all checked before any weight is loaded.
    with processes.one_first(state.is_main_process):  # it downloads, the others find the files
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
        replacing = {key: getattr(options, key) for key in ("unet", "lora", "vae", "base_revision", "t5_tokens")}
        model = models.resolve_model(*models.read_model_spec(options.model, **replacing))
        family = families.family_of_pipeline(model.base)
    settings = settings_of_family(settings, options, family)
    jobs = [
        plan_job(
            prompt_set,
            model,
            settings,
            options.output,
            images_per_prompt=options.images_per_prompt,
            format=options.format,
            quality=options.quality,
        )
        for prompt_set in prompt_sets
    ]
    if len({job.folder for job in jobs}) < len(jobs):
        raise ValueError(f"--prompts names a set twice: {', '.join(options.prompts)}")
    for job in jobs:
        check_image_folder(job.folder, job.identity)
    processes.wait()

    with files.only_run([job.folder for job in jobs], "generate.py", is_main=state.is_main_process):
        make_missing_images(jobs, state, options.allow_oom_halving)
    return 0


def build_settings(options: argparse.Namespace) -> SamplingSettings:
    if not 1 <= options.quality <= 100:
        raise ValueError(f"--quality must lie between 1 and 100, got {options.quality}")
    if options.guidance is not None and not 0 <= options.guidance < float("inf"):
        raise ValueError(f"--guidance must be 0 or more, got {options.guidance}")
    if options.image_size is not None and options.image_size % 8:
        raise ValueError(f"--image-size must be a multiple of 8, got {options.image_size}")
    return SamplingSettings(
        seed=options.seed,
        num_inference_steps=options.steps,
        guidance_scale=SamplingSettings.guidance_scale if options.guidance is None else options.guidance,
        scheduler=options.scheduler,
        image_size=options.image_size,
        precision=options.precision,
        compile=options.compile,
        batch_size=options.batch_size,
    )


def settings_of_family(settings: SamplingSettings, options: argparse.Namespace, family: "Family") -> SamplingSettings:
    """The settings, with the guidance of the model's family where none was asked for.

    Raises ValueError for what the family can't sample.
    """
    if settings.image_size is not None and settings.image_size % family.size_multiple:
        raise ValueError(
            f"--image-size must be a multiple of {family.size_multiple} for {family.name}, got {settings.image_size}"
        )
    if family.is_flow and settings.scheduler != "pipeline":
        raise ValueError(
            f"--scheduler {settings.scheduler} samples diffusions, and {family.name} is a flow, which the pipeline's "
            "own samples; leave it out"
        )
    return settings if options.guidance is not None else replace(settings, guidance_scale=family.guidance)


# --- sheets --------------------------------------------------------------------------------------------


def grid(options: argparse.Namespace) -> int:
    """Write sheets of the prompts for which every folder has an image. Returns 0."""
    from xdpo.images.making import differences, makings_of
    from xdpo.images.reading import picture_of
    from xdpo.images.sheets import first_images, write_sheets

    if options.output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"--output must end in .png or .jpg, got {str(options.output)!r}")
    titles = options.titles or [folder.resolve().name for folder in options.images]
    if len(titles) != len(options.images) or len(set(titles)) != len(titles):
        raise ValueError(f"--titles must name each of the {len(options.images)} columns differently, got {titles}")
    folders = dict(zip(titles, options.images, strict=True))
    rows_by_title = {title: first_images(folder, options.prompts) for title, folder in folders.items()}
    shared = sorted(set.intersection(*map(set, rows_by_title.values())))
    prompts = [prompt for prompt in shared if _is_selected(rows_by_title[titles[0]][prompt], options)][: options.limit]
    if not prompts:
        raise ValueError("no prompt is left that all folders have images of; check --categories and --indices")
    columns = {
        title: [folder / options.prompts / rows_by_title[title][prompt].file for prompt in prompts]
        for title, folder in folders.items()
    }
    shown = [
        picture_of(row, title, options.prompts, folders[title] / options.prompts)
        for title, rows in rows_by_title.items()
        for row in (rows[prompt] for prompt in prompts)
    ]
    for problem in differences(makings_of(shown)):
        print(f"note: {problem.describe()}", file=sys.stderr)
    captions = [text for _, text in prompts]
    for path, count in write_sheets(columns, captions, options.output, options.rows, options.cell):
        print(f"{path}: {count} prompts × {len(titles)} models")
    everywhere = max(map(len, rows_by_title.values()))
    print(f"{len(prompts)} of {everywhere} prompts shown; {len(shared)} have an image in every folder")
    return 0


def _is_selected(row: "ManifestRow", options: argparse.Namespace) -> bool:
    in_category = not options.categories or row.category in options.categories
    return in_category and (options.indices is None or row.index in options.indices)


if __name__ == "__main__":
    sys.exit(main())
