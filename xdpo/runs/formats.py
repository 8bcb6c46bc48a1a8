"""A trained model, or its adapter, in the forms in which others load it: see export.formats.

```
diffusers         unet/ …, or pytorch_lora_weights.safetensors
diffusers_fp16    the same in fp16/
single_file       single_file/NAME.safetensors: the whole checkpoint, or the adapter in kohya's names
unet              single_file/NAME_unet.safetensors
```
"""

import json
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from xdpo.families import Family
from xdpo.families.single_file import kohya

if TYPE_CHECKING:
    from diffusers import ModelMixin

HALF = "_fp16"


def write_model(
    folder: Path,
    formats: Collection[str],
    name: str,
    family: Family,
    denoiser: "ModelMixin",
    encoders: Mapping[str, nn.Module],
    trained: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a denoiser, or the adapter that it has, in each of these forms, checked by `families.check_formats`.

    name: of single files. encoders: the pipeline's other parts with weights; only a whole checkpoint needs them.
    trained: weights by their names in place of the denoiser's own.
    """
    if getattr(denoiser, "peft_config", None):
        writers = _of_adapter(name, family, denoiser, trained)
    else:
        writers = _of_whole(name, family, denoiser, encoders, trained or {})
    for form in formats:
        kind = form.removesuffix(HALF)
        convert = _halved if form.endswith(HALF) else _unchanged
        writers[kind](folder / "fp16" if form == f"diffusers{HALF}" else folder, form.removeprefix(kind), convert)
    for path in folder.rglob("*.safetensors"):
        sort_metadata(path)


Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
Writer = Callable[[Path, str, Convert], None]
"""(folder, ending of a file's name, conversion of the weights) → written."""


def _of_whole(
    name: str,
    family: Family,
    denoiser: "ModelMixin",
    encoders: Mapping[str, nn.Module],
    trained: Mapping[str, Tensor],
) -> dict[str, Writer]:
    # A checkpoint holds parameters alone, a model in diffusers' format its buffers too (positions, in SD 3).
    others = {key: value.cpu() for key, value in denoiser.state_dict().items() if key not in trained}
    weights = {**others, **trained}

    def diffusers(folder: Path, ending: str, convert: Convert) -> None:
        with torch.device("meta"):
            exported = type(denoiser).from_config(denoiser.config)
        exported.load_state_dict(convert(weights), assign=True)
        exported.save_pretrained(folder / family.denoiser)

    def original(folder: Path, file: str, convert: Convert, parts: Collection[str]) -> None:
        named = family.single_file[family.denoiser](weights, denoiser.config)
        for part in parts:
            named |= family.single_file[part](_on_cpu(encoders[part].state_dict()), encoders[part].config)
        _save(convert(named), folder / "single_file" / file)

    def unet(folder: Path, ending: str, convert: Convert) -> None:
        original(folder, f"{name}_unet{ending}.safetensors", convert, ())

    def single_file(folder: Path, ending: str, convert: Convert) -> None:
        original(folder, f"{name}{ending}.safetensors", convert, family.encoders)

    return {"diffusers": diffusers, "single_file": single_file, "unet": unet}


def _of_adapter(
    name: str, family: Family, denoiser: "ModelMixin", trained: Mapping[str, Tensor] | None
) -> dict[str, Writer]:
    from peft import get_peft_model_state_dict

    (adapter,) = denoiser.peft_config
    layers = get_peft_model_state_dict(denoiser, state_dict=trained, adapter_name=adapter)
    config = denoiser.peft_config[adapter].to_dict()  # without it a loader uses the rank as alpha
    config["target_modules"] = sorted(config["target_modules"])  # it is a set

    def diffusers(folder: Path, ending: str, convert: Convert) -> None:
        import diffusers

        named = {
            f"{family.denoiser}_lora_layers": family.lora_names(convert(layers)),
            f"{family.denoiser}_lora_adapter_metadata": config,
        }
        getattr(diffusers, family.pipeline_class).save_lora_weights(folder, **named)

    def single_file(folder: Path, ending: str, convert: Convert) -> None:
        assert family.kohyas_layer is not None, "check_formats refuses families whose names aren't known"
        named = kohya(layers, float(config["lora_alpha"]), partial(family.kohyas_layer, denoiser.config))
        _save(convert(named), folder / "single_file" / f"{name}{ending}.safetensors")

    return {"diffusers": diffusers, "single_file": single_file}


def _save(weights: Mapping[str, Tensor], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    contiguous = {key: value.contiguous() for key, value in weights.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu() for key, value in weights.items()}


def _unchanged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(weights)


def _halved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}


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
