"""Numbers on a command line."""

import argparse

import pytest

from xdpo.arguments import count, positive


def test_whole_numbers_are_taken():
    assert (count("0"), count("12"), positive("1")) == (0, 12, 1)


@pytest.mark.parametrize(
    "kind, least, wrong", [(count, 0, "-1"), (count, 0, "1.5"), (positive, 1, "0"), (positive, 1, "²")]
)
def test_anything_else_is_refused_with_what_is_wanted(kind, least, wrong):
    with pytest.raises(argparse.ArgumentTypeError, match=f"a whole number from {least}, got '{wrong}'"):
        kind(wrong)
