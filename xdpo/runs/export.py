"""Exports the trained model in the form that other software loads: diffusers format or LoRA weights, with a card."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from xdpo.config import Config, dump_config
from xdpo.families import Family, PipelineParts
from xdpo.files import replacing_folder
from xdpo.runs.checkpoints import trainable_weights
from xdpo.runs.formats import write_model

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


def export_model(
    folder: Path,
    policy: nn.Module,
    parts: PipelineParts,
    settings: Config,
    *,
    is_main: bool,
    unwrap: Callable,
    ema: "EMAModel | None" = None,
) -> Path:
    """Write output_dir/export: the denoiser in diffusers format, in a folder named as in the pipeline, or LoRA weights
    for `load_lora_weights`; the other forms that the config asks for; a model card.

    ema: its weights are exported instead of the policy's. Every process calls it; only the first one writes.
    Raises StorageError where it can't be written.
    """
    final = folder / "export"
    if not is_main:
        return final
    denoiser, family = unwrap(policy), parts.family
    weights = {name: weight.detach().cpu() for name, weight in trainable_weights(denoiser).items()}
    if ema is not None:
        names = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
        weights = {**weights, **{n: p.detach().cpu() for n, p in zip(names, ema.shadow_params, strict=True)}}
    with replacing_folder(final) as aside:
        encoders = {part: module for part, module in parts.modules.items() if part != family.denoiser}
        write_model(aside, settings.export.formats, folder.resolve().name, family, denoiser, encoders, weights)
        (aside / "README.md").write_text(model_card(settings, family), encoding="utf-8")
    return final


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
