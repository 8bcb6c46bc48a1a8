"""The command line of a training: options, overrides, and a help that lists every key."""

import argparse

from xdpo.config.explain import help_of_keys


def config_parser(description: str) -> argparse.ArgumentParser:
    """`--config FILE [section.key=value …]`, for every program that works on the config of a training.

    Call its `parse_intermixed_args`, so that overrides may come before, between and after the options.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, such as configs/xdpo_sd15.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override a key; train_xdpo.py --help lists them"
    )
    return parser


def build_parser(description: str) -> argparse.ArgumentParser:
    """A `config_parser` with the switches of a training, and a help that lists every key."""
    parser = config_parser(description)
    parser.epilog = help_of_keys()
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and what follows from it, then stop"
    )
    parser.add_argument(
        "--find-batch",
        action="store_true",
        help="try micro-batches on this device, print speed, memory and accumulation of each, then stop",
    )
    parser.add_argument(
        "--allow-config-change",
        action="store_true",
        help="resume a run although its config has changed in keys that matter",
    )
    return parser
