"""What the two errors d say of a training, in plain language."""

from collections.abc import Mapping
from math import isfinite
from typing import Literal, NamedTuple

from xdpo.dashboard.series import Series
from xdpo.runlog import HELD_OUT

WORSE = 1e-3  # an error that is above the reference's by more than this share of it; less may be the pairs' choice
_LAST_SHARE = 0.1  # of a training's own errors, which are noisy


class Verdict(NamedTuple):
    level: Literal["good", "open", "doubtful", "bad"]
    title: str
    text: str


def verdict(chosen: float, rejected: float) -> Verdict:
    """What the policy's errors mean, each as its distance from the reference's error, in shares of that."""
    if not (isfinite(chosen) and isfinite(rejected)):
        return Verdict("bad", "Not numbers", "The errors are not finite. Lower optim.learning_rate or loss.beta.")
    if max(abs(chosen), abs(rejected)) <= WORSE:
        return Verdict("open", "Still at the reference", "Nothing that was learnt shows yet, as at every beginning.")
    if chosen - rejected > WORSE:
        return Verdict(
            "bad",
            "The wrong way round",
            "The policy has gained more on rejected images than on chosen ones. If this lasts, look at the labels and "
            "at optim.learning_rate.",
        )
    if min(chosen, rejected) > WORSE:
        return Verdict(
            "doubtful",
            "Worse on both images",
            "The policy denoises chosen and rejected images worse than the reference; the margin grows because it "
            "unlearns the rejected ones faster. Samples decide: while they improve, all is well. If they fall apart, "
            "take an earlier checkpoint, or try loss.safeguard=0.9, a larger loss.beta or a smaller "
            "optim.learning_rate.",
        )
    if max(chosen, rejected) < -WORSE:
        return Verdict("good", "Better on both images", "The policy denoises both better, the chosen ones more so.")
    return Verdict(
        "good",
        "As intended",
        "The policy has gained on chosen images against rejected ones, and not by getting worse on both.",
    )


def verdict_of(series: Mapping[str, Series]) -> tuple[Verdict, str] | None:
    """The verdict on a run and the numbers that it is from: of held-out pairs, or else of the last training pairs.

    None where there are no errors against a reference.
    """
    names = ("d_chosen", "d_rejected", "reference_error")
    held_out = [each for name in names if (each := of_held_out(series, name)) is not None]
    if len(held_out) == len(names):
        chosen, rejected, reference = (each.latest for each in held_out)
        source = f"held-out pairs at step {held_out[0].latest_step:,}"
    elif all(name in series and series[name].points for name in names):
        chosen, rejected, reference = (series[name].mean_of_last(_LAST_SHARE) for name in names)
        source = f"training pairs, mean of the last {_LAST_SHARE:.0%} of the steps"
    else:
        return None
    shares = (chosen / reference, rejected / reference) if reference else (float("nan"),) * 2
    shown = [f"{share:+.1%}".replace("-", "−") for share in shares]
    numbers = f"chosen {shown[0]}, rejected {shown[1]} of the reference's error ({source})"
    return verdict(*shares), numbers.replace("%", " %")


def of_held_out(series: Mapping[str, Series], metric: str) -> Series | None:
    """A metric of held-out pairs, once it says something of the training: after step 0."""
    found = series.get(HELD_OUT + metric)
    return found if found and found.latest_step > 0 else None
