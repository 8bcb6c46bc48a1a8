"""Compute the reference's errors for a config ahead of its training, into the folder `cache.reference`.

    accelerate launch scripts/cache_reference.py --config configs/xdpo_sd15.yaml cache.reference=cache/reference

Every training with the same data, seed, noise and model then runs without the reference, whatever its loss. (A
training records what it computes as well: this is for having it before the first one.) On any number of processes;
the same command goes on after a kill.
"""

import argparse
import os
import sys
from itertools import islice
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from tqdm import tqdm

from xdpo import models, precompute, step
from xdpo.compute import build_accelerator
from xdpo.config import Config, load_config
from xdpo.data import StepSampler, held_out_batches, make_loader
from xdpo.noise import HELD_OUT_SEED, NoiseSchedule


def main(arguments: list[str] | None = None) -> int:
    """Fill the cache for the whole run and its evaluations. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="the config of the training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        settings = load_config(options.config, options.overrides)
        if not settings.cache.reference:
            raise ValueError("cache.reference is null; name the cache's folder: cache.reference=FOLDER")
        models.check_pipeline_folder(settings.model.pipeline)
        fill(settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@torch.no_grad()
def fill(settings: Config) -> None:
    """Compute what is missing for the training pairs, then for the held-out ones."""
    accelerator = build_accelerator(settings)
    device = accelerator.device
    if settings.cache.examples and settings.cache.build:
        precompute.build_missing_examples(settings, accelerator, accelerator.print)
    kinds = (False, True) if settings.eval.every else (False,)
    pairs = {held_out: precompute.open_pairs(settings, accelerator, held_out=held_out) for held_out in kinds}
    parts = models.load_parts(settings.model, encoders=not settings.cache.examples)
    for module in filter(None, (parts.vae, parts.text_encoder)):
        module.to(device)
    model = settings.model
    if not settings.compute.compile:
        model = model.model_copy(update={"trainable": "full"})  # LoRA's reference is the UNet itself as well
    reference = models.make_reference(parts.unet, model, settings.compute)
    if reference is None:  # the graph that training compiles has the adapter in it, and a new one adds 0
        reference = models.make_policy(parts.unet, model, settings.compute)
    reference.to(device)
    schedule = NoiseSchedule.from_scheduler(parts.scheduler).to(device)
    make_example = step.ExampleMaker(parts, schedule, settings, device)
    for held_out in kinds:
        known = precompute.open_reference(
            settings, pairs[held_out], held_out=held_out, precision=accelerator.mixed_precision
        )
        wanted = own_batches(settings, accelerator, len(pairs[held_out]), held_out=held_out)
        missing = [positions for positions in wanted if known.get(positions, device) is None]
        dataset = precompute.make_dataset(pairs[held_out], parts.tokenizer, settings, held_out=held_out)
        loader = make_loader(dataset, missing, num_workers=settings.data.num_workers if missing else 0)
        title, seed = ("held-out pairs", HELD_OUT_SEED) if held_out else ("training pairs", settings.seed)
        for batch in tqdm(loader, desc=title, unit="batch", disable=not accelerator.is_main_process):
            # What records gradients runs compiled, where the config has that: training does, evaluation does not.
            with torch.set_grad_enabled(not held_out), accelerator.autocast():
                errors = step.denoising_errors(reference, make_example(batch, seed, batch["positions"])).detach()
            known.record(batch["positions"], errors.view(2, -1))
        known.close()
        accelerator.wait_for_everyone()
        accelerator.print(f"{title}: {known.folder}; {len(wanted):,} batches, {len(missing):,} of them computed now")


def own_batches(settings: Config, accelerator: Accelerator, num_pairs: int, *, held_out: bool) -> list[list[int]]:
    """The positions that this process will meet in the training, in the same micro-batches."""
    rank, world_size, size = accelerator.process_index, accelerator.num_processes, settings.train.micro_batch_pairs
    if held_out:
        return held_out_batches(num_pairs, settings.eval.draws, size, rank, world_size)
    total = settings.train.total_batch_pairs
    sampler = StepSampler(
        start_step=0, total_batch_pairs=total, micro_batch_pairs=size, rank=rank, world_size=world_size
    )
    return list(islice(sampler, settings.train.max_steps * accelerator.gradient_accumulation_steps))


if __name__ == "__main__":
    sys.exit(main())
