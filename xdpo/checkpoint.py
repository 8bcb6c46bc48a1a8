"""The run folder: who it belongs to, checkpoints that survive a kill at any moment, and the exported model.

```
output_dir/
  config.yaml          the resolved config          run.json        versions, commit, data counts, starts
  metrics.jsonl        one line per optimizer step  samples/        policy beside reference
  checkpoints/step_00000200/    policy, optimizer and EMA as safetensors, progress.json
  export/              the result: a UNet in diffusers format or LoRA weights, with a model card
  snapshots/  self_play/          of SePPO alone: earlier policies, and what they sampled for the round
  lock                 held by the process that writes here
```

A checkpoint is written aside, flushed, renamed, and only then are old ones removed. All randomness is a function
of (seed, position), so the step number is the only progress there is to keep.
"""

import glob
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xdpo import optimizer_state, processes
from xdpo.config import Config, changed_keys, dump_config, load_config
from xdpo.files import (
    PART,
    STALE_SECONDS,
    appears,
    aside_of,
    check_writable,
    flush,
    is_untouched,
    storage_fault,
    sweep,
    write_text,
    writing,
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what is intact and what to do."""


# --- the run folder ------------------------------------------------------------------------------------


def check_run_folder(folder: Path, config: Config, allow_config_change: bool) -> None:
    """Refuse a folder that holds something else, another run, or that can't be written to. Writes nothing.

    Raises ValueError naming the keys in which an earlier run's config differs.
    """
    check_writable(folder, "output_dir")
    if is_untouched(folder):
        return
    saved = folder / "config.yaml"
    if not saved.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        raise ValueError(f"output_dir: {folder} holds something that is not a run ({found}); choose another folder")
    changes = changed_keys(load_config(saved), config)
    if changes and not allow_config_change:
        raise ValueError(
            f"output_dir: {folder} holds a run with another config:\n  "
            + "\n  ".join(changes)
            + "\nChoose another output_dir, or continue it under the new config with --allow-config-change"
        )


def check_pairs(folder: Path, fingerprint: str, allow_change: bool, say: Callable[[str], None]) -> None:
    """Refuse to go on with other pairs than a run's. Raises ValueError; where a change is allowed, says so instead.

    fingerprint: of the training pairs. A run from before it was kept passes.
    """
    before = _read_record(folder / "run.json").get("pairs_fingerprint")
    if before in (None, fingerprint):
        return
    change = f"the data have changed: the training pairs are not those that the run in {folder} began with"
    if not allow_change:
        raise ValueError(
            f"output_dir: {change}; at each position of its order there would be another pair. Put the data back, "
            "choose another output_dir, or go on all the same with --allow-config-change"
        )
    say(f"note: {change}; going on in the order of the new ones")


def describe_run(folder: Path, config: Config, **facts: object) -> str:
    """Write config.yaml and run.json: what ran here, with what, started when; facts are added as given.

    Returns the run's identifier, the same at every start.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", dump_config(config))
    path = folder / "run.json"
    before = _read_record(path)
    start = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv}
    identifier = before.get("id") or uuid.uuid4().hex[:12]
    record = {
        "id": identifier,
        "starts": [*before.get("starts", []), start],
        "versions": library_versions(),
        "git_commit": git_commit(),
        **facts,
    }
    write_text(path, json.dumps(record, indent=2) + "\n")
    return identifier


def _read_record(path: Path) -> dict:
    """What run.json holds, nothing where there is none. Raises ValueError for a damaged one."""
    try:
        record = json.loads(path.read_bytes()) if path.is_file() else {}
        if not isinstance(record, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Put back a copy, or remove it: the run goes on, its earlier starts are "
            "forgotten, and whether its pairs are still the same is not checked"
        ) from None
    return record


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "accelerate", "datasets", "peft", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_commit() -> str | None:
    """The commit this code is at, with "+changes" where the tree differs from it; None outside a git checkout."""

    def git(*words: str) -> str:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# --- checkpoints ---------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted((folder / "checkpoints").glob("step_????????"))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where a run keeps, or kept, its checkpoint of an optimizer step."""
    return folder / "checkpoints" / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """How many optimizer steps a checkpoint has behind it."""
    return int(path.name.removeprefix("step_"))


def agree_on_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that every process resumes from: the newest that the first process sees; None for a new run.

    Every process calls it. Raises CheckpointError, on all of them, where one can't see it: a run folder is on storage
    that all machines share.
    """
    finished = checkpoints(folder)
    newest = processes.agree(finished[-1].name if finished else None)
    chosen = folder / "checkpoints" / newest if newest else None
    sees_it = not finished if chosen is None else processes.rank() == 0 or appears(chosen)
    found = processes.gather((socket.gethostname(), str(folder.absolute()), sees_it))
    strangers = [f"process {rank} on {host}: {path}" for rank, (host, path, sees) in enumerate(found) if not sees]
    if strangers:
        raise CheckpointError(
            f"process 0 on {found[0][0]} "
            + (
                f"resumes from {found[0][1]}/checkpoints/{newest}"
                if newest
                else f"finds no checkpoint in {found[0][1]}"
            )
            + f", and {len(strangers)} of {len(found)} processes see something else there:\n  "
            + "\n  ".join(strangers[:8])
            + "\nPut output_dir on storage that all machines share, under the same path, and run the same command again"
        )
    return chosen


def weights_checksum(module: nn.Module) -> str:
    """16 hexadecimal digits over the bits of a module's float32 weights, made on their device."""
    sums = [weight.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for weight in module.parameters()]
    return hashlib.sha256(torch.stack(sums).cpu().numpy().tobytes()).hexdigest()[:16]


def trainable_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that training changes, by name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def save_checkpoint(
    folder: Path,
    step: int,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    is_main: bool,
    keep: int,
    ema: object | None = None,
    reference: nn.Module | None = None,
    extra: dict | None = None,
) -> Path:
    """Save the state after `step` optimizer steps and rotate older checkpoints; only the first process writes.

    policy: outside its distributed wrapper; reference where it moves. `extra` is small JSON (the gradient scaler's
    state). Raises CheckpointError when the disk is full or not writable; earlier checkpoints are then intact.
    """
    final = checkpoint_path(folder, step)
    if final.exists() or not is_main:
        return final
    weights = trainable_weights(policy)
    tensors: dict[str, Mapping[str, Tensor]] = {"policy": weights}
    if ema is not None:
        tensors["ema"] = _shadow(ema)
    if reference is not None:
        tensors["reference"] = reference.state_dict()
    # A run has one writer. What it left aside when it was killed goes first: those gigabytes may be what is missing.
    sweep(final.parent, f"step_*{PART}")
    with writing_aside(final) as aside:
        for name, content in tensors.items():
            on_cpu = {key: value.detach().cpu().contiguous() for key, value in content.items()}
            save_file(on_cpu, aside / f"{name}.safetensors")
            del on_cpu  # before the next one: each is gigabytes
        optimizer_state.save(_bare(optimizer), weights, aside / "optimizer.safetensors")
        progress = {"step": step, "ema_step": getattr(ema, "optimization_step", None), "extra": extra or {}}
        (aside / "progress.json").write_text(json.dumps(progress) + "\n")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)  # what storage holds on to goes at the next rotation
    return final


def load_checkpoint(
    path: Path,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: object | None = None,
    reference: nn.Module | None = None,
) -> dict:
    """Restore what `save_checkpoint` wrote; returns progress: step and extra.

    Every process reads the file; the number of processes may differ from the one that saved. Tensors are copied one
    by one into those that are there, so that the device never holds anything twice. `optimizer` has made no step.
    Raises CheckpointError for a damaged checkpoint or one of another model.
    """
    try:
        progress = dict(json.loads((path / "progress.json").read_bytes()))
        if absent := {"step", "extra"} - progress.keys():
            raise KeyError(f"progress.json lacks {min(absent)}")
        weights = trainable_weights(policy)
        _copy_into(weights, path / "policy.safetensors")
        optimizer_state.load(_bare(optimizer), weights, path / "optimizer.safetensors")
        if ema is not None:
            _copy_into(_shadow(ema), path / "ema.safetensors")
            ema.optimization_step = progress["ema_step"]
        if reference is not None:
            _copy_into(reference.state_dict(), path / "reference.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        others = ", ".join(other.name for other in sorted(path.parent.glob("step_????????")) if other != path)
        cause = _os_error(error)
        if cause is not None:
            raise CheckpointError(f"can't read the checkpoint {path}: {storage_fault(cause, path)}") from error
        raise CheckpointError(
            f"can't read the checkpoint {path}: {error}. Remove that folder and run the same command again; "
            f"left to resume from: {others or 'none, the run would start anew'}"
        ) from error
    return progress


@torch.no_grad()
def _copy_into(targets: Mapping[str, Tensor], path: Path) -> None:
    with safe_open(path, "pt") as file:
        odd = sorted(set(file.keys()) ^ targets.keys())
        if odd:
            raise CheckpointError(
                f"{path} holds another model: {len(odd)} parameters differ, {odd[0]!r} first. "
                "Was model.trainable or model.pipeline changed?"
            )
        for name, target in targets.items():
            found = file.get_tensor(name)
            if found.shape != target.shape:
                raise CheckpointError(
                    f"{path} holds another model: {name} is {tuple(found.shape)} there and {tuple(target.shape)} here. "
                    "Was model.lora_rank or model.pipeline changed?"
                )
            target.copy_(found)


def _shadow(ema: object) -> dict[str, Tensor]:
    return {str(index): tensor for index, tensor in enumerate(ema.shadow_params)}


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper


@contextmanager
def writing_aside(final: Path) -> Iterator[Path]:
    """A folder to write into that becomes `final` once all of it is on the disk; removed again if writing fails."""
    aside = aside_of(final)
    try:
        sweep(final.parent, f"{glob.escape(final.name)}.*{PART}", older_than=STALE_SECONDS)
        aside.mkdir(parents=True)
        yield aside
        _give_usual_modes(aside)
        for path in [*aside.rglob("*"), aside]:
            flush(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        flush(final.parent)
    except (OSError, SafetensorError) as error:
        cause = _os_error(error)
        fault = str(error) if cause is None else storage_fault(cause, final)
        raise CheckpointError(f"could not write {final}: {fault}; what was saved before is intact") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _give_usual_modes(folder: Path) -> None:
    """Files as the umask has them: safetensors writes them for their owner alone."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(folder.stat().st_mode & 0o666)


def _os_error(error: Exception) -> OSError | None:
    """The system's error behind an exception; safetensors has it as text alone ("… Os { code: 28, …")."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return error
    found = re.search(r"os error (\d+)|code: (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    return OSError(int(found[1] or found[2]), os.strerror(int(found[1] or found[2]))) if found else None


# --- the result ----------------------------------------------------------------------------------------


def export_model(
    folder: Path, policy: nn.Module, config: Config, *, is_main: bool, unwrap: Callable, ema: object | None = None
) -> Path:
    """Write output_dir/export: `unet/` in diffusers format, or LoRA weights for `load_lora_weights`; a model card.

    The EMA weights are exported where the config keeps them. Every process calls it.
    """
    final = folder / "export"
    if not is_main:
        return final
    unet = unwrap(policy)
    weights = {name: weight.detach().cpu() for name, weight in trainable_weights(unet).items()}
    if ema is not None:
        names = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
        weights = {**weights, **{n: p.detach().cpu() for n, p in zip(names, ema.shadow_params, strict=True)}}
    with writing_aside(final) as aside:
        if config.model.trainable == "lora":
            from diffusers import StableDiffusionPipeline
            from diffusers.utils import convert_state_dict_to_diffusers
            from peft import get_peft_model_state_dict

            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, state_dict=weights))
            adapter = unet.peft_config["default"].to_dict()  # without it a loader takes alpha for the rank
            adapter["target_modules"] = sorted(adapter["target_modules"])  # it is a set
            StableDiffusionPipeline.save_lora_weights(
                aside, unet_lora_layers=layers, unet_lora_adapter_metadata=adapter
            )
        else:
            with torch.device("meta"):
                exported = type(unet).from_config(unet.config)
            exported.load_state_dict(weights, assign=True)
            exported.save_pretrained(aside / "unet")
        for path in aside.rglob("*.safetensors"):
            sort_metadata(path)
        (aside / "README.md").write_text(model_card(config), encoding="utf-8")
    return final


def sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in order, in place: its writer leaves them in another one in each file.

    Models are named by their files' checksums, so equal models are to be equal files.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(ordered) <= length, "safetensors writes compact JSON, filled up with spaces"
        file.seek(8)
        file.write(ordered.ljust(length))


def model_card(config: Config) -> str:
    """A model card: what was trained on what, with which loss, and how to load it."""
    from huggingface_hub import ModelCardData

    base, loss = config.model.pipeline, config.loss
    card = ModelCardData(base_model=base, tags=["text-to-image", "diffusers", "preference-alignment", loss.name])
    if config.model.trainable == "lora":
        load = f'pipeline = StableDiffusionPipeline.from_pretrained("{base}")\npipeline.load_lora_weights("export")'
    else:
        load = (
            'unet = UNet2DConditionModel.from_pretrained("export", subfolder="unet")\n'
            f'pipeline = StableDiffusionPipeline.from_pretrained("{base}", unet=unet)'
        )
    symbols = {"beta": "β", "eta": "η", "gamma": "γ"}
    numbers = "".join(
        f", {symbols.get(key, key)} = {f'{value:g}' if isinstance(value, float) else value}"
        for key, value in loss.numbers.items()
    )
    method = ""
    if loss.name == "xdpo":
        method = (
            ' The method is xDPO (Zhang & Xiang,\n"Diffusion Preference Alignment via Attenuated Kullback–Leibler '
            'Regularization", Electronics 14:2939, 2025).'
        )
    return f"""---
{card.to_yaml()}
---

# {base} aligned to preferences with {loss.name}

Trained on preference pairs ({config.data.source}: {config.data.path}), objective `{loss.name}`{numbers}.{method}

```python
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

{load}
image = pipeline("a prompt").images[0]
```

The licence of the base model applies. The full config:

```yaml
{dump_config(config)}```
"""
