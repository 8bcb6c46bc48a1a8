"""How images were made, as their manifests and settings.json say, and in what the models' images differ."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from xdpo.images.folder import SETTINGS
from xdpo.images.reading import Picture, Problem

UNKNOWN = "unknown"
AS_THE_PIPELINE = "as the pipeline"
_CHOICES = {"T5 tokens": "model.t5_tokens", "Autoencoder": "model.vae"}  # facts that are told where somebody chose one
MAY_DIFFER = ("Made by", "Revision", "Date")  # models are compared, whenever their images were made
_SAMPLING = {
    "Seed": "seed",
    "Steps": "num_inference_steps",
    "Guidance": "guidance_scale",
    "Scheduler": "scheduler",
    "Precision": "precision",
}


@dataclass(frozen=True)
class Making:
    """How a model's images of a prompt set were made. `facts` has the same keys for all; a value that no file says is
    UNKNOWN, and several values of one folder stand one after another."""

    model: str
    prompt_set: str
    facts: Mapping[str, str]


def makings_of(pictures: Iterable[Picture]) -> list[Making]:
    """A Making for each prompt set and model, models in the order in which they first occur.

    How many tokens T5 read of the prompts, and which other autoencoder decoded, are facts only where somebody chose it.
    """
    grouped: dict[tuple[str, str], list[Picture]] = defaultdict(list)
    for picture in pictures:
        grouped[picture.prompt_set, picture.model].append(picture)
    sets = dict.fromkeys(prompt_set for prompt_set, _ in grouped)
    facts = {key: _facts(group) for key, group in grouped.items()}
    for choice in _CHOICES:
        if all(each[choice] in (AS_THE_PIPELINE, UNKNOWN) for each in facts.values()):
            for each in facts.values():
                del each[choice]
    return [
        Making(model, prompt_set, each)
        for wanted in sets
        for (prompt_set, model), each in facts.items()
        if prompt_set == wanted
    ]


def differences(makings: Sequence[Making], besides: Sequence[str] = ()) -> list[Problem]:
    """A line for each prompt set whose images were not made alike by all models, in facts that are not in `besides`."""
    problems = []
    for prompt_set in dict.fromkeys(making.prompt_set for making in makings):
        named = []
        for fact in makings[0].facts:
            models: dict[str, list[str]] = defaultdict(list)
            for making in makings:
                if making.prompt_set == prompt_set:
                    models[making.facts[fact]].append(making.model)
            if fact not in (*MAY_DIFFER, *besides) and len(models) > 1:
                shown = "; ".join(f"{value}: {', '.join(names)}" for value, names in models.items())
                named.append(f"{fact.lower()} ({shown})")
        if named:
            problems.append(Problem("all models", prompt_set, f"images made with different {', '.join(named)}"))
    return problems


def _facts(pictures: Sequence[Picture]) -> dict[str, str]:
    first = pictures[0]
    saved = _read_settings(first.path.parents[len(Path(first.name).parts) - 1] / SETTINGS)
    sampling = {fact: _listed(p.settings.get(key) for p in pictures) for fact, key in _SAMPLING.items()}
    dates = saved["dates"]
    not_chosen = AS_THE_PIPELINE if saved["settings"] else UNKNOWN
    return {
        "Made by": _listed(picture.source for picture in pictures),
        "Revision": _listed(picture.revision for picture in pictures),
        **sampling,
        **{choice: str(saved["settings"].get(key) or not_chosen) for choice, key in _CHOICES.items()},
        "Size": _size(first.path),
        "File": _file_format(pictures, saved["settings"].get("file.quality")),
        "Images a prompt": str(max(Counter(picture.key for picture in pictures).values())),
        "Date": f"{dates[0]} to {dates[-1]}" if len(dates) > 1 else dates[0] if dates else UNKNOWN,
    }


def _listed(values: Iterable[Any]) -> str:
    """The different values, in their order."""
    distinct = dict.fromkeys(f"{value:g}" if isinstance(value, float) else value for value in values)
    return ", ".join(UNKNOWN if value is None else str(value) for value in distinct)


def _size(path: Path) -> str:
    """Width and height of an image from its header."""
    try:
        with Image.open(path) as image:
            return f"{image.width} × {image.height}"
    except Exception:  # Pillow's errors depend on the damage, which is reported where the image is scored
        return UNKNOWN


def _file_format(pictures: Sequence[Picture], quality: int | None) -> str:
    suffixes = dict.fromkeys(picture.path.suffix.lower().lstrip(".").replace("jpeg", "jpg") for picture in pictures)
    return ", ".join(f"{each}, quality {quality}" if each == "jpg" and quality else each for each in suffixes)


def _read_settings(path: Path) -> dict[str, Any]:
    """The settings of a settings.json and the days of its starts; empty without one of ours."""
    try:
        saved = json.loads(path.read_bytes())
        return {"settings": dict(saved["settings"]), "dates": sorted({start["time"][:10] for start in saved["starts"]})}
    except (OSError, ValueError, KeyError, TypeError):
        return {"settings": {}, "dates": []}
