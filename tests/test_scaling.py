"""Launching on a cluster: the Slurm script against a queue of its own, and the arithmetic of docs/scaling.md."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scaling_model as model

from xdpo import runs

ROOT = Path(__file__).resolve().parent.parent

SRUN = """#!{python}
import os, pathlib, signal, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith("--kill")]
ranks = [str(number) for number in range(int(os.environ["SLURM_NTASKS"]))]
processes = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": rank, "SLURM_LOCALID": rank}}) for rank in ranks
]
pathlib.Path(os.environ["SRUN_PID"]).write_text(str(os.getpid()))
signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in processes])
sys.exit(max(process.wait() % 256 for process in processes))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.fixture
def cluster(tmp_path, small_pipeline, small_pairs):
    """A queue of one machine: job(processes, "key=value", …) starts the script as sbatch would."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    common = [
        *("compute.precision=fp32", "data.source=parquet", "data.resolution=16", "data.num_workers=0"),
        *("optim.learning_rate=1e-4", "optim.scale_lr=false", "eval.every=0", "samples.every=0", "log.trackers=[]"),
        *("train.total_batch_pairs=4", "train.micro_batch_pairs=1", "checkpoint.every=1000"),
        *(f"model.pipeline={small_pipeline}", f"data.path={small_pairs}"),
    ]

    def job(processes, *overrides):
        environment = {
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "REQUEUED": str(tmp_path / "requeued"),
            "SRUN_PID": str(tmp_path / "srun.pid"),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NTASKS": str(processes),
        }
        return subprocess.Popen(
            ["bash", "scripts/train_slurm.sh", "configs/base.yaml", *common, *overrides],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    job.requeued = tmp_path / "requeued"
    return job


@pytest.mark.slow
def test_a_job_that_is_told_to_end_saves_requeues_and_goes_on_on_another_number_of_processes(cluster, tmp_path):
    run = tmp_path / "run"
    first = cluster(2, f"output_dir={run}", "train.max_steps=100000")
    while not (run / "metrics.jsonl").exists() and first.poll() is None:
        time.sleep(0.05)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0, said[-2000:]
    assert cluster.requeued.read_text().split() == ["requeue", str(os.getpid())]
    (saved,) = runs.finished_checkpoints(run)

    steps = runs.step_of(saved) + 2
    again = cluster(1, f"output_dir={run}", f"train.max_steps={steps}")
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and f"resumed from {saved}" in said, said[-2000:]
    assert runs.step_of(runs.finished_checkpoints(run)[-1]) == steps
    assert len(cluster.requeued.read_text().splitlines()) == 1  # a run that has ended is not requeued


def test_a_job_that_fails_is_not_requeued(cluster, tmp_path):
    failed = cluster(1, f"output_dir={tmp_path}", "loss.bta=3")
    said, _ = failed.communicate(timeout=120)
    assert failed.returncode == 1 and "unknown key" in said
    assert not cluster.requeued.exists()


def test_outside_a_job_the_script_names_the_other_one():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    ended = subprocess.run(
        ["bash", "scripts/train_slurm.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode != 0 and "on one machine use scripts/train_sd15.sh" in ended.stderr


# --- the cost model ------------------------------------------------------------------------------------


def test_a_step_is_passes_and_a_ring():
    mode, link = model.Mode("full", "both", False, 2, 0.0), model.Link("l", 1e9)
    assert mode.tflop_per_pair == pytest.approx(4.814)
    # A pass of 2 pairs: 9.628 TFLOP at 90 · 4 / 6 TFLOP/s, and 859.5 M weights · (6 + 18) bytes at 1 TB/s.
    a_pass = 9.628 / 60 + 859.5e6 * 24 / 1e12
    assert model.pass_seconds(mode, 2) == pytest.approx(a_pass)
    # 256 pairs / 4 GPUs / 2 pairs = 32 passes; 2 · 3/4 · 3.438 GB / 1 GB/s = 5.157 s
    assert model.step_seconds(mode, 4, link) == pytest.approx((32 * a_pass, 5.157))
    assert model.pairs_per_second(mode, 4, link) == pytest.approx(256 / (32 * a_pass + 5.157))
    assert model.efficiency(mode, 4, link) == pytest.approx(32 * a_pass / (32 * a_pass + 5.157))
    assert model.step_seconds(mode, 1, link)[1] == 0
    # With one pair left for each GPU a pass is a smaller one, at half the rate.
    assert model.step_seconds(mode, 256, link)[0] == pytest.approx(4.814 / 45 + 859.5e6 * 24 / 1e12)


def test_what_a_mode_moves_and_computes():
    plain, cached = model.Mode("full", "nothing", True, 1, 0.0), model.Mode("lora", "examples", False, 1, 0.0)
    # 2 images: policy 3.002, reference 0.803, autoencoder 1.117; a caption: 0.013
    assert plain.tflop_per_pair == pytest.approx(2 * (3.002 + 0.803 + 1.117) + 0.013)
    # 3 forwards cast the UNet, one the encoders; gradients of all
    assert plain.pass_bytes == pytest.approx(6 * (3 * 859.5e6 + 157.2e6) + 18 * 859.5e6)
    assert cached.tflop_per_pair == pytest.approx(2 * (1.765 + 0.803))
    assert cached.pass_bytes == pytest.approx(6 * 2 * 859.5e6 + 18 * 12.75e6)


def test_the_page_shows_what_the_script_prints(capsys):
    model.main()
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "scaling.md").read_text()
