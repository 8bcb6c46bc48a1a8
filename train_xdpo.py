"""Align a text-to-image model to preference pairs, with xDPO or another objective of docs/objectives.md.

    accelerate launch train_xdpo.py --config configs/xdpo_sd15.yaml [section.key=value …]
    python train_xdpo.py --config configs/tiny/xdpo.yaml          (the embedded default, minutes on a CPU)

The same command resumes a run that was stopped or killed.
"""

import importlib.util
import os
import signal
import sys

from xdpo import config
from xdpo.config import Config


def main(arguments: list[str] | None = None) -> int:
    """Parse, check what needs no library, then train. Returns the exit status."""
    options = config.build_parser(__doc__).parse_intermixed_args(arguments)
    try:
        settings = config.load_config(options.config, options.overrides)
        check_optional_packages(settings)
        if options.dry_run:
            rank, num_processes = launched_as()
            plan = config.dump_config(settings) + "\n" + config.describe(settings, num_processes)
            if rank == 0:
                print(plan)
            return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    from xdpo import training  # not before: with PyTorch and diffusers it takes seconds

    return training.main(settings, options)


def launched_as() -> tuple[int, int]:
    """Number of this process and how many there are, as launchers tell it to their processes; alone without one."""
    for names in (("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")):
        rank, count = map(os.environ.get, names)
        if rank and count:
            return int(rank), int(count)
    return 0, 1


def check_optional_packages(settings: Config) -> None:
    """Refuse a config that asks for a package that isn't installed: ValueError naming the key and the package."""
    wanted: dict[str, str] = {f"log.trackers: {name}": name for name in settings.log.trackers}
    if settings.optim.name == "adamw8bit":
        wanted["optim.name: adamw8bit"] = "bitsandbytes"
    for key, package in wanted.items():
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{key} needs {package}, which is not installed; pip install {package}")


if __name__ == "__main__":
    sys.exit(main())
