"""What scripts/inspect_data.py says of pairs whose answers are known."""

import importlib.util

import pytest
from conftest import encoded_image, pick_a_pic_row, write_pick_a_pic
from file_server import serving
from PIL import Image
from training_runs import ROOT


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("inspect_data", ROOT / "scripts" / "inspect_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def second_preferred(number, **changes):
    return pick_a_pic_row(number, **{"label_0": 0.0, "label_1": 1.0} | changes)


def rows():
    """Four pairs, of which the second repeats the first, the third is its contradiction; a tie, and no image."""
    first = {"caption": "Ein Fuchs im Wald", "image_0_uid": "x", "image_1_uid": "y"}
    wide = encoded_image("lime", size=(32, 16), format="JPEG")
    return [
        pick_a_pic_row(0, **first),
        pick_a_pic_row(1, **first),
        second_preferred(2, **first),
        second_preferred(3, caption="лиса", jpg_0=wide, image_1_uid="a3"),
        pick_a_pic_row(4, label_0=0.5, label_1=0.5),
        pick_a_pic_row(5, caption="狐 in 森林的", jpg_1=b"none", image_0_uid="c5"),
    ]


def inspect(script, capsys, *overrides):
    """What it prints, by the titles of its lines; of the first split."""
    keys = ["data.source=parquet", "eval.every=0", *overrides]
    assert script.main(["--config", str(ROOT / "configs/tiny/xdpo.yaml"), *keys]) == 0, capsys.readouterr().err
    lines = [line.strip().partition(" ") for line in capsys.readouterr().out.splitlines()]
    return {title: text.strip() for title, _, text in reversed(lines)} | {"pixels": lines[6][2].strip()}


def test_it_says_what_is_in_the_pairs(script, tmp_path, capsys):
    path = write_pick_a_pic(tmp_path / "train.parquet", rows())
    said = inspect(script, capsys, f"data.path={path}", f"--sheet={tmp_path}/sheet.png", "--examples=3")
    assert said["labels"] == "image 0 is preferred in 60.0% of the pairs, image 1 in 40.0%; 16.7% of rows are ties"
    assert said["captions"].startswith(
        "3 distinct, of 1 to 4 (median 3) words; the commonest: 'Ein Fuchs im Wald' in 3"
    )
    assert said["scripts"] == "Latin 60.0%, Cyrillic 20.0%, Han 20.0%"
    assert said["files"].startswith("10 images, 4 to ")
    assert said["sample"] == "10 images, 1 of them unreadable; PNG RGB 88.9%, JPEG RGB 11.1%"
    assert said["pixels"] == "pixels 16 × 16 88.9%, 32 × 16 11.1%"
    assert said["duplicates"].startswith("2 pairs have caption and images of an earlier one; 1 such pairs are labelled")
    assert "; 1 pairs have the same image twice, by the images' names" in said["duplicates"]
    sheet = Image.open(tmp_path / "sheet.png")
    left = [sheet.getpixel((20, top)) for top in range(30, sheet.height, 20)]
    assert (0, 255, 0) in left and (255, 0, 0) in left, "chosen images, the third one red"


def test_shared_captions_are_counted_with_the_advice(script, tmp_path, capsys):
    path = write_pick_a_pic(tmp_path / "train.parquet", rows())
    held_out = write_pick_a_pic(
        tmp_path / "held.parquet", [pick_a_pic_row(0, caption="ein fuchs  im wald"), *rows()[3:4]]
    )
    overrides = [f"data.path={path}", f"eval.path={held_out}", "data.source=parquet"]
    assert script.main(["--config", str(ROOT / "configs/tiny/xdpo.yaml"), *overrides]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 held-out captions are captions of 4 training pairs too; filter.held_out_captions=true" in out


def test_remote_files_are_not_fetched_but_for_the_sample(script, tmp_path, capsys):
    for number in range(3):
        write_pick_a_pic(tmp_path / "data" / f"train-{number}.parquet", [pick_a_pic_row(number)] * 2)
    with serving(tmp_path / "data") as server:
        said = inspect(script, capsys, f"data.path={server.urls()}".replace("'", '"'))
    assert said["sample"].startswith("4 images, 0 of them unreadable")
    assert said["files"] == "12 images, in files of their own"


def test_errors_are_said_in_a_line(script, tmp_path, capsys):
    arguments = ["--config", str(ROOT / "configs/tiny/xdpo.yaml"), f"data.path={tmp_path}/nothing.parquet"]
    assert script.main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: no .parquet file matches")
