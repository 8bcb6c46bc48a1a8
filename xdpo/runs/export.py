"""Exports the trained model in the form that other software loads: diffusers format or LoRA weights, with a card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from xdpo.config import Config, dump_config
from xdpo.files import replacing_folder
from xdpo.runs.checkpoints import trainable_weights

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


def export_model(
    folder: Path,
    policy: nn.Module,
    settings: Config,
    *,
    is_main: bool,
    unwrap: Callable,
    ema: "EMAModel | None" = None,
) -> Path:
    """Write output_dir/export: `unet/` in diffusers format, or LoRA weights for `load_lora_weights`; a model card.

    ema: its weights are exported instead of the policy's. Every process calls it; only the first one writes.
    Raises StorageError where it can't be written.
    """
    final = folder / "export"
    if not is_main:
        return final
    unet = unwrap(policy)
    weights = {name: weight.detach().cpu() for name, weight in trainable_weights(unet).items()}
    if ema is not None:
        names = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
        weights = {**weights, **{n: p.detach().cpu() for n, p in zip(names, ema.shadow_params, strict=True)}}
    with replacing_folder(final) as aside:
        if settings.model.trainable == "lora":
            from diffusers import StableDiffusionPipeline
            from diffusers.utils import convert_state_dict_to_diffusers
            from peft import get_peft_model_state_dict

            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, state_dict=weights))
            adapter = unet.peft_config["default"].to_dict()  # without it a loader uses the rank as alpha
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
        (aside / "README.md").write_text(model_card(settings), encoding="utf-8")
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


def model_card(settings: Config) -> str:
    """A model card: what was trained on what, with which loss, and how to load it."""
    from huggingface_hub import ModelCardData

    base, loss = settings.model.pipeline, settings.loss
    card = ModelCardData(base_model=base, tags=["text-to-image", "diffusers", "preference-alignment", loss.name])
    if settings.model.trainable == "lora":
        load = f'pipeline = StableDiffusionPipeline.from_pretrained("{base}")\npipeline.load_lora_weights("export")'
    else:
        load = (
            'unet = UNet2DConditionModel.from_pretrained("export", subfolder="unet")\n'
            f'pipeline = StableDiffusionPipeline.from_pretrained("{base}", unet=unet)'
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
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

{load}
image = pipeline("a prompt").images[0]
```

The licence of the base model applies. The full config:

```yaml
{dump_config(settings)}```
"""
