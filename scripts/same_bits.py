"""Checksums of what short runs in the embedded world write, to check that a change of the code changed no bit.

    python scripts/same_bits.py before.json                       before the change
    python scripts/same_bits.py after.json --compare before.json  after it: names every file that differs

It runs every kind of training, also resumed and on two processes, then generates and evaluates images. It takes minutes
on two cores. Times, memory, dates and commits are not compared. Checksums depend on the processor and on the number of
threads.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from xdpo.paths import user_path

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "train.max_steps=4",
    "train.total_batch_pairs=4",
    "train.micro_batch_pairs=2",
    "checkpoint.every=2",
    "optim.warmup_steps=0",
    "eval.every=2",
    "eval.pairs=4",
    "eval.draws=2",
    "samples.every=4",
    "samples.prompts=[a small red star on a white background]",
    "samples.num_inference_steps=2",
    "samples.guidance_scale=3",
    "self_play.every=2",
    "self_play.num_inference_steps=2",
    "self_play.batch_size=2",
    "log.trackers=[]",
    "loss.beta=100",
]
NOT_COMPARED = ("pairs_per_second", "peak_memory_gb", "data_wait_share")
CACHES = ["cache.examples={working}/examples", "cache.dtype=fp32"]
RUNS: Mapping[str, list[str]] = {
    "full": [],
    "lora": ["model.trainable=lora", "model.lora_rank=4"],
    "ema": ["model.ema_decay=0.9"],
    "moving reference": ["model.reference_decay=0.9"],
    "bf16, checkpointed, channels-last": [
        "compute.precision=bf16",
        "compute.gradient_checkpointing=true",
        "compute.channels_last=true",
    ],
    "v-prediction": ["model.pipeline={working}/v_prediction"],
    "safeguard": ["loss.safeguard=0.5"],
    "margin weights": ["loss.margin_weight=10", "data.path={working}/scored.parquet", "eval.every=0"],
    "min-snr, own noise": ["noise.weighting=min_snr", "noise.shared_by_pair=false"],
    "examples cached": CACHES,
    "reference recorded": ["cache.reference={working}/reference"],
    "reference known": ["cache.reference={working}/reference"],
    "both cached": [*CACHES, "cache.reference={working}/reference_cached"],
    "both known": [*CACHES, "cache.reference={working}/reference_cached"],
    "dspo": ["loss.name=dspo"],
    "mapo": ["loss.name=mapo"],
    "sft": ["loss.name=sft", "loss.beta=null"],
    "diffusion_kto": ["loss.name=diffusion_kto"],
    "diffusion_kto cached": ["loss.name=diffusion_kto", *CACHES],
    "seppo": ["loss.name=seppo"],
    "seppo cached": ["loss.name=seppo", *CACHES],
}


def main(arguments: list[str] | None = None) -> int:
    """Run everything, write the checksums, compare. Returns 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=user_path, help="JSON file for the checksums")
    parser.add_argument("--compare", type=user_path, metavar="FILE", help="checksums of before")
    parser.add_argument("--only", nargs="+", choices=[*RUNS, "resumed", "two processes", "images"], metavar="RUN")
    options = parser.parse_args(arguments)
    checksums = {}
    with tempfile.TemporaryDirectory() as folder:
        working = Path(folder)
        prepare(working)
        for name in options.only or [*RUNS, "resumed", "two processes", "images"]:
            checksums[name] = images(working) if name == "images" else training(working, name)
            print(f"{name}: {len(checksums[name])} files", flush=True)
    options.output.write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")
    if options.compare is None:
        return 0
    before = json.loads(options.compare.read_text(encoding="utf-8"))
    changed = 0
    for name, files in checksums.items():
        differing = [file for file in {**before[name], **files} if before[name].get(file) != files.get(file)]
        print(f"{name}: " + (f"DIFFER: {', '.join(differing)}" if differing else f"{len(files)} files are the same"))
        changed += bool(differing)
    return 1 if changed else 0


def prepare(working: Path) -> None:
    """Make what some runs need beside the embedded world: pairs with scores, and a pipeline that predicts v."""
    pairs = pq.read_table(ROOT / "assets/tiny/pairs/train.parquet")
    for side in (0, 1):
        scores = [(7 * number % 11 + 3 * side) / 10 for number in range(len(pairs))]
        pairs = pairs.append_column(f"score_{side}", pa.array(scores, pa.float64()))
    pq.write_table(pairs, working / "scored.parquet")
    shutil.copytree(ROOT / "assets/tiny/pipeline", working / "v_prediction")
    scheduler = working / "v_prediction" / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text(encoding="utf-8")) | {"prediction_type": "v_prediction"}
    scheduler.write_text(json.dumps(settings), encoding="utf-8")


def training(working: Path, name: str) -> dict[str, str]:
    """Checksums of a run's weights, moments, exported model, sample images and metrics."""
    folder = working / "runs" / name.replace(" ", "_")
    keys = [key.format(working=working) for key in RUNS.get(name, [])]
    command = ["train_xdpo.py", "--config", "configs/tiny/xdpo.yaml", *SMALL, f"output_dir={folder}", *keys]
    if name == "resumed":
        call(*command, "train.max_steps=2")
    if name == "two processes":
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command]
        command.append("train.micro_batch_pairs=1")
    call(*command)
    checksums = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".png"):
            checksums[str(path.relative_to(folder))] = checksum(path.read_bytes())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{key: value for key, value in sorted(row.items()) if key not in NOT_COMPARED} for row in rows]
    return checksums | {"metrics.jsonl": checksum(json.dumps(rows).encode())}


def images(working: Path) -> dict[str, str]:
    """Checksums of images of the base model and of a trained one, of their manifests, and of their evaluation."""
    training(working, "full")
    folder, checksums = working / "images", {}
    models = {"base": "assets/tiny/pipeline", "xdpo": str(working / "runs" / "full")}
    for name, model in models.items():
        call(
            *("generate.py", "--model", model, "--prompts", "tinyprompts", "--limit", "6", "--steps", "3"),
            *("--guidance", "3", "--batch-size", "4", "--output", str(folder / name)),
        )
    call(
        *("evaluate.py", "--images", str(folder / "base"), str(folder / "xdpo"), "--output", str(folder / "report")),
        *("--scorers", "tiny_reward,tiny_alignment", "--baseline", "base", "--workers", "0"),
    )
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "lock":
            checksums[str(path.relative_to(folder))] = checksum(without_what_varies(path))
    return checksums


def without_what_varies(path: Path) -> bytes:
    """A file's content; text files without paths, dates, times and commits."""
    if path.suffix not in (".json", ".jsonl", ".md", ".html", ".csv"):
        return path.read_bytes()
    text = path.read_text(encoding="utf-8")
    for pattern in (r"/[\w/.-]*/(?:images|runs)/", r"\d{4}-\d\d-\d\d[T ]?[\d:.+]*", r"\b[0-9a-f]{40}\b", r"[\d.]+ s\b"):
        text = re.sub(pattern, "", text)
    return text.encode()


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def call(*arguments: str) -> None:
    """Run one of the programs; print its output if it fails."""
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    finished = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)
    if finished.returncode:
        raise SystemExit(
            f"{' '.join(arguments)}\nended with {finished.returncode}:\n{finished.stdout}{finished.stderr}"
        )


if __name__ == "__main__":
    sys.exit(main())
