"""Command-line arguments that several benchmarks share."""

import argparse

from benchmarks.pipelines import PIPELINES
from xdpo.arguments import positive


def add_number(parser: argparse.ArgumentParser, name: str, default: int, about: str) -> None:
    parser.add_argument(name, type=positive, default=default, help=f"{about} (default: {default})")


def add_pipeline(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--pipeline",
        default=default,
        help=f"{', '.join(PIPELINES)} (random weights), or a folder or hub id of a pipeline (default: {default})",
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", nargs="+", default=[], dest="overrides", metavar="section.key=value", help="of the training's config"
    )
