"""Parquet files and tars read where they lie: the same pairs as from a copy in Arrow, and no copy."""

import gzip
import io
import os
import pickle
import random
import tarfile
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded_image
from test_data import data_config, tokenize_with
from test_shards import sample

from xdpo.data import DataError, PairDataset, load_pairs, make_loader, sources
from xdpo.data.rows import ParquetImages, TarImages
from xdpo.files import StorageError


def colour(number):
    return encoded_image((number, 255 - number, 7))


def write_parquet(folder, files=3, rows=7, **options):
    """Files of pairs whose images all differ, one in ten missing."""
    for file in range(files):
        numbers = range(file * rows, (file + 1) * rows)
        table = {"caption": [f"a photo of {number % 5}" for number in numbers]}
        for side in (0, 1):
            cells = [None if (number + side) % 10 == 9 else colour(2 * number + side) for number in numbers]
            table |= {f"jpg_{side}": pa.array(cells, pa.binary()), f"label_{side}": [float(side)] * rows}
            table[f"image_{side}_uid"] = [f"{side}-{number}" for number in numbers]
        pq.write_table(pa.table(table), folder / f"train-{file:02}.parquet", **options)
    return data_config(str(folder))


def write_tars(folder, count=2, samples=4, **changes):
    for file in range(count):
        with tarfile.open(folder / f"train-{file}.tar", "w") as tar:
            for number in range(file * samples, (file + 1) * samples):
                members = {"jpg_0.png": colour(2 * number), "jpg_1.png": colour(2 * number + 1), **changes}
                members = {f"a/{number:03}.nsfw.bin": b"0" * 600, **sample(f"a/{number:03}", **members)}
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return data_config(str(folder), source="webdataset")


def by_datasets(monkeypatch, settings):
    """The pairs from a copy that `datasets` makes."""
    with monkeypatch.context() as patched:
        patched.setattr(sources, "MOST_GROUP_BYTES", 0)
        patched.setattr(sources, "tar_rows_in_place", lambda *_, **__: None)
        return load_pairs(settings)


def assert_same_pairs(found, expected):
    assert found.fingerprint == expected.fingerprint
    assert found.counts == expected.counts
    assert found.rows.tolist() == expected.rows.tolist() and found.chosen_side.tolist() == expected.chosen_side.tolist()
    names = sorted(expected.dataset.column_names)
    assert sorted(found.dataset.column_names) == names
    for row in random.Random(0).sample(range(len(expected.dataset)), len(expected.dataset)):
        assert found.dataset[row] == expected.dataset[row]


@pytest.mark.parametrize("options", [{"row_group_size": 2}, {"row_group_size": 100, "compression": "none"}])
def test_parquet_files_give_the_pairs_of_an_arrow_copy(tmp_path, monkeypatch, options):
    settings = write_parquet(tmp_path, **options)
    expected = by_datasets(monkeypatch, settings)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("copied"))
    monkeypatch.setattr("xdpo.data.rows.BATCH_ROWS", 3)
    found = load_pairs(settings)
    assert isinstance(found.dataset.images, ParquetImages)
    assert_same_pairs(found, expected)
    assert_same_pairs(load_pairs(settings, num_proc=3), expected)


def test_images_of_every_kind_of_column_are_those_of_an_arrow_copy(tmp_path, monkeypatch):
    from datasets import Dataset, Features, Image, Value

    (tmp_path / "red.png").write_bytes(encoded_image("red"))
    (folder := tmp_path / "data").mkdir()
    features = Features({"jpg_0": Image(), "jpg_1": Image(), "label_0": Value("int64"), "caption": Value("string")})
    cells = [{"bytes": encoded_image("lime")}, {"bytes": None, "path": str(tmp_path / "red.png")}, None]
    columns = {"jpg_0": cells, "jpg_1": cells[::-1], "label_0": [1, 0, 1], "caption": ["x", "y", "z"]}
    Dataset.from_dict(columns, features).to_parquet(folder / "train-0.parquet")
    settings = data_config(str(folder))
    assert_same_pairs(load_pairs(settings), by_datasets(monkeypatch, settings))
    paths = pa.table({**columns, "jpg_0": [str(tmp_path / "red.png")] * 3, "jpg_1": [colour(7)] * 3})
    pq.write_table(paths, folder / "train-0.parquet")
    found = load_pairs(settings)
    assert_same_pairs(found, by_datasets(monkeypatch, settings))
    (tmp_path / "red.png").write_bytes(colour(9))
    assert load_pairs(settings).fingerprint != found.fingerprint


@pytest.mark.parametrize("kind", ["dictionary", "view", "large", "fixed"])
def test_bytes_of_every_kind_are_measured(tmp_path, kind):
    content = [encoded_image("red"), encoded_image("lime"), encoded_image("red")]
    plain = pa.array(content, pa.binary())
    fixed = pa.array([cell.ljust(99) for cell in content], pa.binary(99))
    kinds = {"view": pa.binary_view(), "large": pa.large_binary()}
    cells = {"dictionary": plain.dictionary_encode(), "fixed": fixed} | {
        name: plain.cast(kinds[name]) for name in kinds
    }
    columns = {"jpg_0": cells[kind], "jpg_1": plain, "label_0": [1, 0, 1], "caption": ["x", "y", "z"]}
    pq.write_table(pa.table(columns), tmp_path / "train-0.parquet")
    images = load_pairs(data_config(str(tmp_path))).dataset.images
    assert [images.cell(row, 0) for row in range(3)] == cells[kind].to_pylist()
    assert images.sizes(0).tolist() == [len(cell) for cell in cells[kind].to_pylist()]


def test_tars_give_the_pairs_of_an_arrow_copy(tmp_path, monkeypatch):
    settings = write_tars(tmp_path, **{"label_0.json": b"0.5", "label_0.txt": None, "ranking_id.cls": b"7"})
    expected = by_datasets(monkeypatch, write_tars(tmp_path))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("copied"))
    found = load_pairs(settings)
    assert isinstance(found.dataset.images, TarImages)
    assert_same_pairs(found, expected)


def test_a_tar_with_a_damaged_header_does_not_end_there(tmp_path):
    settings = write_tars(tmp_path)
    path = tmp_path / "train-1.tar"
    path.write_bytes(path.read_bytes().replace(b"006.caption.txt", b"006.caption.tXt"))
    with pytest.raises(DataError, match=r"train-1\.tar: the header at byte [\d,]+ is damaged"):
        load_pairs(settings)


def test_compressed_tars_are_unpacked_as_ever(tmp_path, monkeypatch):
    settings = write_tars(tmp_path)
    expected = by_datasets(monkeypatch, settings)
    for path in tmp_path.glob("*.tar"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert_same_pairs(load_pairs(settings), expected)


def test_pairs_at_random_from_large_row_groups_are_copied_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "MOST_GROUP_BYTES", 500)
    settings = write_parquet(tmp_path)
    copied, in_place = load_pairs(settings), load_pairs(settings, in_order=True)
    assert capsys.readouterr().err.count("`datasets` makes a copy as large as the files") == 1
    assert not isinstance(copied.dataset.images, ParquetImages) and isinstance(in_place.dataset.images, ParquetImages)
    assert_same_pairs(in_place, copied)


def test_workers_read_what_their_process_reads(tmp_path, tiny_tokenizer):
    settings = write_parquet(tmp_path, row_group_size=3)
    dataset = PairDataset(load_pairs(settings), tokenize_with(tiny_tokenizer), 0, settings)
    batches = [[position, position + 1] for position in range(0, 18, 2)]
    expected = [dataset.batch(batch) for batch in batches]  # leaves readers in the middle of row groups
    for found, alone in zip(make_loader(dataset, batches, num_workers=2), expected, strict=True):
        assert (found.pair_ids, found.unreadable) == (alone.pair_ids, alone.unreadable)
        assert found.images.equal(alone.images)


def test_few_files_are_open_and_a_table_travels_without_its_rows(tmp_path):
    def opened():
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    table = load_pairs(write_parquet(tmp_path, files=40, rows=3))
    for row in range(len(table.dataset)):
        assert table.dataset[row]["caption"] == f"a photo of {row % 5}"
    assert opened() - before <= 4
    sent = pickle.dumps(table)
    assert pickle.loads(sent).dataset[70] == table.dataset[70]
    assert table.dataset[5]["caption"].encode() not in sent


@pytest.mark.parametrize("write", [partial(write_parquet, compression="none"), write_tars])
def test_a_file_that_changed_is_indexed_anew_and_one_cut_while_it_is_read_is_named(tmp_path, write):
    settings = write(tmp_path)
    first = load_pairs(settings)
    path = max(tmp_path.iterdir())
    content = path.read_bytes()
    image = first.dataset[len(first.dataset) - 1]["jpg_0"]
    image = image if isinstance(image, bytes) else image["bytes"]
    path.write_bytes(content.replace(image, image[:-4] + b"\1\2\3\4"))
    assert load_pairs(settings).fingerprint != first.fingerprint
    path.write_bytes(content)
    assert load_pairs(settings).fingerprint == first.fingerprint
    if write is write_tars:
        path.write_bytes(content[:1000])
        with pytest.raises(StorageError, match=rf"{path.name} is shorter than it was; leave the files alone"):
            first.dataset[len(first.dataset) - 1]
