"""Rows as real data sets have them: odd images, captions and names. What can be read is, and the rest is counted."""

import importlib.util
import io
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from conftest import encoded_image, pick_a_pic_row, write_pick_a_pic
from PIL import Image
from tolerances import assert_same_output
from training_runs import ROOT

from xdpo import families, precompute
from xdpo.cache import CachedPairDataset
from xdpo.compute import build_accelerator
from xdpo.config import load_config
from xdpo.data import PairDataset, Split, load_pairs
from xdpo.families.stable_diffusion import tokenize


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


LIME = Image.new("RGB", (16, 16), "lime")
PHOTO = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
READABLE = {  # all lime, or white where they have no colour
    "CMYK": encoded(Image.new("CMYK", (16, 16), (255, 0, 255, 0)), "JPEG"),
    "animated": encoded(LIME, "GIF", save_all=True, append_images=[Image.new("RGB", (16, 16), "red")]),
    "16 bits": encoded(Image.fromarray(np.full((16, 16), 65_535, np.uint16)), "PNG"),
    "with a comment behind it": encoded_image("lime") + b"\0 appended",
    "one pixel wide": encoded(LIME.resize((1, 300)), "PNG"),
}
PNG = encoded_image()
GIGANTIC = PNG[12:16] + struct.pack(">II", 100_000, 100_000) + PNG[24:29]  # 10,000 megapixels, by its header
UNREADABLE = {
    "null": None,
    "empty": b"",
    "truncated": PHOTO[: len(PHOTO) // 2],
    "no image": b"\x89PNG\r\n\x1a\n",
    "gigantic": PNG[:12] + GIGANTIC + struct.pack(">I", zlib.crc32(GIGANTIC)) + PNG[33:],
}
CAPTIONS = ["a\0b", "🦊👨‍👩‍👧 und ein Igel", "word " * 10_000, "ثعلب في الغابة", "\u202egnirts\u202c", "", "   "]


@pytest.fixture
def path(tmp_path):
    images = [*READABLE.values(), *UNREADABLE.values()]
    rows = [pick_a_pic_row(row, jpg_0=image, image_0_uid="the same") for row, image in enumerate(images)]
    rows += [pick_a_pic_row(20 + row, caption=caption) for row, caption in enumerate(CAPTIONS)]
    return write_pick_a_pic(tmp_path / "train.parquet", rows)


def test_odd_images_and_captions_become_examples_or_are_counted(path, tiny_tokenizer):
    settings = load_config(
        ROOT / "configs/base.yaml",
        ["data.source=parquet", f"data.path={path}", "data.resolution=8", "data.caption_dropout=0"],
    )
    table = load_pairs(settings.data)
    dataset = PairDataset(
        table, partial(tokenize, {"tokenizer": tiny_tokenizer}, {}), 0, settings.data, shuffle=False, augment=False
    )
    examples = [dataset[position] for position in range(len(table))]
    first, last = len(READABLE), len(READABLE) + len(UNREADABLE)
    for name, example in zip(READABLE, examples, strict=False):
        assert not example.unreadable, name
        assert example.pixel_values[0, 1].mean() > 0.7, name  # green
    unreadable = list(range(first, last))
    assert [example.unreadable for example in examples[first:last]] == [
        unreadable[row:] for row in range(len(unreadable))
    ]
    assert table.captions()[last:] == CAPTIONS
    for caption, example in zip(CAPTIONS, examples[last:], strict=True):
        assert not example.unreadable and example.row == last + CAPTIONS.index(caption)
    assert examples[last + 2].truncated, "50,000 characters"


def test_odd_rows_are_inspected_and_drawn(path, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("inspect_data", ROOT / "scripts" / "inspect_data.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    keys = ["data.source=parquet", f"data.path={path}", "eval.every=0", "--sheet", str(tmp_path / "sheet.jpg")]
    assert script.main(["--config", str(ROOT / "configs/base.yaml"), *keys]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert f"{len(UNREADABLE)} of them unreadable" in out and "Arabic" in out
    named = [image for image in (*READABLE.values(), *UNREADABLE.values()) if image is not None]
    others = sum(len(image) != len(named[0]) for image in named)
    assert f"; {others} images differ in size from the first one of their name" in out
    without_names = load_config(ROOT / "configs/base.yaml", [*keys[:3], "data.columns={image_0_uid: none}"])
    assert load_pairs(without_names.data).misnamed() == 0, "as the note of a cache advises"
    assert Image.open(tmp_path / "sheet.jpg").width > 500


def test_odd_rows_are_encoded_as_without_a_cache_but_for_images_of_one_name(path, small_pipeline, tmp_path):
    """Those of one name are the first of them, and their number is said."""
    settings = load_config(
        ROOT / "configs/base.yaml",
        [
            f"model.pipeline={small_pipeline}",
            f"data.path={path}",
            f"cache.examples={tmp_path / 'cache'}",
            *("data.source=parquet", "data.resolution=16", "data.num_workers=0", "data.caption_dropout=0"),
            *("data.horizontal_flip=false", "data.sample_latents=false", "train.micro_batch_pairs=1"),
            *("cache.dtype=fp32", "compute.precision=fp32", "eval.every=0", "log.trackers=[]"),
        ],
    )
    said, accelerator = [], build_accelerator(settings)
    precompute.build_missing_examples(settings, accelerator, said.append)
    assert "images differ in size from the first one of their name" in said[-1] and "0 unreadable images" in said[-2]
    cache, parts = precompute.open_examples(settings, accelerator, Split.TRAIN), families.load_parts(settings.model)
    source = PairDataset(load_pairs(settings.data), parts.tokenize, 0, settings.data, shuffle=False, augment=False)
    cached = CachedPairDataset(cache, 0, settings.data, shuffle=False, augment=False)
    first = len(READABLE) + len(UNREADABLE)
    for position in range(first, len(source)):
        expected, found = source.batch([position]), cached.batch([position])
        assert found.pair_ids == expected.pair_ids and found.truncated == expected.truncated
        assert_same_output(found.images.means, parts.encode_images(expected.images).means)
        assert_same_output(found.captions["text"], parts.encode_captions(expected.captions)["text"])
    assert len({cache.images_of(index)[0] for index in range(first)}) == 1
