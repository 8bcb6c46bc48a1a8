"""The reference's errors of a whole training and its evaluations, computed ahead into a reference cache."""

from collections.abc import Iterator
from itertools import chain, islice

import torch
from accelerate import Accelerator

from xdpo import families, models, precompute, processes
from xdpo.cache import ReferenceCache
from xdpo.config import Config
from xdpo.data import Split, StepSampler, held_out_batches, make_loader
from xdpo.noisy import NoisyBatchMaker
from xdpo.progress import Progress
from xdpo.reference import AdapterOff, Frozen, Recorded, Reference

CPU = torch.device("cpu")


@torch.no_grad()
def fill(settings: Config, accelerator: Accelerator) -> None:
    """Compute what is missing for the training pairs, then for the held-out ones."""
    if settings.cache.examples and settings.cache.build:
        precompute.build_missing_examples(settings, accelerator, accelerator.print)
    pairs = {split: precompute.open_pairs(settings, accelerator, split) for split in Split.of(settings)}
    caches = {split: open_cache(settings, accelerator, pairs[split], split) for split in pairs}
    parts = families.load_parts(settings.model, encoders=not settings.cache.examples)
    for module in parts.encoders:
        module.to(accelerator.device)
    process = parts.process(settings.noise).to(accelerator.device)
    make_noisy = NoisyBatchMaker(parts, process, settings, accelerator.device)
    reference = base_model(settings, parts, accelerator.device)
    for split in pairs:
        fill_split(settings, accelerator, split, pairs[split], caches[split], make_noisy, reference)


def open_cache(settings: Config, accelerator: Accelerator, pairs: precompute.Pairs, split: Split) -> ReferenceCache:
    """The errors recorded so far. Raises ValueError for an objective without a reference."""
    cache = precompute.open_reference(settings, pairs, split, accelerator.mixed_precision)
    if cache is None:
        raise ValueError(f"loss.name: {settings.loss.name} needs no reference, so there are no errors to record")
    return cache


def base_model(settings: Config, parts: families.PipelineParts, device: torch.device) -> Reference:
    """The base model, run as a training runs its reference."""
    if settings.model.trainable == "lora" and settings.compute.compile:
        # The graph that training compiles contains the adapter; a new adapter adds 0.
        return AdapterOff(models.make_policy(parts, settings.model, settings.compute).to(device))
    # Without its adapter LoRA's policy is this too. Nothing else runs the parts' denoiser here, so it isn't copied.
    return Frozen(models.as_reference(parts.family, parts.denoiser, settings.compute).to(device))


def fill_split(
    settings: Config,
    accelerator: Accelerator,
    split: Split,
    pairs: precompute.Pairs,
    cache: ReferenceCache,
    make_noisy: NoisyBatchMaker,
    reference: Reference,
) -> None:
    """Compute what is missing for the pairs of one split."""
    recorded = Recorded(reference, cache, accelerator.device)
    batches = training_batches(settings, accelerator.num_processes, len(pairs), split)
    # The first process decides: while others record, their own lists would differ.
    unrecorded = None
    if accelerator.is_main_process:
        unrecorded = [number for number, positions in enumerate(batches) if cache.get(positions, CPU) is None]
    missing = [batches[number] for number in processes.agree(unrecorded)]
    if missing:
        cache.check_writable()
    dataset = precompute.make_dataset(pairs, make_noisy.parts.tokenize, settings, split)
    with Progress(total=len(missing), desc=split.title, unit="batch", disable=not accelerator.is_main_process) as bar:
        taken = take_batches(f"reference/{split.title}", missing, bar)
        for batch in make_loader(dataset, taken, num_workers=settings.data.num_workers if missing else 0):
            # A compiled model runs compiled only where gradients are recorded: in training, not in evaluation.
            with torch.set_grad_enabled(not split.is_held_out), accelerator.autocast():
                recorded.measure(make_noisy(batch, split.seed(settings)))
            recorded.commit()
    cache.close()
    processes.wait()
    accelerator.print(f"{split.title}: {cache.folder}; {len(batches):,} batches, {len(missing):,} of them computed now")


def training_batches(settings: Config, world_size: int, num_pairs: int, split: Split) -> list[list[int]]:
    """The micro-batches of a training on `world_size` processes, because a batch's composition affects rounding."""
    size = settings.train.micro_batch_pairs
    if split.is_held_out:
        ranks = (held_out_batches(num_pairs, settings.eval.draws, size, rank, world_size) for rank in range(world_size))
        return list(chain.from_iterable(ranks))
    total = settings.train.total_batch_pairs
    sampler = StepSampler(start_step=0, total_batch_pairs=total, micro_batch_pairs=size)  # of all ranks, in order
    return list(islice(sampler, settings.train.max_steps * total // size))


def take_batches(name: str, batches: list[list[int]], bar: Progress) -> Iterator[list[int]]:
    """The batches that this process computes, one by one; `bar` counts those of all processes."""
    for number in processes.deal(name, range(len(batches))):
        bar.update(number + 1 - bar.n)
        yield batches[number]
    bar.update(bar.total - bar.n)
