"""Pairs as labelled single images: who is desirable, what stands where, and batches from source and cache."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import encoded_image, pick_a_pic_row, write_pick_a_pic
from tolerances import assert_same_output

from xdpo.cache import CachedPairDataset
from xdpo.config import load_config
from xdpo.data import (
    DataError,
    LabelledImages,
    Split,
    UnpairedDataset,
    UnpairedOrder,
    image_positions_of,
    label_images,
)
from xdpo.families import load_parts
from xdpo.precompute import build_missing_examples, make_dataset, open_pairs

BASE = "configs/base.yaml"


@pytest.fixture
def settings(tmp_path, small_pipeline):
    """Three pairs: image s is preferred to x, s loses to t, y loses to t; so y and x alone are undesirable."""
    images = {"s": "lime", "t": "blue", "x": "red", "y": "yellow"}
    pairs = [("s", "x"), ("t", "s"), ("t", "y")]
    rows = [
        pick_a_pic_row(
            number,
            image_0_uid=winner,
            image_1_uid=loser,
            jpg_0=encoded_image(images[winner]),
            jpg_1=encoded_image(images[loser]),
        )
        for number, (winner, loser) in enumerate(pairs)
    ]
    path = write_pick_a_pic(tmp_path / "train.parquet", rows)
    return load_config(
        BASE,
        [
            f"output_dir={tmp_path / 'run'}",
            f"model.pipeline={small_pipeline}",
            "data.source=parquet",
            f"data.path={path}",
            "data.resolution=16",
            "data.caption_dropout=0.5",
            "data.num_workers=0",
            "eval.every=0",
            "samples.every=0",
        ],
    )


def with_cache(settings, folder):
    return settings.model_copy(
        update={"cache": settings.cache.model_copy(update={"examples": str(folder), "dtype": "fp32"})}
    )


def paired(settings):
    pairs = open_pairs(settings, Accelerator(cpu=True), Split.TRAIN)
    return make_dataset(pairs, load_parts(settings.model).tokenize, settings, Split.TRAIN)


def test_an_image_that_won_once_is_desirable_and_counts_once():
    images = label_images(["s", "t", "t"], ["x", "s", "y"])

    assert list(zip(images.index, images.side, images.desirable, strict=True)) == [
        (0, 0, True),  # s, in spite of its loss to t
        (0, 1, False),  # x
        (1, 0, True),  # t
        (2, 1, False),  # y
    ]


def test_pairs_without_an_undesirable_image_are_refused():
    with pytest.raises(DataError, match="none is undesirable"):
        label_images(["s", "t"], ["t", "s"])


def test_the_share_of_desirable_images_is_as_asked_and_all_images_come():
    images = label_images(["s", "t", "t"], ["x", "s", "y"])
    order = UnpairedOrder(0, images, 0.8)
    drawn = np.array([order[place] for place in range(4000)])

    share = images.desirable[drawn].mean()
    assert abs(share - 0.8) < 4 * np.sqrt(0.8 * 0.2 / 4000)
    counts = np.bincount(drawn, minlength=4)
    assert abs(counts[0] - counts[2]) < 5 * np.sqrt(1600) and abs(counts[1] - counts[3]) < 5 * np.sqrt(400)


def test_a_place_holds_the_same_image_whatever_was_asked_before():
    images = label_images(["s", "t"], ["x", "y"])
    forwards = [UnpairedOrder(7, images, 0.5)[place] for place in range(20)]
    order = UnpairedOrder(7, images, 0.5)

    assert [order[place] for place in reversed(range(20))] == forwards[::-1]
    assert len(set(forwards)) == 4


def test_the_slots_of_a_batch_stand_as_chosen_and_rejected_do():
    assert image_positions_of([3, 5]) == [6, 10, 7, 11]


def test_images_without_uids_are_one_each(tmp_path, settings):
    bare = {name: pick_a_pic_row(0)[name] for name in ("jpg_0", "jpg_1", "label_0", "caption")}
    path = write_pick_a_pic(tmp_path / "bare.parquet", [bare, bare | {"label_0": 0.0}])
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"path": path})})
    chosen, rejected = open_pairs(settings, Accelerator(cpu=True), Split.TRAIN).image_names()

    assert (chosen.tolist(), rejected.tolist()) == ([0, 3], [1, 2])


def test_batches_of_the_source_and_of_the_cache_are_the_same_images(settings, tmp_path):
    parts = load_parts(settings.model)
    cached = with_cache(settings, tmp_path / "cache")
    build_missing_examples(cached, Accelerator(cpu=True), lambda *_: None)
    datasets = [UnpairedDataset(paired(each), 0.6) for each in (settings, cached)]
    assert isinstance(datasets[1].pairs, CachedPairDataset)
    for positions in ([0, 1, 2, 3], [40, 41]):
        source, encoded = (dataset.batch(positions) for dataset in datasets)
        for one, other in zip((*source[:2], *source.single[:2]), (*encoded[:2], *encoded.single[:2]), strict=True):
            assert torch.equal(one, other)
        assert source.single.optimality is encoded.single.optimality is None
        assert source.pair_ids == encoded.pair_ids and len(source.rows) == 2 * len(positions)
        moments = parts.encode_images(source.images)
        assert_same_output(encoded.images.means, moments.means)
        assert_same_output(encoded.images.stds, moments.stds)
        assert_same_output(encoded.captions["text"], parts.encode_captions(source.captions)["text"])


def test_the_next_image_of_the_same_label_stands_in_for_an_unreadable_one(tmp_path, settings):
    rows = [pick_a_pic_row(0, jpg_0=b"no image"), pick_a_pic_row(1)]
    path = write_pick_a_pic(tmp_path / "damaged.parquet", rows)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"path": path})})
    batch = UnpairedDataset(paired(settings), 0.5).batch(list(range(10)))

    assert set(batch.unreadable) == {0}
    assert set(batch.rows[batch.single.desirable].tolist()) == {1}
    assert set(batch.rows[~batch.single.desirable].tolist()) == {0, 1}


def test_a_batch_looks_at_its_own_images_and_not_at_all_labels(settings, monkeypatch):
    dataset = paired(settings)
    expected = UnpairedDataset(dataset, 0.5).batch([0, 1])
    unpaired = UnpairedDataset(dataset, 0.5)
    monkeypatch.setattr(LabelledImages, "of_label", None)
    monkeypatch.setattr(np, "flatnonzero", None)
    assert torch.equal(unpaired.batch([0, 1]).rows, expected.rows)


def test_stand_ins_are_all_images_of_a_label_once_from_the_first_on():
    images = label_images(["a", "b", "c"], ["x", "y", "z"])
    assert images.desirable.tolist() == [True, False] * 3
    order = UnpairedOrder(0, images, 0.5)
    assert list(order.stand_ins(2)) == [2, 4, 0] and list(order.stand_ins(3)) == [3, 5, 1]
