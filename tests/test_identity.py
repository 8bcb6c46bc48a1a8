"""What was recorded knows the images that it was recorded from, wherever they lie."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded_image, pick_a_pic_row, write_pick_a_pic
from training_runs import rows_of

from xdpo import precompute
from xdpo.config import load_config
from xdpo.data import identity, load_pairs


def fingerprint(source, path):
    return load_pairs(load_config("configs/base.yaml", [f"data.source={source}", f"data.path={path}"]).data).fingerprint


@pytest.fixture
def folder(tmp_path):
    """Four pairs as files of their own, in two colours."""
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = ["chosen,rejected,caption"]
    for number in range(4):
        for colour in ("red", "lime"):
            (folder / f"{colour}{number}.png").write_bytes(encoded_image(colour))
        lines.append(f"lime{number}.png,red{number}.png,a photo")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder


def edit(folder):
    """Another image of the same size in bytes."""
    before = (folder / "red2.png").read_bytes()
    shades = (encoded_image((red, 0, 0)) for red in range(254, 0, -1))
    (folder / "red2.png").write_bytes(next(image for image in shades if len(image) == len(before)))


def test_pairs_are_the_same_elsewhere_and_others_with_one_image_edited(folder, tmp_path):
    first = fingerprint("folder", folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert fingerprint("folder", tmp_path / "elsewhere") == first
    edit(folder)
    assert fingerprint("folder", folder) != first


def test_images_in_parquet_files_count_too_however_they_are_kept(tmp_path):
    rows = [pick_a_pic_row(number) for number in range(3)]
    other = [*rows[:2], pick_a_pic_row(2, jpg_1=encoded_image("blue"))]
    found = []
    for name, content in (("one", rows), ("same", rows), ("other", other)):
        path = write_pick_a_pic(tmp_path / name / "train.parquet", content)
        found.append(fingerprint("parquet", path))
        table = pq.read_table(path)  # as `datasets` writes images
        for side in (0, 1):
            cells = pa.array([{"bytes": row[f"jpg_{side}"], "path": None} for row in content])
            table = table.set_column(table.column_names.index(f"jpg_{side}"), f"jpg_{side}", cells)
        pq.write_table(table, tmp_path / name / "struct.parquet")
        found.append(fingerprint("parquet", tmp_path / name / "struct.parquet"))
    assert found == [found[0]] * 4 + [found[4]] * 2 and found[4] != found[0]


def test_a_large_source_is_sampled_and_its_sizes_are_all_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "SAMPLED", 2)  # the first and the last
    reads = []
    original = identity.bytes_of
    monkeypatch.setattr(identity, "bytes_of", lambda cell: reads.append(cell) or original(cell))
    rows = [pick_a_pic_row(number) for number in range(5)]
    first = fingerprint("parquet", write_pick_a_pic(tmp_path / "one" / "train.parquet", rows))
    assert len(reads) == 4
    rows[2]["jpg_0"] += b" "
    assert fingerprint("parquet", write_pick_a_pic(tmp_path / "two" / "train.parquet", rows)) != first


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.slow
def test_held_out_pairs_that_are_trained_on_are_counted(run, small_pairs, tmp_path, capsys, cached):
    rows = pq.read_table(small_pairs)
    pq.write_table(rows.slice(0, 9), tmp_path / "most.parquet")
    pq.write_table(rows.slice(9), tmp_path / "rest.parquet")
    caches = {name: [f"cache.examples={tmp_path / name}"] if cached else [] for name in ("all", "rest")}
    common = (f"data.path={tmp_path / 'most.parquet'}", "train.max_steps=1", "eval.every=1", "eval.draws=1")
    run("all", f"eval.path={small_pairs}", *common, *caches["all"])
    assert "note: 9 of the 12 held-out pairs are training pairs too" in capsys.readouterr().out
    run("rest", f"eval.path={tmp_path / 'rest.parquet'}", *common, *caches["rest"])
    assert "training pairs too" not in capsys.readouterr().out


def test_pairs_are_shared_by_what_they_show_and_not_by_their_names_or_labels(tmp_path):
    def pairs(name, *rows):
        path = write_pick_a_pic(tmp_path / f"{name}.parquet", list(rows))
        return load_pairs(load_config("configs/base.yaml", ["data.source=parquet", f"data.path={path}"]).data)

    train = pairs("train", *(pick_a_pic_row(number, jpg_0=encoded_image((number, 0, 0))) for number in range(3)))
    turned = {"jpg_0": encoded_image("red"), "jpg_1": encoded_image((1, 0, 0)), "label_0": 0.0, "label_1": 1.0}
    shared = pairs(
        "shared", pick_a_pic_row(1, **turned, ranking_id=7), pick_a_pic_row(2, jpg_0=encoded_image((2, 0, 0)))
    )
    assert precompute.count_shared(train, shared) == 2
    others = [
        pick_a_pic_row(0, jpg_0=encoded_image((0, 0, 0)), caption="another caption"),
        pick_a_pic_row(1, jpg_0=encoded_image((99, 0, 0))),
    ]
    assert precompute.count_shared(train, pairs("others", *others)) == 0


def test_errors_recorded_on_other_images_are_not_taken(run, folder, tmp_path):
    common = (
        "data.source=folder",
        f"data.path={folder}",
        "train.max_steps=1",
        f"cache.reference={tmp_path / 'errors'}",
    )
    run("first", *common)
    edit(folder)
    _, second = run("second", *common)
    _, plain = run("plain", *common[:3])
    assert rows_of(second)[0]["loss"] == rows_of(plain)[0]["loss"]
    assert len(list((tmp_path / "errors").iterdir())) == 2


@pytest.mark.parametrize("source", ["folder", "parquet"])
@pytest.mark.slow
def test_a_cache_of_images_that_were_edited_since_is_refused(run, folder, small_pairs, tmp_path, capsys, source):
    path = folder if source == "folder" else shutil.copy(small_pairs, tmp_path / "pairs.parquet")
    common = (f"data.source={source}", f"data.path={path}", "train.max_steps=1", f"cache.examples={tmp_path / 'cache'}")
    assert run("first", *common)[0] == 0
    if source == "folder":
        (folder / "red2.png").touch()
        assert run("touched", *common)[0] == 0
        edit(folder)
    else:
        pq.write_table(pq.read_table(path), path, row_group_size=2)  # the same pairs, in another file
        assert run("touched", *common)[0] == 0
        table = pq.read_table(path)
        images = [encoded_image("navy"), *table["jpg_1"].to_pylist()[1:]]
        pq.write_table(table.set_column(table.column_names.index("jpg_1"), "jpg_1", pa.array(images)), path)
    status, _ = run("second", *common)
    assert status == 1
    assert "was encoded from other images or captions" in capsys.readouterr().err
    (shutil.rmtree if source == "folder" else lambda file: file.unlink())(path)
    assert run("without the data", *common)[0] == 0
