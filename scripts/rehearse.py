"""Rehearse the real run on this machine: stop, kill and resume a training with tables of full size.

    python scripts/rehearse.py                  two processes, some minutes, 2 GB of disk
    python scripts/rehearse.py --processes 8    on a machine with eight GPUs
    python scripts/rehearse.py --launch 'accelerate launch --config_file mine.yaml' --processes 16     your own launcher

The embedded model is trained from an example cache with as many pairs, images, captions and shards as Pick-a-Pic v2's
at Stable Diffusion 1.5's size. The cache's records are small and random. Open files are limited to 256 a process. One
run is not interrupted. Another is stopped by SIGTERM to its launcher, resumed, killed with all its processes, and
finished as one process. Each check is printed as "holds" or "DOES NOT HOLD"; one that does not hold makes the exit
status 1.
"""

import argparse
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from xdpo import runs
from xdpo.cache import ExamplePlan
from xdpo.cache.examples import TABLES, finish, is_finished
from xdpo.config import Config, load_config
from xdpo.data import Split
from xdpo.files import file_sha256, replacing
from xdpo.paths import user_path
from xdpo.precompute import example_key, examples_folder
from xdpo.progress import Progress
from xdpo.runlog import read_rows

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "tiny" / "xdpo.yaml"
PAIRS = 851_293  # of Pick-a-Pic v2 without ties
# Distinct images: the rows of Diffusion-KTO's list of them (jacklishufan/pick-a-pick-kto-processed). Captions: those
# of Diffusion-DPO's paper.
IMAGES_A_PAIR, CAPTIONS_A_PAIR = 928_068 / 851_293, 58_960 / 851_293
RECORDS_A_SHARD = 1024  # of images, as at the true size: 128 MiB of both orientations, mean and deviation, in float16
LATENT_SHAPE, TEXT_SHAPE = (1, 1, 8, 8, 8), (32, 96)  # the embedded model's
OPEN_FILES = 256
LAUNCH_SECONDS = 300
ROUNDING = 1e-5  # relative distance of weights after some steps on another number of processes


def main(arguments: list[str] | None = None) -> int:
    """Rehearse. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="processes of the runs (default: 2)")
    parser.add_argument("--launch", type=shlex.split, metavar="COMMAND", help="what to put before train_xdpo.py")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"pairs in the tables (default: {PAIRS:,})")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps (default: 50)")
    parser.add_argument("--output", type=user_path, default=Path("runs/rehearsal"), help="everything goes here")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the config, such as compute.*")
    options = parser.parse_intermixed_args(arguments)
    if options.steps < 20:
        parser.error("--steps must be at least 20: the run is interrupted twice on the way")
    rehearsal = Rehearsal(options)
    try:
        rehearsal.go()
    except (ValueError, OSError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if rehearsal.all_hold else 1


class Rehearsal:
    """Two runs on one cache, and the checks of their results."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.output = options, options.output.absolute()
        self.every = options.steps // 10
        self.all_hold = True
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={options.processes}",
        ]
        self.launch = options.launch or launch

    def go(self) -> None:
        started = time.monotonic()
        settings = load_config(CONFIG, self._overrides("whole"))
        for split, pairs in ((Split.TRAIN, self.options.pairs), (Split.HELD_OUT, settings.eval.pairs)):
            make_cache(settings, pairs, split)
        for name in ("whole", "interrupted"):
            for folder in (name, f"{name}_reference"):
                shutil.rmtree(self.output / folder, ignore_errors=True)

        self._title("an uninterrupted run")
        whole = Training(self.launch, self._arguments("whole"), self.output / "whole")
        open_files = whole.wait_to_the_end()
        self._check("it ends with status 0", whole.status == 0, f"status {whole.status}")
        limit = OPEN_FILES
        self._check(
            f"it opens fewer than {limit} files in each process", 0 < open_files < limit, f"{open_files} at most"
        )

        self._title("the same run, asked to stop through its launcher")
        run = Training(self.launch, self._arguments("interrupted"), self.output / "interrupted")
        run.wait_for_step(self.options.steps // 4)
        run.process.send_signal(signal.SIGTERM)
        run.wait_to_the_end()
        stopped_at = run.steps_logged()
        saved = run.newest_checkpoint()
        self._check("it saves the step that it was in", saved == stopped_at < self.options.steps, f"step {saved}")
        self._check("none of its processes is left", not run.processes(), f"{len(run.processes())} left")

        self._title("resumed, and killed with all its processes")
        run = Training(self.launch, self._arguments("interrupted"), self.output / "interrupted")
        run.wait_for_step(stopped_at + self.every + 2)
        run.kill()
        killed_at, saved = run.steps_logged(), run.newest_checkpoint()
        self._check("it went on where it had stopped", killed_at > stopped_at, f"from step {stopped_at} to {killed_at}")
        common = [step for step in run.checkpoints() if step % self.every == 0 and step > stopped_at]
        equal = [same_bits(self._checkpoint("whole", step), self._checkpoint("interrupted", step)) for step in common]
        claim = "its weights and moments are the uninterrupted run's, to the bit"
        compared = ", ".join(map(str, common))
        self._check(claim, bool(equal) and all(equal), f"steps {compared}")

        self._title("resumed as one process")
        run = Training([sys.executable], self._arguments("interrupted"), self.output / "interrupted")
        run.wait_to_the_end()
        self._check("it ends with status 0", run.status == 0, f"status {run.status}")
        steps = [row["step"] for row in read_rows(run.folder / "metrics.jsonl") if "loss" in row]
        expected = list(range(1, self.options.steps + 1))
        self._check("every step is logged once", steps == expected, f"{len(steps)} rows")
        distance = relative_distance(*(self._checkpoint(name, self.options.steps) for name in ("whole", "interrupted")))
        claim = f"its weights are the uninterrupted run's, to rounding ({ROUNDING:g})"
        self._check(claim, distance < ROUNDING, f"{distance:.2g}")
        print(f"\n{time.monotonic() - started:.0f} s in all; runs and cache are in {self.output}")

    def _overrides(self, name: str) -> list[str]:
        total = 4 * self.options.processes
        settings = {
            "output_dir": self.output / name,
            "cache.examples": self.output / "cache",
            "cache.reference": self.output / f"{name}_reference",
            "compute.deterministic": "true",  # for GPUs, whose kernels else differ from run to run
            "data.sample_latents": "false",
            "data.num_workers": 2,
            "train.max_steps": self.options.steps,
            "train.total_batch_pairs": total,
            "train.micro_batch_pairs": 2,
            "optim.warmup_steps": 0,
            "eval.every": 2 * self.every,
            "samples.every": 0,
            "checkpoint.every": self.every,
            "checkpoint.keep": 1000,
            "log.trackers": "[]",
        }
        return [*(f"{key}={value}" for key, value in settings.items()), *self.options.overrides]

    def _arguments(self, name: str) -> list[str]:
        return [str(ROOT / "train_xdpo.py"), "--config", str(CONFIG), *self._overrides(name)]

    def _checkpoint(self, name: str, step: int) -> Path:
        return runs.checkpoint_path(self.output / name, step)

    def _title(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def _check(self, claim: str, holds: bool, evidence: str) -> None:
        self.all_hold = self.all_hold and holds
        print(f"  {'holds' if holds else 'DOES NOT HOLD'}: {claim} ({evidence})", flush=True)


class Training:
    """A launched training: its processes and its output so far."""

    def __init__(self, launch: list[str], arguments: list[str], folder: Path):
        self.folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.log = folder.parent / f"{folder.name}.log"
        self.process = subprocess.Popen(
            [*launch, *arguments],
            cwd=ROOT,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=limit_open_files,
        )
        self.status: int | None = None

    def wait_for_step(self, step: int) -> None:
        """Wait until this many optimizer steps are logged. Raises ValueError if the training ends or hangs before."""
        before, deadline = self.steps_logged(), time.monotonic() + LAUNCH_SECONDS
        while self.steps_logged() < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise ValueError(f"the training did not come from step {before} to {step}; see {self.log}")
            time.sleep(0.05)

    def wait_to_the_end(self) -> int:
        """Wait until the launcher has ended. Returns the most files that a process was seen to have open."""
        most, deadline = 0, time.monotonic() + LAUNCH_SECONDS
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise ValueError(f"the training did not end; see {self.log}")
            most = max([most, *(count_open_files(number) for number in self.processes())])
            time.sleep(0.2)
        self.status = self.process.returncode
        return most

    def kill(self) -> None:
        """Send SIGKILL to the launcher and every process of the run, as if the machine had failed."""
        for number in (self.process.pid, *self.processes()):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def processes(self) -> list[int]:
        """Process ids of the run on this machine: those with its folder in their command."""
        return [number for number, command in commands() if f"output_dir={self.folder}" in command]

    def steps_logged(self) -> int:
        rows = read_rows(self.folder / "metrics.jsonl")
        return max((row["step"] for row in rows if "loss" in row), default=0)

    def checkpoints(self) -> list[int]:
        return [runs.step_of(path) for path in runs.finished_checkpoints(self.folder)]

    def newest_checkpoint(self) -> int:
        return max(self.checkpoints(), default=0)


def make_cache(settings: Config, num_pairs: int, split: Split) -> None:
    """A finished example cache of random records in as many shards as the true one has."""
    folder = examples_folder(settings, split)
    if is_finished(folder) and pq.read_metadata(folder / "pairs.parquet").num_rows == num_pairs:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    num_images, num_captions = round(IMAGES_A_PAIR * num_pairs), max(1, round(CAPTIONS_A_PAIR * num_pairs))
    images, chosen = np.arange(num_images), rng.integers(num_images, size=num_pairs)
    captions = [str(number) for number in range(num_captions)]
    tables = {
        "pairs.parquet": {
            "row": np.arange(num_pairs),
            "pair_id": [str(number) for number in range(num_pairs)],
            "chosen_image": chosen,
            "rejected_image": (chosen + rng.integers(1, num_images, size=num_pairs)) % num_images,
            "prompt": rng.integers(num_captions, size=num_pairs),
        },
        "images.parquet": {"name": images, "row": images // 2, "side": images % 2},
        "prompts.parquet": {"caption": captions, "truncated": np.zeros(num_captions, bool)},
    }
    for name in TABLES:
        with replacing(folder / name, "wb") as file:
            pq.write_table(pa.table(tables[name]), file)
    counts = dict.fromkeys(("unlabelled", "without_caption", "identical", "ties", "beyond_max_pairs"), 0)
    plan = ExamplePlan(
        key=example_key(settings, split),
        fingerprint=f"rehearsal {num_pairs}",
        counts={"rows": num_pairs, **counts, "kept": num_pairs},
        num_pairs=num_pairs,
        num_images=num_images,
        num_prompts=num_captions,
        latent_shape=LATENT_SHAPE,
        conditioning_shapes={"text": TEXT_SHAPE},
        scaling_factor=1.0,
        dtype="float16",
        shard_bytes=RECORDS_A_SHARD * 2 * math.prod(LATENT_SHAPE),
        tables={name: file_sha256(folder / name) for name in TABLES},
    )
    plan.save(folder)
    for shards in plan.shards(folder):
        for shard in Progress(range(len(shards)), desc=f"{shards.name} of {num_pairs:,} pairs", unit="shard"):
            shape = (len(shards.records_of(shard)), *shards.shape)
            shards.write(shard, rng.standard_normal(shape, dtype=np.float32).astype(np.float16))
    finish(folder, plan)


def limit_open_files() -> None:
    """Limit the open files of the launched process: to the lowest limit of any system, a quarter of the usual one."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))


def commands() -> Iterator[tuple[int, list[str]]]:
    """Every process of this machine and its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield int(path.parent.name), path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended meanwhile
            continue


def count_open_files(process: int) -> int:
    try:
        return len(os.listdir(f"/proc/{process}/fd"))
    except OSError:  # it ended meanwhile
        return 0


def same_bits(one: Path, other: Path) -> bool:
    """Whether two checkpoints have equal weights and moments."""
    for name in ("policy", "optimizer"):
        first, second = (load_file(path / f"{name}.safetensors") for path in (one, other))
        if first.keys() != second.keys() or any(first[key].tobytes() != second[key].tobytes() for key in first):
            return False
    return True


def relative_distance(one: Path, other: Path) -> float:
    """Norm of the difference of two checkpoints' weights over the norm of the weights."""
    first, second = (load_file(path / "policy.safetensors") for path in (one, other))
    flat = [np.concatenate([weights[name].ravel().astype(np.float64) for name in first]) for weights in (first, second)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0]))


if __name__ == "__main__":
    sys.exit(main())
