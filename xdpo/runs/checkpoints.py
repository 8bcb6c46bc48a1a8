"""Checkpoints that survive a kill at any moment, and resuming from them on any number of processes.

All randomness is a function of (seed, position), so besides tensors a checkpoint keeps the step number as its only
progress. A new checkpoint is on the disk before an old one is removed.
"""

import hashlib
import json
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xdpo import processes
from xdpo.files import PART, appears, replacing_folder, storage_fault, sweep, system_error
from xdpo.runs import optimizer_state

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


class CheckpointError(RuntimeError):
    """A checkpoint that can't be resumed from; the message describes it and names the remedy."""


def finished_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted((folder / "checkpoints").glob("step_????????"))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where a run keeps, or kept, its checkpoint of an optimizer step."""
    return folder / "checkpoints" / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The number of optimizer steps after which a checkpoint was saved."""
    return int(path.name.removeprefix("step_"))


def agree_on_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that every process resumes from: the newest that the first process sees; None for a new run.

    Every process calls it. A run folder is on storage that all machines share: raises CheckpointError, on every
    process, where one of them can't see that checkpoint.
    """
    finished = finished_checkpoints(folder)
    newest = processes.agree(finished[-1].name if finished else None)
    chosen = folder / "checkpoints" / newest if newest else None
    sees_it = not finished if chosen is None else processes.rank() == 0 or appears(chosen)
    views = processes.gather((socket.gethostname(), str(folder.absolute()), sees_it))
    strangers = [f"process {rank} on {host}: {path}" for rank, (host, path, sees) in enumerate(views) if not sees]
    if strangers:
        raise CheckpointError(
            f"process 0 on {views[0][0]} "
            + (
                f"resumes from {views[0][1]}/checkpoints/{newest}"
                if newest
                else f"finds no checkpoint in {views[0][1]}"
            )
            + f", and {len(strangers)} of {len(views)} processes see something else there:\n  "
            + "\n  ".join(strangers[:8])
            + "\nPut output_dir on storage that all machines share, under the same path, and run the same command again"
        )
    return chosen


def weights_checksum(module: nn.Module) -> str:
    """16 hexadecimal digits over the bits of a module's weights, made on their device."""
    bits = {4: torch.int32, 2: torch.int16}
    sums = [
        weight.detach().contiguous().view(bits[weight.element_size()]).sum(dtype=torch.int64)
        for weight in module.parameters()
    ]
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
    ema: "EMAModel | None" = None,
    reference: nn.Module | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Save the state after `step` optimizer steps and rotate older checkpoints; only the first process writes.

    policy: outside its distributed wrapper. reference: only where it changes. extra: small JSON (the gradient scaler's
    state). Raises StorageError when the disk is full or not writable; earlier checkpoints are then intact.
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
    # A run has one writer. Unfinished files of a killed one are removed first, because their gigabytes may be needed.
    sweep(final.parent, f"step_*{PART}")
    with replacing_folder(final) as aside:
        for name, content in tensors.items():
            on_cpu = {key: value.detach().cpu().contiguous() for key, value in content.items()}
            save_file(on_cpu, aside / f"{name}.safetensors")
            del on_cpu  # freed before the next copy is made: each takes gigabytes
        optimizer_state.save(_bare(optimizer), weights, aside / "optimizer.safetensors")
        progress = {"step": step, "ema_step": getattr(ema, "optimization_step", None), "extra": extra or {}}
        (aside / "progress.json").write_text(json.dumps(progress) + "\n")
    for old in finished_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)  # files that storage still holds are removed at the next rotation
    return final


def load_checkpoint(
    path: Path,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: "EMAModel | None" = None,
    reference: nn.Module | None = None,
) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote; returns progress: step and extra.

    Every process reads the files; the number of processes may differ from when they were saved. Tensors are copied one
    by one into the existing ones, so that the device never holds two copies. `optimizer` must not have made a step.
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
        cause = system_error(error)
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
            saved = file.get_tensor(name)
            if saved.shape != target.shape:
                raise CheckpointError(
                    f"{path} holds another model: {name} is {tuple(saved.shape)} there and {tuple(target.shape)} here. "
                    "Was model.lora_rank or model.pipeline changed?"
                )
            target.copy_(saved)


def _shadow(ema: "EMAModel") -> dict[str, Tensor]:
    return {str(index): tensor for index, tensor in enumerate(ema.shadow_params)}


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
