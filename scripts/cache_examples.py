"""Encode every distinct image and caption of a config's pairs once, into the folder `cache.examples`.

    accelerate launch scripts/cache_examples.py --config configs/xdpo_sd15.yaml cache.examples=cache/sd15 \\
        data.horizontal_flip=false data.sample_latents=false
    python scripts/cache_examples.py --config …  --verify      check all of it, and encode a sample again

It runs on any number of processes; the same command resumes after a kill. Files of a hub data set, or at URLs, are
fetched one by one, and let go when their images are encoded (cache.keep_source: kept). Training with the same settings
then needs neither encoders nor the data.
"""

import os
import sys
from typing import TYPE_CHECKING

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

from xdpo.config import Config, config_parser, load_config

if TYPE_CHECKING:
    from accelerate import Accelerator


def main(arguments: list[str] | None = None) -> int:
    """Build or verify. Returns the exit status."""
    parser = config_parser(__doc__)
    parser.add_argument("--verify", action="store_true", help="check a finished cache instead of building one")
    options = parser.parse_intermixed_args(arguments)
    try:
        settings = load_config(options.config, options.overrides)
        if not settings.cache.examples:
            raise ValueError("cache.examples is null; name the cache's folder: cache.examples=FOLDER")
        from xdpo import ending, families, precompute  # not before: with PyTorch and diffusers it takes seconds
        from xdpo.compute import build_accelerator

        families.check_config(settings)
        accelerator = build_accelerator(settings)
        with ending.together():
            if options.verify:
                verify(settings, accelerator)
            else:
                precompute.build_missing_examples(settings, accelerator, accelerator.print)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def verify(settings: Config, accelerator: "Accelerator") -> None:
    """Check every checksum and encode a sample again. Raises CacheError for damage."""
    from xdpo import families, precompute
    from xdpo.data import Split

    parts = families.load_parts(settings.model)
    for split in Split.of(settings):
        cache = precompute.open_examples(settings, accelerator, split)
        table = precompute.load_table(settings, accelerator, split, in_order=True)
        differences = precompute.verify_examples(cache, table, parts, settings, accelerator)
        shown = ", ".join(f"{difference:.2g} ({name})" for name, difference in differences.items())
        accelerator.print(
            f"{cache.folder}: every checksum holds; a sample encoded again differs by {shown} of its norm"
        )


if __name__ == "__main__":
    sys.exit(main())
