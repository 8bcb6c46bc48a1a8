"""AI feedback: new labels from a scorer, old ones kept, nothing half written."""

import os
import shutil
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import relabel
from conftest import ROOT, encoded_image, held_elsewhere, pick_a_pic_row, write_pick_a_pic
from forks import launch
from PIL import features

from xdpo.config import load_config
from xdpo.data import load_pairs
from xdpo.files import is_untouched

SCORER = """
import numpy as np

class Red:
    def score(self, images, prompts):
        return [float(np.asarray(image)[..., 0].mean()) for image in images]
"""


@pytest.fixture
def call(tmp_path):
    """relabel(...) on two files of pairs; images are grey by number: (image 0, image 1, human label of image 0)."""
    (tmp_path / "red.py").write_text(SCORER)
    pairs = [(200, 100, 0.0), (100, 200, 0.0), (100, 101, 1.0), (None, 50, 1.0), (90, 30, 0.5), (30, 90, 1.0)]
    for number in range(2):
        rows = [
            pick_a_pic_row(
                place,
                jpg_0=b"no image" if left is None else encoded_image((left, 0, 0)),
                jpg_1=encoded_image((right, 0, 0)),
                label_0=human,
                label_1=1 - human,
                has_label=place != 5,
            )
            for place, (left, right, human) in enumerate(pairs)
        ]
        write_pick_a_pic(tmp_path / "data" / f"train-{number}.parquet", rows)

    def run(*arguments, scorer=f"{tmp_path / 'red.py'}:Red"):
        given = ["--data", str(tmp_path / "data" / "train-*.parquet"), "--output", str(tmp_path / "out")]
        return relabel.main([*given, "--scorer", scorer, "--tie-threshold", "5", *arguments])

    run.output = tmp_path / "out"
    run.data = tmp_path / "data"
    return run


def test_the_higher_score_is_preferred_ties_are_ties_and_the_human_labels_stay(call, capsys):
    assert call() == 0
    table = pq.read_table(call.output / "train-0.parquet").to_pydict()
    assert table["label_0"] == [1, 0, 0.5, 0.5, 1, 0]
    assert table["label_1"] == [0, 1, 0.5, 0.5, 0, 1]
    assert table["human_label_0"] == [0, 0, 1, 1, 0.5, 1]
    assert table["score_0"][:3] == [200, 100, 100] and np.isnan(table["score_0"][3]) and np.isnan(table["score_1"][3])
    said = capsys.readouterr().out
    assert (
        "chosen by score: 8\n  tie: 2\n  unreadable: 2\n  agrees with the label: 2\n  contradicts the label: 4" in said
    )


def test_training_reads_the_new_labels(call):
    call()
    settings = type("data", (), {"source": "parquet", "path": str(call.output), "split": "train", "revision": None})
    settings.max_pairs = settings.columns = None
    table = load_pairs(settings)
    assert (table.counts.kept, table.counts.ties) == (8, 4)
    assert table.chosen_side.tolist() == [0, 1, 0, 1] * 2


def test_what_is_done_is_kept_and_an_interrupted_file_is_made_again(call, monkeypatch, capsys):
    original, calls = relabel.score_pairs, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("the disk is full")
        return original(*arguments)

    monkeypatch.setattr(relabel, "score_pairs", interrupted)
    assert call() == 1 and "the disk is full" in capsys.readouterr().err
    assert [path.name for path in call.output.glob("*.parquet")] == ["train-0.parquet"]
    assert call() == 0
    assert "2 files in" in (said := capsys.readouterr().out) and "1 of them made now" in said
    assert len(calls) == 3


KILLED = """
import os, signal, sys
import relabel
original, calls = relabel.score_pairs, []
def deadly(*arguments):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
relabel.score_pairs = deadly
sys.exit(relabel.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_share_the_files_and_killed_or_not_make_what_one_makes(call, tmp_path):
    for number in (2, 3):
        shutil.copyfile(call.data / "train-0.parquet", call.data / f"train-{number}.parquet")
    assert call() == 0
    arguments = ["--data", f"{call.data}/train-*.parquet", "--output", "two", "--scorer", f"{tmp_path}/red.py:Red"]
    arguments += ["--tie-threshold", "5"]
    killed = launch(KILLED, arguments, 2, tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'scripts'}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").glob("*.parquet")}
    assert len(made) == 2  # each process was killed in its second file

    resumed = launch(ROOT / "scripts" / "relabel.py", arguments, 2, tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert resumed.stdout.count("4 files in two, 2 of them made now\n  chosen by score: 8\n") == 1
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    for path in call.output.glob("*.parquet"):
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_another_scorer_into_the_same_folder_is_refused(call, capsys):
    call()
    assert call("--tie-threshold", "6") == 1
    assert "train-0.parquet was made with another tie-threshold; choose another" in capsys.readouterr().err


def test_bad_input_is_refused_before_anything_is_scored(call, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(relabel, "load_scorer", lambda *_: pytest.fail("a scorer was loaded"))
    rows = [{name: value for name, value in pick_a_pic_row(0).items() if name != "caption"}]
    bare = write_pick_a_pic(tmp_path / "bare.parquet", rows)
    for arguments, message in (
        (["--data", bare], "bare.parquet lacks the columns caption; it has are_different, "),
        (["--columns", "{caption: prompt}"], "train-0.parquet lacks the columns prompt; it has "),
        (["--columns", "{caption: [a]}"], "data.columns: must be a mapping such as {caption: prompt}"),
        (["--columns", "{image: jpg_0, rank: label_0}"], "--columns names image, and relabelling needs pairs"),
        (["--data", str(tmp_path / "none*.parquet")], "no file matches"),
        (["--data", str(tmp_path / "red.py")], "not a readable parquet file"),
        (["--output", str(call.data)], "labels are not overwritten"),
        (["--scorer", "pikscore"], "did you mean 'pickscore'"),
    ):
        assert call(*arguments) == 1
        assert message in capsys.readouterr().err
    assert not call.output.exists()


def test_a_full_disk_is_said_and_leaves_no_file(call, full_disk, capsys):
    assert call() == 1
    assert "could not write" in (said := capsys.readouterr().err) and "the disk is full" in said
    assert is_untouched(call.output)


def test_its_own_output_gets_new_labels_and_keeps_those_of_people(call, tmp_path, capsys):
    """Also a third time: columns are replaced, never doubled."""
    (tmp_path / "dark.py").write_text(SCORER.replace(".mean())", ".mean() * -1)"))
    first = call.output
    assert call() == 0
    before = pq.read_table(first / "train-0.parquet").to_pydict()
    source = first
    for target in (tmp_path / "two", tmp_path / "three"):
        given = ["--data", str(source / "*.parquet"), "--output", str(target)]
        assert call(*given, scorer=f"{tmp_path / 'dark.py'}:Red") == 0
        table = pq.read_table(target / "train-0.parquet")
        assert len(set(table.column_names)) == len(table.column_names)
        after = table.to_pydict()
        assert after["human_label_0"] == before["human_label_0"] and after["human_label_1"] == before["human_label_1"]
        assert after["label_0"] == [0, 1, 0.5, 0.5, 0, 1]
        assert after["score_0"][:3] == [-200, -100, -100]
        assert "agrees with the label: 4\n  contradicts the label: 2" in capsys.readouterr().out
        source = target
    settings = {"source": "parquet", "path": str(target), "split": "train", "revision": None, "max_pairs": None}
    settings["columns"] = None
    assert load_pairs(type("data", (), settings)).counts.kept == 8
    assert call("--data", str(first / "*.parquet"), "--output", str(target)) == 1
    assert "was made with another scorer and source" in capsys.readouterr().err


def test_labels_as_text_and_missing_ones_are_compared_where_they_are_numbers(call, tmp_path, capsys):
    table = pq.read_table(call.data / "train-0.parquet")
    for name, values in (("label_0", ["1", None, "", "left", "0", "1.0"]), ("label_1", ["0", None, "", "", "1", "0"])):
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, tmp_path / "text.parquet")
    assert call("--data", str(tmp_path / "text.parquet")) == 0
    assert "agrees with the label: 1\n  contradicts the label: 2" in capsys.readouterr().out
    assert pq.read_table(call.output / "text.parquet").to_pydict()["human_label_0"] == [
        "1",
        None,
        "",
        "left",
        "0",
        "1.0",
    ]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("caption", [["a"]] * 6, "column caption must hold text, it holds list"),
        ("caption", [1.0] * 6, "column caption must hold text, it holds double"),
        ("jpg_0", [1] * 6, "column jpg_0 must hold images, as encoded bytes"),
        ("jpg_1", [[0, 255]] * 6, "column jpg_1 must hold images, as encoded bytes"),
    ],
)
def test_columns_of_another_type_are_refused_before_anything_is_scored(call, tmp_path, name, values, message, capsys):
    table = pq.read_table(call.data / "train-0.parquet")
    table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, tmp_path / "other.parquet")
    assert call("--data", str(tmp_path / "other.parquet")) == 1
    assert f"other.parquet: {message}" in capsys.readouterr().err


def test_a_pattern_that_matches_nothing_beside_one_that_does_is_named(call, capsys):
    assert call("--data", str(call.data / "train-*.parquet"), str(call.data / "test-*.parquet")) == 1
    assert "no file matches" in (said := capsys.readouterr().err) and "test-*" in said and "train-*" not in said


def test_pairs_that_were_edited_since_are_not_taken_for_done(call, capsys):
    assert call() == 0
    path = call.data / "train-1.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, table.column_names[0], table.column(0)), path)
    assert call() == 0, "written again as it was"
    images = [encoded_image((1, 2, 3)), *table["jpg_1"].to_pylist()[1:]]
    pq.write_table(table.set_column(table.column_names.index("jpg_1"), "jpg_1", pa.array(images)), path)
    assert call() == 1
    assert "train-1.parquet was made with another source; choose another --output" in capsys.readouterr().err


def test_a_second_relabelling_into_a_folder_is_refused_by_the_name_of_the_first(call, capsys):
    """Two scorers at once would mix their labels."""
    with held_elsewhere(call.output, "relabel.py") as holder:
        assert call() == 1
    assert f"{call.output} is in use: relabel.py, process {holder.pid} on " in capsys.readouterr().err
    assert is_untouched(call.output) and call() == 0


def test_a_start_that_failed_binds_its_folder_to_nothing(call, tmp_path, capsys):
    (tmp_path / "wrong.py").write_text("class Wrong:\n    def score(self, images, prompts):\n        return ['a']\n")
    assert call(scorer=f"{tmp_path / 'wrong.py'}:Wrong") == 1
    assert "wrong.py:Wrong' must return a number for each image" in capsys.readouterr().err
    assert is_untouched(call.output) and call() == 0


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_scored(call, capsys, monkeypatch):
    monkeypatch.setattr(relabel, "load_scorer", lambda *_: pytest.fail("a scorer was loaded"))
    assert call("--output", str(call.data / "train-0.parquet")) == 1
    assert "--output: " in (said := capsys.readouterr().err) and "train-0.parquet is a file; choose another" in said
    monkeypatch.setattr("os.access", lambda *_: False)
    assert call() == 1
    assert "--output: no permission to write in" in capsys.readouterr().err


def test_what_is_written_may_be_read_by_whom_the_umask_lets(call):
    before = os.umask(0o027)
    try:
        assert call() == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in call.output.iterdir()} == {0o640}


@pytest.mark.parametrize("format", ["AVIF", "DDS", "TIFF"])
def test_whatever_a_decoder_raises_makes_one_pair_unreadable(call, format, capsys):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    whole = encoded_image((9, 0, 0), (64, 64), format)
    path = call.data / "train-0.parquet"
    table = pq.read_table(path)
    images = [whole[: len(whole) // 3], *table["jpg_0"].to_pylist()[1:]]
    pq.write_table(table.set_column(table.column_names.index("jpg_0"), "jpg_0", pa.array(images)), path)
    assert call() == 0
    assert "unreadable: 3" in capsys.readouterr().out  # two pairs have an image that is none


def test_a_damaged_output_is_named(call, capsys):
    call.output.mkdir()
    (call.output / "train-0.parquet").write_bytes(b"PAR1 cut")
    assert call() == 1
    assert "out/train-0.parquet is not a readable parquet file" in capsys.readouterr().err


def test_empty_shards_are_left_out(call, capsys):
    table = pq.read_table(call.data / "train-0.parquet")
    pq.write_table(table.slice(0, 0), call.data / "train-0.parquet")
    assert call() == 0
    assert [path.name for path in call.output.glob("*.parquet")] == ["train-1.parquet"]
    pq.write_table(table.slice(0, 0), call.data / "train-1.parquet")
    assert call() == 1
    assert "no file has any row" in capsys.readouterr().err


def test_a_glob_that_meets_its_own_output_is_refused(call, capsys):
    deep = ["--data", f"{call.data}/**/*.parquet", "--output", str(call.data / "out")]
    assert call(*deep) == 0
    assert call(*deep) == 1
    assert "several files are called train-0.parquet" in capsys.readouterr().err


def test_captions_that_are_no_utf8_are_named_by_their_file(call, capsys):
    table = pq.read_table(call.data / "train-1.parquet")
    texts = pa.array(["café".encode("cp1252")] * len(table), pa.binary()).view(pa.string())
    pq.write_table(
        table.set_column(table.column_names.index("caption"), "caption", texts), call.data / "train-1.parquet"
    )
    assert call() == 1
    assert "train-1.parquet can't be read: " in capsys.readouterr().err
    assert [path.name for path in call.output.glob("*.parquet")] == ["train-0.parquet"]


def test_a_folder_in_brackets_is_that_folder(call, tmp_path):
    call.data.rename(tmp_path / "data[1]")
    assert call("--data", str(tmp_path / "data[1]" / "train-*.parquet")) == 0
    assert len(list(call.output.glob("*.parquet"))) == 2


OTHER_NAMES = {
    "orientation": ("{chosen: left, rejected: right, caption: prompt}", {}, [1.0] * 6, [2, 2]),
    "votes": (
        "{jpg_0: left, jpg_1: right, votes_0: up, votes_1: down, caption: prompt}",
        {"up": [3, 0, 1, 2, 1, None], "down": ["0.5", "1", "1", "1", "2", "1"]},
        [1.0, 0.0, 0.5, 1.0, 0.0, None],
        [2, 1],
    ),
}


@pytest.mark.parametrize(("columns", "votes", "human", "agreement"), OTHER_NAMES.values(), ids=OTHER_NAMES)
def test_pairs_with_other_columns_are_written_with_those_of_pick_a_pic(
    call, tmp_path, columns, votes, human, agreement, capsys
):
    table = pq.read_table(call.data / "train-0.parquet").select(["jpg_0", "jpg_1", "caption", "label_0"])
    table = table.rename_columns(["left", "right", "prompt", "jpg_0"])  # the last is another one, which isn't read
    for name, values in votes.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table.append_column("nsfw", pa.array(range(6))), tmp_path / "other.parquet")
    given = ["--data", str(tmp_path / "other.parquet")]
    assert call(*given, "--columns", columns) == 0
    said = capsys.readouterr().out
    assert f"agrees with the label: {agreement[0]}\n  contradicts the label: {agreement[1]}" in said
    made = pq.read_table(call.output / "other.parquet")
    assert made["label_0"].to_pylist() == [1, 0, 0.5, 0.5, 1, 0] and made["human_label_0"].to_pylist() == human
    assert made["nsfw"].to_pylist() == list(range(6)) and "left" not in made.column_names
    settings = load_config(ROOT / "configs/base.yaml", ["data.source=parquet", f"data.path={call.output}/*.parquet"])
    pairs = load_pairs(settings.data)
    assert pairs.chosen_side.tolist() == [0, 1, 0, 1] and pairs.captions()[0] == "a photo of 0"
    assert call(*given, "--columns", columns.replace("prompt", "'prompt'")) == 0, "the same mapping"
    assert call(*given, "--columns", "{jpg_0: left, jpg_1: right, caption: prompt}") == 1
    assert "other.parquet was made with another mapping; choose another --output" in capsys.readouterr().err
