"""Encoding every distinct image and caption once, into an example cache."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from accelerate import Accelerator

from xdpo import processes
from xdpo.cache import CacheError, ExampleCache, ExamplePlan
from xdpo.cache.examples import SOURCE, TABLES, finish, is_finished
from xdpo.config import Config
from xdpo.data import PairTable, Split, finite_scores, local_files, no_scores
from xdpo.data.identity import file_states
from xdpo.data.remote import RemoteError
from xdpo.data.streaming import MOST_FAILURES, StreamedImages, not_all_read
from xdpo.data.table import pair_id
from xdpo.families import PipelineParts, load_parts
from xdpo.files import PART, appears, file_sha256, is_own, only_run, replacing, sweep
from xdpo.precompute.keys import example_key, examples_folder
from xdpo.precompute.kinds import Kind, kinds_of
from xdpo.precompute.opening import load_table, refuse_without_sizes
from xdpo.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa

VERIFIED = 16  # records of each kind that `verify` encodes again
VERIFY_TOLERANCE = 0.02  # norm of the difference over the norm: bf16's rounding is 0.004, another image about 1

Say = Callable[[str], None]


def build_missing_examples(settings: Config, accelerator: Accelerator, say: Say = print) -> None:
    """Build whatever is missing of the example caches that a run with these settings reads. Every process calls it.

    Raises CacheError or DataError, before weights are loaded, for a cache that the run could not use.
    """
    missing: dict[Split, PairTable] = {}
    is_main = accelerator.is_main_process
    for split in Split.of(settings):
        folder = examples_folder(settings, split)
        needs_scores = settings.loss.margin_weight is not None
        # Only the first process looks, here and below: network storage may cache that a file doesn't exist.
        plan, is_built = processes.agree((ExamplePlan.load(folder), is_finished(folder)) if is_main else None)
        if plan is not None:
            plan.refuse_another(folder, example_key(settings, split))
            if needs_scores and not plan.has_scores:
                raise no_scores(split)
            refuse_without_sizes(settings, plan, folder)
        if is_built:
            if processes.agree(is_main and _may_have_changed(plan)):
                table = load_table(settings, accelerator, split, in_order=True)
                if table.fingerprint != plan.fingerprint:
                    raise CacheError(
                        f"cache.examples: {folder} was encoded from other images or captions than {settings.data.path} "
                        "has now. Remove it, and it is made again, or put the data back"
                    )
            continue
        missing[split] = load_table(settings, accelerator, split, in_order=True)
        if needs_scores:
            finite_scores(missing[split], split)
    if not missing:
        return
    parts = load_parts(settings.model)
    for split, table in missing.items():
        folder = examples_folder(settings, split)
        with only_run([folder], "encoding examples", is_main=is_main):
            build_examples(folder, table, parts, settings, accelerator, split, say=say)


def _may_have_changed(plan: ExamplePlan) -> bool:
    """Whether the local files that a cache was made from may have changed; files that are gone count as unchanged.

    Images of a folder are not among the plan's files, so they always may have.
    """
    if not plan.sources:
        return False
    now = file_states(list(plan.sources))
    is_folder = plan.key["data.source"] == "folder"
    return bool(now) and (is_folder or any(list(plan.sources[path]) != state for path, state in now.items()))


def build_examples(
    folder: Path,
    table: PairTable,
    parts: PipelineParts,
    settings: Config,
    accelerator: Accelerator,
    split: Split,
    *,
    say: Say = print,
    shard_bytes: int | None = None,
) -> None:
    """Encode what a folder lacks of its cache: every distinct image and caption of `table`, once.

    Every process calls it; a free process takes the next shard. Finished shards are kept, so the same command resumes
    after a kill, on any number of processes. Batches have the training's size, because rounding depends on the batch's
    shape. A process holds one shard in memory.
    Raises CacheError where the folder belongs to something else, the disk is too small, or latents aren't finite.
    """
    plan, is_main = None, accelerator.is_main_process
    if is_main:
        sweep(folder / SOURCE, f"*{PART}")  # what a killed run was fetching; this run is the only one here
        plan = ExamplePlan.load(folder)
        if plan is None:
            plan = begin(folder, table, parts, settings, split, shard_bytes=shard_bytes)
        plan.refuse_another(folder, example_key(settings, split))
        if plan.fingerprint not in _fingerprints(table):
            raise CacheError(f"cache.examples: {folder} was begun with other pairs; remove it, or name another folder")
    plan = processes.agree(plan)
    kinds = kinds_of(folder, table, plan, parts, settings, accelerator)
    if is_main:
        say(_estimate(folder, plan, kinds, accelerator.num_processes))
    failures: set[str] = set()
    for kind in kinds:
        unfinished = processes.agree(kind.unfinished() if is_main else None)
        before = np.cumsum([0, *(len(kind.records_of(shard)) for shard in unfinished)]).tolist()
        name = f"{folder.name}/{kind.name}"
        with Progress(total=before[-1], desc=name, unit="record", disable=not is_main) as bar:
            for number in processes.deal(f"examples/{name}", range(len(unfinished))):
                bar.update(before[number] - bar.n)  # earlier shards are done, or being written by other processes
                try:
                    _write_shard(kind, unfinished[number], settings.data.num_workers, bar)
                except RemoteError as error:
                    failures.add(str(error))
                    if len(failures) >= MOST_FAILURES:
                        break
            bar.update(bar.total - bar.n)
    images = table.dataset.images
    if isinstance(images, StreamedImages):
        _measure_rest(folder.name, images, table.end, kinds[0], failures)
    processes.wait()
    if is_main and not is_finished(folder):
        for shards in plan.shards(folder):  # other processes wrote them, perhaps on other machines
            for shard in range(len(shards)):
                appears(shards.checksum_path(shard))
        if isinstance(images, StreamedImages):
            plan = replace(plan, fingerprint=table.fingerprint)
            plan.save(folder)
        misnamed = table.misnamed()
        finish(folder, plan)
        if not settings.cache.keep_source:
            shutil.rmtree(folder / SOURCE, ignore_errors=True)
        say(f"{folder}: finished; {len(plan.latents(folder).unreadable())} unreadable images")
        if misnamed:
            say(
                f"note: {misnamed:,} images differ in size from the first one of their name (image_*_uid), "
                "which was encoded for all. If this is wrong, add to data.columns that the names are in a column that "
                "isn't there (image_0_uid: none), and encode anew"
            )
    processes.wait()


def _fingerprints(table: PairTable) -> tuple[str, ...]:
    """What the plan of a cache of these pairs may have as their fingerprint, first what it has when it is begun.

    The fingerprint of streamed pairs covers images that have not been read then.
    """
    images = table.dataset.images
    if not isinstance(images, StreamedImages):
        return (table.fingerprint,)
    are_known = all(map(images.is_measured, images.before(table.end)))
    return (images.begun_as, table.fingerprint) if are_known else (images.begun_as,)


def _measure_rest(name: str, images: StreamedImages, end: int, kind: Kind, failures: set[str]) -> None:
    """Read the files without an image to encode, which count in the fingerprint too if they have rows before `end`.

    Raises RemoteError for all files that no process could read, the `failures` of each. Every process calls it.
    """
    every = images.before(end)
    unmeasured = processes.agree([number for number in every if not images.is_measured(number)])
    for number in processes.deal(f"examples/{name}/unmeasured", unmeasured):
        if len(failures) >= MOST_FAILURES:
            break
        try:
            images.bring([number])
        except RemoteError as error:
            failures.add(str(error))
        kind.let_go()
    images.wait()
    if everyone := sorted(set().union(*processes.gather(failures))):
        raise not_all_read(everyone, len(every))


def _write_shard(kind: Kind, shard: int, num_workers: int, bar: Progress) -> None:
    """Encode a shard's records into memory of their final size and type, and write them."""
    record_ids, filled = list(kind.records_of(shard)), 0
    kind.bring(record_ids)
    unreadable: list[int] = []
    records = {
        name: np.empty((len(record_ids), *shards.shape), dtype=shards.dtype) for name, shards in kind.shards.items()
    }
    for encoded, batch in kind.encoded(record_ids, num_workers):
        rows = slice(filled, filled := filled + len(batch["record"]))
        for name, values in encoded.items():
            records[name][rows] = values
        unreadable += [
            record for record, is_readable in zip(batch["record"], batch["readable"], strict=True) if not is_readable
        ]
        bar.update(len(batch["record"]))
    for name, shards in kind.shards.items():
        shards.write(shard, records[name], unreadable)
    kind.let_go()


def verify_examples(
    cache: ExampleCache, table: PairTable, parts: PipelineParts, settings: Config, accelerator: Accelerator
) -> dict[str, float]:
    """Check every checksum and encode a sample again. Returns the relative difference of each name's shards.

    Raises CacheError for damage, or where a sample differs by more than rounding.
    """
    differences = {}
    for kind in kinds_of(cache.folder, table, cache.plan, parts, settings, accelerator):
        sample = sorted(np.random.default_rng(0).permutation(kind.count)[:VERIFIED].tolist())
        encoded_again = []
        for start in range(0, len(sample), kind.batch_size):
            kind.bring(batch := sample[start : start + kind.batch_size])
            encoded_again += [encoded for encoded, _ in kind.encoded(batch)]
            if processes.count() == 1:  # several read the same sample
                kind.let_go()
        for name, shards in kind.shards.items():
            shards.verify(partial(Progress, desc=f"checksums of {name}", unit="shard"))
            again = np.concatenate([encoded[name] for encoded in encoded_again])
            cached = np.stack([[shards.read(record, part) for part in range(shards.shape[0])] for record in sample])
            difference = float(np.linalg.norm(again - cached.astype(np.float32)) / np.linalg.norm(again))
            if not difference <= VERIFY_TOLERANCE:
                raise CacheError(
                    f"{cache.folder}: {name} encoded again differ by {difference:.3g} of their norm from those kept; "
                    "remove the folder and build it again"
                )
            differences[name] = difference
    processes.wait()
    if isinstance(table.dataset.images, StreamedImages) and not settings.cache.keep_source:
        shutil.rmtree(cache.folder / SOURCE, ignore_errors=True)
    return differences


def begin(
    folder: Path,
    table: PairTable,
    parts: PipelineParts,
    settings: Config,
    split: Split,
    *,
    shard_bytes: int | None,
) -> ExamplePlan:
    """Write the tables and the plan of a new cache.

    Raises CacheError for a folder that holds something else, or a disk that is too small.
    """
    import pyarrow.parquet as pq

    if folder.is_dir() and any(not is_own(path) and path.name not in (*TABLES, SOURCE) for path in folder.iterdir()):
        raise CacheError(f"cache.examples: {folder} holds something that is no cache; name another folder")
    pairs, images, prompts = _tables(table, parts)
    plan = _plan(table, pairs, images, prompts, parts, settings, split)
    if shard_bytes is not None:
        plan = replace(plan, shard_bytes=shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_small_disk(folder, plan)
    for name, content in zip(TABLES, (pairs, images, prompts), strict=True):
        with replacing(folder / name, "wb") as file:
            pq.write_table(content, file)
    plan = replace(plan, tables={name: file_sha256(folder / name) for name in TABLES})
    plan.save(folder)
    return plan


def _tables(table: PairTable, parts: PipelineParts) -> "tuple[pa.Table, pa.Table, pa.Table]":
    """The pairs, the distinct images in the order of their first pair, the distinct captions after the empty one."""
    import pyarrow as pa

    columns = table.columns("image_0_uid", "image_1_uid", "caption", "ranking_id", "__key__")
    records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    # Images without a name are all distinct.
    uids = [columns.get(f"image_{side}_uid") or [None] * len(table) for side in (0, 1)]
    names = [uids[side][index] or f"row {row}, image {side}" for index, row in enumerate(table.rows) for side in (0, 1)]
    encoded = pa.array(names).dictionary_encode()
    # `codes` has the image at both sides of pair 0, then of pair 1, …: a dictionary numbers names by first occurrence,
    # so an image's code is its record in the cache, and half of where a code first occurs is the pair it comes from.
    codes = encoded.indices.to_numpy()
    first = np.unique(codes, return_index=True)[1]
    images = {"name": encoded.dictionary, "row": table.rows[first // 2], "side": (first % 2).astype(np.int8)}
    side_0, chosen_side = 2 * np.arange(len(table)), table.chosen_side.astype(np.int64)

    captions = pa.array(["", *columns["caption"]]).dictionary_encode()
    truncated = [parts.tokenize(caption)[1] for caption in captions.dictionary.to_pylist()]
    prompts = {"caption": captions.dictionary, "truncated": truncated}

    pairs = {
        "row": table.rows,
        "pair_id": [pair_id(record, int(row)) for record, row in zip(records, table.rows, strict=True)],
        "chosen_image": codes[side_0 + chosen_side].astype(np.int64),
        "rejected_image": codes[side_0 + 1 - chosen_side].astype(np.int64),
        "prompt": captions.indices.to_numpy()[1:].astype(np.int64),
    }
    if (scores := table.scores) is not None:
        pairs |= {"chosen_score": scores[0], "rejected_score": scores[1]}
    return pa.table(pairs), pa.table(images), pa.table(prompts)


def _plan(
    table: PairTable,
    pairs: "pa.Table",
    images: "pa.Table",
    prompts: "pa.Table",
    parts: PipelineParts,
    settings: Config,
    split: Split,
) -> ExamplePlan:
    """A new cache's plan, but for the checksums of its tables."""
    return ExamplePlan(
        key=example_key(settings, split),
        fingerprint=_fingerprints(table)[0],
        counts=table.counts.by_name(),
        num_pairs=len(table),
        num_images=len(images),
        num_prompts=len(prompts),
        latent_shape=(
            2 if settings.data.horizontal_flip and not split.is_held_out else 1,
            2 if settings.data.sample_latents else 1,
            *parts.latent_shape(settings.data.resolution),
        ),
        conditioning_shapes=parts.family.conditioning_shapes(parts),
        scaling_factor=parts.vae.config.scaling_factor,
        shift_factor=parts.vae.config.shift_factor or 0.0,
        dtype={"fp16": "float16", "fp32": "float32"}[settings.cache.dtype],
        has_scores="chosen_score" in pairs.column_names,
        has_sizes="size_conditioning" in parts.family.keys,
        sources=file_states(local_files(split.source(settings))),
    )


def _refuse_small_disk(folder: Path, plan: ExamplePlan) -> None:
    needed, free = sum(shards.num_bytes for shards in plan.shards(folder)), shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(
            f"cache.examples: {folder} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; make room, "
            "name another disk, or halve it by data.horizontal_flip=false or data.sample_latents=false"
        )


_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))


def _estimate(folder: Path, plan: ExamplePlan, kinds: list[Kind], num_processes: int) -> str:
    """A line with a cache's gigabytes and hours. One batch of each kind is timed, after another that warms up."""
    seconds = 0.0
    for kind in kinds if kinds[0].copies is None else ():
        unfinished = kind.unfinished()
        one_batch = list(range(min(kind.batch_size, kind.count)))
        for _ in range(2 if unfinished else 0):
            start = time.perf_counter()
            list(kind.encoded(one_batch))
            elapsed = time.perf_counter() - start
        if unfinished:
            missing = sum(len(kind.records_of(shard)) for shard in unfinished)
            seconds += missing * elapsed / len(one_batch) / num_processes
    latents, text = (kind.num_bytes / 1e9 for kind in kinds)
    size, unit = next((size, unit) for size, unit in _UNITS if seconds >= size or size == 1)
    time_needed = f"about {seconds / size:,.1f} {unit} from here on (one batch timed, decoding included)"
    if (copies := kinds[0].copies) is not None:
        count = len(copies.images.before(int(copies.rows[-1]) + 1))
        time_needed = f"from {count:,} remote files, {'kept' if copies.keep else 'each let go when encoded'}"
    return (
        f"example cache in {folder}: {plan.num_images:,} images, {plan.num_prompts:,} captions of {plan.num_pairs:,} "
        f"pairs; {latents:.3g} GB of latents, {text:.3g} GB of text states; {time_needed}"
    )
