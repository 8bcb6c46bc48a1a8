"""Write a finished run, one of its checkpoints or any pipeline in forms that other programs load.

    python scripts/export.py runs/xdpo_sdxl --formats single_file_fp16 --output exported/xdpo_sdxl
    python scripts/export.py runs/xdpo_sd15_lora/checkpoints/step_00004000 --formats diffusers single_file --output …

ComfyUI, A1111 and Forge load the single files: a whole checkpoint or `unet` from models/checkpoints or models/unet, a
LoRA from models/loras or models/Lora.
"""

import argparse
import os
import sys
from typing import get_args

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

from xdpo.config import ExportConfig
from xdpo.paths import expanded, user_path

FORMATS = get_args(get_args(ExportConfig.model_fields["formats"].annotation)[0])


def main(arguments: list[str] | None = None) -> int:
    """Convert. Returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        export(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=expanded, help="a run's folder, a checkpoint, or what generate.py --model takes")
    parser.add_argument("--formats", nargs="+", required=True, choices=FORMATS, help="as the config's export.formats")
    parser.add_argument("--output", required=True, type=user_path, help="a new folder")
    parser.add_argument("--name", help="of single files; default: the model's")
    return parser


def export(options: argparse.Namespace) -> None:
    """Raises ValueError, before weights are loaded, for what can't be written."""
    from xdpo import families, models, runs
    from xdpo.files import replacing_folder

    if options.output.exists():
        raise ValueError(f"--output: {options.output} exists already; name a new folder")
    model = models.resolve_model(*models.read_model_spec(options.model))
    family = families.family_of_pipeline(model.base)
    is_adapter = model.kind == "lora" or (model.kind == "checkpoint" and model.base.trainable == "lora")
    families.check_formats(family, options.formats, is_adapter=is_adapter)
    pipeline = models.load_model(model)
    denoiser = getattr(pipeline, family.denoiser)
    encoders = {part: getattr(pipeline, part) for part in family.encoders}
    with replacing_folder(options.output) as aside:
        runs.write_model(aside, options.formats, options.name or model.name, family, denoiser, encoders)
    print(f"{model.name}: {', '.join(options.formats)} in {options.output}")


if __name__ == "__main__":
    sys.exit(main())
