"""Exports the trained model in the form that other software loads: diffusers format or LoRA weights, with a card."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from xdpo.config import Config
from xdpo.families import PipelineParts
from xdpo.files import replacing_folder
from xdpo.runs.card import model_card
from xdpo.runs.checkpoints import trainable_weights
from xdpo.runs.formats import write_model

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

SHEET = "samples.png"  # beside the card


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
    for `load_lora_weights`; the other forms that the config asks for; a model card, and the newest sample sheet for it.

    ema: its weights are exported instead of the policy's. Every process calls it; only the first one writes.
    Raises StorageError where it can't be written.
    """
    final = folder / "export"
    if not is_main:
        return final
    denoiser, family = unwrap(policy), parts.family
    weights: dict[str, Tensor] = {**trainable_weights(denoiser)}
    if ema is not None:
        names = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
        weights |= dict(zip(names, ema.shadow_params, strict=True))
    weights = {name: weight.detach().cpu() for name, weight in weights.items()}
    with replacing_folder(final) as aside:
        encoders = {part: module for part, module in parts.modules.items() if part != family.denoiser}
        write_model(aside, settings.export.formats, folder.resolve().name, family, denoiser, encoders, weights)
        sheets = sample_sheets(folder)
        if sheets:
            shutil.copyfile(sheets[-1], aside / SHEET)
        card = model_card(settings, family, folder, sheet=SHEET if sheets else None)
        (aside / "README.md").write_text(card, encoding="utf-8")
    return final


def sample_sheets(folder: Path) -> list[Path]:
    """A run's sheets of sample images, the oldest first."""
    return sorted((folder / "samples").glob("step_*.png"))
