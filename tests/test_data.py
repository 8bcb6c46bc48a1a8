"""Preference rows → oriented pairs → examples. In the fixtures the preferred image is lime, the other one red."""

import csv
import errno
import io
import itertools
import json
import pickle
import tarfile
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import encoded_image, failing, pick_a_pic_row, write_pick_a_pic
from PIL import Image

from xdpo.config import load_config
from xdpo.data import (
    DataError,
    PairDataset,
    Split,
    StepSampler,
    UnreadableTracker,
    collate_pairs,
    load_pairs,
    make_loader,
    weigh_pairs,
)
from xdpo.data.images import UnreadableImageError, decode_rgb, square_pixels
from xdpo.families.stable_diffusion import tokenize
from xdpo.files import StorageError

LIME, RED = [-1, 1, -1], [1, -1, -1]


def data_config(path="unused", **changes):
    """A `data` section."""
    defaults = {
        "source": "parquet",
        "path": path,
        "revision": None,
        "split": "train",
        "columns": None,
        "max_pairs": None,
        "resolution": 8,
        "crop": "center",
        "horizontal_flip": False,
        "caption_dropout": 0.0,
    }
    return SimpleNamespace(**defaults | changes)


def tokenize_with(tokenizer):
    return partial(tokenize, {"tokenizer": tokenizer}, {})


def parquet_table(tmp_path, rows, **changes):
    return load_pairs(data_config(write_pick_a_pic(tmp_path / "train.parquet", rows), **changes))


def parquet_dataset(tmp_path, rows, tokenizer, *, seed=0, shuffle=True, augment=True, **changes):
    table = parquet_table(tmp_path, rows)
    return PairDataset(table, tokenize_with(tokenizer), seed, data_config(**changes), shuffle=shuffle, augment=augment)


def colours(example):
    """(chosen, rejected) mean colour."""
    return example.pixel_values.mean(dim=(2, 3)).tolist()


def gradient_image(size=(24, 16)):
    """Red grows to the right, green downwards: flips and crops leave their trace."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# Sources


def test_parquet_of_pick_a_pic_is_oriented_by_its_label(tmp_path, tiny_tokenizer):
    rows = [pick_a_pic_row(0), pick_a_pic_row(1, jpg_0=encoded_image("red"), jpg_1=encoded_image("lime"))]
    rows[1] |= {"label_0": 0.0, "label_1": 1.0}
    dataset = parquet_dataset(tmp_path, rows, tiny_tokenizer, shuffle=False)
    assert colours(dataset[0]) == [LIME, RED]
    assert colours(dataset[1]) == [LIME, RED]
    assert [dataset[0].pair_id, dataset[1].pair_id] == ["1000", "1001"]
    assert dataset[0].pixel_values.shape == (2, 3, 8, 8)
    assert dataset[0].pixel_values.dtype == torch.float32


def test_every_row_has_one_fate_and_is_counted(tmp_path):
    rows = [
        pick_a_pic_row(0),
        pick_a_pic_row(1, label_0=0.5, label_1=0.5),
        pick_a_pic_row(2, has_label=False, label_0=0.5, label_1=0.5),
        pick_a_pic_row(3, label_0=None),
        pick_a_pic_row(4, label_1=float("nan")),
        pick_a_pic_row(5, are_different=False),
        pick_a_pic_row(6, caption=None),
        pick_a_pic_row(7),
        pick_a_pic_row(8),
    ]
    counts = parquet_table(tmp_path, rows, max_pairs=2).counts
    assert (counts.rows, counts.unlabelled, counts.without_caption) == (9, 3, 1)
    assert (counts.identical, counts.ties, counts.beyond_max_pairs, counts.kept) == (1, 1, 1, 2)
    assert "ties 1" in str(counts) and "kept 2" in str(counts)


def test_rows_of_the_source_are_reported_not_indices_after_filtering(tmp_path, tiny_tokenizer):
    rows = [pick_a_pic_row(0, label_0=0.5, label_1=0.5), pick_a_pic_row(1)]
    example = parquet_dataset(tmp_path, rows, tiny_tokenizer, shuffle=False)[0]
    assert (example.row, example.pair_id) == (1, "1001")


def test_a_missing_ranking_id_falls_back_to_the_uids_then_to_the_row(tmp_path):
    assert parquet_table(tmp_path, [pick_a_pic_row(0, ranking_id=None)]).pair_id(0) == "a0/b0"
    bare = {name: pick_a_pic_row(0)[name] for name in ("jpg_0", "jpg_1", "label_0", "caption")}
    assert parquet_table(tmp_path / "bare", [bare]).pair_id(0) == "0"


def test_names_and_captions_choose_no_columns_of_the_source_anew(tmp_path, tiny_tokenizer, monkeypatch):
    dataset = parquet_dataset(tmp_path, [pick_a_pic_row(number) for number in range(5)], tiny_tokenizer, shuffle=False)
    calls, choose = [], datasets.Dataset.select_columns

    def counted(self, *arguments, **options):
        calls.append(arguments)
        return choose(self, *arguments, **options)

    monkeypatch.setattr(datasets.Dataset, "select_columns", counted)
    names = [dataset.table.pair_id(int(row)) for row in dataset.table.rows]
    captions = [dataset.caption(index)["input_ids"] for index in range(5)]
    assert not calls
    assert names == [dataset[index].pair_id for index in range(5)] and len(set(names)) == 5
    assert all(torch.equal(captions[index], dataset[index].tokens["input_ids"]) for index in range(5))


def test_a_table_travels_to_a_worker_as_it_was_before_its_use(tmp_path):
    table = parquet_table(tmp_path, [pick_a_pic_row(number) for number in range(3)])
    size, name = len(pickle.dumps(table)), table.pair_id(0)
    assert len(pickle.dumps(table)) == size
    again = pickle.loads(pickle.dumps(table))
    assert again.pair_id(0) == name and again.fingerprint == table.fingerprint


def test_globs_folders_and_lists_name_parquet_files(tmp_path):
    for number in range(3):
        write_pick_a_pic(tmp_path / f"train-0000{number}-of-00003.parquet", [pick_a_pic_row(number)])
    write_pick_a_pic(tmp_path / "train_unique-00000-of-00001.parquet", [pick_a_pic_row(9)])
    files = [str(tmp_path / f"train-0000{number}-of-00003.parquet") for number in range(3)]
    as_glob = load_pairs(data_config(str(tmp_path / "train-*.parquet")))
    as_folder = load_pairs(data_config(str(tmp_path)))
    as_list = load_pairs(data_config([files[0], files[1], files[0], files[2]]))
    for table in (as_glob, as_folder, as_list):
        assert [table.pair_id(row) for row in table.rows.tolist()] == ["1000", "1001", "1002"]


def test_held_out_pairs_have_a_path_a_split_a_number_and_columns_of_their_own(tmp_path):
    write_pick_a_pic(tmp_path / "train.parquet", [pick_a_pic_row(0)])
    write_pick_a_pic(tmp_path / "test.parquet", [pick_a_pic_row(5), pick_a_pic_row(6)])
    keys = ["data.source=parquet", "data.path=elsewhere", "data.columns={caption: prompt}", "data.max_pairs=9"]
    keys += [f"eval.path={tmp_path}", "eval.split=test", "eval.pairs=1"]
    table = load_pairs(Split.HELD_OUT.source(load_config("configs/base.yaml", [*keys, "eval.columns={}"])))
    assert [table.pair_id(row) for row in table.rows.tolist()] == ["1005"]
    settings = load_config("configs/base.yaml", keys)
    assert Split.TRAIN.source(settings) == settings.data
    with pytest.raises(DataError, match=r"test\.parquet lacks the columns prompt;.* in eval\.columns where"):
        load_pairs(Split.HELD_OUT.source(settings))


def test_a_folder_without_the_split_never_yields_another_one(tmp_path):
    write_pick_a_pic(tmp_path / "test.parquet", [pick_a_pic_row(0)])
    with pytest.raises(DataError, match=r"no \.parquet file of split 'train' \(found test\)"):
        load_pairs(data_config(str(tmp_path)))


def test_image_columns_of_type_image_stay_encoded(tmp_path, tiny_tokenizer):
    from datasets import Dataset, Features, Image, Value

    features = Features({"jpg_0": Image(), "jpg_1": Image(), "label_0": Value("int64"), "caption": Value("string")})
    cells = {name: [{"bytes": encoded_image(color)}] for name, color in (("jpg_0", "lime"), ("jpg_1", "red"))}
    Dataset.from_dict({**cells, "label_0": [1], "caption": ["x"]}, features).to_parquet(tmp_path / "train.parquet")
    table = load_pairs(data_config(str(tmp_path)))
    assert isinstance(table.dataset[0]["jpg_0"]["bytes"], bytes)
    assert colours(PairDataset(table, tokenize_with(tiny_tokenizer), 0, data_config())[0]) == [LIME, RED]


@pytest.mark.parametrize("caption_name", ["original_prompt.txt", "caption.txt"])
def test_webdataset_tars_are_read_with_labels_as_text(tmp_path, tiny_tokenizer, caption_name):
    def members(key, label_0, label_1):
        green_first = label_0 == "1.0"
        yield f"{key}.jpg_0.jpg", encoded_image("lime" if green_first else "red", format="JPEG")
        yield f"{key}.jpg_1.jpg", encoded_image("red" if green_first else "lime", format="JPEG")
        yield f"{key}.label_0.txt", label_0.encode()
        yield f"{key}.label_1.txt", label_1.encode()
        yield f"{key}.score_0.txt", b"0.5\n"
        yield f"{key}.score_1.txt", f"1.{key}".encode()
        yield f"{key}.{caption_name}", f"caption {key}".encode()

    with tarfile.open(tmp_path / "train-000.tar", "w") as tar:
        for key, *labels in (("000", "1.0", "0.0"), ("001", "0.5", "0.5\n"), ("002", "0\n", "1\n")):
            for name, content in members(key, *labels):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    table = load_pairs(data_config(str(tmp_path / "*.tar"), source="webdataset"))
    assert (table.counts.rows, table.counts.ties, table.counts.kept) == (3, 1, 2)
    assert [table.pair_id(row) for row in table.rows.tolist()] == ["000", "002"]
    assert table.dataset[2]["caption"] == "caption 002"
    assert table.scores.tolist() == [[0.5, 1.002], [1.0, 0.5]]
    dataset = PairDataset(table, tokenize_with(tiny_tokenizer), 0, data_config(), shuffle=False)
    for position in range(2):
        assert torch.allclose(torch.tensor(colours(dataset[position])), torch.tensor([LIME, RED]).float(), atol=0.05)


def write_folder(folder, listing, rows):
    folder.mkdir(parents=True)
    (folder / "good.png").write_bytes(encoded_image("lime"))
    (folder / "bad.png").write_bytes(encoded_image("red"))
    with (folder / listing).open("w", newline="", encoding="utf-8") as file:
        if listing.endswith(".csv"):
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return str(folder)


@pytest.mark.parametrize("listing", ["pairs.csv", "pairs.jsonl"])
def test_a_folder_lists_chosen_and_rejected(tmp_path, tiny_tokenizer, listing):
    caption = 'one, "two"\u2028three'
    rows = [{"chosen": "good.png", "rejected": "bad.png", "caption": caption}]
    table = load_pairs(data_config(write_folder(tmp_path / "f", listing, rows), source="folder"))
    assert table.dataset[0]["caption"] == caption
    assert colours(PairDataset(table, tokenize_with(tiny_tokenizer), 0, data_config())[0]) == [LIME, RED]


@pytest.mark.parametrize("listing", ["pairs.csv", "pairs.jsonl"])
def test_a_folder_lists_labels(tmp_path, tiny_tokenizer, listing):
    images = {"image_0": "bad.png", "image_1": "good.png", "caption": "x"}
    rows = [{**images, "label_0": label} for label in (0.5, 0, None)]
    table = load_pairs(data_config(write_folder(tmp_path / "f", listing, rows), source="folder"))
    assert (table.counts.ties, table.counts.unlabelled, table.counts.kept) == (1, 1, 1)
    assert colours(PairDataset(table, tokenize_with(tiny_tokenizer), 0, data_config())[0]) == [LIME, RED]


def listed_folder(tmp_path, name, content):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_pairs(data_config(str(tmp_path), source="folder"))


CHOICE = "chosen,rejected,caption\n"
JSON_PAIR = '{"chosen": "a", "rejected": "b", "caption": "c"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.csv", CHOICE + "a.png,b.png,a cat, 8k\n", r"pairs\.csv line 2 has 4 columns, the header 3"),
        ("pairs.csv", CHOICE + 'a.png,b.png,"a cat\nc.png,d.png,5"\n', r"pairs\.csv lines 2 to 3"),
        ("pairs.csv", CHOICE.replace(",", ";") + "a.png;b.png;a cat\n", r"pairs\.csv: .*semicolons"),
        ("pairs.csv", (CHOICE + "a.png,b.png,café\n").encode("cp1252"), r"pairs\.csv line 2: byte 39 .*UTF-8"),
        ("pairs.csv", "chosen,chosen,rejected,caption\na,b,c,d\n", r"several columns called 'chosen'"),
        (
            "pairs.jsonl",
            '\n{"chosen": "a", "rejected": "b", "caption": ["x"]}',
            r"line 2: column caption must hold text",
        ),
        ("pairs.jsonl", '{"chosen": "a", "rejected": "b", "caption": 3}', r"line 1: column caption must hold text"),
        ("pairs.jsonl", '{"chosen": 1, "rejected": "b", "caption": "x"}', r"line 1: column chosen must hold text"),
        ("pairs.jsonl", '{"chosen": "a", "rejected": "b", "caption": "\\ud83d"}', r"line 1: .* half a character"),
        (
            "pairs.jsonl",
            '{"chosen": "a", "rejected": "b", "caption": "x", "ranking_id": [1]}',
            r"line 1: column ranking_id must hold text",
        ),
        (
            "pairs.jsonl",
            '{"image_0": "a", "image_1": "b", "caption": "x", "label_0": [1]}',
            r"line 1: column label_0 must hold numbers, got \[1\]",
        ),
    ],
)
def test_a_list_of_pairs_that_is_no_text_is_refused_with_file_and_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        listed_folder(tmp_path, name, content)


def test_null_and_nan_are_no_caption_and_no_image(tmp_path):
    rows = [
        '{"chosen": "a.png", "rejected": "b.png", "caption": "x"}',
        '{"chosen": "a.png", "rejected": "b.png", "caption": NaN}',
        '{"chosen": "a.png", "rejected": "b.png", "caption": null}',
        '{"chosen": "a.png", "rejected": "b.png"}',
        '{"chosen": null, "rejected": NaN, "caption": "nan"}',
    ]
    table = listed_folder(tmp_path, "pairs.jsonl", "\n".join(rows))
    assert (table.counts.without_caption, table.counts.kept) == (3, 2)
    assert table.columns("caption") == {"caption": ["x", "nan"]}
    assert (table.dataset[4]["jpg_0"], table.dataset[4]["jpg_1"]) == (None, None)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_what_excel_saves_as_unicode_is_read(tmp_path, encoding, line_end):
    text = (CHOICE + 'a.png,b.png,"café, 8k"\n').replace("\n", line_end)
    table = listed_folder(tmp_path, "pairs.csv", text.encode(encoding))
    assert table.columns("caption") == {"caption": ["café, 8k"]}


def test_labels_and_flags_may_be_booleans(tmp_path):
    rows = [
        f'{{"image_0": "a", "image_1": "b", "caption": "x", "label_0": {label}, "has_label": {flag}}}'
        for label, flag in (("true", "true"), ("false", "true"), ("true", "false"))
    ]
    table = listed_folder(tmp_path, "pairs.jsonl", "\n".join(rows))
    assert (table.chosen_side.tolist(), table.counts.unlabelled) == ([0, 1], 1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.csv", "note,caption,rejected,chosen\n,a cat,b.png,a.png\n"),
        ("pairs.jsonl", '{"caption": "a cat", "note": [1], "rejected": "b.png", "chosen": "a.png"}\n'),
        ("pairs.csv", "label_0,caption,image_1,image_0\n0,a cat,a.png,b.png\n"),
        ("pairs.jsonl", '{"label_0": false, "image_1": "a.png", "caption": "a cat", "image_0": "b.png"}\n'),
    ],
)
def test_columns_are_found_by_name_in_any_order(tmp_path, name, content):
    table = listed_folder(tmp_path, name, content)
    (tmp_path / "a.png").write_bytes(encoded_image("lime"))
    (tmp_path / "b.png").write_bytes(encoded_image("red"))
    assert table.images_of(0) == (encoded_image("lime"), encoded_image("red")) and table.captions() == ["a cat"]


def test_a_column_that_only_later_lines_have_counts(tmp_path):
    rows = ['{"chosen": "a", "rejected": "b", "caption": "x"', '"ranking_id": 7}']
    table = listed_folder(tmp_path, "pairs.jsonl", f"{rows[0]}}}\n{', '.join(rows)}\n")
    assert [table.pair_id(row) for row in range(2)] == ["0", "7"]


# Scores


def test_scores_are_oriented_as_the_labels_and_found_by_row(tmp_path):
    rows = [pick_a_pic_row(number, score_0=0.1 * number, score_1=1.0) for number in range(4)]
    rows[0] |= {"label_0": 0.5, "label_1": 0.5}
    rows[2] |= {"label_0": 0.0, "label_1": 1.0, "score_1": None}
    table = parquet_table(tmp_path, rows)
    np.testing.assert_array_equal(table.scores, np.array([[0.1, np.nan, 0.1 * 3], [1.0, 0.2, 1.0]]))
    assert parquet_table(tmp_path / "without", [pick_a_pic_row(0)]).scores is None


def test_the_pairs_are_the_same_pairs_with_other_scores(tmp_path):
    """What is known of their reference holds for them."""
    scores = {"none": {}, "some": {"score_0": 1.0, "score_1": 0.0}, "others": {"score_0": 2.0, "score_1": 0.0}}
    tables = [parquet_table(tmp_path / name, [pick_a_pic_row(0, **found)]) for name, found in scores.items()]
    assert len({table.fingerprint for table in tables}) == 1


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": "good.png", "rejected": "bad.png", "score_chosen": 2.5, "score_rejected": -1}, [[2.5], [-1]]),
        ({"image_0": "bad.png", "image_1": "good.png", "label_0": 0, "score_0": -1, "score_1": 2.5}, [[2.5], [-1]]),
        ({"chosen": "good.png", "rejected": "bad.png", "score_chosen": 2.5}, None),
    ],
)
@pytest.mark.parametrize("listing", ["pairs.csv", "pairs.jsonl"])
def test_a_folder_lists_scores_of_both_images(tmp_path, listing, row, expected):
    folder = write_folder(tmp_path / "f", listing, [row | {"caption": "x"}])
    scores = load_pairs(data_config(folder, source="folder")).scores
    assert (scores if scores is None else scores.tolist()) == expected


def scored_table(folder, *scores):
    """Pairs with (chosen, rejected) scores, from the second row on."""
    rows = [pick_a_pic_row(0, label_0=0.5, label_1=0.5, score_0=99.0, score_1=-99.0)]
    for number, (chosen, rejected) in enumerate(scores, start=1):
        rows.append(pick_a_pic_row(number, score_0=chosen, score_1=rejected))
    return parquet_table(folder, rows)


def test_a_weight_is_smpos_with_the_training_pairs_range_and_belongs_to_its_row(tmp_path):
    # Training scores go from 0 to 4, without the dropped tie's: p = σ(gap / 4), weight 10·(2p − 1) = 10·tanh(gap / 8).
    train, held_out = scored_table(tmp_path / "a", (4, 1), (2, 2), (0, 1)), scored_table(tmp_path / "b", (9, 1), (1, 3))
    weights = weigh_pairs(10.0, train, held_out)
    found = weights.train.get(torch.tensor([3, 1, 2, 1]), torch.device("cpu"))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([10 * np.tanh(gap / 8) for gap in (-1, 3, 0, 3)], rel=1e-6)
    held_out_weights = weights.held_out.get(torch.tensor([1, 2]), torch.device("cpu"))
    assert held_out_weights.tolist() == pytest.approx([10 * np.tanh(gap / 8) for gap in (8, -2)], rel=1e-6)
    assert "scores from 0 to 4; 1 of 3 pairs turned round" in str(weights.train)
    assert weigh_pairs(None, parquet_table(tmp_path / "c", [pick_a_pic_row(0)])) == (None, None)


def test_scores_that_are_missing_or_no_finite_numbers_are_named(tmp_path):
    good, bare = scored_table(tmp_path / "good", (1, 0)), parquet_table(tmp_path / "bare", [pick_a_pic_row(0)])
    with pytest.raises(DataError, match=r"the training pairs have none .*score_0 and score_1.*scripts/relabel\.py"):
        weigh_pairs(10.0, bare, good)
    with pytest.raises(DataError, match=r"the held-out pairs have none"):
        weigh_pairs(10.0, good, bare)
    broken = scored_table(tmp_path / "broken", (1, 0), (None, 0), (1, float("nan")), (float("inf"), 0))
    message = r"3 of 4 held-out pairs lack one \(row 2: nan/0, row 3: 1/nan, row 4: inf/0, chosen/rejected\)"
    with pytest.raises(DataError, match=message):
        weigh_pairs(10.0, good, broken)
    with pytest.raises(DataError, match=r"all of the training pairs' are 1\."):
        weigh_pairs(10.0, scored_table(tmp_path / "equal", (1, 1)))
    row = {"chosen": "", "rejected": "", "caption": "", "score_chosen": "high", "score_rejected": 1}
    text = write_folder(tmp_path / "f", "pairs.csv", [row])
    with pytest.raises(DataError, match=r"column score_0 must hold numbers.*'high'"):
        weigh_pairs(10.0, load_pairs(data_config(text, source="folder")))


def card_features(*names):
    types = {name: {"caption": "string", "label_0": "float64"}.get(name, "binary") for name in names}
    return [{"name": name, "dtype": dtype} for name, dtype in types.items()]


def test_a_hub_data_set_reads_the_files_of_the_named_split_alone(tmp_path, tiny_tokenizer):
    write_pick_a_pic(tmp_path / "data" / "train-00000-of-00001.parquet", [pick_a_pic_row(0)])
    (tmp_path / "data" / "test-00000-of-00001.parquet").write_bytes(b"never opened")
    splits = [{"name": name, "num_bytes": 1, "num_examples": 1} for name in ("train", "test")]
    card = {"dataset_info": {"features": card_features("jpg_0", "jpg_1", "label_0", "caption"), "splits": splits}}
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    table = load_pairs(data_config(str(tmp_path), source="hub"))
    assert (len(table), table.pair_id(0)) == (1, "1000")
    with pytest.raises(DataError, match="no split 'validation'; choose from"):
        load_pairs(data_config(str(tmp_path), source="hub", split="validation"))


def test_columns_that_the_card_of_a_hub_data_set_lacks_are_named_before_anything_is_fetched(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"never opened")
    card = {"dataset_info": {"features": card_features("label_0", "caption")}}
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    with pytest.raises(DataError, match="lacks the columns jpg_0, jpg_1; it has label_0, caption"):
        load_pairs(data_config(str(tmp_path), source="hub"))


# Errors


def test_a_failed_hub_load_names_the_copies_and_the_local_ways():
    with pytest.raises(DataError) as caught:
        load_pairs(data_config("yuvalkirstain/pickapic_v2", source="hub"))
    for part in (
        "'yuvalkirstain/pickapic_v2'",
        "liuhuohuo2/pick-a-pic-v2",
        "sayakpaul/pickapic_v2_webdataset",
        "data.source=parquet",
        "data.source=webdataset",
        "data.source=folder",
    ):
        assert part in str(caught.value)


def test_missing_columns_are_named_beside_the_found_ones(tmp_path):
    rows = [{"caption": "x", "label_0": 1.0, "picture": "y"}]
    with pytest.raises(DataError, match=r"train\.parquet lacks the columns jpg_0, jpg_1; it has caption, label_0, pic"):
        parquet_table(tmp_path, rows)
    folder = write_folder(tmp_path / "f", "pairs.csv", [{"winner": "good.png", "caption": "x"}])
    with pytest.raises(DataError, match=r"has the columns winner, caption; it needs chosen, rejected, caption or"):
        load_pairs(data_config(folder, source="folder"))


@pytest.mark.parametrize("source", ["parquet", "webdataset"])
def test_a_glob_that_matches_nothing_is_named(tmp_path, source):
    with pytest.raises(DataError, match=r"no \.(parquet|tar) file matches '.*nothing-\*'"):
        load_pairs(data_config(str(tmp_path / "nothing-*"), source=source))


def test_a_folder_without_a_list_of_pairs_is_named(tmp_path):
    with pytest.raises(DataError, match=r"holds no pairs\.csv or pairs\.jsonl"):
        load_pairs(data_config(str(tmp_path), source="folder"))


def test_a_list_of_pairs_may_be_named_itself_and_two_of_them_are_a_clash(tmp_path):
    for name, content in (
        ("pairs.csv", CHOICE + "a,b,of csv\n"),
        ("pairs.jsonl", JSON_PAIR),
        ("Mine.CSV", CHOICE + "a,b,mine\n"),
    ):
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=r"holds both pairs\.csv and pairs\.jsonl; name the one"):
        load_pairs(data_config(str(tmp_path), source="folder"))
    for name, caption in (("pairs.csv", "of csv"), ("pairs.jsonl", "c"), ("Mine.CSV", "mine")):
        table = load_pairs(data_config(str(tmp_path / name), source="folder"))
        assert table.captions() == [caption] and table.dataset[0]["jpg_0"] == str(tmp_path / "a")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "pairs.csv").write_text(CHOICE + "a,b,of the split\n")
    assert load_pairs(data_config(str(tmp_path), source="folder")).captions() == ["of the split"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, r"the disk is full .* make room"),
        (errno.EROFS, r"the file system is read-only; name a folder that can be written to"),
        (errno.EACCES, r"there is no permission"),
    ],
)
def test_a_cache_of_datasets_that_cannot_be_written_is_named(tmp_path, monkeypatch, number, words):
    """Whether `datasets` says so itself or as the cause of another error."""
    from datasets.config import HF_DATASETS_CACHE

    def fail(*arguments, **options):
        try:
            failing(number)()
        except OSError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error

    write_pick_a_pic(tmp_path / "train.parquet", [pick_a_pic_row(0)])
    for raising in (fail, failing(number)):
        monkeypatch.setattr("datasets.load_dataset", raising)
        with pytest.raises(DataError, match=rf"into the cache {HF_DATASETS_CACHE} \(HF_DATASETS_CACHE names .*{words}"):
            load_pairs(data_config(str(tmp_path), source="hub"))


def test_an_index_that_cannot_be_written_is_named(tmp_path, full_disk):
    write_pick_a_pic(tmp_path / "train.parquet", [pick_a_pic_row(0)])
    with pytest.raises(StorageError, match=r"could not write .*/xdpo/\w+\.arrow: the disk is full .* make room"):
        load_pairs(data_config(str(tmp_path)))


def test_a_line_that_is_not_json_is_named(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(JSON_PAIR + '{"chosen"\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl line 2 is not JSON"):
        load_pairs(data_config(str(tmp_path), source="folder"))


@pytest.mark.parametrize(("name", "source"), [("train.parquet", "parquet"), ("train.tar", "webdataset")])
def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path, name, source):
    (tmp_path / name).write_bytes(b"not this")
    with pytest.raises(DataError, match=name):
        load_pairs(data_config(str(tmp_path / name), source=source))


def test_labels_that_are_none_are_named_by_row(tmp_path):
    rows = [pick_a_pic_row(0), pick_a_pic_row(1, label_0=0.7, label_1=0.3), pick_a_pic_row(2, label_0=1, label_1=0.5)]
    with pytest.raises(DataError, match=r"got others in 2 rows \(row 1: 0\.7/0\.3, row 2: 1/0\.5\)"):
        parquet_table(tmp_path, rows)
    folder = write_folder(
        tmp_path / "f", "pairs.csv", [{"image_0": "", "image_1": "", "caption": "", "label_0": "left"}]
    )
    with pytest.raises(DataError, match=r"column label_0 must hold numbers.*'left'"):
        load_pairs(data_config(folder, source="folder"))


def test_nothing_left_after_filtering_is_an_error_with_the_counts(tmp_path):
    with pytest.raises(DataError, match=r"no usable pair in .*rows 1, .*ties 1, .*kept 0"):
        parquet_table(tmp_path, [pick_a_pic_row(0, label_0=0.5, label_1=0.5)])


def test_an_unknown_source_lists_the_known_ones():
    with pytest.raises(DataError, match=r"unknown data\.source 'csv'; choose from hub, parquet, webdataset, folder"):
        load_pairs(data_config(source="csv"))


# Images


def test_transparency_lies_over_white_and_every_mode_becomes_rgb():
    def decoded(image, **options):
        buffer = io.BytesIO()
        image.save(buffer, options.pop("format", "PNG"), **options)
        return decode_rgb(buffer.getvalue()).getpixel((0, 0))

    assert decoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0))) == (255, 255, 255)
    assert decoded(Image.new("LA", (2, 2), (0, 0))) == (255, 255, 255)
    assert decoded(Image.new("P", (2, 2), 0), transparency=0) == (255, 255, 255)
    assert decoded(Image.new("L", (2, 2), 100)) == (100, 100, 100)
    assert decoded(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    assert decoded(Image.fromarray(np.full((2, 2), 100 * 257, np.uint16))) == (100, 100, 100)
    assert decoded(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), format="JPEG") == (0, 0, 0)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (16, 8), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by 90°
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert decode_rgb(buffer.getvalue()).size == (8, 16)


@pytest.mark.parametrize(
    "content", [None, b"", b"text", encoded_image(size=(64, 64), format="JPEG")[:-200], "/no/such"]
)
def test_damaged_and_missing_images_are_unreadable(content):
    with pytest.raises(UnreadableImageError):
        decode_rgb(content)


def test_a_decompression_bomb_is_unreadable(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(UnreadableImageError, match="DecompressionBombError"):
        decode_rgb(encoded_image(size=(16, 16)))


def test_one_resize_of_the_square_equals_resizing_the_short_side_and_cropping():
    image = decode_rgb(gradient_image((48, 32)))
    shorter = image.resize((24, 16), Image.Resampling.BILINEAR).crop((4, 0, 20, 16))
    expected = torch.from_numpy(np.array(shorter)).permute(2, 0, 1) / 127.5 - 1
    assert (square_pixels(image, 16) - expected).abs().max() <= 1 / 127.5 + 1e-6


def test_pixels_span_minus_one_to_one():
    assert square_pixels(Image.new("RGB", (3, 5), "white"), 8).unique().tolist() == [1.0]
    assert square_pixels(Image.new("RGB", (3, 5), "black"), 8).unique().tolist() == [-1.0]


# Examples


def gradient_rows(count=1, second_size=(24, 16)):
    return [
        pick_a_pic_row(number, jpg_0=gradient_image(), jpg_1=gradient_image(second_size)) for number in range(count)
    ]


def test_both_images_are_flipped_or_neither(tmp_path, tiny_tokenizer):
    dataset = parquet_dataset(tmp_path, gradient_rows(), tiny_tokenizer, horizontal_flip=True)
    plain = parquet_dataset(tmp_path, gradient_rows(), tiny_tokenizer)[0].pixel_values
    flips = 0
    for position in range(60):
        pixels = dataset[position].pixel_values
        flipped = torch.allclose(pixels, plain.flip(-1), atol=0.02)
        assert flipped or torch.equal(pixels, plain)
        flips += flipped
    assert 15 < flips < 45


def test_both_images_are_cropped_at_the_same_relative_place(tmp_path, tiny_tokenizer):
    rows = gradient_rows(second_size=(48, 32))
    dataset = parquet_dataset(tmp_path, rows, tiny_tokenizer, crop="random", horizontal_flip=True)
    lefts = set()
    for position in range(20):
        chosen, rejected = dataset[position].pixel_values
        assert torch.allclose(chosen, rejected, atol=0.06)
        lefts.add(round(chosen[0].mean().item(), 2))
    assert len(lefts) > 5


def test_switching_the_flip_on_leaves_the_crops_as_they_were(tmp_path, tiny_tokenizer):
    def mean_red(**changes):
        dataset = parquet_dataset(tmp_path, gradient_rows(), tiny_tokenizer, crop="random", **changes)
        return torch.tensor([dataset[position].pixel_values[0, 0].mean() for position in range(8)])

    assert torch.allclose(mean_red(), mean_red(horizontal_flip=True), atol=0.01)


def test_without_augmentation_nothing_is_random(tmp_path, tiny_tokenizer):
    random_config = {"crop": "random", "horizontal_flip": True, "caption_dropout": 1.0}
    rows = gradient_rows(3)
    held_out = parquet_dataset(tmp_path, rows, tiny_tokenizer, shuffle=False, augment=False, **random_config)
    centre = parquet_dataset(tmp_path, rows, tiny_tokenizer, shuffle=False)
    for position in range(3):
        assert held_out[position].row == position
        assert not held_out[position].caption_dropped
        assert torch.equal(held_out[position].pixel_values, centre[position].pixel_values)


def test_captions_are_dropped_at_about_the_configured_rate_and_always_the_same_ones(tmp_path, tiny_tokenizer):
    rows = [pick_a_pic_row(0)]
    dataset = parquet_dataset(tmp_path, rows, tiny_tokenizer, caption_dropout=0.2)
    examples = [dataset[position] for position in range(400)]
    dropped = [example.caption_dropped for example in examples]
    assert 50 < sum(dropped) < 110  # 80 ± 8 expected
    assert dropped == [dataset[position].caption_dropped for position in range(400)]
    empty = tiny_tokenizer("", padding="max_length", max_length=8).input_ids
    for example in examples[:50]:
        assert (example.tokens["input_ids"].tolist() == empty) == example.caption_dropped


def test_long_captions_are_cut_and_counted(tmp_path, tiny_tokenizer):
    rows = [pick_a_pic_row(0, caption="abcdef"), pick_a_pic_row(1, caption="abcdefg")]  # 6 + 2 tokens fit into 8
    dataset = parquet_dataset(tmp_path, rows, tiny_tokenizer, shuffle=False)
    examples = [dataset[0], dataset[1]]
    assert [example.truncated for example in examples] == [False, True]
    batch = collate_pairs(examples)
    assert batch.truncated == 1
    assert batch.captions["input_ids"].shape == (2, 8)


def test_each_epoch_shows_every_pair_once_in_an_order_of_its_own(tmp_path, tiny_tokenizer):
    dataset = parquet_dataset(tmp_path, [pick_a_pic_row(number) for number in range(10)], tiny_tokenizer)
    epochs = [[dataset[epoch * 10 + place].row for place in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(dataset) == 10


def test_a_collated_batch_has_all_chosen_images_first(tmp_path, tiny_tokenizer):
    dataset = parquet_dataset(tmp_path, [pick_a_pic_row(number) for number in range(3)], tiny_tokenizer)
    batch = collate_pairs([dataset[position] for position in range(3)])
    assert batch.images.mean(dim=(2, 3)).tolist() == [LIME] * 3 + [RED] * 3
    assert batch.positions.tolist() == [0, 1, 2]
    assert [f"{1000 + row}" for row in batch.rows.tolist()] == batch.pair_ids


# Unreadable images


def rows_with_damage(count, damaged):
    return [pick_a_pic_row(n, **({"jpg_1": b"broken"} if n in damaged else {})) for n in range(count)]


def test_the_next_pair_stands_in_for_an_unreadable_one(tmp_path, tiny_tokenizer):
    rows = rows_with_damage(5, {1, 2, 4})
    dataset = parquet_dataset(tmp_path, rows, tiny_tokenizer, shuffle=False)
    found = [(example.row, example.unreadable) for example in (dataset[position] for position in range(5))]
    assert found == [(0, []), (3, [1, 2]), (3, [2]), (3, []), (0, [4])]
    assert collate_pairs([dataset[1], dataset[4]]).unreadable == [1, 2, 4]


def test_a_missing_file_of_a_folder_is_an_unreadable_image(tmp_path, tiny_tokenizer):
    rows = [{"chosen": name, "rejected": "bad.png", "caption": "x"} for name in ("gone.png", "good.png")]
    table = load_pairs(data_config(write_folder(tmp_path / "f", "pairs.csv", rows), source="folder"))
    example = PairDataset(table, tokenize_with(tiny_tokenizer), 0, data_config(), shuffle=False)[0]
    assert (example.row, example.unreadable) == (1, [0])


def test_no_readable_pair_at_all_is_an_error(tmp_path, tiny_tokenizer):
    dataset = parquet_dataset(tmp_path, rows_with_damage(3, {0, 1, 2}), tiny_tokenizer)
    with pytest.raises(DataError, match="3 pairs in a row have unreadable images"):
        dataset[0]


def test_more_than_the_configured_share_of_unreadable_rows_stops_the_run(tmp_path):
    tracker = UnreadableTracker(parquet_table(tmp_path, rows_with_damage(300, set())), max_share=0.01)
    tracker.update(32, [5])
    tracker.update(32, [5, 5])  # the same row again is no new damage
    with pytest.raises(DataError, match=r"2 of the first 96 .*max_unreadable_share=0\.01.*row 5 \(pair 1005\), row 7"):
        tracker.update(32, [7])


def test_the_unreadable_share_does_not_fade_with_the_epochs(tmp_path):
    tracker = UnreadableTracker(parquet_table(tmp_path, rows_with_damage(200, set())), max_share=0.01)
    tracker.update(10_000, [1, 2])
    with pytest.raises(DataError, match="3 of the first"):
        tracker.update(10_000, [3])


# Order, ranks, workers


def micro_batches(count, **split):
    return list(itertools.islice(StepSampler(**split), count))


def test_a_step_takes_the_same_positions_however_it_is_split():
    for world_size, micro_batch_pairs in [(1, 12), (1, 2), (2, 3), (3, 2), (4, 3)]:
        accumulation = 12 // (world_size * micro_batch_pairs)
        ranks = [
            micro_batches(
                accumulation,
                start_step=5,
                total_batch_pairs=12,
                micro_batch_pairs=micro_batch_pairs,
                rank=rank,
                world_size=world_size,
            )
            for rank in range(world_size)
        ]
        in_order = [position for step in zip(*ranks, strict=True) for batch in step for position in batch]
        assert in_order == list(range(60, 72))


def test_starting_at_a_step_equals_running_up_to_it():
    split = {"total_batch_pairs": 8, "micro_batch_pairs": 2, "rank": 1, "world_size": 2}
    assert micro_batches(10, start_step=0, **split)[6:] == micro_batches(4, start_step=3, **split)


def test_a_batch_that_cannot_be_split_evenly_is_refused():
    with pytest.raises(ValueError, match="total_batch_pairs 10 must be a multiple of micro_batch_pairs 2 × 2 proc"):
        StepSampler(start_step=0, total_batch_pairs=10, micro_batch_pairs=2, world_size=2)


def assert_equal_batches(ones, others):
    for one, other in zip(ones, others, strict=True):
        for value, same in zip((*one, *one.captions.values()), (*other, *other.captions.values()), strict=True):
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, same)
            elif value is not one.captions:
                assert value == same


@pytest.fixture
def augmented(tmp_path, tiny_tokenizer):
    rows = [pick_a_pic_row(n, jpg_0=gradient_image(), jpg_1=b"" if n == 4 else gradient_image()) for n in range(7)]
    config = {"crop": "random", "horizontal_flip": True, "caption_dropout": 0.5}
    return parquet_dataset(tmp_path, rows, tiny_tokenizer, seed=3, **config)


def loaded(dataset, count, **options):
    workers = options.pop("num_workers", 0)
    return list(itertools.islice(iter(make_loader(dataset, StepSampler(**options), num_workers=workers)), count))


def test_workers_do_not_change_a_batch_and_windows_run_across_epochs(augmented):
    split = {"start_step": 1, "total_batch_pairs": 4, "micro_batch_pairs": 2}
    alone = loaded(augmented, 6, **split)
    assert_equal_batches(alone, loaded(augmented, 6, **split, num_workers=2))
    assert torch.cat([batch.positions for batch in alone]).tolist() == list(range(4, 16))  # epochs of 7 pairs
    assert any(batch.unreadable == [4] for batch in alone)


def test_two_ranks_load_what_one_would(augmented):
    whole = loaded(augmented, 2, start_step=2, total_batch_pairs=4, micro_batch_pairs=4)
    split = {"start_step": 2, "total_batch_pairs": 4, "micro_batch_pairs": 2, "world_size": 2}
    ranks = [loaded(augmented, 2, rank=rank, **split) for rank in range(2)]
    for step in range(2):
        pixels = torch.cat([ranks[rank][step].images.unflatten(0, (2, 2)) for rank in range(2)], dim=1)
        assert torch.equal(pixels.flatten(0, 1), whole[step].images)
        captions = torch.cat([ranks[rank][step].captions["input_ids"] for rank in range(2)])
        assert torch.equal(captions, whole[step].captions["input_ids"])


def test_loading_draws_nothing_from_the_global_generator(augmented):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loaded(augmented, 2, start_step=0, total_batch_pairs=2, micro_batch_pairs=2, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_is_another_order(tmp_path, tiny_tokenizer):
    rows = [pick_a_pic_row(number) for number in range(20)]
    orders = [
        [dataset[position].row for position in range(20)]
        for dataset in (parquet_dataset(tmp_path, rows, tiny_tokenizer, seed=seed) for seed in (1, 2))
    ]
    assert orders[0] != orders[1]
