"""What a config leaves out of the pairs: by captions, columns of numbers, sizes of images, held-out captions."""

import errno
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded_image, pick_a_pic_row, write_pick_a_pic
from file_server import serving
from PIL import Image
from training_runs import ROOT

from xdpo import precompute
from xdpo.compute import build_accelerator
from xdpo.config import ConfigError, load_config
from xdpo.data import DataError, Filters, Split, load_pairs
from xdpo.data.filters import Denied, words_of
from xdpo.data.rows import sides_of
from xdpo.files import StorageError


def load(path, *overrides, **options):
    """The pairs of parquet files, or of what overrides name, filtered."""
    settings = load_config(ROOT / "configs/base.yaml", ["data.source=parquet", f"data.path={path}", *overrides])
    return load_pairs(settings.data, filters=Filters(settings.filter), **options)


def write_captions(path, *captions):
    return write_pick_a_pic(path, [pick_a_pic_row(number, caption=text) for number, text in enumerate(captions)])


def test_denied_captions_are_left_out_and_counted_once(tmp_path):
    rows = [pick_a_pic_row(number, caption=text) for number, text in enumerate(["GORE, here", "gorey", "a fox", None])]
    rows += [pick_a_pic_row(4, caption="gore", label_0=0.5, label_1=0.5), pick_a_pic_row(5, caption="Dead - Body!")]
    path = write_pick_a_pic(tmp_path / "train.parquet", rows)
    deny = tmp_path / "deny.txt"
    deny.write_text("gore\n\ndead body\n")
    table = load(path, f"filter.captions={deny}")
    assert table.captions() == ["gorey", "a fox"]
    counts = table.counts
    assert (counts.denied_caption, counts.ties, counts.without_caption, counts.kept) == (2, 1, 1, 2)
    assert str(counts).endswith("ties 1, denied caption 2, beyond max pairs 0, kept 2")
    assert "denied" not in str(load(path).counts)


@pytest.mark.parametrize(
    "phrase, text, is_found",
    [
        ("nude", "NUDE", True),
        ("nude", "nudes", False),
        ("nude", "a_nude_figure", True),
        ("dead body", "dead\tBODY", True),
        ("dead body", "body, dead", False),
        ("dead body", "dead", False),
        ("straße", "STRASSE", True),
        ("кровь", "Кровь на снегу", True),
        ("a b c", "a a b c", True),
        ("裸体", "森林的裸体画", True),
        ("裸体", "体裸", False),
        ("cafe\u0301", "CAFÉ", True),
        ("nude", "ｎｕｄｅ", True),
    ],
)
def test_words_and_phrases_are_found_whole_in_any_case(phrase, text, is_found):
    assert Denied(frozenset([tuple(words_of(phrase))])).finds(text) is is_found


def test_a_file_of_captions_without_words_or_that_is_not_there_is_refused(tmp_path):
    path = write_captions(tmp_path / "train.parquet", "a")
    (tmp_path / "deny.txt").write_text("\n--\n")
    with pytest.raises(DataError, match=r"deny\.txt has no words; write one word"):
        load(path, f"filter.captions={tmp_path}/deny.txt")
    with pytest.raises(DataError, match=r"could not read .*nothing\.txt"):
        load(path, f"filter.captions={tmp_path}/nothing.txt")


def write_scored(folder):
    """Two files, whose columns of numbers have different types."""
    for number, values in enumerate([pa.array([0.1, None, float("nan")]), pa.array(["0.9", "0.4", ""])]):
        rows = pa.Table.from_pylist([pick_a_pic_row(3 * number + row) for row in range(3)])
        folder.mkdir(exist_ok=True)
        pq.write_table(rows.append_column("nsfw", values), folder / f"train-{number}.parquet")
    return folder


def test_columns_of_numbers_have_bounds_and_missing_values_are_beyond_them(tmp_path):
    path = write_scored(tmp_path / "pairs")
    table = load(path, "filter.columns={nsfw: [null, 0.5]}")
    assert table.rows.tolist() == [0, 4] and table.counts.out_of_bounds == 4
    assert load(path, "filter.columns={nsfw: [0.4, 0.9]}").rows.tolist() == [3, 4]
    with pytest.raises(DataError, match="lacks the columns aesthetic; it has"):
        load(path, "filter.columns={aesthetic: [5, null]}")
    with pytest.raises(DataError, match="column caption must hold numbers, got 'a photo of 0' in row 0"):
        load(path, "filter.columns={caption: [5, null]}")


def test_votes_and_scores_have_bounds_by_what_they_stand_for(tmp_path):
    row = {"image_0": "a.png", "image_1": "b.png", "caption": "x", "one": 5, "two": 1}
    (tmp_path / "list.json").write_text(json.dumps([row, row | {"caption": "y", "one": 2}]))
    columns = "data.columns={votes_0: one, votes_1: two}"
    options = ["data.source=folder", columns, "filter.columns={votes_0: [3, null]}"]
    assert load(tmp_path / "list.json", *options).captions() == ["x"]
    scored = {"chosen": "a.png", "rejected": "b.png", "caption": "x", "score_chosen": 1.5, "score_rejected": 1}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(scored) + "\n" + json.dumps(scored | {"score_chosen": 9}))
    assert load(tmp_path, "data.source=folder", "filter.columns={score_0: [null, 2]}").rows.tolist() == [0]


def test_a_source_without_any_caption_is_said_to_be_so(tmp_path):
    path = write_captions(tmp_path / "train.parquet", None, None)
    (tmp_path / "deny.txt").write_text("gore")
    with pytest.raises(DataError, match=r"no usable pair .*without caption 2"):
        load(path, f"filter.captions={tmp_path}/deny.txt")


def test_columns_of_numbers_of_a_list_of_pairs_have_bounds(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded_image())
    (tmp_path / "pairs.csv").write_text("chosen,rejected,caption,nsfw\na.png,b.png,x,0.1\na.png,b.png,y,0.9\n")
    options = ["data.source=folder", "filter.columns={nsfw: [null, 0.5]}"]
    assert load(tmp_path, *options).captions() == ["x"]
    with pytest.raises(DataError, match=r"filter\.columns needs other"):
        load(tmp_path, "data.source=folder", "filter.columns={other: [null, 0.5]}")


SIZES = [((64, 48), (48, 64)), ((32, 64), (64, 64)), ((128, 64), (64, 64)), None]  # None: no image
KEPT = {"filter.min_side=48": [0, 2, 3], "filter.max_aspect=1.5": [0, 3], "filter.max_aspect=2": [0, 1, 2, 3]}


def write_sized(folder, source):
    folder.mkdir()
    images = [[b"none"] * 2 if sizes is None else [encoded_image(size=size) for size in sizes] for sizes in SIZES]
    if source == "webdataset":
        with tarfile.open(folder / "train.tar", "w") as tar:
            for row, (one, other) in enumerate(images):
                members = {"jpg_0.png": one, "jpg_1.png": other, "label_0.txt": b"1", "caption.txt": b"a"}
                for name, content in members.items():
                    member = tarfile.TarInfo(f"{row}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    elif source == "folder":
        lines = []
        for row, contents in enumerate(images):
            for side, content in enumerate(contents):
                (folder / f"{row}{side}.png").write_bytes(content)
            lines.append({"chosen": f"{row}0.png", "rejected": f"{row}1.png", "caption": "a"})
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    else:
        rows = [pick_a_pic_row(row, jpg_0=one, jpg_1=other) for row, (one, other) in enumerate(images)]
        write_pick_a_pic(folder / "train.parquet", rows)
    return folder


@pytest.mark.parametrize("source", ["parquet", "webdataset", "folder", "hub"])
def test_sizes_of_images_have_bounds_and_unreadable_ones_pass(tmp_path, source):
    folder = write_sized(tmp_path / "pairs", source)
    whole = load(folder, f"data.source={source}")
    for override, rows in KEPT.items():
        table = load(folder, f"data.source={source}", override)
        assert table.rows.tolist() == rows, override
        assert table.counts.too_small + table.counts.too_long == 4 - len(rows)
    table = load(folder, f"data.source={source}", "filter.max_aspect=2")
    assert table.fingerprint == whole.fingerprint, "the index with sizes holds the same images"


def test_remote_files_do_not_tell_sizes(tmp_path):
    write_sized(tmp_path / "data", "parquet")
    with serving(tmp_path / "data") as server, pytest.raises(DataError, match=r"download the files"):
        (url,) = server.urls()
        load(url, "filter.min_side=8", streamed_into=tmp_path / "source")


def test_remote_files_are_asked_again_for_columns_that_filters_need(tmp_path):
    write_scored(tmp_path / "data")
    with serving(tmp_path / "data") as server:
        urls, folder = json.dumps(server.urls()), tmp_path / "source"
        assert len(load(urls, streamed_into=folder)) == 6
        server.requests.clear()
        assert len(load(urls, streamed_into=folder)) == 6 and not server.requests
        assert load(urls, "filter.columns={nsfw: [null, 0.5]}", streamed_into=folder).rows.tolist() == [0, 4]


def settings_with_held_out(tmp_path, *overrides):
    train = write_captions(tmp_path / "train.parquet", "A  fox", "a hen", "a cow")
    held_out = write_captions(tmp_path / "held_out.parquet", "a cat", "a dog", "a FOX")
    options = [f"data.path={train}", f"eval.path={held_out}", "data.source=parquet", "eval.pairs=1", *overrides]
    return load_config(ROOT / "configs/tiny/xdpo.yaml", options)


def test_captions_of_all_held_out_pairs_are_left_out_of_training(tmp_path):
    settings = settings_with_held_out(tmp_path, "filter.held_out_captions=true", "data.max_pairs=2")
    accelerator = build_accelerator(settings)
    table = precompute.load_table(settings, accelerator, Split.TRAIN, in_order=True)
    assert (table.captions(), table.counts.held_out_caption) == (["a hen", "a cow"], 1)
    assert precompute.load_table(settings, accelerator, Split.HELD_OUT, in_order=True).captions() == ["a cat"]
    with pytest.raises(ConfigError, match=r"filter\.held_out_captions needs held-out pairs, and eval\.every is 0"):
        settings_with_held_out(tmp_path, "filter.held_out_captions=true", "eval.every=0")


def test_a_cache_belongs_to_its_filters_and_columns(tmp_path):
    deny = tmp_path / "deny.txt"
    deny.write_text("gore\n")

    def key(*overrides, split=Split.TRAIN):
        return precompute.example_key(settings_with_held_out(tmp_path, *overrides), split)

    plain = key()
    assert not any(name.startswith("filter") or name == "data.columns" for name in plain)
    denied = key(f"filter.captions={deny}")
    deny.write_text("gore\nblood\n")
    others = [
        key(f"filter.captions={deny}"),
        key("filter.min_side=8"),
        key("filter.columns={nsfw: [null, 1]}"),
        key("filter.held_out_captions=true"),
        key("data.columns={caption: prompt}"),
        key("filter.held_out_captions=true", "eval.columns={caption: prompt}"),
    ]
    keys = [json.dumps(each) for each in (plain, denied, *others)]
    assert len(set(keys)) == len(keys)
    other = key("eval.columns={caption: prompt}", split=Split.HELD_OUT)
    assert other == key("data.columns={caption: prompt}", split=Split.HELD_OUT) != key(split=Split.HELD_OUT)
    assert key("eval.columns={caption: prompt}") == plain
    assert key("filter.held_out_captions=true", split=Split.HELD_OUT) == key(split=Split.HELD_OUT)


def test_a_failing_disk_is_no_image_of_unknown_size(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(number, "as told")

    monkeypatch.setattr(Image, "open", fail)
    number = errno.EIO
    with pytest.raises(StorageError, match=r"could not read one\.png"):
        sides_of("one.png")
    number = errno.ENOENT
    assert sides_of("one.png") == (0, 0)


def test_sides_are_known_by_their_rows(tmp_path):
    folder = write_sized(tmp_path / "pairs", "parquet")
    images = load(folder, "filter.min_side=8").dataset.images
    assert images.sides(0).tolist() == [[64, 48], [32, 64], [128, 64], [0, 0]]
    assert images.sides(1).dtype == np.int64
