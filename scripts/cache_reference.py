"""Compute the reference's errors for a config ahead of its training, into the folder `cache.reference`.

    accelerate launch scripts/cache_reference.py --config configs/xdpo_sd15.yaml cache.reference=cache/reference

Every training with the same data, seed, noise and model then runs without the reference, whatever its loss. (A
training also records what it computes; this script records everything before the first one.) It runs on any number of
processes; the same command resumes after a kill.
"""

import os
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

from xdpo.config import config_parser, load_config


def main(arguments: list[str] | None = None) -> int:
    """Fill the cache for the whole run and its evaluations. Returns the exit status."""
    options = config_parser(__doc__).parse_intermixed_args(arguments)
    try:
        settings = load_config(options.config, options.overrides)
        if not settings.cache.reference:
            raise ValueError("cache.reference is null; name the cache's folder: cache.reference=FOLDER")
        from xdpo import ending, families, recording  # not before: with PyTorch and diffusers it takes seconds
        from xdpo.compute import build_accelerator

        families.check_config(settings)
        accelerator = build_accelerator(settings)
        with ending.together():
            recording.fill(settings, accelerator)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
