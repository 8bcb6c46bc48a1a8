"""Checks a LoRA file against the model that it adapts: every weight must belong to a layer and fit its size."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import Tensor, nn

from xdpo.families import Family
from xdpo.families.checks import build_empty
from xdpo.families.pipeline_files import read_header

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

LORA_FILE = "pytorch_lora_weights.safetensors"
_KOHYA = re.compile(r"lora_(?P<part>[a-z]+\d?)_(?P<layer>[^.]+)\.(?P<half>lora_down\.weight|lora_up\.weight|alpha)")
_KOHYAS_PARTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
_DIFFUSERS = re.compile(
    r"(?P<part>unet|transformer|text_encoder(?:_\d)?)\."
    r"(?P<layer>.+?)(?:\.|_)lora(?:_linear_layer)?(?P<half>_A|_B|\.down|\.up)\.weight"
)
_LAYERS_OF_OLD = {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out": ".out_proj"}


@dataclass
class _Pair:
    """The two halves that adapt one layer: name → shape in the file, and the factor α where the file has one."""

    down: tuple[int, ...] = ()  # (rank, inputs, …)
    up: tuple[int, ...] = ()  # (outputs, rank, …)
    up_name: str = ""
    alpha: str | None = None
    names: list[str] = field(default_factory=list)


def check_lora(family: Family, file: Path, base: Path, label: str) -> None:
    """Refuse a LoRA file of another model, of which only a part fits this one, or that changes nothing.

    base: a folder with the configs of the pipeline to adapt, whose weights aren't read. Names are those of diffusers,
    of PEFT below `unet.`, `text_encoder.` and so on, or of kohya's scripts. Raises ValueError with counts and examples.
    """
    header = read_header(file)
    modules = {part: build_empty(family, base, part) for part in family.lora_parts}
    layers = {part: dict(module.named_modules()) for part, module in modules.items()}
    pairs, strange = _pairs(header, {part: _flat_names(family, part, module) for part, module in modules.items()})
    matched = sum(len(pair.names) for pair in pairs.values())
    if strange or not pairs:
        raise ValueError(
            f"{label}: {len(strange):,} of {len(header):,} weights in {file.name} have no place in the pipeline's "
            f"{' or '.join(family.lora_parts)}, {matched:,} have one: without a place are {', '.join(strange[:3])}"
            + (", …" if len(strange) > 3 else "")
            + f". {_guess(strange, family)}"
        )
    if problems := [problem for key, pair in pairs.items() for problem in _problems(key, pair, layers)]:
        raise ValueError(
            f"{label}: {len(problems):,} of {len(pairs):,} layers in {file.name} don't fit the pipeline: "
            f"{problems[0]}. It is a LoRA of another model, or damaged; take the pipeline that it was trained on"
        )
    with safe_open(file, "pt") as opened:
        factors = {pair.alpha: _number(opened.get_tensor(pair.alpha)) for pair in pairs.values() if pair.alpha}
        halves = [opened.get_tensor(pair.up_name) for pair in pairs.values()]
    if idle := [name for name, alpha in factors.items() if not (math.isfinite(alpha) and alpha > 0)]:
        raise ValueError(
            f"{label}: {len(idle):,} of {len(factors):,} factors in {file.name} are no positive numbers: {idle[0]} is "
            f"{factors[idle[0]]}. Those layers would change nothing; the file is damaged, save it again"
        )
    if odd := [half.dtype for half in halves if not half.is_floating_point()]:
        raise ValueError(f"{label}: the weights in {file.name} are of type {odd[0]}; save them as floats")
    if not any(half.any() for half in halves):
        raise ValueError(
            f"{label}: all {len(halves):,} layers in {file.name} add zero, as before the first step of a training: the "
            "images would be the base's. Take the LoRA that training left"
        )


def _number(alpha: Tensor) -> float:
    return float(alpha) if alpha.numel() == 1 else math.nan


def layers_adapted(file: Path) -> int:
    """How many layers a checked LoRA file adapts."""
    return sum(name.endswith(("lora_A.weight", "down.weight")) for name in read_header(file))


def _flat_names(family: Family, part: str, module: "ModelMixin | PreTrainedModel") -> dict[str, str]:
    """Every name of a layer in kohya's way, after diffusers' or the family's own names → the layer."""
    names = [name for name, _ in module.named_modules()]
    flat = {_flat(name): name for name in names}
    if part == family.denoiser and family.kohyas_layer is not None:
        flat |= {_flat(family.kohyas_layer(module.config, name)): name for name in names}
    return flat


def _pairs(
    header: Mapping[str, tuple[int, ...]], flat: Mapping[str, Mapping[str, str]]
) -> tuple[dict[tuple[str, str], _Pair], list[str]]:
    """A file's weights by (part, layer), and the names of those that belong to no layer."""
    pairs: dict[tuple[str, str], _Pair] = {}
    strange = []
    for name, shape in sorted(header.items()):
        match = _KOHYA.fullmatch(name) or _DIFFUSERS.fullmatch(name)
        if match is None:
            strange.append(name)
            continue
        part = _KOHYAS_PARTS.get(match["part"], match["part"])
        layer = flat[part].get(_flat(_modern(match["layer"], part))) if part in flat else None
        if layer is None:
            strange.append(name)
            continue
        pair = pairs.setdefault((part, layer), _Pair())
        pair.names.append(name)
        if match["half"] == "alpha":
            pair.alpha = name
        elif match["half"] in ("_A", ".down", "lora_down.weight"):
            pair.down = shape
        else:
            pair.up, pair.up_name = shape, name
    return pairs, strange


def _modern(layer: str, part: str) -> str:
    """A layer's name as the libraries have it now, from those of their older versions."""
    layer = layer.replace(".processor.", ".")
    if not part.startswith("text_encoder"):
        return f"{layer}.0" if layer.endswith(".to_out") else layer
    for old, new in _LAYERS_OF_OLD.items():
        layer = layer.removesuffix(old) + new if layer.endswith(old) else layer
    return layer


def _flat(layer: str) -> str:
    """A layer's name as kohya's scripts write it, to compare names of both kinds."""
    return layer.replace(".", "_").removeprefix("text_model_")


def _problems(key: tuple[str, str], pair: _Pair, layers: Mapping[str, Mapping[str, nn.Module]]) -> list[str]:
    """Problems of a pair: a missing half, two different ranks, or another width than the layer's."""
    part, layer = key
    name = f"{part}.{layer}"
    if not (pair.down and pair.up):
        return [f"{name} has {'no second' if pair.down else 'no first'} half"]
    if len(pair.down) < 2 or len(pair.up) < 2:
        return [f"{name} has halves of shapes {pair.down} and {pair.up}, which are no matrices"]
    if pair.down[0] != pair.up[1]:
        return [f"{name} has rank {pair.down[0]} in one half and {pair.up[1]} in the other"]
    weight = getattr(layers[part][layer], "weight", None)
    if weight is None or weight.ndim < 2:
        return [f"{name} is no layer with a matrix of weights"]
    fits = (pair.up[0], pair.down[1])
    if fits != tuple(weight.shape[:2]):
        outputs, inputs = weight.shape[:2]
        return [f"{name} is for {fits[1]} inputs and {fits[0]} outputs, the layer has {inputs} and {outputs}"]
    if pair.down[2:] != tuple(weight.shape[2:]) or set(pair.up[2:]) - {1}:
        return [f"{name} has halves of shapes {pair.down} and {pair.up}, the layer's weight has {tuple(weight.shape)}"]
    return []


def _guess(strange: list[str], family: Family) -> str:
    """Which kind of file probably has such names, and what to do."""
    first, denoiser = strange[0] if strange else "", family.denoiser
    save = f"save it with {family.pipeline_class}.save_lora_weights(folder, {denoiser}_lora_layers=…)"
    if not strange:
        return "It holds no weights at all"
    if first.startswith("base_model.model."):
        return f"It is in PEFT's own format; {save}"
    named = _KOHYA.fullmatch(first) or _DIFFUSERS.fullmatch(first)
    if named and _KOHYAS_PARTS.get(named["part"], named["part"]) not in family.lora_parts:
        return "It is a LoRA of another family of models, such as Stable Diffusion XL, 3 or FLUX"
    if any(mark in name for name in strange for mark in ("hada_", "lokr_", "oft_", "dora_scale", "magnitude_vector")):
        return "It is a LyCORIS or DoRA file (LoHa, LoKr, OFT, DoRA), and only plain LoRA is used here"
    if any(_DIFFUSERS.fullmatch(f"{denoiser}.{name}") for name in strange):
        prefixes = " or ".join(f'"{part}."' for part in family.lora_parts)
        return f"Their names lack the part that they adapt ({prefixes}); {save}"
    return "It is a LoRA of another model; take the pipeline that it was trained on"
