"""How a run ends before its time: real signals to real launchers, one process that fails, processes that disagree."""

import os
import signal
import socket
import sys

import pytest
from forks import exit_codes, fork, ranks
from training_runs import command, processes_with, rows_of, start, wait_for

from xdpo import ending, runs

LONG_RUN = ("train.max_steps=100000", "checkpoint.every=100000", "data.num_workers=2", "train.micro_batch_pairs=1")
PYTHON = sys.executable
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
AROUND = 'source scripts/foreground.sh; foreground "$@"'
LAUNCHERS = {
    "python": [PYTHON, "train_xdpo.py"],
    "accelerate launch": [PYTHON, *ACCELERATE, "train_xdpo.py"],
    "torchrun": [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_xdpo.py"],
    "scripts/train_sd15.sh": ["bash", "scripts/train_sd15.sh"],
    "a script around it": ["bash", "-c", AROUND, "script", PYTHON, "train_xdpo.py"],
}
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP}
TO_ALL = "to the process group"


USUAL = {
    ("accelerate launch", "SIGTERM", "to the launcher"),
    ("python", "SIGINT", TO_ALL),
}
ONCE_LOST = USUAL | {("torchrun", "SIGTERM", "to the launcher")}


def every_case():
    """Every signal to every launcher, in turn to the launcher alone and to its whole process group.

    All but the usual two are slow; beside the cases in turn are those that once lost runs.
    """
    for row, launcher in enumerate(LAUNCHERS):
        for column, name in enumerate(SIGNALS):
            whom = (TO_ALL, "to the launcher")[(row + column) % 2]
            cases = {(launcher, name, whom), *(case for case in ONCE_LOST if case[:2] == (launcher, name))}
            for case in sorted(cases):
                marks = () if case in USUAL else (pytest.mark.slow,)
                yield pytest.param(*case, marks=marks, id=f"{launcher}, {name} {case[2]}")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize(("launcher", "name", "whom"), every_case())
def test_a_signal_saves_and_ends_the_run_whoever_launched_it(
    small_pipeline, small_pairs, tmp_path, launcher, name, whom
):
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = command(small_pipeline, small_pairs, folder, *LONG_RUN)
    if launcher == "scripts/train_sd15.sh":  # its first argument is the config
        arguments = arguments[1:]
    launched = start([*LAUNCHERS[launcher], *arguments], log, NUM_PROCESSES="1", PYTHON=PYTHON)
    try:
        rows = folder / "metrics.jsonl"
        wait_for(lambda: launched.poll() is not None or (rows.is_file() and len(rows_of(folder)) > 2))
        assert launched.poll() is None, log.read_text()[-3000:]
        if whom == TO_ALL:
            os.killpg(launched.pid, SIGNALS[name])
        else:
            os.kill(launched.pid, SIGNALS[name])
        launched.wait(60)
        wait_for(lambda: not processes_with(str(folder)), 30)
    finally:
        for process in processes_with(str(folder)):
            os.kill(process, signal.SIGKILL)

    said = log.read_text()
    saved = [runs.step_of(path) for path in runs.finished_checkpoints(folder)]
    assert saved == [rows_of(folder)[-1]["step"]], said[-3000:]
    assert "as asked and saved; the same command resumes" in said
    assert "killed by signal" not in said  # a data worker
    if launcher in ("python", "scripts/train_sd15.sh"):
        assert launched.returncode == 128 + SIGNALS[name]


def test_what_follows_a_signal_at_once_is_the_same_request(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in ending.SIGNALS}
    clock = iter([10.0, 11.0, 13.0])
    monkeypatch.setattr(ending.time, "monotonic", lambda: next(clock))
    raised = []
    monkeypatch.setattr(ending.signal, "raise_signal", raised.append)
    try:
        stop = ending.StopRequest()
        for _ in range(2):  # Ctrl-C, and what the launcher hands on
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT and raised == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert raised == [signal.SIGTERM]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# --- several processes ------------------------------------------------------------------------------------


def start_two(script, arguments, tmp_path):
    """Two processes, each of which says what it says in a file of its own."""
    return [fork(script, arguments, tmp_path / f"log{rank['RANK']}", **rank) for rank in ranks(2)]


FAILS = """
import os, sys, time
import train_xdpo
from xdpo import data, step
original = step.preference_loss
def measured(*arguments):
    if os.environ["RANK"] == "1":
        raise data.DataError("row 7 is no pair")
    time.sleep(3600)  # busy with something long, in no collective
step.preference_loss = measured
sys.exit(train_xdpo.main(sys.argv[1:]))
"""


def test_an_error_in_one_process_ends_all_with_its_message(small_pipeline, small_pairs, tmp_path):
    arguments = command(small_pipeline, small_pairs, tmp_path / "run", "train.micro_batch_pairs=1")
    launched = start_two(FAILS, arguments, tmp_path)
    assert exit_codes(launched, 90) == [1, 1]
    said = [(tmp_path / f"log{rank}").read_text() for rank in range(2)]
    assert "error: row 7 is no pair" in said[1]
    assert "process 0 ends: process 1 failed: DataError: row 7 is no pair" in said[0]


DISAGREE = """
import os, sys
import torch.distributed as dist
from xdpo import files, processes, runs
files.LISTING_SECONDS = 1
dist.init_process_group("gloo")
processes.connect()
rank, case = dist.get_rank(), sys.argv[1]
folder = os.path.join(sys.argv[2], str(rank))
finished = {"the first resumes": rank == 0, "the second has more": rank == 1, "both": True}[case]
if finished:
    os.makedirs(f"{folder}/run/checkpoints/step_00000004")
    open(f"{folder}/run/checkpoints/step_00000004/progress.json", "w").close()
os.makedirs(folder, exist_ok=True)
os.chdir(folder)
from pathlib import Path
try:
    print("chose", runs.agree_on_checkpoint(Path("run")))
    processes.refuse_differences({"policy": f"weights {rank}"}, "Give every machine the same model")
except (runs.CheckpointError, ValueError) as error:
    print(error)
processes.disconnect()
"""


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("the first resumes", "process 1 on HOST: FOLDER/1/run"),
        ("the second has more", "finds no checkpoint in FOLDER/0/run, and 1 of 2 processes see something else"),
        ("both", "policy: weights 0 in process 0 on HOST, weights 1 in process 1 on HOST\nGive every machine the same"),
    ],
)
def test_processes_that_see_other_files_or_weights_are_refused_on_all_of_them(tmp_path, case, message):
    launched = start_two(DISAGREE, [case, str(tmp_path)], tmp_path)
    assert exit_codes(launched, 60) == [0, 0]
    message = message.replace("HOST", socket.gethostname()).replace("FOLDER", str(tmp_path))
    for rank in range(2):
        said = (tmp_path / f"log{rank}").read_text()
        assert message in said, said
        assert ("chose run/checkpoints/step_00000004" in said) == (case == "both")


SHARED_BUCKETS = """
import sys
import train_xdpo
from xdpo import models, step
make, measure, policies, places = models.make_policy, step.preference_loss, [], []
models.make_policy = lambda *given: policies.append(make(*given)) or policies[-1]
def looked_at(*given):  # in every micro-step, before its backward pass
    gradients = [weight.grad for weight in models.trainable_parameters(policies[0]) if weight.grad is not None]
    own = sum(gradient.untyped_storage().nbytes() == gradient.nbytes for gradient in gradients)
    places.append([gradient.data_ptr() for gradient in gradients])
    where = "as before" if places[-1] == places[0] else "elsewhere"
    count = f"{own} of {len(gradients)}"
    print(f"micro-step {len(places)}: {count} gradients have memory of their own, {where}", flush=True)
    return measure(*given)
step.preference_loss = looked_at
sys.exit(train_xdpo.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_gradients_lie_in_the_buckets_that_are_exchanged_from_the_first_pass_on(small_pipeline, small_pairs, tmp_path):
    """Otherwise they are there twice, 3.4 GB of Stable Diffusion 1.5's; a bucket that DDP left behind counts too."""
    options = ("train.micro_batch_pairs=1", "train.max_steps=3", "train.total_batch_pairs=8")  # 4 micro-steps a step
    launched = start_two(SHARED_BUCKETS, command(small_pipeline, small_pairs, tmp_path / "run", *options), tmp_path)
    assert exit_codes(launched, 120) == [0, 0], (tmp_path / "log0").read_text()[-3000:]
    said = (tmp_path / "log0").read_text()
    for number in range(1, 13):
        assert f"micro-step {number}: 0 of 208 gradients have memory of their own, as before" in said, said
