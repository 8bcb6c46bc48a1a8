"""Opens a run's pairs, from their source or a cache, its data sets, and the recorded errors of its reference."""

import filecmp
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from xdpo import processes
from xdpo.cache import CachedPairDataset, CacheError, ExampleCache, ExamplePlan, ReferenceCache
from xdpo.cache.examples import is_finished
from xdpo.config import Config
from xdpo.data import Filters, PairDataset, PairTable, Split, UnpairedDataset, label_images, load_pairs
from xdpo.data.examples import Tokenize
from xdpo.families import PipelineParts
from xdpo.files import is_own, reading, replacing
from xdpo.precompute.keys import (
    encoders_precision,
    example_key,
    examples_folder,
    reference_key,
    source_folder,
    takes_single_images,
)

Pairs = PairTable | ExampleCache
Examples = PairDataset | CachedPairDataset | UnpairedDataset
MOST_ALIKE = 20
COPIED_AT_ONCE = 2**24
MANIFEST = "manifest.json"


def open_pairs(settings: Config, accelerator: Accelerator, split: Split) -> Pairs:
    """Training or held-out pairs, from the example cache if the config names one, else from their source.

    Every process calls it. Raises CacheError or DataError, also where the objective can't be trained on these pairs.
    """
    pairs: Pairs
    if settings.cache.examples:
        pairs = open_examples(settings, accelerator, split)
        refuse_without_sizes(settings, pairs.plan, pairs.folder)
        if note := pairs.plan.precision_note(encoders_precision(settings)):
            accelerator.print(f"cache.examples: {pairs.folder}: {note}")
    else:
        pairs = load_table(settings, accelerator, split, in_order=split.is_held_out)
    if takes_single_images(settings, split):
        label_images(*pairs.image_names())  # refuses data in which all images have one label
    return pairs


def count_shared(train: Pairs, held_out: Pairs) -> int:
    """How many held-out pairs are training pairs too, with the same caption and the same two images.

    For each caption at most MOST_ALIKE training pairs are compared.
    """
    captions = held_out.captions()
    alike: dict[str, list[int]] = {caption: [] for caption in captions}
    for index, caption in enumerate(train.captions()):
        if caption in alike and len(alike[caption]) < MOST_ALIKE:
            alike[caption].append(index)
    pairs = (
        (set(held_out.images_of(index)), alike[caption]) for index, caption in enumerate(captions) if alike[caption]
    )
    return sum(any(set(train.images_of(other)) == images for other in others) for images, others in pairs)


def make_dataset(pairs: Pairs, tokenize: Tokenize, settings: Config, split: Split) -> Examples:
    """The data set of a split, of pixels or cached encodings. Held-out pairs are neither shuffled nor augmented.

    For training by an unpaired objective it is one of single images.
    """
    seed, is_trained = split.seed(settings), not split.is_held_out
    dataset: PairDataset | CachedPairDataset
    if isinstance(pairs, ExampleCache):
        dataset = CachedPairDataset(pairs, seed, settings.data, shuffle=is_trained, augment=is_trained)
    else:
        dataset = PairDataset(pairs, tokenize, seed, settings.data, shuffle=is_trained, augment=is_trained)
    if takes_single_images(settings, split):
        return UnpairedDataset(dataset, settings.loss.values["desirable_share"])
    return dataset


def latent_shape(pairs: Pairs, parts: PipelineParts, settings: Config) -> tuple[int, int, int]:
    """(C, h, w) of the latents in training."""
    if isinstance(pairs, ExampleCache):
        _, _, channels, height, width = pairs.plan.latent_shape
        return channels, height, width
    return parts.latent_shape(settings.data.resolution)


def load_table(
    settings: Config, accelerator: Accelerator, split: Split, *, in_order: bool, keep_ties: bool = False
) -> PairTable:
    """The pairs of the `data` section, or the held-out ones of the `eval` section, from their source.

    in_order: whether their images will be read in the order of their rows. Every process calls it, and all return
    together.
    """
    with processes.one_first(
        accelerator.is_main_process
    ):  # the first process indexes or converts the files, the others find it done
        return load_pairs(
            split.source(settings),
            filters=filters_of(settings, split),
            in_order=in_order,
            streamed_into=_streamed_into(settings, split),
            keep_source=settings.cache.keep_source,
            keep_ties=keep_ties,
        )


def filters_of(settings: Config, split: Split, streamed_into: Path | None = None) -> Filters:
    """The filters of a split's pairs. Training captions may be compared with those of all held-out pairs.

    streamed_into: where remote files of held-out pairs are kept, if there is no cache where they would stay.
    """
    if split.is_held_out or not settings.filter.held_out_captions:
        return Filters(settings.filter)
    held_out = load_pairs(
        Split.HELD_OUT.source(settings).model_copy(update={"max_pairs": None}),
        in_order=True,
        streamed_into=_streamed_into(settings, Split.HELD_OUT) or streamed_into,
        keep_source=settings.cache.keep_source,
    )
    return Filters(settings.filter, frozenset(held_out.captions()))


def _streamed_into(settings: Config, split: Split) -> Path | None:
    return source_folder(settings, split) if settings.cache.examples else None


def open_examples(settings: Config, accelerator: Accelerator, split: Split) -> ExampleCache:
    """The finished example cache of a split, from the local copy if the config asks for one."""
    folder, key = examples_folder(settings, split), example_key(settings, split)
    if settings.cache.local_copy is None:
        return ExampleCache(folder, key)
    copy = Path(settings.cache.local_copy) / folder.name
    with processes.one_first(accelerator.is_local_main_process):
        if accelerator.is_local_main_process and not is_finished(copy):
            ExampleCache(folder, key)  # refuses before gigabytes are copied
            copy_examples(folder, copy)
        elif is_finished(folder) and not filecmp.cmp(folder / MANIFEST, copy / MANIFEST, shallow=False):
            raise CacheError(
                f"cache.local_copy: {copy} is not a copy of {folder} as it is now; remove it, to copy it anew"
            )
    return ExampleCache(copy, key)


def refuse_without_sizes(settings: Config, plan: ExamplePlan, folder: Path) -> None:
    """Raise CacheError where the denoiser is to be told each image's size, and a cache holds none."""
    if settings.model.size_conditioning is not None and not plan.has_sizes:
        raise CacheError(
            f"cache.examples: {folder} was made before caches held the images' sizes, which model.size_conditioning="
            f"{settings.model.size_conditioning} needs; remove it, or name another folder"
        )


def copy_examples(source: Path, target: Path) -> None:
    """Copy a finished cache, the manifest last. An interrupted copy is resumed."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == MANIFEST):
        copied = target / path.name
        if is_own(path) or path.is_dir() or (copied.is_file() and copied.stat().st_size == path.stat().st_size):
            continue
        with replacing(copied, "wb") as out:
            for piece in _pieces(path):
                out.write(piece)


def _pieces(path: Path) -> Iterator[bytes]:
    """A file piece by piece. Raises StorageError, naming the source, where it can't be read."""
    with reading(path), path.open("rb") as file:
        while piece := file.read(COPIED_AT_ONCE):
            yield piece


def open_reference(settings: Config, pairs: Pairs, split: Split, precision: str) -> ReferenceCache | None:
    """The recorded errors of the reference on `pairs`; None where the config or the objective has none."""
    if settings.cache.reference is None or not settings.loss.needs_reference:
        return None
    key = reference_key(settings, pairs, split, precision=precision)
    return ReferenceCache(Path(settings.cache.reference), key)
