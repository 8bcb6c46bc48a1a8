"""Caches filled from remote files: what is in them, what a bad network costs, and what lies on the disk meanwhile.

The suite kills those who fill them a few times. More often:

    XDPO_KILLS=20 python -m pytest tests/test_streaming.py -q -m slow
"""

import json
import os
import pickle
import random
import tarfile
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded_image, forget_accelerators, pick_a_pic_row, write_pick_a_pic
from file_server import serving
from forks import fork, launch, ranks
from test_in_place import write_tars
from training_runs import ROOT

from xdpo import families, precompute
from xdpo.cache import CacheError
from xdpo.compute import build_accelerator
from xdpo.config import load_config
from xdpo.data import DataError, Split, load_pairs, remote, sources, streaming
from xdpo.data.remote import Remote, RemoteError, State

KILLS = int(os.environ.get("XDPO_KILLS", 5))
FILES = 6
SHARD_BYTES = 2 * 4 * 8 * 8 * 2 * 3  # three images without mirror images


def rows_of_file(number):
    """Four pairs; images recur in later files, one can't be decoded, and the fourth file has ties alone."""
    rows = []
    for row in range(4 * number, 4 * number + 4):
        left, right = row, (row - 3) % 24
        images = [b"no image" if uid == 4 else encoded_image((uid * 10, 255 - uid * 9, 40)) for uid in (left, right)]
        changes = {"jpg_0": images[0], "jpg_1": images[1], "image_0_uid": f"u{left}", "image_1_uid": f"u{right}"}
        rows.append(pick_a_pic_row(row, **changes, caption=f"photo {row % 3}", label_0=row % 2, label_1=1 - row % 2))
        if number == 3:
            rows[-1] |= {"label_0": 0.5, "label_1": 0.5, "image_0_uid": f"t{row}"}
    return rows


def write_files(folder):
    for number in range(FILES):
        write_pick_a_pic(folder / f"train-{number}.parquet", rows_of_file(number))
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(remote, "FETCHED_AT_ONCE", 1500)
    write_files(tmp_path / "data")
    with serving(tmp_path / "data") as server:
        yield server


@pytest.fixture
def fill(small_pipeline, tmp_path):
    """fill(name, paths, "key=value", …): fill the cache of this name; returns its folder."""

    def call(name, paths, *overrides):
        forget_accelerators()
        return fill_cache(small_pipeline, paths, tmp_path / name, *overrides)

    return call


@pytest.fixture(scope="module")
def expected(small_pipeline, tmp_path_factory):
    """What a cache of the same files holds when they are local."""
    folder = tmp_path_factory.mktemp("local")
    return content_of(fill_cache(small_pipeline, str(write_files(folder / "data")), folder / "cache"))


def fill_cache(pipeline, paths, folder, *overrides):
    settings = settings_of(pipeline, paths, folder, *overrides)
    with pytest.MonkeyPatch.context() as patched:
        build = partial(precompute.build.build_examples, shard_bytes=SHARD_BYTES)
        patched.setattr(precompute.build, "build_examples", build)
        precompute.build_missing_examples(settings, build_accelerator(settings), lambda text: None)
    return folder / "train"


def settings_of(pipeline, paths, folder, *overrides):
    return load_config(
        str(ROOT / "configs/base.yaml"),
        [
            f"model.pipeline={pipeline}",
            f"data.path={json.dumps(paths)}",
            f"cache.examples={folder}",
            *("data.source=parquet", "data.resolution=16", "data.num_workers=0", "data.horizontal_flip=false"),
            *("train.micro_batch_pairs=1", "compute.precision=fp32", "eval.every=0", "log.trackers=[]"),
            *overrides,
        ],
    )


def content_of(folder):
    """Every file of a cache; of its plan what does not name the source."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".part"}
    plan = json.loads(files.pop("plan.json"))
    del files["manifest.json"], files["lock"], plan["sources"], plan["key"]["data.path"], plan["key"]["data.source"]
    return files | {"plan": plan}


def test_a_cache_of_remote_files_is_that_of_local_ones_and_leaves_nothing_else(fill, server, expected, monkeypatch):
    assert len([name for name in expected if name.startswith("latents") and name.endswith(".npy")]) >= 5
    fetched, fetch = [], streaming.fetch
    monkeypatch.setattr(streaming, "fetch", lambda remote, path: fetched.append(remote.url) or fetch(remote, path))
    folder = fill("streamed", server.urls(), "data.num_workers=2")
    assert content_of(folder) == expected
    assert sorted(fetched) == server.urls(), "each once"
    assert not (folder / "source").exists()
    server.requests.clear()
    fill("streamed", server.urls())
    assert not server.requests, "a finished cache asks for nothing"
    kept = fill("kept", server.urls(), "cache.keep_source=true")
    assert content_of(kept) == expected
    copies = [path.read_bytes() for path in sorted((kept / "source").glob("*.shard"))]
    assert copies == [path.read_bytes() for path in sorted(server.folder.iterdir())]


def test_a_cache_of_remote_files_is_verified_by_a_sample_of_them(fill, server, small_pipeline, tmp_path):
    folder = fill("streamed", server.urls())
    settings = settings_of(small_pipeline, server.urls(), folder.parent)
    accelerator = build_accelerator(settings)
    cache = precompute.open_examples(settings, accelerator, Split.TRAIN)
    parts = families.load_parts(settings.model)

    def verify():
        table = precompute.load_table(settings, accelerator, Split.TRAIN, in_order=True)
        return precompute.verify_examples(cache, table, parts, settings, accelerator)

    again = pickle.loads(pickle.dumps(precompute.load_table(settings, accelerator, Split.TRAIN, in_order=True)))
    assert again.pair_id(3) == "1003", "as a spawned worker gets it"
    assert max(verify().values()) < 0.01  # rounded to fp16
    assert not (folder / "source").exists()
    cache.latents.write(0, np.zeros_like(np.load(cache.latents.path(0))))
    with pytest.raises(CacheError, match="encoded again differ"):
        verify()


def test_a_trial_of_a_few_pairs_fetches_the_files_that_they_are_in(fill, server, small_pipeline, tmp_path, monkeypatch):
    fetched, fetch = [], streaming.fetch
    monkeypatch.setattr(streaming, "fetch", lambda remote, path: fetched.append(remote.url) or fetch(remote, path))
    folder = fill("streamed", server.urls(), "data.max_pairs=5", "cache.keep_source=true")
    assert sorted(fetched) == server.urls()[:2]
    forget_accelerators()
    local = fill_cache(small_pipeline, str(server.folder), tmp_path / "local", "data.max_pairs=5")
    assert content_of(folder) == content_of(local)
    rows = [row | {"jpg_1": encoded_image("navy")} for row in rows_of_file(5)]
    write_pick_a_pic(server.folder / "train-5.parquet", rows)
    forget_accelerators()
    again = fill_cache(small_pipeline, str(server.folder), tmp_path / "again", "data.max_pairs=5")
    assert content_of(again) == content_of(local), "what is not used does not count"


def test_few_copies_lie_on_the_disk_at_once(fill, server, monkeypatch):
    most, let_go = [], streaming.StreamedImages.let_go

    def counted(images, is_needed):
        images.wait()  # what is fetched ahead counts
        most.append(len(list(images.files[0].place.parent.glob("*.shard"))))
        let_go(images, is_needed)

    monkeypatch.setattr(streaming.StreamedImages, "let_go", counted)
    monkeypatch.setattr(streaming, "AHEAD", 1)
    fill("streamed", server.urls())
    assert 2 <= max(most) <= 4 < FILES  # two for a shard of the cache, one ahead


def test_a_bad_network_costs_time_alone(fill, server, expected):
    for number, path in enumerate(sorted(server.folder.iterdir())):
        faults = [None, 429, 500, 503, "cut", "slow", "short", "cut", 408]
        server.faults[path.name] += faults[number:] + faults[:number]
    assert content_of(fill("streamed", server.urls())) == expected
    assert not any(server.faults.values())


def test_a_file_that_stays_broken_is_named_and_all_else_is_done(fill, server, expected, tmp_path):
    urls = server.urls()
    server.faults["train-2.parquet"] = [500] * remote.ATTEMPTS * 2
    with pytest.raises(RemoteError, match=r"(?s)1 of 6 files could not .*train-2\.parquet: the server answers 500"):
        fill("streamed", urls)  # in the first pass
    server.faults.clear()
    source = tmp_path / "streamed" / "train" / "source"
    load_pairs(settings_of("x", urls, tmp_path / "streamed").data, in_order=True, streamed_into=source)
    server.faults["train-2.parquet"] = [404] * 9
    with pytest.raises(RemoteError, match=r"(?s)1 of 6 files .*train-2\.parquet: the server answers 404.*same command"):
        fill("streamed", urls)
    done = len(list(source.parent.glob("latents_*.json")))
    assert 0 < done < len([name for name in expected if name.startswith("latents") and name.endswith(".json")])
    server.faults.clear()
    server.requests.clear()
    assert content_of(fill("streamed", urls)) == expected
    assert "train-5.parquet" not in server.requests, "done before"


def test_a_file_that_changed_since_is_refused(fill, server, tmp_path):
    urls, source = server.urls(), tmp_path / "streamed" / "train" / "source"
    load_pairs(settings_of("x", urls, tmp_path / "streamed").data, in_order=True, streamed_into=source)
    rows = [row | {"jpg_1": encoded_image("navy")} for row in rows_of_file(2)]
    before = (server.folder / "train-2.parquet").read_bytes()
    write_pick_a_pic(server.folder / "train-2.parquet", rows)
    with pytest.raises(RemoteError, match=r"train-2\.parquet is another file than when this cache was begun .*Put the"):
        fill("streamed", urls)
    (server.folder / "train-2.parquet").write_bytes(before)
    fill("streamed", urls)


def test_a_file_that_changes_while_it_is_fetched_is_refused(server, tmp_path):
    path = server.folder / "train-2.parquet"
    before = path.read_bytes()
    assert len(before) > 2 * remote.FETCHED_AT_ONCE, "several requests"
    file = Remote(f"{server.url}/{path.name}")
    assert file.read(0, 10) == before[:10]
    for changed in (before[:-1] + b"!", before[: len(before) // 2]):
        path.write_bytes(changed)
        with pytest.raises(RemoteError, match=r"train-2\.parquet is another file than when this cache was begun"):
            streaming.fetch(file, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
    path.write_bytes(before)
    streaming.fetch(file, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == before


@pytest.mark.parametrize("source", ["parquet", "webdataset"])
def test_a_file_that_is_truncated_on_the_server_is_named(server, tmp_path, source):
    suffix = {"parquet": "parquet", "webdataset": "tar"}[source]
    write_tars(server.folder, count=3, samples=3)
    urls, path = server.urls(f"*.{suffix}"), server.folder / f"train-1.{suffix}"
    settings = settings_of("x", urls, tmp_path, f"data.source={source}").data
    whole = path.read_bytes()
    middle = len(whole) // 1024 * 512
    for cut in (middle, middle + 512, middle + 700):  # of a tar between members, within one, and within a block
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"train-1\.{suffix}"):
            load_pairs(settings, in_order=True, streamed_into=tmp_path / "source")
    path.write_bytes(whole)
    table = load_pairs(settings, in_order=True, streamed_into=tmp_path / "source")
    assert table.counts.rows == {"parquet": 4, "webdataset": 3}[source] * len(urls)


def test_a_copy_that_cannot_be_read_is_named_and_fetched_again(fill, server, expected, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Remote, "fetch", lambda self, file: file.write(b"a proxy's page"))
        with pytest.raises(RemoteError, match=r"(?s)6 of 6 .*train-0\.parquet: its copy can't be read: "):
            fill("streamed", server.urls())
    assert content_of(fill("streamed", server.urls())) == expected


def test_remote_files_that_do_not_fit_are_refused_in_words(fill, server, tmp_path):
    urls = server.urls()
    with pytest.raises(DataError, match=r"train-0\.parquet is remote: .* Set cache\.examples, or download"):
        load_pairs(settings_of("x", urls, tmp_path / "c").data)
    with pytest.raises(DataError, match="mixes files here with remote ones"):
        fill("mixed", [urls[0], str(server.folder / "train-1.parquet")])
    server.faults["train-0.parquet"] = ["whole"]
    with pytest.raises(DataError, match=r"train-0\.parquet: the server does not serve parts of files"):
        fill("whole", urls)
    table = pq.read_table(server.folder / "train-1.parquet")
    pq.write_table(table.drop_columns(["jpg_1"]), server.folder / "train-1.parquet")
    with pytest.raises(DataError, match=rf"{urls[1]} lacks the columns jpg_1"):
        fill("lacking", urls)


def test_the_files_of_a_hub_data_set_are_streamed_too_and_none_that_its_cache_has(
    fill, server, expected, tmp_path, monkeypatch
):
    for path in server.folder.iterdir():  # images as the hub has them
        table = pq.read_table(path)
        for name in ("jpg_0", "jpg_1"):
            cells = pa.array([{"bytes": content, "path": "x.jpg"} for content in table[name].to_pylist()])
            table = table.set_column(table.column_names.index(name), name, cells)
        pq.write_table(table, path, row_group_size=3)
    monkeypatch.setattr(sources, "_hub_files", lambda *_: server.urls())
    assert content_of(fill("streamed", "who/pairs", "data.source=hub")) == expected

    snapshot = tmp_path / "hub" / "datasets--who--pairs" / "snapshots" / ("a" * 40)
    path = snapshot / "data" / "train-0.parquet"
    write_pick_a_pic(path, rows_of_file(0))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    url = f"hf://datasets/who/pairs@{'a' * 40}/data/train-0.parquet"
    streaming.fetch(Remote(url, State(path.stat().st_size, "x")), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()


def test_files_of_other_protocols_are_read_by_fsspec(fill, server, expected):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in sorted(server.folder.iterdir()):
        memory.pipe(f"/pairs/{path.name}", path.read_bytes())
    urls = [f"memory://pairs/{path.name}" for path in sorted(server.folder.iterdir())]
    assert content_of(fill("streamed", urls)) == expected


@pytest.mark.parametrize("keep", [False, True])
def test_a_cache_of_remote_tars_is_that_of_local_ones(fill, server, tmp_path, keep):
    write_tars(server.folder, count=3, samples=3)
    with tarfile.open(server.folder / "train-00.tar", "w"):
        pass  # an empty one
    local = content_of(fill("local", str(server.folder / "*.tar"), "data.source=webdataset"))
    for name in ("train-1.tar", "train-2.tar"):
        server.faults[name] += ["cut", 500, None, "cut"]
    options = ["data.source=webdataset", f"cache.keep_source={keep}"]
    folder = fill("streamed", server.urls("*.tar"), *options)
    assert content_of(folder) == local
    assert len(list(folder.glob("source/*.shard"))) == (4 if keep else 0)
    read = sum(server.requests["train-2.tar"])
    size = (server.folder / "train-2.tar").stat().st_size
    assert size <= read < (1 if keep else 2) * size + 4000, "once for the plan, and once more where it was let go"


def test_a_remote_tar_with_other_members_is_named(fill, server):
    write_tars(server.folder, count=2)
    (other := server.folder / "other").mkdir()
    write_tars(other, count=1, **{"jpg_0.png": None, "jpg_0.gif": encoded_image(format="GIF")})
    (other / "train-0.tar").replace(server.folder / "train-1.tar")
    with pytest.raises(DataError, match=r"/train-1\.tar: its samples hold jpg_0\.gif, but jpg_0\.png in http"):
        fill("streamed", server.urls("*.tar"), "data.source=webdataset")


FILLING = """
import sys, time
sys.path.append("tests")
from pathlib import Path
from types import SimpleNamespace
from test_streaming import fill_cache
from xdpo.families import PipelineParts
encode = PipelineParts.encode_images
PipelineParts.encode_images = lambda parts, pixels: time.sleep(0.05) or encode(parts, pixels)
fill_cache(sys.argv[1], sys.argv[3:], Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_killed_at_any_moment_go_on_to_the_same_cache(server, expected, small_pipeline, tmp_path, processes):
    """SIGKILL of all processes at once, a random time after a file has come or gone, on a network that is bad too.

    A cache that was finished before its kill begins anew in another folder.
    """
    chance, kills, folders = random.Random(processes), 0, [tmp_path / "cache 0" / "train"]

    def files():
        return {path.name for path in folders[-1].rglob("*") if path.suffix != ".part"}

    def arguments():
        return [small_pipeline, folders[-1].parent, *server.urls()]

    for _ in range(3 * KILLS):
        for url in server.urls():
            server.faults[url.rpartition("/")[2]] = [None, chance.choice([429, 500, "cut", "short", "slow"])] * 2
        before = files()
        begun = [fork(FILLING, arguments(), os.devnull, **rank) for rank in (ranks(2) if processes == 2 else [{}])]
        while files() - before <= {"lock"} and all(process.is_alive() for process in begun):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        kills += all(process.is_alive() for process in begun)
        for process in begun:
            process.kill()
            process.join()
        if kills == KILLS:
            break
        if (folders[-1] / "manifest.json").exists():
            folders.append(tmp_path / f"cache {len(folders)}" / "train")
    assert kills == KILLS
    ended = launch(FILLING, arguments(), processes)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for folder in folders:
        assert content_of(folder) == expected
    assert not (folders[-1] / "source").exists()


def test_a_copy_is_needed_until_every_encoding_of_its_images_is_there():
    """XL's caches hold sizes beside latents; a kill may fall between the two."""
    from xdpo.precompute.kinds import _Copies

    def shards(*finished):
        return SimpleNamespace(per_shard=2, is_finished=lambda number: number in finished)

    files = [SimpleNamespace(start=0, end=3), SimpleNamespace(start=3, end=9), SimpleNamespace(start=9, end=12)]
    rows = np.array([0, 1, 4, 8])  # of two shards; no image of the third file is encoded
    latents, sizes = shards(0, 1), shards(0)
    copies = _Copies(SimpleNamespace(files=files), rows, (latents, sizes), keep=False)
    assert [copies.is_needed(number) for number in range(3)] == [False, True, False]
