"""What a kill leaves of an image folder, what a reader makes of any folder, and how sheets are laid out."""

import hashlib
import json
import os
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from xdpo.files import StorageError, file_sha256
from xdpo.images import fonts
from xdpo.images.folder import (
    SETTINGS,
    ImageFolderError,
    check_image_folder,
    collect_manifest,
    open_image_folder,
    read_manifest,
    record,
    save_image,
)
from xdpo.images.manifest import MANIFEST, ManifestRow
from xdpo.images.reading import (
    Picture,
    Problem,
    missing_against_others,
    of_one_colour,
    read_model_folder,
    with_checksums,
    with_prompts,
)
from xdpo.images.sheets import contact_sheet, save_sheet


def pixels(images):
    return [np.asarray(image).tobytes() for image in images]


# --- writing -------------------------------------------------------------------------------------------

SETTINGS_A = {"sampling.seed": 0, "model.base": "a", "file.quality": None}


def row(number):
    return ManifestRow(
        file=f"x/{number:05d}.png",
        category="x",
        index=number,
        position=number,
        image=0,
        prompt="“é”",
        truncated=False,
        seed=number,
        model="a",
        revision=None,
        settings={"seed": 0},
        set="set",
        batch_size=4,
        sha256="0" * 64,
    )


def opened(folder, numbers=()):
    open_image_folder(folder, SETTINGS_A, {"device": "cpu"})
    for number in numbers:
        save_image(folder / row(number).file, Image.new("RGB", (4, 4)), 75)
    return folder


def test_a_saved_image_has_the_checksum_that_is_returned_and_leaves_nothing_else(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    for name in ("a.png", "a.jpg"):
        checksum = save_image(tmp_path / "deep" / name, image, quality=30)
        assert checksum == hashlib.sha256((tmp_path / "deep" / name).read_bytes()).hexdigest()

    assert pixels([Image.open(tmp_path / "deep" / "a.png")]) == pixels([image])
    rough, fine = (tmp_path / "deep" / "a.jpg").stat().st_size, tmp_path / "fine.jpg"
    save_image(fine, image, quality=95)
    assert fine.stat().st_size > rough
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a.jpg", "a.png"]


def test_parts_are_collected_in_order_and_removed(tmp_path):
    folder = opened(tmp_path / "set", range(4))
    record(folder, 1, [row(3), row(1)])
    record(folder, 0, [row(0), row(2)])

    assert read_manifest(folder) == []
    assert [kept.position for kept in collect_manifest(folder)] == [0, 1, 2, 3]
    assert read_manifest(folder) == [row(number) for number in range(4)]
    assert not list(folder.glob("manifest.part*"))


def test_a_line_torn_by_a_kill_is_dropped_and_so_is_a_row_without_its_image(tmp_path):
    folder = opened(tmp_path / "set", [0, 1, 2])
    record(folder, 0, [row(0), row(1)])
    part = next(folder.glob("manifest.part*"))
    torn = json.dumps(asdict(row(2)), ensure_ascii=False).encode()
    part.write_bytes(part.read_bytes() + torn[: torn.index("é".encode()) + 1])  # in the midst of a character
    (folder / row(1).file).unlink()

    assert collect_manifest(folder) == [row(0)]


def test_a_kill_between_manifest_and_parts_counts_nothing_twice(tmp_path):
    folder = opened(tmp_path / "set", [0, 1])
    record(folder, 0, [row(0)])
    collect_manifest(folder)
    record(folder, 0, [row(0), row(1)])

    assert collect_manifest(folder) == [row(0), row(1)]


def test_a_folder_of_other_settings_is_refused_with_the_keys_that_differ(tmp_path):
    folder = opened(tmp_path / "set", [0])
    check_image_folder(folder, SETTINGS_A)

    with pytest.raises(ImageFolderError) as refused:
        check_image_folder(folder, {"sampling.seed": 1, "model.base": "a", "sampling.new": True})
    message = str(refused.value)
    assert "sampling.seed: 0 there, 1 asked for" in message and "sampling.new: None there, True" in message
    assert "model.base" not in message


def test_a_folder_without_an_image_takes_other_settings(tmp_path):
    folder = opened(tmp_path / "set")
    (folder / "x").mkdir()
    (folder / "x" / "00000.png.1f.part").write_bytes(b"half an image")
    other = SETTINGS_A | {"sampling.seed": 1}

    check_image_folder(folder, other)
    assert open_image_folder(folder, other, {"device": "gpu"}) == []
    saved = json.loads((folder / SETTINGS).read_text())
    assert saved["settings"] == other and [start["device"] for start in saved["starts"]] == ["gpu"]


def test_an_image_that_is_not_yet_recorded_binds_its_folder(tmp_path):
    folder = opened(tmp_path / "set", [0])
    with pytest.raises(ImageFolderError, match=r"sampling\.seed"):
        check_image_folder(folder, SETTINGS_A | {"sampling.seed": 1})


def test_a_folder_that_is_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("")

    with pytest.raises(ImageFolderError, match=r"chapter\.tex"):
        check_image_folder(tmp_path / "thesis", SETTINGS_A)
    with pytest.raises(StorageError, match="is a file"):
        check_image_folder(tmp_path / "file" / "set", SETTINGS_A)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_what_was_written_aside_before_a_kill_does_not_make_a_folder_something_else(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / f"{SETTINGS}.0123456789ab.part").write_text('{"sett')
    check_image_folder(tmp_path / "set", SETTINGS_A)


def test_a_full_disk_is_said_of_an_image_and_of_the_manifest(tmp_path, full_disk):
    with pytest.raises(StorageError, match=r"could not write .*00000\.png: the disk is full"):
        save_image(tmp_path / "cats" / "00000.png", Image.new("RGB", (8, 8)), 90)
    assert not any((tmp_path / "cats").iterdir())
    (tmp_path / "manifest.part-00000.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="the disk is full"):
        record(tmp_path, 0, [row(0)])


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": {}}'])
def test_damaged_settings_are_refused(tmp_path, content):
    folder = opened(tmp_path / "set")
    (folder / SETTINGS).write_text(content)
    with pytest.raises(ImageFolderError, match="is damaged"):
        check_image_folder(folder, SETTINGS_A)


@pytest.mark.parametrize("line", ["{nonsense", '{"file": "x/00000.png"}', "7"])
def test_a_damaged_manifest_is_named_with_the_line(tmp_path, line):
    folder = opened(tmp_path / "set")
    (folder / MANIFEST).write_text(row(0).to_line() + line + "\n")
    with pytest.raises(ImageFolderError, match="line 2 is damaged"):
        read_manifest(folder)


def test_going_on_with_another_device_is_said_and_remembered(tmp_path):
    folder = opened(tmp_path / "set")

    assert open_image_folder(folder, SETTINGS_A, {"device": "cpu"}) == []
    assert open_image_folder(folder, SETTINGS_A, {"device": "gpu"}) == ["device: cpu, now gpu"]
    saved = json.loads((folder / SETTINGS).read_text())
    assert [start["device"] for start in saved["starts"]] == ["cpu", "cpu", "gpu"]


# --- image folders -------------------------------------------------------------------------------------------


def write_images(folder, prompts, manifest=True, **changes):
    """Files {folder}/{key}.png with made-up bytes, and a manifest for them; prompts maps "anime/00000" to texts."""
    rows = []
    for name, prompt in prompts.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{folder.parent.name} {name}".encode())
        row = {"file": f"{name}.png", "prompt": prompt, "category": name.split("/")[0], "model": folder.parent.name}
        rows.append(row | {"sha256": file_sha256(path)} | changes.get(name, {}))
    if manifest:
        (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


PROMPTS = {"anime/00000": "a cat", "anime/00001": "a dog", "photo/00000": "a tree"}


def read(*folders, known=None):
    """Everything evaluate.py reads of some model folders: pictures, and problems by kind."""
    pictures, problems = [], []
    for folder in folders:
        found, wrong = read_model_folder(folder, folder.name)
        pictures, problems = [*pictures, *found], [*problems, *wrong]
    pictures, wrong = with_prompts(pictures, lambda prompt_set: known or {})
    pictures, changed = with_checksums(pictures)
    problems += [*wrong, *changed, *missing_against_others(pictures)]
    return pictures, {(problem.model, problem.kind): problem.names for problem in problems}


def test_a_whole_folder_has_no_problems(tmp_path):
    write_images(tmp_path / "sd15" / "hpsv2", PROMPTS)
    pictures, problems = read(tmp_path / "sd15")
    assert problems == {}
    assert [(p.prompt_set, p.key, p.category, p.prompt) for p in pictures] == [
        ("hpsv2", "anime/0", "anime", "a cat"),
        ("hpsv2", "anime/1", "anime", "a dog"),
        ("hpsv2", "photo/0", "photo", "a tree"),
    ]


def test_a_reader_takes_from_a_manifest_what_the_writer_put_there(tmp_path):
    folder = opened(tmp_path / "sd15" / "set", [0])
    record(folder, 0, [row(0)])
    collect_manifest(folder)
    ((picture,), problems) = read_model_folder(tmp_path / "sd15", "sd15")
    assert problems == []
    found = picture.name, picture.category, picture.prompt, picture.sha256, picture.source
    assert found == (row(0).file, row(0).category, row(0).prompt, row(0).sha256, row(0).model)


def test_other_programs_names_for_category_and_checksum_are_understood(tmp_path):
    folder = tmp_path / "sd15" / "hpsv2"
    write_images(folder, PROMPTS, manifest=False)
    lines = [
        {"file": "anime/00000.png", "style": "drawn", "checksum": "ab"},
        {"file": "anime/00001.png", "style": "drawn", "category": "ours", "checksum": "ab", "sha256": "cd"},
    ]
    (folder / MANIFEST).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, _ = read_model_folder(tmp_path / "sd15", "sd15")
    assert [(p.category, p.sha256, p.prompt) for p in found] == [("drawn", "ab", None), ("ours", "cd", None)]


def test_the_folder_of_one_set_can_be_named_itself(tmp_path):
    write_images(tmp_path / "sd15" / "hpsv2", PROMPTS)
    found, _ = read_model_folder(tmp_path / "sd15" / "hpsv2", "sd15")
    assert {picture.prompt_set for picture in found} == {"hpsv2"}


def test_several_images_of_a_prompt_share_its_key(tmp_path):
    write_images(tmp_path / "sd15" / "hpsv2", {"anime/00003": "a cat", "anime/00003_1": "a cat"})
    pictures, _ = read(tmp_path / "sd15")
    assert [(p.key, p.repeat) for p in pictures] == [("anime/3", 0), ("anime/3", 1)]


def test_missing_unlisted_and_changed_files_are_named(tmp_path):
    folder = tmp_path / "sd15" / "hpsv2"
    write_images(folder, PROMPTS)
    (folder / "anime" / "00001.png").unlink()
    (folder / "anime" / "00009.png").write_bytes(b"unknown")
    (folder / "photo" / "00000.png").write_bytes(b"changed")
    with (folder / "manifest.jsonl").open("a") as file:
        file.write('{"file": "anime/000')
    pictures, problems = read(tmp_path / "sd15")
    assert [picture.name for picture in pictures] == ["anime/00000.png", "photo/00000.png"]
    assert problems == {
        ("sd15", "listed in the manifest but missing"): ("anime/00001.png",),
        ("sd15", "left out: not in the manifest"): ("anime/00009.png",),
        ("sd15", "unreadable lines of the manifest"): ("line 4",),
        ("sd15", "changed since the manifest was written; scored as they are now"): ("photo/00000.png",),
    }


def test_an_image_made_from_another_prompt_is_left_out_and_named(tmp_path):
    write_images(tmp_path / "sd15" / "hpsv2", PROMPTS)
    write_images(tmp_path / "xdpo" / "hpsv2", PROMPTS | {"anime/00001": "a wolf"})
    pictures, problems = read(tmp_path / "sd15", tmp_path / "xdpo")
    assert len(pictures) == 5
    assert problems == {
        ("xdpo", "left out: made from another prompt than the first model's"): ("anime/00001.png",),
        ("xdpo", "prompts without an image that others have"): ("anime/1",),
    }


def test_without_a_manifest_prompts_come_from_the_other_models(tmp_path):
    write_images(tmp_path / "sd15" / "hpsv2", PROMPTS)
    write_images(tmp_path / "kto" / "hpsv2", PROMPTS, manifest=False)
    pictures, problems = read(tmp_path / "kto", tmp_path / "sd15")
    assert {p.key: p.prompt for p in pictures if p.model == "kto"} == {
        "anime/0": "a cat",
        "anime/1": "a dog",
        "photo/0": "a tree",
    }
    assert list(problems) == [("kto", "no manifest; read by layout, prompts taken from elsewhere")]


def test_without_any_manifest_prompts_come_from_the_set_and_gaps_are_named(tmp_path):
    write_images(tmp_path / "kto" / "mine", {"a/00000": "", "a/00002": "", "b/00000": ""}, manifest=False)
    known = {"a/0": ("A", "zero"), "a/2": ("A", "two")}
    pictures, problems = read(tmp_path / "kto", known=known)
    assert [(p.category, p.prompt) for p in pictures] == [("A", "zero"), ("A", "two")]
    assert problems[("kto", "missing in the numbering")] == ("a/00001",)
    assert problems[("kto", "left out: no prompt is known")] == ("b/00000.png",)


@pytest.mark.parametrize("other", ["anime/00001.jpg", "anime/1.png", "anime/00001_0.png", "anime/00001.PNG"])
@pytest.mark.parametrize("manifest", [True, False])
def test_two_files_for_one_image_are_a_clash_and_neither_is_taken(tmp_path, manifest, other):
    folder = tmp_path / "sd15" / "hpsv2"
    write_images(folder, PROMPTS, manifest=manifest)
    (folder / other).write_bytes(b"another image of the same prompt")
    if manifest:
        with (folder / "manifest.jsonl").open("a") as file:
            file.write(json.dumps({"file": other, "prompt": "a dog", "category": "anime"}) + "\n")
    known = {"anime/0": ("anime", "a cat"), "photo/0": ("photo", "a tree")}
    pictures, problems = read(tmp_path / "sd15", known=known)
    assert [picture.name for picture in pictures] == ["anime/00000.png", "photo/00000.png"]
    both = " and ".join(sorted([other, "anime/00001.png"]))
    assert problems["sd15", "clashes, left out: files for one image"] == (both,)


def test_a_folder_of_clashes_alone_says_so(tmp_path):
    write_images(tmp_path / "sd15" / "hpsv2", {"anime/0": "", "anime/00": ""}, manifest=False)
    with pytest.raises(ValueError, match=r"holds no images: .*1 clashes, left out: .*anime/0\.png and anime/00\.png"):
        read_model_folder(tmp_path / "sd15", "sd15")


def test_lines_of_a_manifest_that_hold_no_text_are_named_and_texts_of_unicode_are_whole(tmp_path):
    folder = tmp_path / "sd15" / "hpsv2"
    write_images(folder, {f"anime/{number}": "" for number in range(6)}, manifest=False)
    prompts = ["a\u2028b\x85c", 42, ["a"], "half \ud83d", None]
    rows = [json.dumps({"file": f"anime/{place}.png", "prompt": prompt}) for place, prompt in enumerate(prompts)]
    rows[0] = rows[0].replace("\\u2028", "\u2028").replace("\\u0085", "\x85")
    content = "\n".join(rows).encode() + b'\n{"file": "anime/5.png", "prompt": "caf\xe9"}\n'
    (folder / "manifest.jsonl").write_bytes(content)
    pictures, problems = read_model_folder(tmp_path / "sd15", "sd15")
    assert [picture.prompt for picture in pictures] == ["a\u2028b\x85c", None]
    [names] = [problem.names for problem in problems if problem.kind == "unreadable lines of the manifest"]
    assert names == ("line 2", "line 3", "line 4", "line 6")


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no image folder"):
        read_model_folder(tmp_path / "nothing", "x")
    with pytest.raises(ValueError, match="holds no images"):
        read_model_folder(tmp_path, "x")


def test_a_problem_names_some_and_counts_all():
    problem = Problem("sd15", "hpsv2", "broken", tuple("abcdef"))
    assert problem.describe(shown=2) == "sd15, hpsv2: 6 broken (a, b, … 4 more)"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("side", [16, 512])
def test_one_colour_is_seen_in_every_format_and_size(tmp_path, format, side):
    plain, busy = tmp_path / "plain", tmp_path / "busy"
    Image.new("RGB", (side, side), (0, 40, 0)).save(plain, format, quality=100)
    image = Image.new("RGB", (side, side), (0, 40, 0))
    image.paste((200, 0, 0), (0, 0, side // 2, side // 2))
    image.save(busy, format, quality=100)
    pictures = [Picture("m", "s", "", path.name, 0, path, path.name) for path in (plain, busy)]
    assert [problem.names for problem in of_one_colour(pictures)] == [("plain",)]


def test_images_and_manifests_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        opened(tmp_path / "set", [0])
        record(tmp_path / "set", 0, [row(0)])
        collect_manifest(tmp_path / "set")
    finally:
        os.umask(before)
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 3 and {path.stat().st_mode & 0o777 for path in made} == {0o640}


# --- sheets --------------------------------------------------------------------------------------------


def test_a_sheet_has_a_cell_for_every_model_and_prompt():
    columns = {"one": [Image.new("RGB", (128, 128), "red")] * 2, "two": [Image.new("RGB", (128, 128), "blue")] * 2}
    sheet = contact_sheet(columns, ["a prompt", "another"])

    colours = [sheet.getpixel((8 + 64 + column * 136, 26 + 64)) for column in range(2)]
    assert colours == [(255, 0, 0), (0, 0, 255)]
    assert sheet.width == 8 + 2 * 136
    taller = contact_sheet(columns, ["a prompt", "many words " * 200])
    assert taller.height == sheet.height + 5 * 15


def test_small_images_are_enlarged_to_sharp_pixels_and_large_ones_reduced_smoothly():
    checks = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8))
    enlarged = contact_sheet({"a": [checks.crop((0, 0, 2, 2))]}, [""], cell=128)
    reduced = contact_sheet({"a": [checks]}, [""], cell=64)

    assert {enlarged.getpixel((x, 60)) for x in range(8, 136)} == {(0, 0, 0), (255, 255, 255)}
    assert all(100 < reduced.getpixel((x, 60))[0] < 155 for x in range(12, 68))


def ink(sheet, top, height):
    """Dark pixels in a strip."""
    return int((np.asarray(sheet.convert("L"))[top : top + height] < 160).sum())


def test_prompts_of_any_script_are_drawn_and_wrapped(capsys):
    white = {"η = 0.05": [Image.new("RGB", (128, 128), "white")]}
    texts = {"naïve café — π → ∞": 1, "Кот в сапогах": 1, "قطة في الحديقة": 1, "猫" * 60: 6, "x" * 60: 4}
    for text, most in texts.items():
        sheet = contact_sheet(white, [text])
        lines = (sheet.height - 26 - 128 - 6 - 8) // 15
        assert 1 <= lines <= most and (lines > 1) == (len(text) > 30), text
        assert all(ink(sheet, 26 + 128 + 15 * line, 15) > 20 for line in range(lines)), text
        assert ink(sheet, 0, 26) > 20
    shown = {text: fonts.text_width(text, 20) for text in ("π", "Ж", "猫")}
    assert all(width > 5 for width in shown.values())
    assert capsys.readouterr().err.count("note: no font on this machine has") <= 1


def test_a_character_is_drawn_in_a_font_that_has_it():
    from matplotlib.ft2font import FT2Font

    for path, part in fonts._runs("a cat, ein Kätzchen, кошка, γάτα → 猫"):
        assert all(character == " " or FT2Font(path).get_char_index(ord(character)) for character in part), part


def test_texts_grow_with_large_cells():
    def title_ink(cell):
        return ink(contact_sheet({"xdpo": [Image.new("RGB", (64, 64), "white")]}, [""], cell=cell), 0, 26 * cell // 256)

    assert title_ink(1024) > 5 * title_ink(256) > 0


def test_a_sheet_is_written_in_the_format_of_its_ending(tmp_path):
    for ending, image_format in ((".png", "PNG"), (".JPG", "JPEG")):
        path = tmp_path / "new" / f"sheet{ending}"
        save_sheet(path, Image.new("RGB", (4, 4), "red"))
        assert Image.open(path).format == image_format
    with pytest.raises(ValueError, match=r"sheet\.txt: unknown file extension: \.txt"):
        save_sheet(tmp_path / "sheet.txt", Image.new("RGB", (4, 4)))
