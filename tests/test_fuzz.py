"""Damaged input of every kind: nothing but our own errors, and nothing else in the file changed in silence.

The suite tries the same few thousand cases every time. XDPO_FUZZ_SECONDS=600 tries new ones for so many seconds in each
test; a failure names its case, which `random.Random(case)` brings back:

    XDPO_FUZZ_SECONDS=600 python -m pytest tests/test_fuzz.py -q
"""

import csv
import io
import json
import os
import random
import struct
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from xdpo.config import ConfigError, load_config
from xdpo.data import DataError, load_pairs
from xdpo.data.images import UnreadableImageError, decode_rgb, square_pixels
from xdpo.experiments.plan import load_plan
from xdpo.images.reading import read_model_folder
from xdpo.prompts import load_prompts
from xdpo.tables import TableError, read_table

SECONDS = float(os.environ.get("XDPO_FUZZ_SECONDS", 0))
pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of damage as well


def cases(name, count):
    """(case, its generator): always the same `count`, or without end until the time is over."""
    first = time.time_ns() if SECONDS else 0
    end = time.monotonic() + SECONDS
    number = 0
    while time.monotonic() < end if SECONDS else number < count:
        case = f"{name} {first + number}"
        yield case, random.Random(case)
        number += 1


def damaged(content, chance):
    """A copy of some bytes with one damage: flipped, cut, zeroed, doubled or removed."""
    content = bytearray(content)
    at, length = chance.randrange(len(content)), min(chance.choice([1, 1, 2, 4, 16, 64]), len(content))
    match chance.randrange(6):
        case 0:
            content[at] ^= 1 << chance.randrange(8)
        case 1:
            content[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF])
        case 2:
            del content[at:]
        case 3:
            content[at : at + length] = bytes(length)
        case 4:
            content[at:at] = content[at : at + length]
        case 5:
            del content[at : at + length]
    return bytes(content)


# --- images --------------------------------------------------------------------------------------------


def picture():
    across, down = np.meshgrid(np.arange(0, 240, 10), np.arange(0, 240, 15))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))


GREY = ("L", "LA", "I", "I;16", "F")


def every_format():
    """{format mode: bytes} of all that this Pillow writes and reads again."""
    Image.init()
    found, grey = {}, picture().convert("L")
    for format in sorted(set(Image.SAVE) & set(Image.OPEN)):
        for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I", "I;16", "F"):
            buffer = io.BytesIO()
            try:
                (grey.convert(mode) if mode in ("LA", "I", "I;16", "F") else picture().convert(mode)).save(
                    buffer, format
                )
            except Exception:  # Pillow's writers raise anything for a mode that they don't have
                continue
            try:
                decode_rgb(buffer.getvalue())
            except UnreadableImageError:
                continue
            found[f"{format} {mode}"] = buffer.getvalue()
    return found


FORMATS = every_format()


def test_all_common_formats_are_tried():
    assert {"JPEG RGB", "PNG RGBA", "PNG I;16", "TIFF F", "GIF P", "BMP RGB", "WEBP RGB"} <= set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_image_is_read_or_unreadable(name, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    whole = FORMATS[name]
    for case, chance in cases(name, 40):
        content = whole
        for _ in range(chance.choice([1, 1, 2, 5])):
            content = damaged(content, chance) or b"\0"
        try:
            image = decode_rgb(content)
        except UnreadableImageError:
            continue
        assert image.mode == "RGB", case
        assert square_pixels(image, 8).isfinite().all(), case


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_damaged_metadata_change_no_pixel(format):
    """Only the turn that the orientation asks for."""
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010E: "a description", 0x011A: 72.0})
    if format != "TIFF":
        exif[0x8769] = {0x9003: "2024:01:01 00:00:00", 0x927C: b"maker"}
    buffer = io.BytesIO()
    picture().save(buffer, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    whole, block = buffer.getvalue(), exif.tobytes()
    upright = decode_rgb(whole)
    turned = [upright.transpose(turn) for turn in Image.Transpose]
    pixels = {np.asarray(image).tobytes() for image in [upright, *turned]}
    for case, chance in cases(f"exif {format}", 250):
        damage = block
        for _ in range(chance.choice([1, 1, 2, 5])):
            damage = damaged(damage, chance) or b"\0"
        if format == "TIFF":  # its metadata are its directory
            content = damaged(whole, chance)
        else:
            buffer = io.BytesIO()
            picture().save(buffer, format, exif=damage, **({"lossless": True} if format == "WEBP" else {}))
            content = buffer.getvalue()
        try:
            image = decode_rgb(content)
        except UnreadableImageError:
            continue
        assert format == "TIFF" or np.asarray(image).tobytes() in pixels, case


def lossless():
    """Names of FORMATS that lose nothing and store the mode that they were given."""
    for name, content in FORMATS.items():
        format, mode = name.split()
        with Image.open(io.BytesIO(content)) as image:
            if format in ("PNG", "TIFF", "BMP", "PPM", "TGA") and image.mode in (mode, "RGB"):
                yield name


@pytest.mark.parametrize("name", lossless())
def test_whole_images_keep_their_pixels(name):
    mode = name.split()[1]
    expected = (picture().convert("L") if mode in GREY else picture().convert(mode)).convert("RGB")
    if mode == "I;16" or name == "PPM I":  # the file has 16 bits, of which these values are the darkest
        expected = Image.new("RGB", expected.size)
    assert np.array_equal(np.asarray(decode_rgb(FORMATS[name])), np.asarray(expected))


ODD_TAGS = [0x010E, 0x0131, 0x011A, 0x0100, 0x8769, 0x8825, 0xA005, 0x9286, 0x927C, 0x02BC, 0x83BB, 0xEA1C]
TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}


def test_odd_metadata_make_no_good_image_unreadable():
    """Tags of types that they should not have, in counts and with places that make no sense; Pillow may stop there."""
    for case, chance in cases("odd exif", 1000):
        orientation = chance.choice(list(TURNS))
        entries = [struct.pack("<HHII", 0x0112, 3, 1, orientation)]
        for _ in range(chance.randrange(1, 4)):
            tag, value = chance.choice([*ODD_TAGS, chance.randrange(0x1000)]), chance.choice([60, 2**32])
            entries.append(
                struct.pack("<HHII", tag, chance.randrange(14), chance.randrange(6), chance.randrange(value))
            )
        chance.shuffle(entries)
        exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(40)
        buffer = io.BytesIO()
        picture().save(buffer, "PNG", exif=exif, compress_level=0)
        expected = [picture(), picture().transpose(TURNS[orientation])]
        found = np.asarray(decode_rgb(buffer.getvalue()))
        assert any(np.array_equal(found, np.asarray(image)) for image in expected), case


# --- tables --------------------------------------------------------------------------------------------

PIECES = ["a cat", "café", ",", '"', "\n", "\r\n", " ", "8k", "\u2028", "👍", "'", "\\", "nan", ";", "\t", "x" * 90]


def rows_of_pairs(chance, lines=True):
    pieces = [piece for piece in PIECES if lines or "\n" not in piece]
    captions = ["".join(chance.choices(pieces, k=chance.randrange(1, 6))) for _ in range(chance.randrange(1, 7))]
    return [
        {"chosen": f"img/{place}_w.png", "rejected": f"img/{place}_l.png", "caption": caption}
        for place, caption in enumerate(captions)
    ]


def as_csv(rows, chance):
    buffer = io.StringIO(newline="")
    every, end = chance.choice([(csv.QUOTE_MINIMAL, "\r\n"), (csv.QUOTE_ALL, "\n"), (csv.QUOTE_ALL, "\r")])
    writer = csv.DictWriter(buffer, rows[0], quoting=every, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def as_jsonl(rows, chance):
    ends, ascii_only = chance.choice(["\n", "\r\n"]), chance.random() < 0.5
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + ends for row in rows)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_whatever_stands_in_a_caption_is_read_as_it_was_written(tmp_path, suffix):
    path = tmp_path / f"pairs{suffix}"
    for case, chance in cases(f"whole {suffix}", 300):
        rows = rows_of_pairs(chance)
        text = as_csv(rows, chance) if suffix == ".csv" else as_jsonl(rows, chance)
        path.write_bytes(text.encode(chance.choice(["utf-8", "utf-8-sig", "utf-16", "utf-32"])))
        assert read_table(path).rows == rows, case


def edited(text, chance):
    """A text with one sign put in, taken out or exchanged, mostly one that matters."""
    signs = '",\n\r\\{}[]:; x\0'
    places = [place for place, sign in enumerate(text) if sign in signs] if chance.random() < 0.8 else range(len(text))
    at = chance.choice(places)
    return text[:at] + chance.choice(["", chance.choice(signs)]) + text[at + chance.randrange(2) :]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_one_wrong_sign_is_an_error_or_changes_no_other_row(tmp_path, suffix):
    path = tmp_path / f"pairs{suffix}"
    read = 0
    for case, chance in cases(f"edited {suffix}", 1500):
        rows = rows_of_pairs(chance, lines=suffix == ".jsonl")
        text = edited(as_csv(rows, chance) if suffix == ".csv" else as_jsonl(rows, chance), chance)
        path.write_bytes(text.encode())
        try:
            table = read_table(path)
            found = [list(cells) for cells in zip(*map(table.texts, table.names), strict=True)]
        except TableError as error:
            assert str(path) in str(error), case
            continue
        if len(table.names) != 3 or list(table.names) != list(rows[0]):  # the header, which sources check
            continue
        whole = [list(row.values()) for row in rows]
        assert len(found) == len(whole), f"{case}: {text!r}"
        assert sum(one != other for one, other in zip(found, whole, strict=True)) <= 1, f"{case}: {text!r}"
        read += 1
    assert read > 0


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_damaged_lists_of_pairs_are_read_or_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"pairs{suffix}"
    settings = SimpleNamespace(source="folder", path=str(tmp_path), revision=None, split="train", max_pairs=None)
    settings.columns = None
    for case, chance in cases(f"damaged {suffix}", 150):
        rows = rows_of_pairs(chance)
        text = as_csv(rows, chance) if suffix == ".csv" else as_jsonl(rows, chance)
        path.write_bytes(damaged(text.encode(chance.choice(["utf-8", "utf-16"])), chance))
        try:
            captions = load_pairs(settings).columns("caption")["caption"]
        except DataError as error:
            assert str(tmp_path) in str(error), case
            continue
        assert all(isinstance(caption, str) for caption in captions), case


# --- other files ---------------------------------------------------------------------------------------

PROMPT_FILES = {
    ".json": json.dumps({"anime": ["a cat", "a dog"], "photo": ["a tree", "café"]}, ensure_ascii=False),
    ".jsonl": '{"prompt": "a cat", "category": "x"}\n"a dog"\n{"text": "café"}\n',
    ".tsv": "prompt\tcategory\na cat\tx\na dog\ty\n",
    ".csv": 'prompt,style\n"a cat, 8k",x\na dog,y\n',
    ".txt": "a cat\na dog\n",
}


@pytest.mark.parametrize("suffix", PROMPT_FILES)
def test_damaged_files_of_prompts_are_read_or_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    for case, chance in cases(f"prompts {suffix}", 300):
        whole = PROMPT_FILES[suffix].encode(chance.choice(["utf-8", "utf-8-sig", "utf-16"]))
        path.write_bytes(damaged(edited(whole.decode("latin-1"), chance).encode("latin-1", "replace"), chance))
        try:
            loaded = load_prompts(str(path))
        except ValueError as error:
            assert type(error) in (TableError, ValueError), f"{case}: {error!r}"
            assert "mine" in str(error) or "share the folder" in str(error), case
            continue
        assert all(type(prompt.text) is str and type(prompt.category) is str for prompt in loaded.prompts), case
        "".join(prompt.text + prompt.category for prompt in loaded.prompts).encode()


def test_a_damaged_manifest_loses_no_image_without_naming_it(tmp_path):
    folder = tmp_path / "model" / "set"
    folder.mkdir(parents=True)
    rows = [{"file": f"{number}.png", "prompt": f"prompt {number}", "model": "m"} for number in range(4)]
    for row in rows:
        (folder / row["file"]).touch()
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for case, chance in cases("manifest", 300):
        (folder / "manifest.jsonl").write_bytes(damaged(whole, chance))
        try:
            pictures, problems = read_model_folder(tmp_path / "model", "model")
        except ValueError as error:
            assert "holds no images" in str(error), case
            continue
        named = {name for problem in problems for name in problem.names}
        for row in rows:
            assert row["file"] in named or row["file"] in {picture.name for picture in pictures}, case


CONFIG = """\
output_dir: runs/x
data: {source: parquet, path: [a.parquet, 'b*.parquet'], split: train}
optim:
  learning_rate: 1e-5
  betas: [0.9, 0.999]
loss:
  name: "xdpo"
  beta: 1/6
samples:
  prompts: ["a cat", "a dog"]
"""
PLAN = """\
title: a plan
steps: 2
checkpoints: [1, 2]
seeds: [1]
prompts: [mine]
guidances: [1]
scorers: [clip]
score: clip
alignment: clip
baseline: sft
tuning: {key: loss.beta, values: ["1"], seed: 7, prompts: [other]}
methods:
  sft: {config: sft.yaml, group: a}
"""


@pytest.mark.parametrize(("text", "load"), [(CONFIG, load_config), (PLAN, load_plan)], ids=["config", "plan"])
def test_damaged_yaml_is_read_or_refused_by_name(tmp_path, text, load):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    load(path)
    tags = ["!!bool ", "!!timestamp ", "!!float ", "!!int ", "!!binary ", "!!int '' ", "!!float '' "]
    signs = ["&a ", "*a ", "<<: ", "? ", "- ", "\t", "\0", "2001-99-99", "1e9999", "{", "0x", "0b", "~", "[["]
    for case, chance in cases("yaml", 300):
        content = text
        for _ in range(chance.choice([1, 1, 3])):
            at = chance.randrange(len(content))
            content = content[:at] + chance.choice(tags + signs) + content[at + chance.randrange(3) :]
        path.write_bytes(damaged(content.encode(), chance) if chance.random() < 0.5 else content.encode())
        try:
            load(path)
        except ValueError as error:
            assert type(error) in (ConfigError, ValueError, TableError), f"{case}: {error!r}"
            assert "mine.yaml" in str(error), f"{case}: {error}"
