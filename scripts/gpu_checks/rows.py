"""A row of the table: a claim, its check, and what the check found."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gpu_checks.context import Context


class Verdict(StrEnum):
    HOLDS = "holds"
    FAILS = "DOES NOT HOLD"
    IMPOSSIBLE = "not possible here"


class NotPossible(Exception):
    """A check can't be made on this machine; the message says what it lacks."""


@dataclass(frozen=True)
class Finding:
    """What a check found: the two numbers that it compared, and what to try where the claim does not hold.

    Where it isn't possible here, there are no numbers, and `remedy` says what is missing.
    """

    verdict: Verdict
    measured: str = ""
    expected: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Row:
    claim: str
    check: Callable[["Context"], Finding]


def at_most(measured: float, bound: float, remedy: str, *, judged: bool = True) -> Finding:
    return _compared(measured, f"at most {bound:.6g}", measured <= bound, remedy, judged)


def at_least(measured: float, bound: float, remedy: str, *, judged: bool = True) -> Finding:
    return _compared(measured, f"at least {bound:.6g}", measured >= bound, remedy, judged)


def near(measured: float, expected: float, tolerance: float, remedy: str, *, judged: bool = True) -> Finding:
    """tolerance: relative to the expected number."""
    holds = abs(measured - expected) <= tolerance * abs(expected)
    return _compared(measured, f"{expected:.6g} ± {tolerance:.0e} of it", holds, remedy, judged)


def equal(measured: object, expected: object, remedy: str) -> Finding:
    return Finding(_verdict(measured == expected), str(measured), str(expected), remedy)


def judge(row: Row, context: "Context") -> Finding:
    """Run a row's check. An exception in it is a finding too, so that the other rows go on."""
    try:
        return row.check(context)
    except NotPossible as error:
        return Finding(Verdict.IMPOSSIBLE, remedy=str(error))
    except torch.OutOfMemoryError as error:  # of a card that is too small; what shall fit has rows of its own
        return Finding(Verdict.IMPOSSIBLE, remedy=f"the card is too small: {str(error).splitlines()[0]}")
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        frame = traceback.extract_tb(error.__traceback__)[-1]
        remedy = f"mend the error, raised in {frame.filename}, line {frame.lineno}"
        return Finding(Verdict.FAILS, said[:1500], "no error", remedy)


def _compared(measured: float, expected: str, holds: bool, remedy: str, judged: bool) -> Finding:
    if not judged:
        expected, holds = (
            f"a number above 0 ({expected} at the true size on a GPU)",
            isfinite(measured) and measured > 0,
        )
    return Finding(_verdict(holds), f"{measured:.6g}", expected, remedy)


def _verdict(holds: bool) -> Verdict:
    return Verdict.HOLDS if holds else Verdict.FAILS
