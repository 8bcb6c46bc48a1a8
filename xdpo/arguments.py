"""Types for command-line arguments that are numbers. For paths use `xdpo.paths.user_path`."""

import argparse


def count(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, least=0)


def positive(text: str) -> int:
    """A whole number from 1."""
    return _whole(text, least=1)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least}, got {text!r}")
    return int(text)
