"""Where a run's examples come from: the source of its pairs, or caches; and what is known of the reference's errors."""

import filecmp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from xdpo import processes
from xdpo.cache import CachedPairDataset, CacheError, ExampleCache, ReferenceCache
from xdpo.cache.examples import is_finished
from xdpo.compute import precision_of
from xdpo.config import Config
from xdpo.data import PairDataset, PairTable, Split, UnpairedDataset, label_images, load_pairs
from xdpo.data.examples import Tokenize
from xdpo.families import PipelineParts
from xdpo.files import is_own, reading, replacing
from xdpo.precompute.keys import example_key, examples_folder, reference_key, takes_single_images

Pairs = PairTable | ExampleCache
MOST_ALIKE = 20
COPIED_AT_ONCE = 2**24
MANIFEST = "manifest.json"


def open_pairs(settings: Config, accelerator: Accelerator, split: Split) -> Pairs:
    """Training pairs or held-out ones: a cache of encoded examples where the config names one, else their source.

    Every process calls it. Raises CacheError or DataError, also where the objective can't be trained on them.
    """
    pairs: Pairs
    if settings.cache.examples:
        pairs = open_examples(settings, accelerator, split)
        if note := pairs.plan.precision_note(precision_of(settings.compute)):
            accelerator.print(f"cache.examples: {pairs.folder}: {note}")
    else:
        pairs = load_table(settings, accelerator, split)
    if takes_single_images(settings, split):
        label_images(*pairs.image_names())  # refuses data of one label alone
    return pairs


def count_shared(train: Pairs, held_out: Pairs) -> int:
    """How many held-out pairs are training pairs too, with the same caption and the same two images.

    Of each caption MOST_ALIKE training pairs are looked at.
    """
    wanted = held_out.captions()
    alike: dict[str, list[int]] = {caption: [] for caption in wanted}
    for index, caption in enumerate(train.captions()):
        if caption in alike and len(alike[caption]) < MOST_ALIKE:
            alike[caption].append(index)
    pairs = ((set(held_out.images_of(index)), alike[caption]) for index, caption in enumerate(wanted) if alike[caption])
    return sum(any(set(train.images_of(other)) == images for other in others) for images, others in pairs)


def make_dataset(
    pairs: Pairs, tokenize: Tokenize, settings: Config, split: Split
) -> PairDataset | CachedPairDataset | UnpairedDataset:
    """Batches by position, encoded or not; held-out pairs in their order, without augmentation.

    An unpaired objective trains on single images.
    """
    seed, is_trained = split.seed(settings), not split.is_held_out
    how = {"shuffle": is_trained, "augment": is_trained}
    if isinstance(pairs, ExampleCache):
        dataset = CachedPairDataset(pairs, seed, settings.data, **how)
    else:
        dataset = PairDataset(pairs, tokenize, seed, settings.data, **how)
    if takes_single_images(settings, split):
        return UnpairedDataset(dataset, settings.loss.values["desirable_share"])
    return dataset


def latent_shape(pairs: Pairs, parts: PipelineParts, settings: Config) -> tuple[int, int, int]:
    """(C, h, w) of the latents that training sees."""
    if isinstance(pairs, ExampleCache):
        return tuple(pairs.plan.latent_shape[2:])
    return parts.latent_shape(settings.data.resolution)


def load_table(settings: Config, accelerator: Accelerator, split: Split) -> PairTable:
    """The pairs of the `data` section, or the held-out ones of the `eval` section, from their source.

    Every process calls it, and all return together.
    """
    max_pairs = settings.eval.pairs if split.is_held_out else None
    with processes.one_first(accelerator.is_main_process):  # it converts the files, the others find them converted
        return load_pairs(settings.data, **source_of(settings, split), max_pairs=max_pairs)


def source_of(settings: Config, split: Split) -> dict[str, Any]:
    """What of the `eval` section takes the place of the `data` section's: path and split of the held-out pairs."""
    return {"path": settings.eval.path, "split": settings.eval.split} if split.is_held_out else {}


def open_examples(settings: Config, accelerator: Accelerator, split: Split) -> ExampleCache:
    """The finished cache of the training pairs or the held-out ones, from the local copy where one is asked for."""
    folder, key = examples_folder(settings, split), example_key(settings, split)
    if settings.cache.local_copy is None:
        return ExampleCache(folder, key)
    copy = Path(settings.cache.local_copy) / folder.name
    with processes.one_first(accelerator.is_local_main_process):
        if accelerator.is_local_main_process and not is_finished(copy):
            ExampleCache(folder, key)  # refuses before gigabytes travel
            copy_examples(folder, copy)
        elif is_finished(folder) and not filecmp.cmp(folder / MANIFEST, copy / MANIFEST, shallow=False):
            raise CacheError(
                f"cache.local_copy: {copy} is not a copy of {folder} as it is now; remove it, to copy it anew"
            )
    return ExampleCache(copy, key)


def copy_examples(source: Path, target: Path) -> None:
    """Copy a finished cache, the manifest last; what an interrupted copy left is gone on with."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == MANIFEST):
        there = target / path.name
        if is_own(path) or (there.is_file() and there.stat().st_size == path.stat().st_size):
            continue
        with replacing(there, "wb") as out:
            for piece in _pieces(path):
                out.write(piece)


def _pieces(path: Path) -> Iterator[bytes]:
    """A file piece by piece. Raises StorageError where it can't be read, which is not the copy's fault."""
    with reading(path), path.open("rb") as file:
        while piece := file.read(COPIED_AT_ONCE):
            yield piece


def open_reference(settings: Config, pairs: Pairs, split: Split, precision: str) -> ReferenceCache | None:
    """The cache of the reference's errors on `pairs`, or None where the config or the objective asks for none."""
    if settings.cache.reference is None or not settings.loss.needs_reference:
        return None
    key = reference_key(settings, pairs, split, precision=precision)
    return ReferenceCache(Path(settings.cache.reference), key)
