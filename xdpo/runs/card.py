"""The model card of an exported model: what was trained on what, with which loss, how it went, and how to load it."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from xdpo.config import Config, dump_config
from xdpo.families import Family
from xdpo.files import reading
from xdpo.runlog import HELD_OUT, read_rows

_OTHER = "other"  # the hub's word for a licence that it has no name for
_LICENCES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # of base models, as their own cards give them: the licence, and its name where the hub has none
        "stable-diffusion-v1-5/stable-diffusion-v1-5": ("creativeml-openrail-m", ""),
        "stabilityai/stable-diffusion-xl-base-1.0": ("openrail++", ""),
        "stabilityai/stable-diffusion-3-medium-diffusers": (_OTHER, "stabilityai-ai-community"),
        "stabilityai/stable-diffusion-3.5-medium": (_OTHER, "stabilityai-ai-community"),
        "stabilityai/stable-diffusion-3.5-large": (_OTHER, "stabilityai-ai-community"),
        "black-forest-labs/FLUX.1-dev": (_OTHER, "flux-1-dev-non-commercial-license"),
    }
)
_HELD_OUT_ROWS = {  # of the table: metric → what people call it, and its format
    "implicit_accuracy": ("pairs in the right order", ".1%"),
    "margin": ("margin", ".4g"),
    "d_chosen": ("d of chosen images", "+.4g"),
    "d_rejected": ("d of rejected images", "+.4g"),
}


def model_card(
    settings: Config, family: Family, folder: Path, *, location: str = "export", sheet: str | None = None
) -> str:
    """The card as Markdown with the hub's metadata.

    folder: the run's, whose record and metrics the card quotes as far as they are there.
    location: where the model will be loaded from, a folder or a hub id. sheet: a file of sample images, as the card
    names it.
    """
    base, loss = settings.model.pipeline, settings.loss
    symbols = {"beta": "β", "eta": "η", "gamma": "γ"}
    objective = f"`{loss.name}`" + "".join(
        f", {symbols.get(key, key)} = {f'{value:g}' if isinstance(value, float) else value}"
        for key, value in loss.hyperparameters.items()
    )
    method = f" The method is {loss.objective.citation}." if loss.objective.citation else ""
    parts = [
        f"---\n{_metadata(settings)}\n---",
        f"# {base} aligned to preferences with {loss.name}",
        f"Trained on preference pairs ({settings.data.source}: {settings.data.path}), objective {objective}.{method}",
        f"![Prompts and their images: the base model beside this one]({sheet})" if sheet else "",
        _loading(settings, family, location),
        _held_out(settings, folder),
        _training(folder),
        "The licence of the base model applies. The full config:",
        f"```yaml\n{dump_config(settings)}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(settings: Config) -> str:
    from huggingface_hub import ModelCardData

    base, is_adapter = settings.model.pipeline, settings.model.trainable == "lora"
    licence, name = _LICENCES.get(base, (_OTHER, "that-of-the-base-model"))
    facts: dict[str, object] = {"license": licence, "license_name": name or None}
    if _is_hub_id(base):
        facts |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
        facts["license_link"] = f"https://huggingface.co/{base}" if name else None
    if settings.data.source == "hub":
        facts["datasets"] = [settings.data.path] if isinstance(settings.data.path, str) else list(settings.data.path)
    tags = ["text-to-image", "diffusers", "preference-alignment", settings.loss.name, *(["lora"] if is_adapter else [])]
    return ModelCardData(tags=tags, pipeline_tag="text-to-image", library_name="diffusers", **facts).to_yaml()


def _is_hub_id(pipeline: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", pipeline)) and not Path(pipeline).exists()


def _loading(settings: Config, family: Family, location: str) -> str:
    base, pipeline_class, denoiser = settings.model.pipeline, family.pipeline_class, family.denoiser
    (denoiser_class,) = family.classes[denoiser]
    if settings.model.trainable == "lora":
        load = f'pipeline = {pipeline_class}.from_pretrained("{base}")\npipeline.load_lora_weights("{location}")'
    else:
        load = (
            f'{denoiser} = {denoiser_class}.from_pretrained("{location}", subfolder="{denoiser}")\n'
            f'pipeline = {pipeline_class}.from_pretrained("{base}", {denoiser}={denoiser})'
        )
    return (
        f"```python\nfrom diffusers import {pipeline_class}, {denoiser_class}\n\n{load}\n"
        'image = pipeline("a prompt").images[0]\n```'
    )


def _held_out(settings: Config, folder: Path) -> str:
    """The first and the last evaluation of held-out pairs as a table; nothing without one."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if f"{HELD_OUT}loss" in row]
    if not rows:
        return ""
    first, last = rows[0], rows[-1]
    lines = [f"| held-out pairs | step {first['step']:,} | step {last['step']:,} |", "|---|---|---|"]
    for metric, (title, form) in _HELD_OUT_ROWS.items():
        name = HELD_OUT + metric
        if name in last and name in first:
            lines.append(f"| {title} | {first[name]:{form}} | {last[name]:{form}} |")
    note = (
        f"Means over {settings.eval.draws} fixed draws of timestep and noise for each of at most "
        f"{settings.eval.pairs:,} pairs; d is the trained model's denoising error minus its reference's. They say "
        "nothing of sampled images."
    )
    return "\n".join([*lines, "", note])


def _training(folder: Path) -> str:
    """The command that began the training; nothing where the run has no record."""
    path = folder / "run.json"
    if not path.is_file():
        return ""
    with reading(path):
        starts = json.loads(path.read_bytes())["starts"]
    program, *arguments = starts[0]["command"]
    often = f", and was started {len(starts)} times in all" if len(starts) > 1 else ""
    command = shlex.join(["python", Path(program).name, *arguments])
    return f"The training began with this command{often}.\n\n```bash\n{command}\n```"
