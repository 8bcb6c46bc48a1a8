"""Public data sets in their own columns: the source blocks of docs/data.md, each on small files in the same layout.

The preferred image is lime, others are red or grey.
"""

import io
import json
import pickle
import re
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded_image, pick_a_pic_row, write_pick_a_pic
from PIL import Image
from training_runs import ROOT

from xdpo.config import ConfigError, load_config
from xdpo.data import DataError, Filters, Split, load_pairs

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
GREYS = ["lime", (200, 200, 200), (120, 120, 120), "red"]  # from the best on


def blocks_of(heading):
    """The YAML blocks under a heading of the page."""
    section = re.search(rf"^### {heading}\n(.*?)(?=^#)", PAGE, re.MULTILINE | re.DOTALL)[1]
    return re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(heading, number=0): the pairs of a split of a block of the page, seen from tmp_path."""
    monkeypatch.chdir(tmp_path)

    def call(heading, number=0, *overrides, split=Split.TRAIN, **options):
        file = tmp_path / "config.yaml"
        file.write_text(f"inherits: {ROOT}/configs/base.yaml\n" + blocks_of(heading)[number])
        return load_pairs(split.source(load_config(file, overrides)), **options)

    return call


def write_image(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded_image(colour))


def colours(table, index):
    """Pixel (0, 0) of a pair's images, chosen first."""
    return [Image.open(io.BytesIO(content)).convert("RGB").getpixel((0, 0)) for content in table.images_of(index)]


def assert_lime_is_chosen(table):
    assert len(table)
    for index in range(len(table)):
        (red, green, _), rejected = colours(table, index)
        assert green > 240 and red < 15 and rejected[0] > 90


def test_pick_a_pic_on_the_hub(load, tmp_path):
    rows = [pick_a_pic_row(0), pick_a_pic_row(1, label_0=0.5, label_1=0.5)]
    write_pick_a_pic(tmp_path / "liuhuohuo2" / "pick-a-pic-v2" / "data" / "train-00000-of-00001.parquet", rows)
    table = load("Pick-a-Pic")
    assert (table.counts.kept, table.counts.ties) == (1, 1)
    assert_lime_is_chosen(table)


def test_pick_a_pic_in_tars(load, tmp_path):
    (tmp_path / "pickapic_v2_webdataset").mkdir()
    with tarfile.open(tmp_path / "pickapic_v2_webdataset" / "00000.tar", "w") as tar:
        members = {"jpg_0.jpg": encoded_image("red"), "jpg_1.jpg": encoded_image("lime"), "label_0.txt": b"0"}
        for name, content in (members | {"label_1.txt": b"1", "original_prompt.txt": b"a frog"}).items():
            member = tarfile.TarInfo(f"000000.{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    table = load("Pick-a-Pic", 1)
    assert table.captions() == ["a frog"]
    assert_lime_is_chosen(table)


def test_hpdv2_has_choices_of_two_and_ranks_of_many(load, tmp_path):
    for folder in ("train", "test"):
        for number, colour in enumerate(GREYS):
            write_image(tmp_path / "HPDv2" / folder / f"{number}.jpg", colour)
    train = [
        {"prompt": "a", "image_path": ["3.jpg", "0.jpg"], "human_preference": [0, 1], "user_hash": "x"},
        {"prompt": "a", "image_path": ["0.jpg", "1.jpg"], "human_preference": [1, 0], "user_hash": "y"},
    ]
    (tmp_path / "HPDv2" / "train" / "train.json").write_text(json.dumps(train))
    table = load("HPDv2")
    assert_lime_is_chosen(table)
    chosen, rejected = table.image_names()
    assert (chosen.tolist(), rejected.tolist()) == (["0.jpg", "0.jpg"], ["3.jpg", "1.jpg"])
    ranked = {"prompt": "b", "image_path": ["2.jpg", "0.jpg", "3.jpg", "1.jpg"], "rank": [2, 0, 3, 1]}
    (tmp_path / "HPDv2" / "test" / "test.json").write_text(json.dumps([ranked, ranked | {"rank": [1, 0, 1, 1]}]))
    table = load("HPDv2", split=Split.HELD_OUT)
    pairs = list(zip(*(names.tolist() for names in table.image_names()), strict=True))
    assert (len(pairs), table.counts.ties) == (9, 3)
    assert all(int(chosen[0]) < int(rejected[0]) for chosen, rejected in pairs)


def test_hpdv3_has_the_preferred_image_first(load, tmp_path):
    write_image(tmp_path / "HPDv3" / "images" / "a.jpg", "lime")
    write_image(tmp_path / "HPDv3" / "images" / "b.jpg", "red")
    pair = {"prompt": "a", "path1": "images/a.jpg", "path2": "images/b.jpg", "choice_dist": [12, 7], "confidence": 0.9}
    (tmp_path / "HPDv3" / "train.json").write_text(json.dumps([pair | {"model1": "flux", "model2": "kolors"}]))
    assert_lime_is_chosen(load("HPDv3"))


def test_image_reward_db_ranks_the_images_of_a_prompt(load, tmp_path):
    rows = []
    for prompt in ("a", "b"):
        for number, colour in enumerate(GREYS):
            path = f"images/train/train_1/{prompt}{number}.webp"
            write_image(tmp_path / "ImageRewardDB" / path, colour)
            rows.append({"image_path": path, "prompt_id": prompt, "prompt": "the same", "rank": number + 1})
    rows[3]["rank"] = 3  # a tie
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "ImageRewardDB" / "metadata-train.parquet")
    table = load("ImageRewardDB")
    pairs = list(zip(*([name[-7:-5] for name in names] for names in table.image_names()), strict=True))
    assert (len(pairs), table.counts.ties, table.counts.rows) == (11, 1, 12)
    assert all(chosen[0] == rejected[0] and chosen[1] < rejected[1] for chosen, rejected in pairs)
    assert pairs.count(("a0", "a3")) == 1 and len(set(pairs)) == 11


def test_rapidatas_votes_are_weighted(load, tmp_path):
    folder = tmp_path / "Rapidata" / "Flux-2-pro_t2i_human_preference" / "data"
    folder.mkdir(parents=True)
    votes = {"image1": [0.7, 0.2, 0.5, None], "image2": [0.3, 0.8, 0.5, None]}
    images = [{"bytes": encoded_image(colour), "path": None} for colour in ("lime", "red")]
    content = {
        "image1": [images[0], images[1], *images],
        "image2": [images[1], images[0], *images],
        "prompt": ["a"] * 4,
    }
    content |= {f"weighted_results_{side}_preference": values for side, values in votes.items()}
    content |= {"model1": ["flux"] * 4, "detailed_results_preference": ["[]"] * 4}
    features = datasets.Dataset.from_dict(content).features | {name: datasets.Image() for name in ("image1", "image2")}
    datasets.Dataset.from_dict(content, datasets.Features(features)).to_parquet(folder / "train-00000-of-00001.parquet")
    table = load("Rapidata")
    assert (table.counts.kept, table.counts.ties, table.counts.unlabelled) == (2, 1, 1)
    assert table.chosen_side.tolist() == [0, 1]
    assert_lime_is_chosen(table)
    in_place = load("Rapidata", 0, "data.source=parquet", f"data.path={folder}")
    assert in_place.chosen_side.tolist() == [0, 1]
    assert_lime_is_chosen(in_place)


def test_open_image_preferences_are_chosen_and_rejected(load, tmp_path):
    folder = tmp_path / "data-is-better-together" / "open-image-preferences-v1-binarized" / "data"
    folder.mkdir(parents=True)
    content = {"prompt": ["a"], "chosen": [encoded_image("lime")], "rejected": [encoded_image("red")], "label_0": [0.0]}
    pq.write_table(pa.table(content), folder / "train-00000-of-00001.parquet")
    assert_lime_is_chosen(load("Open Image Preferences"))


# Two folders


@pytest.fixture
def two_folders(tmp_path):
    for name in ("a/fox", "hen"):
        write_image(tmp_path / "pairs" / "winner" / f"{name}.png", "lime")
        write_image(tmp_path / "pairs" / "loser" / f"{name}.jpg", "red")
        (tmp_path / "pairs" / "winner" / f"{name}.txt").write_text(f"photo of {name}\n")
    return tmp_path / "pairs"


def settings(path, columns, *overrides):
    keys = ["data.source=folder", f"data.path={path}", f"data.columns={columns}", *overrides]
    return load_config(ROOT / "configs/base.yaml", keys).data


def test_two_folders_have_the_same_names_in_both(two_folders):
    columns = "{chosen: winner, rejected: loser}"
    table = load_pairs(settings(two_folders, columns))
    assert_lime_is_chosen(table)
    assert table.captions() == ["photo of a/fox", "photo of hen"]
    assert [table.pair_id(row) for row in (0, 1)] == ["a/fox", "hen"]
    assert len(load_pairs(settings(two_folders, columns, "data.split=hens", "data.max_pairs=1"))) == 1
    (two_folders / "texts").mkdir()
    (two_folders / "texts" / "hen.txt").write_text("a hen")
    table = load_pairs(settings(two_folders, "{chosen: winner, rejected: loser, caption: texts}"))
    assert (table.captions(), table.counts.without_caption) == (["a hen"], 1)
    (two_folders / "loser" / "hen.jpg").unlink()
    with pytest.raises(DataError, match=r"1 images are in winner or in loser alone \(hen\)"):
        load_pairs(settings(two_folders, columns))


# Ranked images in parquet files


BEST_FIRST = [encoded_image(colour) for colour in GREYS]


def write_ranked(path, rows, images, **options):
    """Rows of (images, ranks, prompt). images: the column's type."""
    path.parent.mkdir(exist_ok=True)
    columns = {name: [row[place] for row in rows] for place, name in enumerate(("images", "ranks", "prompt"))}
    pq.write_table(pa.table(columns | {"images": pa.array(columns["images"], images)}), path, **options)


@pytest.mark.parametrize("is_struct", [False, True], ids=["bytes", "structs"])
def test_lists_of_ranked_images_in_parquet_files_are_read_in_place(load, tmp_path, is_struct, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("copied"))
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    type = pa.list_(struct if is_struct else pa.binary())
    best, second, third, worst = [{"bytes": content} if is_struct else content for content in BEST_FIRST]
    rows = [
        ([second, best, worst], [2, 1, 2], "a"),
        (None, None, "b"),
        ([best], [1], "c"),
        ([third, best], [5, None], "d"),
    ]
    write_ranked(tmp_path / "ranked" / "0.parquet", rows, type, row_group_size=2)
    write_ranked(tmp_path / "ranked" / "1.parquet", [([None, best], [1, 2], "a")], type)
    table = load("Ranked images")
    assert (table.counts.rows, table.counts.ties, table.counts.unlabelled, len(table)) == (5, 1, 1, 3)
    named = list(zip(*(names.tolist() for names in table.image_names()), strict=True))
    assert named == [("0/1", "0/0"), ("0/1", "0/2"), ("4/0", "4/1")] and table.captions() == ["a"] * 3
    green, light, _, red = BEST_FIRST
    expected = [(green, light), (green, red), (b"", green)]  # a missing image is unreadable, as elsewhere
    assert [table.images_of(index) for index in range(3)] == expected
    assert table.dataset.images.sizes(0).tolist() == [len(light), len(light), len(green), len(BEST_FIRST[2]), -1]

    monkeypatch.setattr("xdpo.data.ranked.parquet_texts", lambda *_: pytest.fail("indexed anew"))
    again = pickle.loads(pickle.dumps(load("Ranked images")))
    assert again.fingerprint == table.fingerprint
    assert [again.images_of(index) for index in (2, 1, 0)] == expected[::-1]


def test_ranked_images_of_a_row_each_are_grouped_and_filtered_by_size(tmp_path):
    images = [*BEST_FIRST[:2], encoded_image("red", (8, 16))]
    rows = [(images[0], "1", "a"), (images[1], "2", "b"), (images[1], "2", "a"), (images[2], "3", "a")]
    write_ranked(tmp_path / "train.parquet", rows, pa.binary())
    columns = "{image: images, votes: ranks, caption: prompt}"
    keys = ["data.source=parquet", f"data.path={tmp_path}", f"data.columns={columns}", "filter.min_side=9"]
    config = load_config(ROOT / "configs/base.yaml", keys)
    table = load_pairs(config.data, filters=Filters(config.filter))
    assert (table.counts.kept, table.counts.too_small) == (1, 2)
    assert table.images_of(0) == (images[1], images[0])
    assert [names.tolist() for names in table.image_names()] == [["2/0"], ["0/0"]]


def test_ranked_images_without_a_caption_make_no_pairs(tmp_path):
    rows = [(BEST_FIRST[0], rank, caption) for rank, caption in ((1, None), (2, None), (1, "a"), (2, "a"))]
    write_ranked(tmp_path / "train.parquet", rows, pa.binary())
    columns = "{image: images, rank: ranks, caption: prompt}"
    keys = ["data.source=parquet", f"data.path={tmp_path}", f"data.columns={columns}"]
    assert len(load_pairs(load_config(ROOT / "configs/base.yaml", keys).data)) == 1


def test_ranked_images_that_cannot_be_read_so_are_refused_in_words(tmp_path, monkeypatch):
    file, columns = tmp_path / "train.parquet", "{image: images, rank: ranks, caption: prompt}"
    write_ranked(file, [([BEST_FIRST[0]] * 2, [1, 2], "a"), ([BEST_FIRST[0]] * 2, [1], "b")], pa.list_(pa.binary()))
    with pytest.raises(
        DataError, match=r"train\.parquet row 1: column ranks must hold 2 numbers, one for each of images"
    ):
        load_pairs(settings(file, columns, "data.source=parquet"))
    with pytest.raises(DataError, match=r"images holds images themselves.* read it with data\.source=parquet"):
        load_pairs(settings(file, columns))
    write_ranked(file, [([BEST_FIRST[0]] * 2, [1, 2], "a")], pa.list_(pa.binary()))
    monkeypatch.setattr("xdpo.data.sources.MOST_GROUP_BYTES", 100)
    with pytest.raises(DataError, match=r"a row group holds more than .* Set cache\.examples"):
        load_pairs(settings(file, columns, "data.source=parquet"))
    assert len(load_pairs(settings(file, columns, "data.source=parquet"), in_order=True)) == 1
    with pytest.raises(DataError, match=r"ranked images .* parquet files on this machine .* not from .* http://a/b"):
        load_pairs(settings("http://a/b.parquet", columns, "data.source=parquet"), streamed_into=tmp_path)
    write_ranked(file, [([1], [1], "a")], pa.list_(pa.int64()))
    with pytest.raises(DataError, match=r"column images must hold images.*; it holds int64"):
        load_pairs(settings(file, columns, "data.source=parquet"))


# What doesn't go together


@pytest.mark.parametrize(
    "columns, message",
    [
        ("{chosen: good, rejected: path2}", "has the columns path1, path2, caption; it needs good, path2, caption"),
        ("{image: path1, rank: place}", "lacks the columns place; it has path1, path2, caption"),
        ("{image: path1, rank: path2}", "entry 1: column path2 must hold numbers, got 'x'"),
    ],
)
def test_columns_that_cannot_be_read_are_named(tmp_path, columns, message):
    (tmp_path / "list.json").write_text(json.dumps([{"path1": "a.png", "path2": "x", "caption": "a"}]))
    with pytest.raises(DataError, match=message):
        load_pairs(settings(tmp_path / "list.json", columns))


def test_ranked_images_are_read_of_parquet_files_and_lists_alone(tmp_path):
    with pytest.raises(
        DataError, match=r"ranked images \(image: a\) are read from parquet files .* not from webdataset"
    ):
        load_pairs(settings(tmp_path, "{image: a, rank: b}", "data.source=webdataset"))


def test_votes_go_before_columns_that_would_be_taken_without_them(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "lime")):
        write_image(tmp_path / name, colour)
    row = {"chosen": "a.png", "rejected": "b.png", "caption": "a", "one": 1, "two": 2}
    (tmp_path / "list.json").write_text(json.dumps([row]))
    columns = "{jpg_0: chosen, jpg_1: rejected, votes_0: one, votes_1: two}"
    assert_lime_is_chosen(load_pairs(settings(tmp_path / "list.json", columns)))


def test_images_of_one_group_are_compared_with_one_caption_alone(tmp_path):
    row = {"caption": "a", "image": "a.png", "rank": 1, "set": None}
    rows = [row, row | {"image": "b.png", "rank": "2"}, row | {"caption": "b", "image": "c.png", "rank": 3}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    table = load_pairs(settings(tmp_path / "list.json", "{image: image, rank: rank, group: set}"))
    assert [names.tolist() for names in table.image_names()] == [["a.png"], ["b.png"]]
    (tmp_path / "list.json").write_text(json.dumps([row | {"image": {"bytes": "x"}}]))
    with pytest.raises(DataError, match=r"entry 1: column image must hold text, got \{'bytes': 'x'\}"):
        load_pairs(settings(tmp_path / "list.json", "{image: image, rank: rank}"))


def test_a_column_of_a_file_stands_for_one_thing(tmp_path):
    with pytest.raises(DataError, match="names the column prompt twice"):
        load_pairs(settings(tmp_path, "{caption: prompt, ranking_id: prompt}", "data.source=parquet"))


def test_missing_columns_are_named_as_in_the_source(tmp_path):
    pq.write_table(pa.table({"image1": [b"x"], "prompt": ["a"]}), tmp_path / "train.parquet")
    columns = "{chosen: image1, rejected: image2, caption: prompt}"
    with pytest.raises(DataError, match=r"lacks the columns image2; it has image1, prompt. Columns of other names"):
        load_pairs(settings(tmp_path, columns, "data.source=parquet"))


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.columns={prompt: caption}", "data.columns: has prompt, and a column may stand for caption, jpg_0"),
        ("data.columns=[caption]", "data.columns: must be a mapping such as {caption: prompt}"),
        ("data.columns={chosen: a}", "data.columns: has chosen, and not rejected; name both"),
        ("eval.columns={votes_1: a}", "eval.columns: has votes_1, and not votes_0"),
        (
            "data.columns={chosen: a, rejected: b, image: c, rank: d}",
            "data.columns: has chosen and image, which are different layouts",
        ),
        ("data.columns={image: a}", "data.columns: has image, which needs rank (the lowest is the best) or votes"),
        ("eval.columns={group: a}", "eval.columns: has group, which goes with image"),
        ("data.columns={caption: 1}", "data.columns: must be a mapping such as {caption: prompt}"),
        ("filter.columns={nsfw: 0.5}", "filter.columns: must be a mapping such as {nsfw: [null, 0.5]}"),
        ("filter.columns={nsfw: [1, 0]}", "filter.columns: has bounds of nsfw that nothing or everything keeps to"),
        ("filter.columns={nsfw: [a, 0]}", "filter.columns: must be a number"),
        ("filter.max_aspect=0.5", "filter.max_aspect: must be at least 1"),
    ],
)
def test_mappings_are_checked_with_the_config(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(ROOT / "configs/base.yaml", [override])
