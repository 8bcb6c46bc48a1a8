"""How far two runs may part that compute the same thing in another order: what float32's rounding makes of it, no more.

The order differs with the micro-batch, the number of processes and threads, and the instructions of the processor.
Everything follows from two counts of roundings, in units of eps = 2⁻²³: with ATen's default, AVX2 and AVX-512 kernels,
oneDNN's SSE4.1 and AVX2, batches of 1 to 12 and one and two threads at most two fifths of them were seen.
What claims equality to the bit compares with torch.equal and needs none of this.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import policy_of, rows_of

from xdpo.config import effective_beta, load_config
from xdpo.families import family_of

EPS = torch.finfo(torch.float32).eps
ELEMENT = 32 * EPS  # of a network's output, relative to its largest: a chain of some fifty roundings
ERROR = 4 * EPS  # of a denoising error, relative: a mean over hundreds of elements, whose roundings even out


def assert_same_output(one, other):
    """Two tensors that a network made of the same input, alone or in a batch, differ by its rounding."""
    torch.testing.assert_close(one, other, rtol=0, atol=ELEMENT * other.abs().max().item())


def assert_same_image(one, other):
    """Two images that one network made in different memory, on any number of threads: at most a level apart.

    A product of matrices may be summed in another order where memory is aligned differently, and a value that lies
    between two of the 255 levels then goes to either.
    """
    difference = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))
    assert difference.max() <= 1, f"{(difference > 1).sum()} of {difference.size} values differ, by {difference.max()}"


def drift(one, other):
    """Norm of the difference of two runs' weights, as a share of the way that `one` went from the pipeline's.

    0 where they are the same, about √2 where they have nothing in common but the start.
    """
    pipeline = Path(load_config(one / "config.yaml").model.pipeline)
    start = load_file(pipeline / family_of(pipeline).denoiser / "diffusion_pytorch_model.safetensors")
    first, second = policy_of(one), policy_of(other)
    assert start.keys() - {"pos_embed.pos_embed"} == first.keys() == second.keys()  # a buffer of Stable Diffusion 3's
    origin, end, other_end = (
        torch.cat([weights[name].flatten().double() for name in first]) for weights in (start, first, second)
    )
    return ((end - other_end).norm() / (end - origin).norm()).item()


def margin_tolerance(run):
    """Of a margin β/2·(e_w − e_w^ref − e_l + e_l^ref) at the same weights: four errors' roundings.

    Of a loss too, whose slope in the margin is at most 1.
    """
    config = load_config(run / "config.yaml")
    beta = (effective_beta(config) or config.loss.beta) * (config.loss.margin_weight or 1)
    return beta / 2 * 4 * ERROR * largest(rows_of(run), "policy_error")


def drift_tolerance(run):
    """Of drift: 2·√ERROR for the signs of Adam's first step, and the margins' rounding for the gradients' later.

    The first step is the learning rate times the gradient's sign. A share of about ERROR of the weights has a gradient
    smaller than its rounding and may go the other way, two steps apart: in the norm 2·√share of the way. Later steps
    divide means by means, and part as far as the gradients' factors σ(−m) do.
    """
    return 2 * ERROR**0.5 + margin_tolerance(run)


def assert_same_but_for_rounding(one, other):
    """Two runs end with the same weights and log the same figures."""
    assert drift(one, other) < drift_tolerance(one)
    assert_same_figures(one, other)


def assert_same_figures(one, other):
    """Two runs log the same figures but for rounding, of training and of the held-out pairs."""
    of_way = drift_tolerance(one)
    for prefix in ("", "eval/"):
        rows, others = ([row for row in rows_of(run) if f"{prefix}margin" in row] for run in (one, other))
        assert [row["step"] for row in rows] == [row["step"] for row in others]
        if not rows:
            continue
        # Besides its rounding a figure is off by the weights' drift, as a share of what training has moved.
        error = ERROR * largest(rows, f"{prefix}policy_error")
        moved = of_way * max(largest(rows, f"{prefix}{name}") for name in ("d_chosen", "d_rejected"))
        margin = margin_tolerance(one) + of_way * largest(rows, f"{prefix}margin")
        tolerances = {
            **dict.fromkeys(("policy_error", "reference_error"), error + moved),
            **dict.fromkeys(("d_chosen", "d_rejected", "gain", "z0"), 2 * error + moved),
            **dict.fromkeys(("margin", "loss"), margin),
            "implicit_accuracy": 0,  # a pair's margin is zero to the bit, or further from it than its rounding
        }
        for row, figures in zip(rows, others, strict=True):
            for name in (name for name in tolerances if f"{prefix}{name}" in row):
                found = figures[f"{prefix}{name}"]
                assert row[f"{prefix}{name}"] == pytest.approx(found, rel=0, abs=tolerances[name]), (row["step"], name)


def largest(rows, name):
    return max(abs(row[name]) for row in rows if name in row)
