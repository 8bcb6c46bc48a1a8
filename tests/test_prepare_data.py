"""Data prepared ahead: what is said of it, and that training finds it."""

import errno
from pathlib import Path

import prepare_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import failing
from training_runs import ROOT

from xdpo.config import load_config
from xdpo.data import Split, load_pairs


@pytest.fixture
def prepare(monkeypatch):
    monkeypatch.chdir(ROOT)
    return lambda *options: prepare_data.main(["--config", "configs/base.yaml", *options])


def no_conversion(monkeypatch):
    monkeypatch.setattr("datasets.builder.DatasetBuilder._download_and_prepare", lambda *_, **__: pytest.fail("anew"))


@pytest.mark.parametrize("source", ["parquet", "hub"])
def test_training_finds_what_was_prepared_in_its_order(prepare, small_pairs, tmp_path, monkeypatch, capsys, source):
    """Three files, converted by several processes; a folder here stands for a data set of the hub."""
    table = pq.read_table(small_pairs)
    for name, start, stop in (("train-0", 0, 5), ("train-1", 5, 7), ("train-2", 7, 10), ("test-0", 10, 12)):
        pq.write_table(table.slice(start, stop - start), tmp_path / f"{name}.parquet")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    overrides = [f"data.source={source}", f"data.path={tmp_path}", "eval.every=10", "eval.split=test"]

    assert prepare(*overrides) == 0
    said = capsys.readouterr().out
    size = sum(path.stat().st_size for path in tmp_path.glob("train-*"))
    where = {"hub": "\n  converted in ", "parquet": ", read where they are; their index goes into "}[source]
    assert f"training pairs: 3 files, {size / 1e9:.3g} GB{where}" in said
    assert ("GB are free" in said) == (source == "hub") and "held-out pairs: 1 files" in said
    assert "kept 10\n" in said and "kept 2\n" in said

    no_conversion(monkeypatch)
    monkeypatch.setattr("xdpo.data.index.parquet_texts", lambda *_: pytest.fail("indexed anew"))
    settings = load_config("configs/base.yaml", overrides)
    found = load_pairs(settings.data)
    assert found.columns("caption")["caption"] == [f"a photo of {number}" for number in range(10)]
    assert len(load_pairs(Split.HELD_OUT.source(settings))) == 2


def test_what_relabelling_leaves_is_prepared_and_what_a_run_leaves_is_not(prepare, small_pairs, tmp_path, capsys):
    """Beside relabelled files lies the lock of whoever wrote them."""
    (tmp_path / "lock").write_text("relabel.py, process 1")
    table = pq.read_table(small_pairs)
    for side in (0, 1):
        table = table.append_column(f"human_label_{side}", table.column(f"label_{side}"))
    pq.write_table(table, tmp_path / "train-0.parquet")
    assert prepare("data.source=parquet", f"data.path={tmp_path}", "eval.every=0") == 0
    assert "kept 12\n" in capsys.readouterr().out
    pq.write_table(pa.table({"step": [1], "loss": [0.7]}), tmp_path / "train-0.parquet")
    assert prepare("data.source=parquet", f"data.path={tmp_path}", "eval.every=0") == 1
    assert "train-0.parquet lacks the columns caption, jpg_0" in capsys.readouterr().err


def test_a_full_cache_of_datasets_is_named(prepare, small_pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.load_dataset", failing(errno.ENOSPC))
    (tmp_path / "train.parquet").write_bytes(Path(small_pairs).read_bytes())
    assert prepare("data.source=hub", f"data.path={tmp_path}", "eval.every=0") == 1
    assert "(HF_DATASETS_CACHE names another): " in (said := capsys.readouterr().err) and "the disk is full" in said


def test_a_folder_of_images_is_read_where_it_lies_and_what_is_missing_is_said(prepare, tmp_path, capsys):
    (tmp_path / "pairs.csv").write_text("chosen,rejected,caption\na.png,b.png,one\n")
    assert prepare("data.source=folder", f"data.path={tmp_path}", "eval.every=0") == 0
    assert "files" not in capsys.readouterr().out
    assert prepare("data.source=parquet", f"data.path={tmp_path}", "eval.every=0") == 1
    assert "no .parquet file matches" in capsys.readouterr().err
