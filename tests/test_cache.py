"""Caches on disk: what they hold, what they refuse, what a kill costs. (test_train: training from them is the same.)"""

import errno
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import encoded_image, failing, held_elsewhere, pick_a_pic_row, write_pick_a_pic
from forks import fork
from tolerances import ELEMENT, assert_same_output

from xdpo import families, precompute
from xdpo.batch import LatentMoments
from xdpo.cache import CachedPairDataset, CacheError, ExampleCache, ExamplePlan, ReferenceCache, Shards
from xdpo.cache.examples import finish
from xdpo.compute import build_accelerator
from xdpo.config import ConfigError, load_config
from xdpo.data import DataError, PairDataset, Split, load_pairs, weigh_pairs
from xdpo.families import PipelineParts
from xdpo.files import StorageError

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


# --- shards --------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Ten records of two parts in three files."""
    shards = Shards(tmp_path, "latents", count=10, shape=(2, 3), dtype="float32", per_shard=4)
    values = np.arange(60, dtype=np.float32).reshape(10, 2, 3)
    for shard in range(3):
        shards.write(shard, values[list(shards.records_of(shard))], unreadable=[9] if shard == 2 else [])
    return shards


def reopened(shards):
    return Shards(
        shards.folder, shards.name, count=shards.count, shape=shards.shape, dtype="float32", per_shard=shards.per_shard
    )


def test_records_come_back_part_by_part(shards):
    assert len(shards) == 3
    assert reopened(shards).read(5, 1).tolist() == [33, 34, 35]
    assert reopened(shards).read(9, 0).tolist() == [54, 55, 56]
    assert shards.unreadable() == [9]
    reopened(shards).verify()


def test_a_flipped_byte_is_named_when_its_record_is_read_and_by_verify(shards):
    content = bytearray(shards.path(1).read_bytes())
    content[-1] ^= 1  # the last part of record 7
    shards.path(1).write_bytes(content)
    again = reopened(shards)
    assert again.read(7, 0).tolist() == [42, 43, 44]
    with pytest.raises(CacheError, match=r"latents_00001\.npy is damaged: record 7 .*remove latents_00001\.json"):
        again.read(7, 1)
    with pytest.raises(CacheError, match=r"latents_00001\.npy is damaged"):
        reopened(shards).verify()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "latents_00001.npy is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "latents_00001.npy is cut or damaged"),
        (lambda path: path.write_bytes(b"not numpy"), "latents_00001.npy is cut or damaged"),
        (
            lambda path: np.save(path, np.zeros((3, 2, 3), np.float32)),
            r"holds \(3, 2, 3\) float32, expected \(4, 2, 3\)",
        ),
        (lambda path: np.save(path, np.zeros((4, 2, 3), np.float16)), "float16, expected"),
    ],
)
def test_a_missing_cut_or_foreign_file_is_named_at_opening(shards, damage, message):
    damage(shards.path(1))
    with pytest.raises(CacheError, match=message):
        reopened(shards).check_files()


def test_a_shard_without_checksums_is_not_finished(shards):
    shards.checksum_path(0).unlink()
    assert [shards.is_finished(shard) for shard in range(3)] == [False, True, True]
    with pytest.raises(CacheError, match="the cache isn't finished"):
        reopened(shards).read(0)


def test_a_full_disk_leaves_no_half_file_and_says_so(shards, full_disk):
    before = sorted(path.name for path in shards.folder.iterdir())
    with pytest.raises(StorageError, match=r"could not write .*latents_00000\.npy: the disk is full .* make room"):
        shards.write(0, np.zeros((4, 2, 3), np.float32))
    assert sorted(path.name for path in shards.folder.iterdir()) == before


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, "too many files are open"),
        (errno.EIO, "input/output error"),
        (errno.ESTALE, "the network storage does not answer"),
    ],
)
def test_storage_that_fails_is_not_taken_for_damage(shards, monkeypatch, number, words):
    again, known = reopened(shards), reopened(shards)
    known.read(5)
    monkeypatch.setattr("io.open", failing(number))
    monkeypatch.setattr("builtins.open", failing(number))
    for use in (again.check_files, again.unreadable, lambda: known.read(6)):
        with pytest.raises(StorageError, match=rf"could not read .*0[01]\.(npy|json): .*{words}") as raised:
            use()
        assert "remove" not in str(raised.value) and "damaged" not in str(raised.value)


def test_input_output_errors_within_a_file_have_words_too(shards, monkeypatch):
    class Failing(io.BytesIO):
        readinto = read = failing(errno.EIO)

    monkeypatch.setattr("builtins.open", lambda *_, **__: Failing())
    again = reopened(shards)
    with pytest.raises(StorageError, match=r"could not read .*latents_00001\.npy: .*input/output error"):
        again.read(5)


def test_a_file_cut_after_the_check_is_damage(shards):
    again = reopened(shards)
    again.check_files()
    os.truncate(shards.path(1), shards.path(1).stat().st_size - 4)
    assert again.read(7, 0).tolist() == [42, 43, 44]
    with pytest.raises(CacheError, match=r"latents_00001\.npy is cut or damaged"):
        again.read(7, 1)


FEW_FILES = """
import pickle, resource, sys
from pathlib import Path
from xdpo.cache import Shards

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
names = ("latents", "text", "held_out_latents", "held_out_text")
kinds = [Shards(Path(sys.argv[1]), name, count=200, shape=(1, 1), dtype="float32", per_shard=1) for name in names]
for kind in kinds:
    kind.check_files()
for kind in (*kinds, *pickle.loads(pickle.dumps(kinds))):
    assert [kind.read(record).item() for record in range(200)] == list(range(200))
    kind.verify()
"""


def test_caches_of_more_files_than_may_be_open_are_read(tmp_path):
    for name in ("latents", "text", "held_out_latents", "held_out_text"):
        for shard in range(200):
            values = np.full((1, 1, 1), shard, dtype=np.float32)
            np.save(tmp_path / f"{name}_{shard:05d}.npy", values)
            checksums = {"crc32": [[zlib.crc32(values)]], "unreadable": []}
            (tmp_path / f"{name}_{shard:05d}.json").write_text(json.dumps(checksums))
    subprocess.run([sys.executable, "-c", FEW_FILES, str(tmp_path)], check=True, cwd=ROOT)


def test_shards_are_pickled_without_what_they_hold(shards):
    shards.read(5)
    assert len(pickle.dumps(shards)) < 1000
    assert pickle.loads(pickle.dumps(shards)).read(5, 1).tolist() == [33, 34, 35]


# --- the reference's errors ----------------------------------------------------------------------------


def test_errors_come_back_in_any_batch_and_from_several_writers(tmp_path):
    one, other = ReferenceCache(tmp_path, {"seed": 0}), ReferenceCache(tmp_path, {"seed": 0})
    one.record([0, 1], torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
    other.record(torch.tensor([5, 2]), torch.tensor([[0.5, 0.6], [0.7, 0.8]]))
    for cache in (one, other):
        cache.close()

    again = ReferenceCache(tmp_path, {"seed": 0})
    assert torch.equal(again.get([2, 0, 5], CPU), torch.tensor([[0.6, 0.1, 0.5], [0.8, 0.3, 0.7]]))
    assert len(again) == 4
    assert (
        again.has(range(0, 3)) and not again.has(range(0, 4)) and not again.has(range(5, 7)) and again.has(range(7, 7))
    )
    assert again.get([2, 3], CPU) is None and again.get([600], CPU) is None


def test_another_key_is_another_folder(tmp_path):
    one = ReferenceCache(tmp_path, {"seed": 0, "noise": {"shared_by_pair": True}})
    one.record([0], torch.zeros(2, 1))
    assert len(ReferenceCache(tmp_path, {"seed": 1, "noise": {"shared_by_pair": True}})) == 0
    assert len(ReferenceCache(tmp_path, {"noise": {"shared_by_pair": True}, "seed": 0})) == 1
    assert json.loads((one.folder / "key.json").read_text()) == {"seed": 0, "noise": {"shared_by_pair": True}}


def test_errors_that_are_not_finite_are_not_kept(tmp_path):
    cache = ReferenceCache(tmp_path, {})
    cache.record([0, 1], torch.tensor([[float("nan"), 1.0], [1.0, 2.0]]))
    assert cache.get([0], CPU) is None
    assert cache.get([1], CPU).tolist() == [[1.0], [2.0]]


def test_a_block_that_a_kill_cut_counts_as_absent_and_a_flipped_byte_is_refused(tmp_path):
    cache = ReferenceCache(tmp_path, {})
    cache.record([0, 1], torch.ones(2, 2))
    cache.record([2, 3], torch.ones(2, 2))
    cache.close()
    (path,) = cache.folder.glob("errors-*.bin")
    whole = path.read_bytes()
    for length in range(len(whole) // 2, len(whole)):
        path.write_bytes(whole[:length])
        assert len(ReferenceCache(tmp_path, {})) == 2
    path.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    with pytest.raises(CacheError, match=r"errors-.*\.bin is damaged at byte 0; remove the file"):
        ReferenceCache(tmp_path, {})


def errors_file(*blocks):
    """What a process writes: a block for each list of (position, chosen, rejected)."""
    content = b""
    for block in blocks:
        records = b"".join(struct.pack("<qff", *record) for record in block)
        content += struct.pack("<4sII", b"xref", len(block), zlib.crc32(records)) + records
    return content


def test_blocks_of_any_sizes_are_read_whole_up_to_a_cut_and_every_flipped_byte_is_found(tmp_path):
    cache = ReferenceCache(tmp_path, {})
    path = cache.folder / "errors-0.bin"
    sizes = [1, 1, 1, 2, 3, 3, 0, 1, 1, 1, 1, 1, 2]
    ends, blocks, position = [], [], 0
    for size in sizes:
        blocks.append([(position + place, position + place, -1.0) for place in range(size)])
        position += size
        ends.append(len(errors_file(*blocks)))
    content = errors_file(*blocks)
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = sum(sizes[: sum(end <= length for end in ends)])
        again = ReferenceCache(tmp_path, {})
        assert len(again) == whole
        if whole:
            assert again.get(range(whole), CPU).tolist() == [list(map(float, range(whole))), [-1.0] * whole]
    last_count = range(ends[-2] + 4, ends[-2] + 8)  # a last block that says it is longer looks like one that was cut
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x80]) + content[place + 1 :])
        if place in last_count:
            assert len(ReferenceCache(tmp_path, {})) == sum(sizes[:-1])
        else:
            with pytest.raises(CacheError, match=r"errors-0\.bin is damaged at byte"):
                ReferenceCache(tmp_path, {})


def test_a_million_and_a_half_blocks_are_read_and_a_flipped_byte_among_them_is_found(tmp_path):
    cache = ReferenceCache(tmp_path, {})
    path = cache.folder / "errors-0.bin"
    distinct = 15_000
    some = errors_file(*([(position, position / 7, position)] for position in range(distinct)))
    content = bytearray(some * 100)
    path.write_bytes(content)
    again = ReferenceCache(tmp_path, {})
    expected = torch.stack([torch.arange(distinct, dtype=torch.float64) / 7, torch.arange(distinct)]).float()
    assert len(again) == distinct and torch.equal(again.get(range(distinct), CPU), expected)
    block = 1_234_567
    content[28 * block + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheError, match=f"is damaged at byte {28 * block}; remove the file"):
        ReferenceCache(tmp_path, {})


def test_processes_that_open_a_cache_at_the_same_moment_do_not_hinder_one_another(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 42)  # as in containers on several machines
    failed, at_once = [], threading.Barrier(4)

    def open_all():
        try:
            for number in range(20):
                at_once.wait()
                ReferenceCache(tmp_path, {"seed": number})
        except Exception as error:
            failed.append(error)
            at_once.abort()

    threads = [threading.Thread(target=open_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.fixture
def read_only(monkeypatch):
    """Call it, and files can only be read from then on."""

    def writes(path, mode="r", *_, **__):
        return isinstance(mode, str) and set(mode) & set("wax+")

    def start():
        monkeypatch.setattr("io.open", failing(errno.EROFS, open, writes))
        for name in ("os.mkdir", "os.replace", "os.rename", "os.unlink"):
            monkeypatch.setattr(name, failing(errno.EROFS))
        monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)

    return start


def test_a_reference_cache_on_read_only_storage_is_read_and_refuses_to_record(tmp_path, read_only):
    cache = ReferenceCache(tmp_path, {"seed": 0})
    cache.check_writable()
    cache.record([0, 1], torch.ones(2, 2))
    cache.close()
    read_only()
    again = ReferenceCache(tmp_path, {"seed": 0})
    assert again.has(range(2))
    with pytest.raises(StorageError, match=r"cache\.reference: no permission to write .* read-only"):
        again.check_writable()
    with pytest.raises(StorageError, match="the file system is read-only"):
        again.record([2], torch.ones(2, 1))
    with pytest.raises(StorageError, match="the file system is read-only"):
        ReferenceCache(tmp_path, {"seed": 1})


def test_a_full_disk_is_said_of_errors_at_once_and_at_the_end(tmp_path, monkeypatch):
    cache = ReferenceCache(tmp_path, {})
    monkeypatch.setattr("xdpo.cache.reference.Path.open", lambda *_: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(StorageError, match="the disk is full"):
        cache.record([0], torch.ones(2, 1))
    assert cache.get([0], CPU) is None
    monkeypatch.undo()

    cache = ReferenceCache(tmp_path, {})
    cache.record([0], torch.ones(2, 1))
    monkeypatch.setattr("os.fsync", failing(errno.EDQUOT))  # network storage looks no sooner
    with pytest.raises(StorageError, match="the disk is full"):
        cache.close()


# --- examples ------------------------------------------------------------------------------------------


COLOURS = {"a": "red", "b": "lime", "c": "blue", "d": "white", "e": "pink"}


def rows_with_shared_images():
    """Five pairs of six images, one of them unreadable, and two captions."""
    images = {name: encoded_image(colour) for name, colour in COLOURS.items()}
    images["x"] = b"no image"
    pairs = [("a", "b", "one"), ("b", "c", "one"), ("d", "a", "two"), ("x", "e", "two"), ("e", "d", "one")]
    return [
        pick_a_pic_row(
            number,
            image_0_uid=left,
            image_1_uid=right,
            jpg_0=images[left],
            jpg_1=images[right],
            caption=caption,
            label_0=float(number % 2),
            label_1=1.0 - number % 2,
            score_0=0.3 * number,
            score_1=0.7,
        )
        for number, (left, right, caption) in enumerate(pairs)
    ]


@pytest.fixture
def world(small_pipeline, tmp_path, monkeypatch):
    """Settings, table, parts and accelerator of a run over rows_with_shared_images."""
    monkeypatch.chdir(ROOT)
    path = write_pick_a_pic(tmp_path / "train.parquet", rows_with_shared_images())
    return World(small_pipeline, path, tmp_path / "cache")


class World:
    def __init__(self, pipeline, path, folder, *overrides):
        self.overrides = [
            f"model.pipeline={pipeline}",
            f"data.path={path}",
            f"cache.examples={folder}",
            f"output_dir={folder}",
            "train.micro_batch_pairs=1",
            *("data.source=parquet", "data.resolution=16", "data.num_workers=0", "data.caption_dropout=0.5"),
            *("cache.dtype=fp32", "compute.precision=fp32", "eval.every=0", "log.trackers=[]"),
            *overrides,
        ]
        self.settings = load_config("configs/base.yaml", self.overrides)
        self.table = load_pairs(self.settings.data)
        self.parts = families.load_parts(self.settings.model)
        self.accelerator = build_accelerator(self.settings)
        self.folder = precompute.examples_folder(self.settings, Split.TRAIN)

    def changed(self, *overrides):
        return load_config("configs/base.yaml", [*self.overrides, *overrides])

    def build(self, settings=None, **options):
        precompute.build_examples(
            self.folder,
            self.table,
            self.parts,
            settings or self.settings,
            self.accelerator,
            Split.TRAIN,
            say=lambda text: None,
            **options,
        )

    def open(self, settings=None):
        return precompute.open_examples(settings or self.settings, self.accelerator, Split.TRAIN)


def test_every_distinct_image_and_caption_is_encoded_once_in_both_orientations(world):
    world.build()
    cache = world.open()
    assert (cache.plan.num_images, cache.plan.num_prompts, len(cache)) == (6, 3, 5)  # the empty caption is the third
    assert cache.plan.latent_shape == [2, 2, 4, 8, 8]
    assert cache.latents.unreadable() == [4]
    assert vars(cache.counts) == world.table.counts.by_name()
    mean, std = cache.latents.read(cache.records_of(0)[0], 0)
    batch = PairDataset(world.table, world.parts.tokenize, 0, world.settings.data, shuffle=False, augment=False).batch(
        [0]
    )
    moments = world.parts.encode_images(batch.images)
    assert_same_output(torch.tensor(mean), moments.means[0])
    assert_same_output(torch.tensor(std), moments.stds[0])


def test_batches_from_the_cache_are_those_of_the_source_encoded(world):
    world.build()
    source = PairDataset(world.table, world.parts.tokenize, 3, world.settings.data)
    cached = CachedPairDataset(world.open(), 3, world.settings.data)
    for positions in ([0, 1, 2], [3, 4], [17, 23, 8]):
        expected, found = source.batch(positions), cached.batch(positions)
        for name in ("pair_ids", "truncated", "unreadable"):
            assert getattr(found, name) == getattr(expected, name)
        for name in ("positions", "rows"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        moments = world.parts.encode_images(expected.images)
        assert_same_output(found.images.means, moments.means)
        assert_same_output(found.images.stds, moments.stds)
        assert_same_output(found.captions["text"], world.parts.encode_captions(expected.captions)["text"])


def test_a_cache_has_the_scores_of_its_pairs_and_every_batch_the_same_weights_from_it(world):
    """One pair is unreadable: the pair that stands in for it brings its own weight."""
    world.build()
    assert world.open().scores.tobytes() == world.table.scores.tobytes()
    source = PairDataset(world.table, world.parts.tokenize, 3, world.settings.data)
    cached = CachedPairDataset(world.open(), 3, world.settings.data)
    from_source, from_cache = weigh_pairs(10.0, world.table).train, weigh_pairs(10.0, world.open()).train
    by_row = dict(zip(world.table.rows.tolist(), from_source.weights.tolist(), strict=True))
    assert len(set(by_row.values())) == 5
    batch, again = source.batch(range(5)), cached.batch(range(5))
    assert batch.unreadable == [3]
    weights = from_source.get(batch.rows, CPU)
    assert weights.tolist() == [by_row[row] for row in batch.rows.tolist()]
    assert torch.equal(weights, from_cache.get(again.rows, CPU))


def test_a_cache_from_before_scores_is_read_as_ever_and_refused_where_they_are_asked_for(world, monkeypatch):
    world.build()
    plan, table = json.loads((world.folder / "plan.json").read_text()), world.folder / "pairs.parquet"
    pq.write_table(pq.read_table(table).drop_columns(["chosen_score", "rejected_score"]), table)
    del plan["has_scores"]
    (world.folder / "plan.json").write_text(json.dumps(plan))
    finish(world.folder, ExamplePlan.load(world.folder))
    assert world.open().scores is None
    assert len(CachedPairDataset(world.open(), 3, world.settings.data).batch([0, 1]).rows) == 2
    monkeypatch.setattr(precompute.build, "load_parts", lambda *_: pytest.fail("weights were loaded"))
    precompute.build_missing_examples(world.settings, world.accelerator)
    weighted = world.changed("loss.margin_weight=10")
    for _ in ("finished", "begun"):
        with pytest.raises(DataError, match=r"the training pairs have none .*remove the folder, and it is made again"):
            precompute.build_missing_examples(weighted, world.accelerator)
        (world.folder / "manifest.json").unlink(missing_ok=True)


def test_a_cache_from_when_captions_had_one_entry_is_read_as_ever(world):
    world.build()
    expected = CachedPairDataset(world.open(), 3, world.settings.data).batch([0, 1, 2])
    plan = json.loads((world.folder / "plan.json").read_text())
    plan["text_shape"] = [1, *plan.pop("conditioning_shapes")["text"]]
    (world.folder / "plan.json").write_text(json.dumps(plan))
    finish(world.folder, ExamplePlan.load(world.folder))
    found = CachedPairDataset(world.open(), 3, world.settings.data).batch([0, 1, 2])
    assert torch.equal(found.captions["text"], expected.captions["text"])


def test_the_references_errors_do_not_depend_on_the_weights_of_margins(world):
    keys = [
        precompute.reference_key(settings, world.table, split, precision="no")
        for settings in (world.settings, world.changed("loss.margin_weight=10"))
        for split in Split
    ]
    assert keys[:2] == keys[2:]


@pytest.mark.parametrize(
    ("change", "trained", "held_out"),
    [
        ("compute.attention=eager", True, True),
        ("compute.channels_last=true", True, True),
        ("compute.tf32=false", True, True),
        ("compute.deterministic=true", True, True),
        ("compute.compile=true", True, False),  # evaluation runs as written
        ("compute.gradient_checkpointing=true", False, False),  # the same forward
        ("model.trainable=lora", False, False),  # whose reference is the same UNet
    ],
)
def test_the_references_errors_are_those_of_its_kernels(world, change, trained, held_out):
    for split, differs in ((Split.TRAIN, trained), (Split.HELD_OUT, held_out)):
        one, other = (
            precompute.reference_key(settings, world.table, split, precision="no")
            for settings in (world.settings, world.changed(change))
        )
        assert (one != other) == differs


def test_a_compiled_references_errors_are_those_of_the_policys_graph(world):
    ways = ("model.lora_rank=4", "model.trainable=lora", "compute.gradient_checkpointing=true")
    keys = [
        precompute.reference_key(
            world.changed("compute.compile=true", *ways[:count]), world.table, Split.TRAIN, precision="no"
        )
        for count in range(4)
    ]
    assert keys[0] == keys[1] != keys[2] != keys[3]


def test_the_references_errors_on_another_device_or_on_other_examples_are_others(world, monkeypatch):
    world.build()

    def key():
        return precompute.reference_key(world.settings, world.open(), Split.TRAIN, precision="no")

    first = key()
    assert key() == first
    monkeypatch.setattr(precompute.keys, "device_kind", lambda: "cuda 8.9")
    assert key() != first
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    cache = world.open()
    cache.latents.write(0, np.array(np.load(cache.latents.path(0)))[::-1].copy(), unreadable=[4])
    finish(world.folder, cache.plan)
    assert key() != first


def test_a_finished_cache_of_another_precision_is_used_and_said_and_a_begun_one_is_not_mixed(world, capsys):
    world.build()
    bf16 = world.changed("compute.precision=bf16")

    def note(settings):
        cache = precompute.open_pairs(settings, world.accelerator, Split.TRAIN)
        assert len(cache) == 5
        return capsys.readouterr().out

    assert note(world.settings) == ""
    assert "encoded in fp32, this run would in bf16" in note(bf16)
    (world.folder / "manifest.json").unlink()
    with pytest.raises(CacheError, match="encoders' precision: fp32 in the cache, bf16 in this run"):
        world.build(bf16)

    # One from before the precision was noted.
    plan = json.loads((world.folder / "plan.json").read_text())
    del plan["key"]["encoders' precision"]
    (world.folder / "plan.json").write_text(json.dumps(plan))
    world.build(bf16)
    assert "encoded in a precision that was not noted, this run would in fp32" in note(world.settings)


def test_half_precision_means_without_mirror_images_take_a_quarter_of_the_room(world):
    world.settings = world.changed("cache.dtype=fp16", "data.horizontal_flip=false", "data.sample_latents=false")
    world.build()
    cache = world.open()
    assert cache.plan.latent_shape == [1, 1, 4, 8, 8]
    batch = CachedPairDataset(cache, 0, world.settings.data).batch([0, 1])
    assert batch.images.means.dtype == torch.float16 and batch.images.stds is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("data.resolution=8", "data.resolution: 16 in the cache, 8 in this run"),
        ("data.horizontal_flip=false", "mirrored images: True in the cache, False"),
        ("data.sample_latents=false", "posterior: mean and standard deviation in the cache, mean"),
        ("cache.dtype=fp16", "cache.dtype: fp32 in the cache, fp16"),
        ("data.max_pairs=3", "data.max_pairs: None in the cache, 3"),
    ],
)
def test_a_cache_of_something_else_is_refused_naming_what_differs(world, change, named):
    world.build()
    with pytest.raises(CacheError, match=named):
        world.open(world.changed(change))


def test_a_cache_of_another_autoencoder_or_text_encoder_is_refused(world, tmp_path):
    world.build()
    other = shutil.copytree(world.settings.model.pipeline, tmp_path / "other")
    for name in ("vae", "text_encoder"):
        settings = json.loads((other / name / "config.json").read_text())
        (other / name / "config.json").write_text(json.dumps(settings | {"note": "changed"}))
    with pytest.raises(CacheError, match=r"autoencoder: (?s:.*)text encoder: "):
        world.open(world.changed(f"model.pipeline={other}"))


def test_an_unfinished_cache_other_pairs_and_a_folder_of_something_else_are_refused(world, tmp_path):
    with pytest.raises(CacheError, match="holds no finished cache"):
        world.open()
    world.folder.mkdir(parents=True)
    (world.folder / "holiday.jpg").write_text("")
    with pytest.raises(CacheError, match="holds something that is no cache"):
        world.build()
    (world.folder / "holiday.jpg").unlink()
    world.build()
    (world.folder / "manifest.json").unlink()
    rows = [row | {"caption": "changed"} for row in rows_with_shared_images()]
    write_pick_a_pic(Path(world.settings.data.path), rows)
    world.table = load_pairs(world.settings.data)
    with pytest.raises(CacheError, match="begun with other pairs"):
        world.build()


@pytest.mark.parametrize("name", ["pairs.parquet", "plan.json", "manifest.json", "latents_00000.json"])
def test_a_damaged_small_file_is_named(world, name):
    world.build()
    content = bytearray((world.folder / name).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (world.folder / name).write_bytes(content)
    with pytest.raises(CacheError, match=f"{name} is damaged"):
        world.open()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_encoded(world, monkeypatch):
    monkeypatch.setattr(PipelineParts, "encode_images", lambda *_: pytest.fail("an image was encoded"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 100}))
    with pytest.raises(CacheError, match=r"make room, name another disk, or halve it by data\.horizontal_flip=false"):
        world.build()


def test_latents_that_are_not_finite_are_refused(world, monkeypatch):
    broken = LatentMoments(torch.full((2, 4, 8, 8), float("nan")), torch.zeros(2, 4, 8, 8), 1.0)
    monkeypatch.setattr(PipelineParts, "encode_images", lambda parts, pixels: broken)
    with pytest.raises(CacheError, match=r"not finite .* set compute\.precision to bf16 or fp32"):
        world.build()


def test_what_a_failure_interrupted_goes_on_and_only_the_shard_in_work_is_computed_twice(world, monkeypatch):
    shard_bytes = 2 * 2 * 2 * 4 * 8 * 8 * 4  # two images
    encode, encoded = PipelineParts.encode_images, []

    def counting(parts, pixels):
        if len(encoded) == 4:
            encoded.append("failed")
            raise KeyboardInterrupt
        encoded.append(len(pixels) // 2)
        return encode(parts, pixels)

    monkeypatch.setattr("xdpo.precompute.build._estimate", lambda *_: "")
    monkeypatch.setattr(PipelineParts, "encode_images", counting)
    with pytest.raises(KeyboardInterrupt):
        world.build(shard_bytes=shard_bytes)
    world.build()
    assert encoded == [1, 1, 1, 1, "failed", 1, 1]  # shards of two: the second was whole, the third begun
    cache = world.open()
    again = precompute.verify_examples(cache, world.table, world.parts, world.settings, world.accelerator)
    assert max(again.values()) < ELEMENT


@pytest.mark.slow
def test_the_builder_killed_at_any_moment_goes_on_to_a_cache_that_verifies(world):
    """SIGKILL after every further shard of a real process, until it finishes."""
    settings = world.settings
    program = (
        "import sys; sys.path.append('tests'); from test_cache import World\n"
        f"World({settings.model.pipeline!r}, {settings.data.path!r}, {settings.cache.examples!r})"
        ".build(shard_bytes=2048)"
    )
    kills = 0
    while kills < 3:
        before = len(list(world.folder.glob("latents_*.json")))
        process = fork(program, [], os.devnull)
        while process.is_alive() and len(list(world.folder.glob("latents_*.json"))) == before:
            time.sleep(0.005)
        process.kill()
        kills += 1
        process.join()
    world.build()
    cache = world.open()
    assert len(cache.latents) == 6
    again = precompute.verify_examples(cache, world.table, world.parts, world.settings, world.accelerator)
    assert max(again.values()) < ELEMENT


def test_verify_finds_latents_of_another_image(world):
    world.build()
    cache = world.open()
    values = np.array(np.load(cache.latents.path(0)))
    cache.latents.write(0, values[::-1].copy(), unreadable=[4])
    finish(world.folder, cache.plan)  # every checksum fits what is there
    with pytest.raises(CacheError, match="latents encoded again differ by"):
        precompute.verify_examples(world.open(), world.table, world.parts, world.settings, world.accelerator)


def test_a_local_copy_is_read_and_an_interrupted_one_goes_on(world, tmp_path):
    world.build()
    local = tmp_path / "local"
    (local / "train").mkdir(parents=True)
    (local / "train" / "latents_00000.npy").write_bytes(b"half")
    settings = world.changed(f"cache.local_copy={local}")
    cache = world.open(settings)
    assert isinstance(cache, ExampleCache) and cache.folder == local / "train"
    cache.latents.verify()


def test_a_local_copy_of_a_cache_that_was_made_anew_is_refused(world, tmp_path):
    """The settings are the same, the images are not."""
    world.build()
    settings = world.changed(f"cache.local_copy={tmp_path / 'local'}")
    world.open(settings)
    shutil.rmtree(world.folder)
    world.open(settings)  # the copy alone will do
    rows = rows_with_shared_images()
    write_pick_a_pic(Path(world.settings.data.path), [row | {"jpg_0": encoded_image("navy")} for row in rows])
    world.table = load_pairs(world.settings.data)
    world.build()
    with pytest.raises(
        CacheError, match=r"cache\.local_copy: .*local/train is not a copy of .*cache/train as it is now"
    ):
        world.open(settings)
    shutil.rmtree(tmp_path / "local")
    assert world.open(settings).plan.fingerprint == world.table.fingerprint


def test_encoding_into_a_folder_where_another_encodes_is_refused(world):
    with (
        held_elsewhere(world.folder, "encoding examples") as holder,
        pytest.raises(StorageError, match=f"is in use: encoding examples, process {holder.pid} on "),
    ):
        precompute.build_missing_examples(world.settings, world.accelerator)
    precompute.build_missing_examples(world.settings, world.accelerator)
    world.open()


def test_a_start_that_failed_binds_a_caches_folder_to_nothing(world, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("xdpo.precompute.build.load_parts", failing(errno.EIO))
        with pytest.raises(OSError):
            precompute.build_missing_examples(world.settings, world.accelerator)
    other = world.changed("data.horizontal_flip=true", "cache.dtype=fp16")
    precompute.build_missing_examples(other, world.accelerator)
    assert world.open(other).plan.has_scores


def test_a_full_disk_is_said_of_a_caches_shards_and_of_a_local_copy(world, tmp_path, monkeypatch, request):
    world.build()
    request.getfixturevalue("full_disk")
    with pytest.raises(StorageError, match=r"could not write .*local/train/\S+: the disk is full"):
        world.open(world.changed(f"cache.local_copy={tmp_path / 'local'}"))
    shutil.rmtree(world.folder)
    with pytest.raises(StorageError, match=r"could not write .*cache/train/\S+: the disk is full"):
        world.build()


def test_caches_may_be_read_by_whom_the_umask_lets(world, tmp_path):
    before = os.umask(0o027)
    try:
        world.build()
        world.open(world.changed(f"cache.local_copy={tmp_path / 'local'}"))
    finally:
        os.umask(before)
    made = [path for folder in (world.folder, tmp_path / "local") for path in folder.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o640}


def test_a_cache_as_a_source_of_pairs_is_refused_in_words(world):
    """Its own tables are parquet files too, without images."""
    world.build()
    pairs = world.changed(f"data.path={world.folder / 'pairs.parquet'}", "cache.examples=").data
    with pytest.raises(DataError, match=r"pairs\.parquet lacks the columns caption, jpg_0"):
        load_pairs(pairs)


def test_random_crops_can_not_be_cached(tmp_path):
    with pytest.raises(ConfigError, match=r"cache\.examples holds one crop"):
        load_config(str(ROOT / "configs/base.yaml"), ["cache.examples=x", "data.crop=random"])
