"""Compute the reference's errors for a config ahead of its training, into the folder `cache.reference`.

    accelerate launch scripts/cache_reference.py --config configs/xdpo_sd15.yaml cache.reference=cache/reference

Every training with the same data, seed, noise and model then runs without the reference, whatever its loss. (A
training records what it computes as well: this is for having it before the first one.) On any number of processes;
the same command goes on after a kill.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import chain, islice

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

import torch
from accelerate import Accelerator
from tqdm import tqdm

from xdpo import ending, models, precompute, processes, step
from xdpo.compute import build_accelerator
from xdpo.config import Config, load_config
from xdpo.data import StepSampler, held_out_batches, make_loader
from xdpo.noise import HELD_OUT_SEED, NoiseSchedule

CPU = torch.device("cpu")


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
        models.check_pipeline_folder(settings.model.pipeline, settings.model.revision)
        accelerator = build_accelerator(settings)
        with ending.together():
            fill(settings, accelerator)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@torch.no_grad()
def fill(settings: Config, accelerator: Accelerator) -> None:
    """Compute what is missing for the training pairs, then for the held-out ones."""
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
        wanted = training_batches(settings, accelerator.num_processes, len(pairs[held_out]), held_out=held_out)
        # One process looks: what others record meanwhile would make the lists differ.
        unknown = [number for number, positions in enumerate(wanted) if known.get(positions, CPU) is None]
        missing = [wanted[number] for number in processes.agree(unknown)]
        if missing:
            known.check_writable()
        dataset = precompute.make_dataset(pairs[held_out], parts.tokenizer, settings, held_out=held_out)
        title, seed = ("held-out pairs", HELD_OUT_SEED) if held_out else ("training pairs", settings.seed)
        with tqdm(total=len(missing), desc=title, unit="batch", disable=not accelerator.is_main_process) as bar:
            batches = take_batches(f"reference/{title}", missing, bar)
            for batch in make_loader(dataset, batches, num_workers=settings.data.num_workers if missing else 0):
                # What records gradients runs compiled, where the config has that: training does, evaluation does not.
                with torch.set_grad_enabled(not held_out), accelerator.autocast():
                    errors = step.denoising_errors(reference, make_example(batch, seed, batch["positions"])).detach()
                known.record(batch["positions"], errors.view(2, -1))
        known.close()
        processes.wait()
        accelerator.print(f"{title}: {known.folder}; {len(wanted):,} batches, {len(missing):,} of them computed now")


def training_batches(settings: Config, world_size: int, num_pairs: int, *, held_out: bool) -> list[list[int]]:
    """The micro-batches of a training on `world_size` processes: which pairs are together decides how they round."""
    size = settings.train.micro_batch_pairs
    if held_out:
        ranks = (held_out_batches(num_pairs, settings.eval.draws, size, rank, world_size) for rank in range(world_size))
        return list(chain.from_iterable(ranks))
    total = settings.train.total_batch_pairs
    sampler = StepSampler(start_step=0, total_batch_pairs=total, micro_batch_pairs=size)  # of all ranks, in order
    return list(islice(sampler, settings.train.max_steps * total // size))


def take_batches(name: str, batches: list[list[int]], bar: tqdm) -> Iterator[list[int]]:
    """The batches that this process computes, one by one; `bar` counts those of all processes."""
    for number in processes.deal(name, range(len(batches))):
        bar.update(number + 1 - bar.n)
        yield batches[number]
    bar.update(bar.total - bar.n)


if __name__ == "__main__":
    sys.exit(main())
