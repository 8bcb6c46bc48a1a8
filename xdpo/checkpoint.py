"""The run folder: who it belongs to, checkpoints that survive a kill at any moment, and the exported model.

```
output_dir/
  config.yaml          the resolved config          run.json        versions, commit, data counts, starts
  metrics.jsonl        one line per optimizer step  samples/        policy beside reference
  checkpoints/step_00000200/    policy, optimizer and EMA as safetensors, progress.json
  export/              the result: a UNet in diffusers format or LoRA weights, with a model card
```

A checkpoint is written aside, flushed, renamed, and only then are old ones removed. All randomness is a function
of (seed, position), so the step number is the only progress there is to keep.
"""

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from xdpo.config import Config, changed_keys, dump_config, load_config

_SEPARATOR = "::"  # between a parameter's name and its optimizer state, in optimizer.safetensors
_TO_SAVE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)  # on the first process
_TO_LOAD = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)  # on every process


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what is intact and what to do."""


# --- the run folder ------------------------------------------------------------------------------------


def check_run_folder(folder: Path, config: Config, allow_config_change: bool) -> None:
    """Refuse a folder that holds something else, another run, or that can't be written to. Writes nothing.

    Raises ValueError naming the keys in which an earlier run's config differs.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir: no permission to write in {existing}; choose another folder")
    if not folder.exists() or not any(folder.iterdir()):
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


def describe_run(folder: Path, config: Config, **facts: object) -> None:
    """Write config.yaml and run.json: what ran here, with what, started when; facts are added as given."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", dump_config(config))
    path = folder / "run.json"
    starts = json.loads(path.read_text())["starts"] if path.is_file() else []
    starts.append({"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv})
    record = {"starts": starts, "versions": library_versions(), "git_commit": git_commit(), **facts}
    write_text(path, json.dumps(record, indent=2) + "\n")


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


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, never half of it."""
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


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
    """Save the state after `step` optimizer steps and rotate older checkpoints; every process calls it.

    policy and optimizer as accelerate prepared them; reference where it moves. `extra` is small JSON (the gradient
    scaler's state). Raises CheckpointError when the disk is full or not writable; earlier checkpoints are then intact.
    """
    final = checkpoint_path(folder, step)
    weights = get_model_state_dict(policy, options=_TO_SAVE)
    moments = get_optimizer_state_dict(policy, _bare(optimizer), options=_TO_SAVE)
    if is_main and not final.exists():
        tensors = {"policy": weights, "optimizer": _flatten(moments["state"])}
        if ema is not None:
            tensors["ema"] = {str(index): tensor for index, tensor in enumerate(ema.shadow_params)}
        if reference is not None:
            tensors["reference"] = reference.state_dict()
        with writing_aside(final) as aside:
            for name, content in tensors.items():
                save_file({key: value.contiguous() for key, value in content.items()}, aside / f"{name}.safetensors")
            progress = {"step": step, "ema_step": getattr(ema, "optimization_step", None), "extra": extra or {}}
            (aside / "progress.json").write_text(json.dumps(progress) + "\n")
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def load_checkpoint(
    path: Path,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: object | None = None,
    reference: nn.Module | None = None,
) -> dict:
    """Restore what `save_checkpoint` wrote into prepared objects; returns progress: step and extra.

    Every process reads the file; the number of processes may differ from the one that saved. Raises
    CheckpointError for a damaged checkpoint or one of another model.
    """
    try:
        progress = json.loads((path / "progress.json").read_text())
        weights = load_file(path / "policy.safetensors")
        moments = _unflatten(load_file(path / "optimizer.safetensors"))
        expected = get_model_state_dict(policy, options=_TO_LOAD)
        if expected.keys() != weights.keys():
            odd = sorted(expected.keys() ^ weights.keys())
            raise CheckpointError(
                f"{path} holds another model: {len(odd)} parameters differ, {odd[0]!r} first. "
                "Was model.trainable or model.pipeline changed?"
            )
        set_model_state_dict(policy, weights, options=_TO_LOAD)
        bare = _bare(optimizer)
        groups = get_optimizer_state_dict(policy, bare, options=_TO_LOAD)["param_groups"]
        set_optimizer_state_dict(policy, bare, {"state": moments, "param_groups": groups}, options=_TO_LOAD)
        if ema is not None:
            shadow = load_file(path / "ema.safetensors")
            for index, parameter in enumerate(ema.shadow_params):
                parameter.copy_(shadow[str(index)])
            ema.optimization_step = progress["ema_step"]
        if reference is not None:
            reference.load_state_dict(load_file(path / "reference.safetensors"))
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        others = ", ".join(other.name for other in sorted(path.parent.glob("step_????????")) if other != path)
        raise CheckpointError(
            f"can't read the checkpoint {path}: {error}. Remove that folder and run the same command again; "
            f"left to resume from: {others or 'none, the run would start anew'}"
        ) from error
    return progress


@contextmanager
def writing_aside(final: Path) -> Iterator[Path]:
    """A folder to write into that becomes `final` once all of it is on the disk; removed again if writing fails."""
    aside = final.with_name(final.name + ".part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for path in [*aside.rglob("*"), aside]:
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        _flush(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        free = shutil.disk_usage(final.parent if final.parent.exists() else ".").free / 1e9
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        raise CheckpointError(
            f"could not write {final}: {error}. "
            + (f"The disk is full ({free:.2f} GB free); make room" if full else "Check that the folder is writable")
            + " and run the same command again; what was saved before is intact"
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper


def _flatten(moments: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{parameter}{_SEPARATOR}{key}": torch.as_tensor(value)
        for parameter, state in moments.items()
        for key, value in state.items()
    }


def _unflatten(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        parameter, key = name.rsplit(_SEPARATOR, 1)
        moments.setdefault(parameter, {})[key] = value
    return moments


# --- the result ----------------------------------------------------------------------------------------


def export_model(
    folder: Path, policy: nn.Module, config: Config, *, is_main: bool, unwrap: Callable, ema: object | None = None
) -> Path:
    """Write output_dir/export: `unet/` in diffusers format, or LoRA weights for `load_lora_weights`; a model card.

    The EMA weights are exported where the config keeps them. Every process calls it.
    """
    final = folder / "export"
    weights = get_model_state_dict(policy, options=_TO_SAVE)
    if not is_main:
        return final
    unet = unwrap(policy)
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
            StableDiffusionPipeline.save_lora_weights(
                aside, unet_lora_layers=layers, unet_lora_adapter_metadata=adapter
            )
        else:
            with torch.device("meta"):
                exported = type(unet).from_config(unet.config)
            exported.load_state_dict(weights, assign=True)
            exported.save_pretrained(aside / "unet")
        (aside / "README.md").write_text(model_card(config), encoding="utf-8")
    return final


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
