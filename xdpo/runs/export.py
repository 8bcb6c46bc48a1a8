"""Exports the trained model in the form that other software loads: diffusers format or LoRA weights, with a card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from xdpo.config import Config, dump_config
from xdpo.families import Family
from xdpo.files import replacing_folder
from xdpo.runs.checkpoints import trainable_weights

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


def export_model(
    folder: Path,
    policy: nn.Module,
    family: Family,
    settings: Config,
    *,
    is_main: bool,
    unwrap: Callable,
    ema: "EMAModel | None" = None,
) -> Path:
    """Write output_dir/export: the denoiser in diffusers format, in a folder named as in the pipeline, or LoRA weights
    for `load_lora_weights`; a model card.

    ema: its weights are exported instead of the policy's. Every process calls it; only the first one writes.
    Raises StorageError where it can't be written.
    """
    final = folder / "export"
    if not is_main:
        return final
    denoiser = unwrap(policy)
    weights = {name: weight.detach().cpu() for name, weight in trainable_weights(denoiser).items()}
    if ema is not None:
        names = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
        weights = {**weights, **{n: p.detach().cpu() for n, p in zip(names, ema.shadow_params, strict=True)}}
    with replacing_folder(final) as aside:
        if settings.model.trainable == "lora":
            import diffusers
            from peft import get_peft_model_state_dict

            layers = family.lora_names(get_peft_model_state_dict(denoiser, state_dict=weights))
            adapter = denoiser.peft_config["default"].to_dict()  # without it a loader uses the rank as alpha
            adapter["target_modules"] = sorted(adapter["target_modules"])  # it is a set
            named = {f"{family.denoiser}_lora_layers": layers, f"{family.denoiser}_lora_adapter_metadata": adapter}
            getattr(diffusers, family.pipeline_class).save_lora_weights(aside, **named)
        else:
            with torch.device("meta"):
                exported = type(denoiser).from_config(denoiser.config)
            # A checkpoint holds parameters alone, a model in diffusers' format its buffers too (positions, in SD 3).
            buffers = {name: value.cpu() for name, value in denoiser.state_dict().items() if name not in weights}
            exported.load_state_dict({**buffers, **weights}, assign=True)
            exported.save_pretrained(aside / family.denoiser)
        for path in aside.rglob("*.safetensors"):
            sort_metadata(path)
        (aside / "README.md").write_text(model_card(settings, family), encoding="utf-8")
    return final


def sort_metadata(path: Path) -> None:
    """Sort a safetensors file's metadata in place, because safetensors writes them in a random order.

    Models are identified by their files' checksums, so equal models must give equal files.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(ordered) <= length, "safetensors writes compact JSON, filled up with spaces"
        file.seek(8)
        file.write(ordered.ljust(length))


def model_card(settings: Config, family: Family) -> str:
    """A model card: what was trained on what, with which loss, and how to load it."""
    from huggingface_hub import ModelCardData

    base, loss = settings.model.pipeline, settings.loss
    pipeline_class, denoiser = family.pipeline_class, family.denoiser
    (denoiser_class,) = family.classes[denoiser]
    card = ModelCardData(base_model=base, tags=["text-to-image", "diffusers", "preference-alignment", loss.name])
    if settings.model.trainable == "lora":
        load = f'pipeline = {pipeline_class}.from_pretrained("{base}")\npipeline.load_lora_weights("export")'
    else:
        load = (
            f'{denoiser} = {denoiser_class}.from_pretrained("export", subfolder="{denoiser}")\n'
            f'pipeline = {pipeline_class}.from_pretrained("{base}", {denoiser}={denoiser})'
        )
    symbols = {"beta": "β", "eta": "η", "gamma": "γ"}
    objective = f"`{loss.name}`" + "".join(
        f", {symbols.get(key, key)} = {f'{value:g}' if isinstance(value, float) else value}"
        for key, value in loss.hyperparameters.items()
    )
    method = f" The method is {loss.objective.citation}." if loss.objective.citation else ""
    return f"""---
{card.to_yaml()}
---

# {base} aligned to preferences with {loss.name}

Trained on preference pairs ({settings.data.source}: {settings.data.path}), objective {objective}.{method}

```python
from diffusers import {pipeline_class}, {denoiser_class}

{load}
image = pipeline("a prompt").images[0]
```

The licence of the base model applies. The full config:

```yaml
{dump_config(settings)}```
"""
