"""evaluate.py from image folders to report: nothing is scored twice, nothing is lost, and everything odd is named."""

import base64
import io
import json
import os
import re
import signal
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import ROOT, held_elsewhere
from forks import launch
from PIL import ExifTags, Image, features

import evaluate
from xdpo import files
from xdpo.files import file_sha256, is_own
from xdpo.images.reading import Picture, of_one_colour
from xdpo.report import thumbnails
from xdpo.scores import image_statistics, scoring
from xdpo.scores.table import Placement, ScoreKey, ScoreTable

# A scorer of one's own: the mean of the red channel. It writes down how many images each call had.
RED = """
from pathlib import Path
import numpy as np

CALLS = Path({calls!r})

class Red:
    def score(self, images, prompts):
        with CALLS.open("a") as file:
            file.write(str(len(images)) + " ")
        if CALLS.with_name("fail").exists() and len(CALLS.read_text().split()) > 2:
            raise KeyboardInterrupt
        return [float(np.asarray(image)[..., 0].mean()) for image in images]

class Nan:
    def score(self, images, prompts):
        return [float("nan") if "2" in prompt else 1.0 for prompt in prompts]
"""
MODELS = {"sd15": 100, "xdpo": 150}


def make_model(folder, red, count=6, prompt_set="mine", suffix="png", **more):
    """Images in two categories, redder with their number and blue in one corner, and their manifest.

    more: further keys of every line.
    """
    rows = []
    for number in range(count):
        category = "cats" if number < count // 2 else "dogs"
        path = folder / prompt_set / category / f"{number:05d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (8, 8), (red + number, number, 0))
        image.putpixel((0, 0), (red + number, number, 255))
        image.save(path)
        rows.append(
            {
                "file": f"{category}/{path.name}",
                "category": category,
                "index": number,
                "prompt": f"<i>prompt</i> {number}",
                "model": folder.name,
                "sha256": file_sha256(path),
                **more,
            }
        )
    (folder / prompt_set / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def world(tmp_path):
    """Two models' images and a scorer; a function that runs evaluate.py on them."""
    (tmp_path / "red.py").write_text(RED.format(calls=str(tmp_path / "calls")))
    for model, red in MODELS.items():
        make_model(tmp_path / "images" / model, red)

    class World:
        folder, output = tmp_path, tmp_path / "results"
        scorer = f"{tmp_path / 'red.py'}:Red"

        def images(self, *models):
            return [str(tmp_path / "images" / model) for model in models or MODELS]

        def run(self, *more, models=(), scorers=None):
            arguments = ["--images", *self.images(*models), "--scorers", scorers or self.scorer]
            return evaluate.main([*arguments, "--output", str(self.output), "--batch-size", "2", *more])

        def calls(self):
            """How many images were scored since last asked."""
            calls = tmp_path / "calls"
            total = sum(map(int, calls.read_text().split())) if calls.exists() else 0
            calls.unlink(missing_ok=True)
            return total

    return World()


def placed(folder):
    """The rows of a score table that are not image statistics."""
    return [row for row in ScoreTable(folder).placed if row.key.scorer not in image_statistics.NAMES]


def scores(world):
    """(model, key of the prompt) → score."""
    return {(row.placement.model, row.placement.key): row.score for row in placed(world.output)}


def test_two_folders_become_scores_tables_figures_and_a_page(world, capsys):
    assert world.run() == 0
    made = {path.name for path in world.output.iterdir() if not is_own(path)}
    assert made == {"scores.parquet", "report.md", "report.html", "figures", "tables"}
    assert {path.suffix for path in (world.output / "figures").iterdir()} == {".png", ".svg"}
    assert sorted((row.placement.model, row.placement.key, row.score) for row in placed(world.output))[:2] == [
        ("sd15", "cats/0", 100.0),
        ("sd15", "cats/1", 101.0),
    ]
    report = (world.output / "report.md").read_text()
    assert "| Red | xdpo | sd15 | 100.0 % ▲ | [61.0, 100.0] | 6 | 0 | 0 | 0.031 | 0.031 |" in report
    assert "Nothing is missing, broken or left out." in report
    assert "102.5000 [101.1667, 103.8333]" in capsys.readouterr().out


MADE = {"seed": 0, "num_inference_steps": 50, "guidance_scale": 7.5, "scheduler": "pndm", "precision": "fp16"}


def test_models_whose_images_were_made_with_other_settings_are_told_apart(world, capsys):
    images = world.folder / "images"
    make_model(images / "sd15", MODELS["sd15"], settings=MADE, revision="abc")
    make_model(images / "xdpo", MODELS["xdpo"], settings=MADE | {"num_inference_steps": 20}, revision="def")
    assert world.run() == 0
    told = "mine: images made with different steps (50: sd15; 20: xdpo)"
    assert told in (said := capsys.readouterr().err) and "seed" not in said and "revision" not in said
    report = (world.output / "report.md").read_text()
    assert (
        report.count("images made with different steps (50: sd15; 20: xdpo)") == 2
    )  # with the results, in the account
    table = report[report.index("## How the images were made") :]
    assert "| mine | sd15 | sd15 | abc | 0 | 50 | 7.5 | pndm | fp16 | 8 × 8 | png | 1 | unknown |" in table
    assert "| mine | xdpo | xdpo | def | 0 | 20 ≠ | 7.5 |" in table
    page = (world.output / "report.html").read_text()
    assert page.count('<td class="brief differs"') == 1
    settings = {
        "settings": {},
        "starts": [{"time": "2026-01-02T03:04:05+00:00"}, {"time": "2026-01-04T00:00:00+00:00"}],
    }
    (images / "sd15" / "mine" / "settings.json").write_text(json.dumps(settings))
    make_model(images / "xdpo", MODELS["xdpo"], settings=MADE, suffix="jpg")
    assert world.run() == 0
    assert "mine: images made with different file (png: sd15; jpg: xdpo)" in capsys.readouterr().err
    assert "| 2026-01-02 to 2026-01-04 |" in (world.output / "report.md").read_text()


def test_what_read_the_prompt_and_what_decoded_the_image_tell_models_apart(world, capsys):
    for name in ("sd15", "xdpo"):
        folder = world.folder / "images" / name
        make_model(folder, MODELS[name], settings=MADE)
        settings = {"model.base": "a/b"} | ({"model.t5_tokens": 32, "model.vae": "sha256:ab"} if name == "xdpo" else {})
        (folder / "mine" / "settings.json").write_text(json.dumps({"settings": settings, "starts": []}))
    assert world.run() == 0
    told = (
        "mine: images made with different t5 tokens (as the pipeline: sd15; 32: xdpo), autoencoder (as the pipeline: "
    )
    assert told in capsys.readouterr().err
    assert "| 32 ≠ | sha256:ab ≠ |" in (world.output / "report.md").read_text()
    (world.folder / "images" / "sd15" / "mine" / "settings.json").unlink()  # images of another program
    assert world.run() == 0
    assert "t5 tokens (unknown: sd15; 32: xdpo)" in capsys.readouterr().err


def test_signs_of_reward_hacking_are_measured_once_and_reported(world, capsys):
    assert world.run("--trained-on", world.scorer) == 0
    assert "image statistics: 12 images, 12 of them to measure" in capsys.readouterr().out
    report = (world.output / "report.md").read_text()
    section = report[report.index("## Signs of reward hacking: mine") :]
    assert "rewards trained on +29.28, saturation " in section  # 50 levels of red over a deviation of 1.7
    assert re.search(r"; images of the same seed are 1\d\.\d % of the pixels' range apart\.", section)
    assert (world.output / "figures" / "hacking_mine.svg").is_file()
    make_model(world.folder / "images" / "xdpo", MODELS["xdpo"], settings={"seed": 1})
    assert world.run() == 0
    assert "12 images, 0 of them to measure" in capsys.readouterr().out
    assert "of the same seed are" not in (world.output / "report.md").read_text()  # sd15's seed is unknown
    assert world.run("--trained-on", "clip") == 1
    assert f"--trained-on clip is none of --scorers; choose from {world.scorer}" in capsys.readouterr().err


def test_diversity_and_drift_are_reported_and_features_computed_once(world, metric_weights, capsys):
    """xdpo's two images of a prompt are one and the same; sd15's differ; the reference is sd15's."""
    for model in MODELS:
        folder = world.folder / "images" / model / "mine"
        rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
        for row in rows[:]:
            again = row["file"].replace(".png", "_1.png")
            Image.open(folder / row["file"]).save(folder / again)
            if model == "sd15":
                Image.radial_gradient("L").convert("RGB").save(folder / again)
            rows.append({key: value for key, value in row.items() if key != "sha256"} | {"file": again})
        (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--weights", str(metric_weights), "--diversity", "--reference", str(world.folder / "images" / "sd15")]
    assert world.run(*more) == 0
    assert "features: 36 images, 13 of them to embed" in capsys.readouterr().out  # 2 × 6 and the gradient
    report = (world.output / "report.md").read_text()
    assert re.search(r"\| xdpo \| 0\.0000 \[.*?\] \| 1\.0000 ", report)
    assert re.search(r"\| sd15 \| \*\*0\.\d+\*\* \[.*?\] \| \*\*1\.\d+\*\* ", report)
    drift = {
        row[1]: float(row[3]) for row in re.findall(r"^\| (mine) \| (\w+) \| (12) \| ([\d.]+) \|", report, re.MULTILINE)
    }
    assert drift["sd15"] == 0 < drift["xdpo"]
    assert world.run(*more) == 0
    assert "features: 36 images, 0 of them to embed" in capsys.readouterr().out
    assert world.run(*more, "--features", "dinov2") == 0
    assert "features: 36 images, 13 of them to embed" in capsys.readouterr().out
    report = (world.output / "report.md").read_text()
    assert "on features of DINOv2 (ViT-L/14, 224 pixels)" in report and "CLIP (ViT-L/14" not in report
    assert re.search(r"\| xdpo \| 0\.0000 \[.*?\] \| 1\.0000 ", report)
    assert {path.name for path in world.output.glob("features*")} == {"features.npz", "features_dinov2.npz"}
    assert world.run("--reference", "nowhere") == 1
    assert "--reference: no folder nowhere" in capsys.readouterr().err
    assert world.run("--features", "clip") == 1
    assert "--features is for --diversity and --reference" in capsys.readouterr().err


def test_a_mistyped_folder_costs_no_search_for_weights(world, capsys):
    assert world.run("--images", "nowhere", "--weights", "not here either", scorers="pickscore") == 1
    assert "no image folder nowhere" in capsys.readouterr().err


def test_images_of_one_colour_are_named_in_the_report_and_on_the_console(world, capsys):
    cats = world.folder / "images" / "xdpo" / "mine" / "cats"
    Image.new("RGB", (512, 512)).save(cats / "00001.png")  # black, as images of NaN are
    Image.new("RGB", (64, 64), "white").save(cats / "00002.png", compress_level=1)
    Image.radial_gradient("L").convert("RGB").save(cats / "00000.png")
    assert world.run() == 0
    said = "xdpo, mine: 2 of one colour throughout; scored as they are (cats/00001.png, cats/00002.png)"
    assert said in capsys.readouterr().err
    assert said in (world.output / "report.md").read_text()


def deep_image(path, low, high):
    """A gradient in 16-bit grey."""
    grey = np.linspace(low, high, 16 * 16).reshape(16, 16).astype(np.uint16)
    Image.fromarray(grey).save(path)


def test_a_16_bit_image_is_no_image_of_one_colour(tmp_path):
    """Cut at 255 it would be white."""
    path = tmp_path / "00000.png"
    deep_image(path, 1000, 65_000)
    assert of_one_colour([Picture("m", "s", "", "0", 0, path, path.name)]) == []


def test_a_thumbnail_shows_what_was_scored(tmp_path):
    """16 bits are scaled, transparency lies over white, and a photograph stands upright."""

    def shown(path):
        head, _, content = thumbnails.data_uri(path).partition(",")
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        assert head == f"data:image/{image.format.lower()};base64"
        return image

    deep = tmp_path / "deep.tiff"
    deep_image(deep, 0, 65_535)
    assert 120 < np.asarray(shown(deep)).mean() < 135
    clear = tmp_path / "clear.webp"
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(clear, lossless=True)
    assert np.asarray(shown(clear)).min() == 255
    turned, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (600, 300)).save(turned, exif=exif)
    assert (shown(turned).size, shown(turned).format) == ((128, 256), "WEBP")
    small = tmp_path / "small.png"  # a JPEG by its content
    Image.new("RGB", (16, 16)).save(small, "JPEG")
    assert shown(small).size == (16, 16)
    assert thumbnails.embed([small, deep, small], 10**6).keys() == {small, deep}


@pytest.mark.parametrize("kind", ["16 bits", "a palette with transparency", "CMYK", "grey with alpha", "32-bit floats"])
def test_images_of_every_mode_are_scored_by_the_pixels_that_they_show(world, kind):
    """Each is a flat red of 128, or a grey of 128, whatever it is kept in."""
    folder = world.folder / "images" / "xdpo" / "mine" / "cats"
    path = folder / "00000.png"
    grey = Image.new("L", (8, 8), 128)
    match kind:
        case "16 bits":
            Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(path)
        case "a palette with transparency":
            clear = Image.new("P", (8, 8), 0)
            clear.putpalette([0, 0, 0])
            clear.save(path, transparency=0)  # white shows
        case "CMYK":
            Image.new("CMYK", (8, 8), (127, 127, 127, 0)).save(path, "TIFF")  # whatever its name says
        case "grey with alpha":
            Image.merge("LA", (grey, Image.new("L", (8, 8), 255))).save(path)
        case "32-bit floats":
            Image.fromarray(np.full((8, 8), 128 / 255, np.float32)).save(path, "TIFF")
    assert world.run() == 0
    places = {(row.placement.model, row.placement.file): row.score for row in placed(world.output)}
    assert places["xdpo", "cats/00000.png"] == pytest.approx(255 if "palette" in kind else 128, abs=1)


@pytest.mark.parametrize("format", ["AVIF", "DDS", "WEBP", "JPEG2000", "TIFF"])
def test_whatever_a_decoder_raises_leaves_one_image_out(world, format, capsys):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = world.folder / "images" / "xdpo" / "mine" / "cats" / "00001.png"
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, format)
    path.write_bytes(buffer.getvalue()[: buffer.tell() // 3])
    assert world.run() == 0
    assert "1 left out: cannot be decoded (cats/00001.png)" in capsys.readouterr().err
    assert "5 of 6 prompts have scored images of all models" in (world.output / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text.encode("utf-8-sig"), None),
        (lambda text: text.replace('"cats/00000.png"', '"./cats/00000.png"').encode(), None),
        (
            lambda text: text.replace("prompt</i> 0", "caf\xe9").encode("cp1252"),
            "1 unreadable lines of the manifest (line 1)",
        ),
        (lambda text: text.replace("prompt</i> 0", "a\0b").encode(), "1 unreadable lines of the manifest (line 1)"),
        (lambda text: text.replace('"cats/00000.png"', "5").encode(), "1 unreadable lines of the manifest (line 1)"),
        (lambda text: text.encode("utf-16"), "6 unreadable lines of the manifest"),
        (
            lambda text: text.replace('"cats/', '"cats\\\\').encode(),
            "3 listed in the manifest but missing (cats\\00000.png",
        ),
        (
            lambda text: text.replace('"cats/', '"../cats/').encode(),
            "3 listed in the manifest but missing (../cats/00000.png",
        ),
    ],
)
def test_a_manifest_that_an_editor_saved_anew_is_read_or_its_lines_are_named(world, capsys, change, named):
    manifest = world.folder / "images" / "xdpo" / "mine" / "manifest.jsonl"
    manifest.write_bytes(change(manifest.read_text()))
    assert world.run() == 0
    said = capsys.readouterr().err
    assert (
        ("note:" not in said) if named is None else (f"xdpo, mine: {named}" in said and "left out: not in the" in said)
    )


def test_one_name_in_two_cases_or_widths_is_a_clash(world, capsys):
    """Files that a case-insensitive disk would not hold side by side, without a manifest to say which is meant."""
    folder = world.folder / "images" / "xdpo" / "mine"
    (folder / "manifest.jsonl").unlink()
    for name in ("00000.PNG", "1.png", "000002.jpeg"):
        Image.new("RGB", (8, 8)).save(folder / "cats" / name)
    assert world.run() == 0
    said = capsys.readouterr().err
    for names in (
        "cats/00000.PNG and cats/00000.png",
        "cats/00001.png and cats/1.png",
        "cats/000002.jpeg and cats/00002.png",
    ):
        assert names in said
    assert "xdpo, mine: 3 clashes, left out: files for one image" in said


def test_images_of_another_program_are_listed_as_the_page_says(world):
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    lists = re.findall(r"^images/(\w+)/(\S+)  +({.*})$", page, re.MULTILINE)
    assert [model for model, _, _ in lists] == ["theirs", "ours"]
    for model, path, line in lists:
        listed = world.folder / "images" / model / path
        listed.parent.mkdir(parents=True)
        listed.write_text(line + "\n")
        Image.new("RGB", (8, 8), (50, 0, 0)).save(listed.with_name(json.loads(line)["file"]))
    assert world.run(models=("theirs", "ours")) == 0
    assert scores(world) == {("theirs", "fox"): 50.0, ("ours", "fox"): 50.0}


def test_its_own_output_is_no_model(world, capsys):
    """Figures are images too."""
    assert world.run() == 0
    assert (
        evaluate.main(["--images", str(world.output), "--scorers", world.scorer, "--output", str(world.folder / "r")])
        == 1
    )
    figures = len(list((world.output / "figures").glob("*.png")))
    assert "nothing to compare" in (said := capsys.readouterr().err)
    assert f"{figures} left out: no prompt is known" in said and "Write a manifest.jsonl" in said
    inside = world.folder / "images" / "sd15"
    for _ in range(2):
        arguments = ["--images", *world.images(), "--scorers", world.scorer, "--output", str(inside)]
        assert evaluate.main(arguments) == 0
        assert capsys.readouterr().err.count("note:") == 0
    assert {row.placement.prompt_set for row in placed(inside)} == {"mine"}


def test_a_full_disk_is_said_of_figures_and_pages_and_scores_stay(world, capsys, request, monkeypatch):
    assert world.run() == 0
    before = (world.output / "report.md").read_text()
    with monkeypatch.context() as patched:
        original = files.aside_of
        patched.setattr(files, "aside_of", lambda path: full if path.suffix in (".png", ".md") else original(path))
        (full := world.folder / "full.part").symlink_to("/dev/full")
        assert world.run("--title", "Another") == 1
        assert re.search(r"error: could not write \S+\.png: the disk is full", capsys.readouterr().err)
    assert (world.output / "report.md").read_text() == before
    world.calls()
    assert world.run("--title", "Another") == 0 and world.calls() == 0


def test_what_is_written_may_be_read_by_whom_the_umask_lets(world):
    before = os.umask(0o027)
    try:
        assert world.run() == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in world.output.rglob("*") if path.is_file()} == {0o640}


def test_a_start_that_failed_binds_the_output_to_nothing(world):
    (world.folder / "wrong.py").write_text(
        "class Wrong:\n    def score(self, images, prompts):\n        return ['a']\n"
    )
    assert world.run(scorers=f"{world.folder / 'wrong.py'}:Wrong") == 1
    assert world.run() == 0
    assert {row.key.scorer for row in placed(world.output)} == {world.scorer}


def test_a_scorer_that_gives_no_numbers_is_named(world, capsys):
    for number, result in enumerate(("['a'] * len(images)", "[None] * len(images)", "[[1, 2]] * len(images)")):
        path = world.folder / f"wrong{number}.py"
        path.write_text(f"class Wrong:\n    def score(self, images, prompts):\n        return {result}\n")
        assert world.run(scorers=f"{path}:Wrong") == 1
        assert f"wrong{number}.py:Wrong' must return a number for each image" in capsys.readouterr().err


def test_nothing_is_scored_twice_and_a_new_model_costs_only_its_own(world):
    world.run()
    assert world.calls() == 12
    world.run()
    assert world.calls() == 0
    make_model(world.folder / "images" / "kto", 170)
    world.run(models=("sd15", "kto"))
    assert world.calls() == 6
    assert {row.placement.model for row in placed(world.output)} == {"sd15", "xdpo", "kto"}


def test_a_changed_scorer_scores_anew(world):
    world.run()
    world.calls()
    with (world.folder / "red.py").open("a") as file:
        file.write("# another version")
    world.run()
    assert world.calls() == 12


def test_killed_and_restarted_it_goes_on_where_it_was(world, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "SAVE_SECONDS", -1)
    (world.folder / "fail").touch()
    assert world.run() == 130
    assert "goes on" in capsys.readouterr().err
    (world.folder / "fail").unlink()
    world.calls()
    assert world.run() == 0
    assert world.calls() == 12 - 4  # two batches of two were done
    assert len(placed(world.output)) == 12


# Each process scores only when both have begun, and dies after the third call where told to.
SHARED = """
import os, signal, time
from pathlib import Path
import numpy as np

FOLDER = Path({folder!r})

class Red:
    def score(self, images, prompts):
        (FOLDER / f"begun-{{os.getpid()}}").touch()
        deadline = time.monotonic() + 60
        while len(list(FOLDER.glob("begun-*"))) < int(os.environ.get("WORLD_SIZE", 1)) and time.monotonic() < deadline:
            time.sleep(0.01)
        with (FOLDER / "calls").open("a") as file:
            file.write(f"{{os.environ.get('RANK')}} {{len(images)}}\\n")
        if (FOLDER / "deadly").exists() and len((FOLDER / "calls").read_text().splitlines()) > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return [float(np.asarray(image)[..., 0].mean()) for image in images]
"""
IMPATIENT = """
import sys
import evaluate
from xdpo.scores import scoring
scoring.SAVE_SECONDS = -1
sys.exit(evaluate.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_killed_and_resumed_write_what_one_writes_and_score_nothing_twice(tmp_path, metric_weights):
    (tmp_path / "red.py").write_text(SHARED.format(folder=str(tmp_path)))
    for model, red in MODELS.items():
        make_model(tmp_path / "images" / model, red, count=8)
    (tmp_path / "images" / "sd15" / "mine" / "cats" / "00001.png").write_bytes(b"no image")

    def run(output, processes, program=ROOT / "evaluate.py"):
        (tmp_path / "calls").unlink(missing_ok=True)
        for begun in tmp_path.glob("begun-*"):
            begun.unlink()
        images = [str(tmp_path / "images" / model) for model in MODELS]
        options = ["--scorers", f"{tmp_path}/red.py:Red", "--batch-size", "2", "--output", output]
        more = ["--weights", str(metric_weights), "--reference", images[0]]
        return launch(program, ["--images", *images, *options, *more], processes=processes, cwd=tmp_path)

    def calls():
        """Rank and number of images of every call of the scorer."""
        return [line.split() for line in (tmp_path / "calls").read_text().splitlines()]

    def written(output):
        paths = [path for path in (tmp_path / output).rglob("*") if path.is_file() and not is_own(path)]
        return {str(path.relative_to(tmp_path / output)): path.read_bytes() for path in paths}

    (tmp_path / "deadly").touch()
    killed = run("two", 2, IMPATIENT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    saved = ScoreTable(tmp_path / "two").scores
    assert not (tmp_path / "two" / "scores.parquet").exists() and 0 < len(saved) < 15

    (tmp_path / "deadly").unlink()
    resumed = run("two", 2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert {rank for rank, _ in calls()} == {"0", "1"}
    assert sum(int(images) for _, images in calls()) == 15 - len(saved)
    assert resumed.stdout.count("report: ") == 1 and resumed.stderr.count("1 left out: cannot be decoded") == 1

    one = run("one", 1)
    assert one.returncode == 0, one.stderr[-3000:]
    expected, of_two = written("one"), written("two")
    assert {"scores.parquet", "report.html", "report.md", "features.npz"} < expected.keys() == of_two.keys()
    assert [name for name, content in expected.items() if of_two[name] != content] == []


def test_images_are_scored_as_training_sees_them(world):
    """Turned upright, transparency over white: the same pixels as everywhere."""
    path = world.folder / "images" / "sd15" / "mine" / "cats" / "00000.png"
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(path)
    assert world.run() == 0
    assert scores(world)["sd15", "cats/0"] == 255.0


def test_two_files_for_one_image_are_told(world, capsys):
    folder = world.folder / "images" / "sd15" / "mine"
    (folder / "cats" / "1.png").write_bytes((folder / "cats" / "00002.png").read_bytes())
    row = {"file": "cats/1.png", "category": "cats", "prompt": "<i>prompt</i> 1"}
    with (folder / "manifest.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert world.run() == 0
    told = "1 clashes, left out: files for one image (cats/00001.png and cats/1.png)"
    assert told in capsys.readouterr().err and told in (world.output / "report.md").read_text()


def test_identical_images_are_scored_once(world):
    make_model(world.folder / "images" / "copy", MODELS["sd15"])
    world.run(models=("sd15", "copy"))
    assert world.calls() == 6
    assert len(placed(world.output)) == 12


def test_worker_processes_give_the_same_numbers_as_none(world):
    world.run()
    alone = scores(world)
    world.output = world.folder / "with_workers"
    world.run("--workers", "2")
    assert scores(world) == alone


def test_broken_and_missing_images_are_named_and_the_comparison_says_how_many_are_left(world, capsys):
    sd15 = world.folder / "images" / "sd15" / "mine"
    (sd15 / "cats" / "00001.png").write_bytes((sd15 / "cats" / "00001.png").read_bytes()[:40])
    (sd15 / "dogs" / "00004.png").unlink()
    assert world.run() == 0
    report = (world.output / "report.md").read_text()
    assert "4 of 6 prompts have scored images of all models and are compared (sd15 lacks 2)." in report
    assert "1 left out: cannot be decoded (cats/00001.png)" in report
    assert "1 listed in the manifest but missing (dogs/00004.png)" in report
    assert "cannot be decoded" in capsys.readouterr().err


def test_scores_that_are_not_finite_leave_their_prompts_out(world):
    assert world.run(scorers=f"{world.scorer},{world.folder / 'red.py'}:Nan") == 0
    report = (world.output / "report.md").read_text()
    assert "5 of 6 prompts have scored images" in report
    assert "left out: no finite score by" in report


def test_a_set_that_only_some_models_have_compares_those(world):
    make_model(world.folder / "images" / "xdpo", 90, prompt_set="other")
    assert world.run("--baseline", "sd15") == 0
    report = (world.output / "report.md").read_text()
    assert "## mine" in report and "## other" in report
    assert world.run("--sets", "mine") == 0
    assert "## other" not in (world.output / "report.md").read_text()


def test_a_folder_without_a_manifest_works_by_layout_with_a_warning(world, capsys):
    (world.folder / "images" / "xdpo" / "mine" / "manifest.jsonl").unlink()
    assert world.run() == 0
    assert "xdpo, mine: no manifest; read by layout" in capsys.readouterr().err
    assert "| xdpo | **152.5000**" in (world.output / "report.md").read_text()


def test_models_can_be_named(world):
    images = world.images()
    arguments = ["--images", f"before={images[0]}", f"after={images[1]}", "--scorers", world.scorer]
    assert evaluate.main([*arguments, "--output", str(world.output), "--baseline", "after"]) == 0
    assert "| Red | before | after | 0.0 % ▼" in (world.output / "report.md").read_text()


def test_a_models_name_may_have_dots_and_brackets(world):
    before, after = world.images()
    arguments = ["--images", f"sd1.4={before}", f"sd1.5 (mine)={after}", "--scorers", world.scorer]
    assert evaluate.main([*arguments, "--output", str(world.output), "--baseline", "sd1.4", "sd1.5 (mine)"]) == 0
    links = re.findall(r"!\[.*?\]\((.*?)\)", (world.output / "report.md").read_text())
    assert len(set(links)) == len(list((world.output / "figures").glob("*.png"))) >= 3
    assert all((world.output / unquote(link)).is_file() for link in links)


def test_a_second_image_that_is_broken_leaves_the_prompt_its_first(world):
    folder = world.folder / "images" / "xdpo" / "mine"
    (folder / "cats" / "00000_1.png").write_bytes(b"no image")
    row = {"file": "cats/00000_1.png", "category": "cats", "prompt": "<i>prompt</i> 0"}
    with (folder / "manifest.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert world.run() == 0
    report = (world.output / "report.md").read_text()
    assert "6 prompts, each with images of all 2 models." in report
    assert "1 left out: cannot be decoded (cats/00000_1.png)" in report


def test_tables_are_printed_from_the_scores_that_are_there(world, capsys):
    world.run()
    world.calls()
    capsys.readouterr()
    assert evaluate.main(["--output", str(world.output), "--table2", "--table3"]) == 0
    printed = capsys.readouterr().out
    assert "Table 2" in printed and "Table 3" in printed
    assert re.search(r"HPSV2 +xDPO \(ours\) +published +27\.98 +21\.694\* +0\.737\* +0\.354\* +5\.66", printed)
    assert "Nothing measured on these prompt sets" in printed
    assert world.calls() == 0


def test_quality_is_drawn_over_a_runs_checkpoints(world):
    run = world.folder / "runs" / "xdpo"
    run.mkdir(parents=True)
    log = [{"step": step, "pairs_seen": 8 * step, "pairs_per_second": 2.0} for step in range(1, 5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    make_model(world.folder / "images" / "xdpo@2", 120)
    assert world.run("--runs", str(run), models=("sd15", "xdpo@2", "xdpo")) == 0
    assert (world.output / "figures" / "training_mine.svg").is_file()
    assert "## Training: mine" in (world.output / "report.md").read_text()


def test_the_page_is_one_file_that_asks_for_nothing_from_elsewhere(world):
    world.run("--title", "</title><script>alert(1)</script>")
    html = (world.output / "report.html").read_text()
    assert "alert(1)</script>" not in html
    assert "<i>prompt</i>" not in html and "&lt;i&gt;prompt" in html
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", html)
    assert html.count("data:image/png;base64,") == 12
    assert "All 12 images are in this file" in html


def test_images_beyond_the_budget_are_links_beside_the_page(world):
    world.run("--embed-mb", "0.0003")
    html = (world.output / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert 0 < len(data["embedded"]) < 12
    images = [image for prompt in data["sets"][0]["prompts"] for model in prompt["images"] for image in model]
    assert sum(number >= 0 for number, _, _ in images) == len(data["embedded"])
    assert all((world.output / link).is_file() for _, link, _ in images)


@pytest.mark.parametrize(
    "change, message",
    [
        (["--scorers", "hps"], "unknown scorer 'hps'; choose from aesthetic, clip, hp, hpsv2"),
        (["--scorers", ","], "--scorers names none"),
        (["--baseline", "sd14"], "unknown model 'sd14' in --baseline; choose from sd15, xdpo"),
        (["--sets", "hpsv2"], "no images of prompt set 'hpsv2' in these folders; there are mine"),
        (["--images", "nowhere"], "no image folder nowhere"),
        (["--images", "a/b=nowhere"], "a model cannot be called 'a/b'"),
        (["--device", "abacus"], "--device abacus: "),
        (["--runs", "nowhere"], "nowhere/metrics.jsonl has no training steps"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(world, capsys, change, message):
    assert world.run(*change) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error[0]


def test_two_models_of_one_name_are_refused(world, capsys):
    assert world.run(models=("sd15", "sd15")) == 1
    assert "two models are called 'sd15'" in capsys.readouterr().err


def test_tables_without_scores_and_a_call_without_images_are_refused(world, capsys):
    assert evaluate.main(["--output", str(world.output), "--table2"]) == 1
    assert "run evaluate.py with --images" in capsys.readouterr().err
    assert evaluate.main(["--output", str(world.output)]) == 1
    assert "give --images" in capsys.readouterr().err


def test_tables_of_scores_by_several_versions_of_a_scorer_are_refused(world, capsys):
    world.output.mkdir()
    table = ScoreTable(world.output)
    keys = [ScoreKey("a fox", sha, "clip", version) for sha, version in (("a", "1"), ("b", "2"))]
    table.add(dict.fromkeys(keys, 0.5))
    placements = [Placement("mine", model, "cats", "00000", 0, "cats/00000.png") for model in ("sd15", "xdpo")]
    table.close(zip(placements, keys, strict=True), replaced=[])
    assert evaluate.main(["--output", str(world.output), "--table2"]) == 1
    assert "the scores by clip are of several versions (1; 2) and don't compare" in capsys.readouterr().err


def test_a_corrupted_score_table_is_named_before_anything_is_scored(world, capsys):
    world.output.mkdir()
    (world.output / "scores.parquet").write_bytes(b"PAR1 nonsense")
    assert world.run() == 1
    assert "scores.parquet is not a score table" in capsys.readouterr().err
    assert world.calls() == 0


def test_no_permission_is_said_before_anything_is_scored(world, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    assert world.run() == 1
    assert "no permission to write" in capsys.readouterr().err
    assert world.calls() == 0


def test_a_second_evaluation_into_the_same_folder_waits_its_turn(world, capsys):
    with held_elsewhere(world.output, "evaluate.py") as holder:
        assert world.run() == 1
    assert f"{world.output} is in use: evaluate.py, process {holder.pid} on " in capsys.readouterr().err
    assert world.calls() == 0
    assert world.run() == 0


def test_the_page_fills_its_template_completely(world):
    world.run()
    assert not re.findall(r"\{\{\w+\}\}", (world.output / "report.html").read_text())


def test_what_generate_makes_evaluate_reads(small_pipeline, tmp_path):
    import generate

    for name, seed in (("one", "0"), ("two", "7")):
        arguments = ["--model", small_pipeline, "--prompts", "tinyprompts", "--sample", "3", "--seed", seed]
        arguments += ["--steps", "1", "--batch-size", "2", "--images-per-prompt", "2"]
        assert generate.main([*arguments, "--output", str(tmp_path / name)]) == 0
    arguments = ["--images", str(tmp_path / "one"), str(tmp_path / "two"), "--scorers", "tiny_alignment,tiny_appeal"]
    assert evaluate.main([*arguments, "--output", str(tmp_path / "results")]) == 0
    rows = placed(tmp_path / "results")
    assert len(rows) == 2 * 3 * 2 * 2  # models, prompts, images of each, scorers
    assert {row.placement.repeat for row in rows} == {0, 1}
    report = (tmp_path / "results" / "report.md").read_text()
    assert "3 prompts, each with images of all 2 models." in report
    assert "all models, tinyprompts: images made with different seed (0: one; 7: two)\n" in report
    (made,) = re.findall(r"^\| tinyprompts \| two \| .*", report, re.MULTILINE)
    assert re.search(r"\| 7 ≠ \| 1 \| 7.5 \| pipeline \| fp32 \| \d+ × \d+ \| png \| 2 \| \d{4}-\d\d-\d\d \|$", made)
