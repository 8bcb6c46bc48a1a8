"""Files of one data set that differ: read under one schema where that is clear, else the one at fault is named."""

import decimal
import gzip
import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded_image, pick_a_pic_row

from xdpo.data import DataError, load_pairs
from xdpo.data.columns import OPTIONAL_COLUMNS, REQUIRED_COLUMNS
from xdpo.data.images import decode_rgb


@pytest.fixture
def load(tmp_path):
    """load(columns of one file, of the next, …) → PairTable; a column is a list or an Arrow array."""

    def call(*files, path=None, source="parquet"):
        for number, columns in enumerate(files):
            pq.write_table(pa.table(columns), tmp_path / f"train-{number}.parquet")
        settings = {"source": source, "path": path or str(tmp_path / "train-*"), "split": "train", "revision": None}
        return load_pairs(type("data", (), settings | {"max_pairs": None, "columns": None}))

    return call


def columns(count=2, **changes):
    row = {name: value for name, value in pick_a_pic_row(0).items() if name in (*REQUIRED_COLUMNS, "label_1")}
    return {name: [value] * count for name, value in row.items()} | changes


# --- one schema ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 0], [1.0, 0.0]),
        ([1.0, 0.0], [1, 0]),
        (["1", "0"], [1.0, 0.0]),
        ([True, False], [1, 0]),
        ([1, 0], pa.array([1, 0], pa.int8())),
        ([1, 0], [decimal.Decimal("1.0"), decimal.Decimal("0.0")]),
    ],
)
def test_labels_of_different_types_mean_the_same(load, one, other):
    files = [columns(label_0=labels) for labels in (one, other)]
    for file in files:
        del file["label_1"]
    assert load(*files).chosen_side.tolist() == [0, 1, 0, 1]


def test_a_tie_in_a_later_file_of_whole_numbers(load):
    files = [columns(label_0=[1, 0], label_1=[0, 1]), columns(label_0=[0.5, 1.0], label_1=[0.5, 0.0])]
    assert load(*files).counts.ties == 1


def test_columns_that_nobody_reads_may_come_go_and_change(load):
    table = load(columns(nsfw=[0.1, 0.2]), columns(), columns(nsfw=["yes", "no"], more=[[1], [2]]))
    assert len(table) == 6
    assert set(table.dataset.column_names) <= {*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS}


def test_optional_columns_may_be_missing_in_some_files(load):
    """Whichever comes first."""
    for files in ([columns(ranking_id=[7, 8]), columns()], [columns(), columns(ranking_id=[7, 8])]):
        table = load(*files)
        assert {table.pair_id(row) for row in range(4)} >= {"7", "8"} and len(table) == 4


def test_names_of_pairs_do_not_change_with_the_type(load):
    table = load(columns(ranking_id=[7, 8]), columns(ranking_id=[9.0, None]), columns(ranking_id=["a", "b"]))
    assert [table.pair_id(row) for row in range(6)] == ["7", "8", "9", "3", "a", "b"]


def test_flags_of_different_types_mean_the_same(load):
    files = [columns(has_label=flags) for flags in ([True, False], [1, 0], ["True", "False"], [None, None])]
    assert load(*files).counts.unlabelled == 3


def test_a_column_without_values_fits_every_type(load):
    table = load(columns(label_0=pa.nulls(2), caption=pa.nulls(2)), columns())
    assert (table.counts.unlabelled, len(table)) == (2, 2)


def test_large_and_encoded_text_is_text(load):
    captions = [pa.array(["a", "b"], pa.large_string()), pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]]
    table = load(*[columns(caption=caption) for caption in captions])
    assert table.columns("caption") == {"caption": ["a", "b"] * 3}


def test_another_name_for_the_caption_in_a_later_file(load):
    other = {("original_prompt" if name == "caption" else name): value for name, value in columns().items()}
    table = load(columns(), other)
    assert table.columns("caption") == {"caption": ["a photo of 0"] * 4}


def test_scores_and_images_of_all_files_are_read(load):
    blue = encoded_image("blue")
    table = load(
        columns(score_0=[1, 2], score_1=[0, 0]),
        columns(score_0=[0.5, 1.5], score_1=[0.0, None], jpg_0=pa.array([blue] * 2, pa.large_binary())),
    )
    np.testing.assert_array_equal(table.scores, [[1, 2, 0.5, 1.5], [0, 0, 0, np.nan]])
    assert decode_rgb(table.dataset[2]["jpg_0"]).getpixel((0, 0)) == (0, 0, 255)


def test_a_file_in_brackets_is_that_file(load, tmp_path):
    folder = tmp_path / "run[1] *?"
    folder.mkdir()
    pq.write_table(pa.table(columns(caption=["in brackets"] * 2)), folder / "train[0].parquet")
    (tmp_path / "run1").mkdir()
    pq.write_table(pa.table(columns(caption=["another"] * 2)), tmp_path / "run1" / "train0.parquet")
    for path in (folder / "train[0].parquet", folder / "train*.parquet"):
        assert load(path=str(path)).columns("caption") == {"caption": ["in brackets"] * 2}


# --- the file at fault ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": [1.0, 2.0]}, r"train-1\.parquet: column caption must hold text, it holds double"),
        ({"caption": [["a"], ["b"]]}, r"train-1\.parquet: column caption must hold text, it holds list"),
        ({"caption": [b"a", b"b"]}, r"train-1\.parquet: column caption must hold text, it holds binary"),
        ({"label_0": [[1], [0]]}, r"train-1\.parquet: column label_0 holds list.*, but double in .*train-0\.parquet"),
        ({"jpg_0": [{"bytes": b"", "path": ""}] * 2}, r"train-1\.parquet: column jpg_0 holds struct.*but binary in"),
        ({"jpg_1": [1, 2]}, r"train-1\.parquet: column jpg_1 holds int64, but binary in"),
    ],
)
def test_a_type_that_does_not_fit_is_named_with_its_file(load, changes, message):
    with pytest.raises(DataError, match=message):
        load(columns(), columns(**changes), columns())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_0": [[1], [0]]}, r"column label_0 must hold numbers, it holds list"),
        ({"label_1": [{"of": 1.0}] * 2}, r"column label_1 must hold numbers, it holds struct"),
        ({"jpg_0": [1, 2]}, r"train-0\.parquet: column jpg_0 must hold images, .* it holds int64"),
        ({"jpg_1": [[0, 255]] * 2}, r"train-0\.parquet: column jpg_1 must hold images, .* it holds list"),
        ({"jpg_1": pa.nulls(2)}, r"train-0\.parquet: column jpg_1 must hold images, .* it holds null"),
        ({"jpg_0": [{"url": "http://"}] * 2}, r"column jpg_0 must hold images, .* it holds struct<url"),
    ],
)
def test_columns_of_a_type_that_is_none_of_theirs_are_named_where_no_other_file_tells(load, changes, message):
    with pytest.raises(DataError, match=message):
        load(columns(**changes))


def test_images_may_be_bytes_of_any_kind_paths_or_both_in_any_order(load, tmp_path):
    (tmp_path / "red.png").write_bytes(content := encoded_image("red"))
    binary, fixed = pa.array([content] * 2, pa.large_binary()), pa.array([content] * 2, pa.binary(len(content)))
    both = pa.StructArray.from_arrays([pa.array(["x"] * 2), binary], names=["path", "bytes"])
    for images in (binary, fixed, both, [str(tmp_path / "red.png")] * 2):
        assert load(columns(jpg_1=images)).images_of(0) == (encoded_image("lime"), content)


def test_empty_shards_are_left_out(load, tmp_path):
    empty = pa.table(columns()).slice(0, 0)
    untyped = pa.table({name: pa.nulls(0) for name in columns()})
    assert len(load(empty, columns(), untyped)) == 2
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"no parquet file has any row, .*train-0\.parquet for one"):
        load(empty, empty)


def test_two_sets_of_shards_in_a_folder_are_a_clash(load, tmp_path):
    """An older download beside a newer one would count pairs twice."""
    names = ["train-00000-of-00002", "train-00001-of-00002", "train-00000-of-00001-0123456789abcdef"]
    for name in names:
        pq.write_table(pa.table(columns()), tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"00001-0123456789abcdef\.parquet and .*-of-00002\.parquet are of two sets of"):
        load(path=str(tmp_path))
    assert len(load(path=[str(tmp_path / f"{name}.parquet") for name in names])) == 6, "files named outright are meant"
    (tmp_path / f"{names[2]}.parquet").unlink()
    assert len(load(path=str(tmp_path))) == 4


def test_a_column_that_is_there_twice_is_named(load, tmp_path):
    table = pa.table(columns())
    pq.write_table(table.append_column("label_0", pa.array([1.0, 1.0])), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=r"train-0\.parquet has several columns called 'label_0'"):
        load()


def test_a_file_damaged_in_the_middle_is_named(load, tmp_path):
    load(columns(), columns(caption=["other", "words"]), columns())
    path = tmp_path / "train-1.parquet"
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)  # pages; the footer is whole
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read parquet data from 3 files, .*train-1\.parquet: "):
        load()


def test_captions_that_are_no_utf8_are_named_with_their_row(load):
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"caf\xe9"], pa.binary()).buffers())
    with pytest.raises(DataError, match=r"column caption holds text that isn't UTF-8 in row 3: b'caf\\xe9'"):
        load(columns(), columns(caption=broken))


def test_labels_that_are_none_are_named_with_their_row(load):
    with pytest.raises(DataError, match=r"column label_0 must hold numbers, got 'left' in row 3"):
        load(columns(), columns(label_0=["1", "left"]))


# --- tars ----------------------------------------------------------------------------------------------


def sample(key, **changes):
    members = {
        "jpg_0.png": encoded_image("lime"),
        "jpg_1.png": encoded_image("red"),
        "label_0.txt": b"1",
        "caption.txt": b"a cat",
    }
    return {f"{key}.{name}": content for name, content in (members | changes).items() if content is not None}


@pytest.fixture
def tars(load, tmp_path):
    def call(*archives):
        for number, members in enumerate(archives):
            with tarfile.open(tmp_path / f"train-{number}.tar", "w") as tar:
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return load(path=str(tmp_path / "train-*.tar"), source="webdataset")

    return call


def test_members_that_nobody_reads_may_come_and_go(tars):
    table = tars(sample("0"), sample("1", **{"nsfw.txt": b"0.1"}), sample("2", **{"caption.txt": None}))
    assert (len(table), table.counts.without_caption) == (2, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_0.txt": None, "label_0.cls": b"1"}, r"label_0\.cls, but label_0\.txt in .*train-0\.tar"),
        ({"jpg_0.png": None, "jpg_0.jpg": encoded_image(format="JPEG")}, r"jpg_0\.jpg, but jpg_0\.png in"),
    ],
)
def test_a_tar_with_other_members_is_named(tars, changes, message):
    with pytest.raises(DataError, match=rf"train-1\.tar: its samples hold {message}"):
        tars(sample("0"), sample("1", **changes))


def test_two_files_for_one_member_are_a_clash(tars, tmp_path):
    with pytest.raises(
        DataError, match=r"train-0\.tar: its samples hold jpg_0\.png and jpg_0\.jpg, and jpg_0 can be but"
    ):
        tars(sample("0", **{"jpg_0.jpg": encoded_image("blue", format="JPEG")}))
    with pytest.raises(DataError, match=r"train-1\.tar: its samples hold caption\.txt and caption\.json"):
        tars(sample("0"), sample("1", **{"caption.json": b'"another"'}))
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:  # written again with --append
        for name, content in [*sample("0").items(), *sample("0").items()]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=r"its samples hold jpg_0\.png and jpg_0\.png"):
        tars()


def test_empty_tars_are_left_out(tars):
    assert len(tars({}, sample("1"), {})) == 1
    with pytest.raises(DataError, match=r"no tar holds a sample, .*train-0\.tar for one"):
        tars({}, {}, {})


@pytest.mark.parametrize("size", [512 + 100, 3 * 512 + 10, 5 * 512 + 1])
def test_a_tar_that_was_cut_short_is_named_wherever_it_ends(tars, tmp_path, size):
    """Within a header, where tarfile sees no fault, as within a member."""
    tars(sample("0"), sample("1"))
    cut = tmp_path / "train-1.tar"
    cut.write_bytes(cut.read_bytes()[:size])
    with pytest.raises(DataError, match=r"train-1\.tar is not a readable tar: .*cut short"):
        tars()


def test_tars_of_a_mac_and_compressed_ones_are_read(tars, tmp_path):
    mac = {"._0.jpg_0.png": b"\0\5\26\7", **sample("0"), "._0.caption.txt": b"\0\5\26\7"}
    assert tars(mac).columns("caption") == {"caption": ["a cat"]}
    content = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-0.tar").write_bytes(gzip.compress(content + b"\0" * 512))
    assert len(tars()) == 1


def test_a_pointer_of_git_lfs_is_told_from_a_tar(tars, tmp_path):
    (tmp_path / "train-9.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(DataError, match=r"train-9\.tar is not a readable tar: it is Git LFS's pointer"):
        tars(sample("0"))


def test_a_tar_whose_text_is_no_utf8_is_named(tars):
    with pytest.raises(DataError, match=r"from 2 files, .*train-1\.tar: 'utf-8' codec"):
        tars(sample("0"), sample("1", **{"caption.txt": "café".encode("cp1252")}))


def test_captions_as_json_objects_are_refused(tars):
    with pytest.raises(DataError, match=r"column caption must hold text, it holds struct"):
        tars(sample("0", **{"caption.txt": None, "caption.json": b'{"en": "a cat"}'}))
