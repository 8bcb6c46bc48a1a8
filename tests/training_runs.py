"""train_xdpo.py in the tests: small runs in this process or in others, and what they left."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xdpo import runs

ROOT = Path(__file__).resolve().parent.parent
SMALL_RUN = [
    "compute.precision=fp32",
    "data.source=parquet",
    "data.resolution=16",
    "data.num_workers=0",
    "data.horizontal_flip=true",
    "optim.learning_rate=1e-4",
    "optim.scale_lr=false",
    "optim.warmup_steps=0",
    "train.total_batch_pairs=4",
    "train.micro_batch_pairs=2",
    "train.max_steps=6",
    "checkpoint.every=3",
    "eval.every=0",
    "samples.every=0",
    "samples.prompts=[a red square]",
    "samples.num_inference_steps=2",
    "log.trackers=[]",
]


def slow_but(usual, cases):
    """The parameters of a test, by their names or names themselves, each but the `usual` ones marked slow."""
    cases = cases if isinstance(cases, dict) else {name: name for name in cases}
    assert set(usual) <= cases.keys(), "no such case"
    marks = {name: () if name in usual else pytest.mark.slow for name in cases}
    return [pytest.param(value, id=name, marks=marks[name]) for name, value in cases.items()]


BITSANDBYTES = ROOT / ".venv" / "optional"  # where scripts/test.sh puts it


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def policy_of(folder):
    return load_file(runs.finished_checkpoints(folder)[-1] / "policy.safetensors")


def assert_same_run(one, other):
    """The same weights, moments and logged numbers, to the last bit."""
    for name in ("policy", "optimizer"):
        first, second = (
            load_file(runs.finished_checkpoints(folder)[-1] / f"{name}.safetensors") for folder in (one, other)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), f"{name} differs"
    timed = ("pairs_per_second", "peak_memory_gb", "data_wait_share")
    logged = [[{k: v for k, v in row.items() if k not in timed} for row in rows_of(folder)] for folder in (one, other)]
    assert logged[0] == logged[1]


def command(small_pipeline, small_pairs, folder, *overrides):
    paths = [f"model.pipeline={small_pipeline}", f"data.path={small_pairs}", f"output_dir={folder}"]
    return ["--config", "configs/base.yaml", *SMALL_RUN, *paths, *overrides]


def start(arguments, log, **environment):
    """Start a command of its own session; what it says goes to the file `log`.

    It meets SIGINT as from a terminal, also where the tests run in the background of a shell, which has it ignored.
    """
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition, seconds=120):
    """Wait until a condition holds. Fails after so many seconds, which only a broken program needs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def processes_with(text):
    """Process ids whose command line has the text: those of a run, by its folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return found
