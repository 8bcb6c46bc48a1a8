"""metrics.jsonl through kills and resumes."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from training_runs import ROOT

from xdpo.files import StorageError
from xdpo.runlog import RunLog, peak_memory_gb, read_rows


def log_rows(folder, start_step, steps):
    log = RunLog(Accelerator(cpu=True), folder, project="test", config={}, start_step=start_step, max_steps=10)
    for step in steps:
        log.row(step, {"loss": float(step), "implicit_accuracy": 0.5, "learning_rate": 1e-8}, advance=True)
    log.close()


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path):
    log_rows(tmp_path, 0, [1, 2, 3, 4])
    log_rows(tmp_path, 2, [3, 4, 5])

    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 1.0}) + '\n{"step": 2, "lo')

    assert read_rows(path) == [{"step": 1, "loss": 1.0}]
    log_rows(tmp_path, 1, [2])
    assert [row["step"] for row in read_rows(path)] == [1, 2]


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"{", b"[1]", b'{"loss": 1.0}', b'{"step": "1"}', b"\0" * 9])
def test_a_damaged_line_is_named_and_no_row_after_it_is_lost(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n' + damage + b'\n{"step": 2}\n'
    path.write_bytes(whole)
    for use in (lambda: read_rows(path), lambda: log_rows(tmp_path, 2, [3])):
        with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is damaged"):
            use()
    assert path.read_bytes() == whole
    path.write_bytes(b'{"step": 1}\n' + damage)
    assert read_rows(path) == [{"step": 1}], "the end of a killed run"


def test_a_full_disk_is_said_of_a_row(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"could not write .*metrics\.jsonl: the disk is full"):
        log_rows(tmp_path, 0, [1])


def test_peak_memory_is_in_gigabytes():
    assert 0.05 < peak_memory_gb(torch.device("cpu")) < 1000


@pytest.mark.slow
def test_peak_memory_is_the_programs_own_and_not_its_parents():
    measure = "import torch; from xdpo.runlog import peak_memory_gb; print(peak_memory_gb(torch.device('cpu')))"
    command = [sys.executable, "-c", measure]
    alone = float(subprocess.check_output(command, cwd=ROOT))
    held = bytearray(b"x" * int(1.5e9))
    assert float(subprocess.check_output(command, cwd=ROOT)) < alone + len(held) / 2e9


def test_trackers_get_the_runs_name_so_that_they_go_on_with_it(tmp_path, monkeypatch):
    accelerator, given = Accelerator(cpu=True), {}
    monkeypatch.setattr(accelerator, "init_trackers", lambda project, **options: given.update(options))
    RunLog(accelerator, tmp_path, project="test", config={}, start_step=0, max_steps=1, run_id="0123abcd").close()
    assert given["init_kwargs"]["wandb"] == {"id": "0123abcd", "resume": "allow"}


def test_trackers_get_sheets_as_images_and_numbers_in_groups(tmp_path, monkeypatch):
    accelerator, given = Accelerator(cpu=True), []
    tracker = SimpleNamespace(
        name="wandb",
        log_images=lambda values, step, **options: given.append((values, step, options)),
        store_init_configuration=lambda config: None,
        finish=lambda: None,
    )
    monkeypatch.setattr(accelerator, "init_trackers", lambda project, **options: None)
    monkeypatch.setattr(accelerator, "trackers", [tracker], raising=False)
    monkeypatch.setattr(accelerator, "log", lambda values, step: given.append((values, step)))
    log = RunLog(accelerator, tmp_path, project="test", config={}, start_step=0, max_steps=1)
    log.row(1, {"loss": 1.0, "learning_rate": 0.1, "eval/loss": 2.0, "pairs_per_second": 3.0, "pairs_seen": 4})
    Image.new("RGB", (3, 2), "red").save(tmp_path / "sheet.png")
    log.image(1, "samples", tmp_path / "sheet.png")

    numbers, (images, step, options) = given
    names = ["train/loss", "optim/learning_rate", "eval/loss", "speed/pairs_per_second", "data/pairs_seen"]
    assert list(numbers[0]) == names and numbers[1] == step == 1 and options == {}
    assert images["samples"].shape == (1, 2, 3, 3) and images["samples"][0, 0, 0].tolist() == [255, 0, 0]
