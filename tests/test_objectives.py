"""Every objective beside xDPO: against the formula as printed, its limits, symmetries, gradients and extremes."""

import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loss import errors_of, loss_of, random_errors, swapped

from xdpo.loss import (
    MAX_EXPONENT,
    OBJECTIVES,
    PairErrors,
    UnpairedErrors,
    diffusion_dpo_margin,
    margin_weights,
    negative_log_sigmoid,
    pairwise,
    preference_probability,
    safeguard,
    xdpo_margin,
)
from xdpo.loss.modifiers import with_kl
from xdpo.loss.types import mean_by_pair
from xdpo.loss.unpaired import nft_weights

BETA = 40.0  # random errors differ by tenths, so that margins stay where every term counts
PAIRED = [name for name, objective in OBJECTIVES.items() if not objective.is_unpaired]
DIVERGENCES = ["reverse_kl", "forward_kl", "jensen_shannon", "alpha_divergence", "xdpo"]
UTILITIES = ["kto", "loss_averse", "risk_seeking"]

# (objective, numbers that differ from the defaults): one row per formula
VARIANTS = [
    *(
        (name, {"beta": BETA})
        for name in ("xdpo", "diffusion_dpo", "chipo", "ipo", "hinge", "dmpo", "alpha_dpo", "seppo")
    ),
    *(("f_dpo", {"beta": BETA, "divergence": divergence, "kappa": 3.0}) for divergence in DIVERGENCES),
    ("chipo", {"beta": BETA, "kappa": 5.0, "label_smoothing": 0.1}),
    ("dmpo", {"beta": BETA, "alpha": 0.3}),
    ("alpha_dpo", {"beta": BETA, "alpha": 0.4}),
    ("seppo", {"beta": BETA, "flip": "indicator", "label_smoothing": 0.2}),
    ("dspo", {"beta": BETA / 100}),
    ("mapo", {"scale": 50.0}),
    ("sft", {}),
]
each_variant = pytest.mark.parametrize(
    "name, numbers", VARIANTS, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values()))
)


def sigma(x):
    return 1 / (1 + math.exp(-x))


def inputs_of(name, errors):
    """The tensors that an objective needs besides the errors: residuals of policy and reference at an angle of 60°."""
    values = {"policy_dot_reference": 0.5 * (errors.policy_chosen * errors.reference_chosen).sqrt()}
    return {key: values[key] for key in OBJECTIVES[name].inputs}


def evaluate(name, errors, **numbers):
    return loss_of(name, errors, **inputs_of(name, errors), **numbers)


def printed(name, e_w, e_l, r_w, r_l, **given):
    """The loss of one pair, in Python floats and as its publication writes it, with β on Diffusion-DPO's scale."""
    numbers = {**OBJECTIVES[name].hyperparameters, **given}
    beta, smoothing = numbers.get("beta"), numbers.get("label_smoothing", 0.0)
    d_w, d_l = e_w - r_w, e_l - r_l
    s = -0.5 * beta * (d_w - d_l) if beta else 0.0
    p = sigma(s)

    def smoothed(m):
        return -(1 - smoothing) * math.log(sigma(m)) - smoothing * math.log(sigma(-m))

    match name:
        case "xdpo":
            h_w, h_l = (numbers["eta"] * d + numbers["gamma"] * math.exp(numbers["n"] * d) for d in (d_w, d_l))
            return smoothed(-0.5 * beta * (h_w - h_l))
        case "diffusion_dpo":
            return smoothed(s)
        case "f_dpo":
            kappa, alpha = numbers["kappa"], numbers["alpha"]
            slope = {
                "reverse_kl": lambda z: math.log(z) + 1,
                "forward_kl": lambda z: -1 / z,
                "jensen_shannon": lambda z: math.log(2 * z / (1 + z)),
                "alpha_divergence": lambda z: (1 - z**-alpha) / alpha,
                "xdpo": lambda z: numbers["eta"] * math.log(z) + numbers["gamma"] * z ** numbers["n"],
            }[numbers["divergence"]]
            return smoothed(0.5 * beta / kappa * (slope(math.exp(-kappa * d_w)) - slope(math.exp(-kappa * d_l))))
        case "chipo":
            kappa, bound = numbers["kappa"], 2 * numbers["max_reward"]
            z_w, z_l = math.exp(-kappa * d_w), math.exp(-kappa * d_l)
            reward_gap = 0.5 * beta / kappa * ((z_w + math.log(z_w)) - (z_l + math.log(z_l)))
            return smoothed(max(min(reward_gap, bound), -bound))
        case "ipo":
            half = beta / 2
            return half**2 * ((d_l - d_w) - 1 / (2 * half)) ** 2
        case "hinge":
            return max(0.0, 1 - beta / 2 * (d_l - d_w))
        case "dmpo":
            q = 1 - numbers["alpha"]
            return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        case "alpha_dpo":
            alpha = numbers["alpha"]
            return (p**alpha - (1 - alpha) - alpha * p) / (alpha * (alpha - 1))
        case "seppo":
            sign = (r_w > e_w) - (r_w < e_w) if numbers["flip"] == "sign" else float(r_w > e_w)
            return smoothed(-0.5 * beta * (d_w - sign * d_l))
        case "dspo":
            # Two residuals of two values each, with these squared means and 60° between them.
            a = (math.sqrt(2 * e_w), 0.0)
            b = (math.sqrt(2 * r_w) / 2, math.sqrt(2 * r_w) * math.sqrt(3) / 2)
            k = beta * (1 - p)
            return sum((x - k * (x - y)) ** 2 for x, y in zip(a, b, strict=True)) / 2
        case "mapo":
            f_w, f_l = (numbers["k"] * e / (math.exp(numbers["k"] * e) - 1) for e in (e_w, e_l))
            return e_w + beta * smoothed(numbers["scale"] * (f_w - f_l))
        case "sft":
            return e_w
    raise AssertionError(f"no printed formula for {name}: add it here")


@each_variant
def test_an_objective_is_its_printed_formula(name, numbers):
    errors = PairErrors(*(0.3 * error for error in random_errors()))
    loss = evaluate(name, errors, **numbers).loss
    expected = [printed(name, *(value.item() for value in pair), **numbers) for pair in zip(*errors, strict=True)]
    # α-DPO as printed divides differences of numbers near 1 by 1 − α = 1e-4, and loses four digits by it.
    tolerance = 1e-10 if name == "alpha_dpo" else 1e-13
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=tolerance)


def test_every_objective_on_pairs_stands_in_the_table_of_formulas():
    assert {name for name, _ in VARIANTS} == set(PAIRED)


@each_variant
def test_gradients_are_those_of_finite_differences(name, numbers):
    chosen = torch.tensor([0.12, 0.10, 0.40, 0.30], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.12, 0.30, 0.20, 0.33], dtype=torch.float64, requires_grad=True)
    # SePPO's flip jumps where the policy is the reference: keep away from it, and below 20 rewards from χPO's clip.
    reference = torch.tensor([0.13, 0.12, 0.25, 0.20], dtype=torch.float64)

    def loss(policy_chosen, policy_rejected):
        return evaluate(name, PairErrors(policy_chosen, policy_rejected, reference, reference), **numbers).loss

    assert torch.autograd.gradcheck(loss, (chosen, rejected), eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", PAIRED)
def test_no_gradient_reaches_the_reference(name):
    errors = errors_of([0.1, 0.3], [0.2, 0.1], [0.15, 0.2], [0.15, 0.2])
    inputs = {key: value.detach() for key, value in inputs_of(name, errors).items()}
    loss_of(name, errors, **inputs).loss.sum().backward()
    assert errors.reference_chosen.grad is None and errors.reference_rejected.grad is None
    assert errors.policy_chosen.grad is not None


@each_variant
def test_half_precision_is_computed_in_float32(name, numbers):
    errors = errors_of([0.1, 0.3], [0.2, 0.1], [0.15, 0.2], [0.15, 0.2], dtype=torch.bfloat16)
    single = PairErrors(*(error.float() for error in errors))
    inputs = inputs_of(name, errors)
    loss = loss_of(name, errors, **inputs, **numbers).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(name, single, **inputs, **numbers).loss)


@pytest.mark.parametrize(
    "name, numbers", [(n, {**v, "beta": 5000.0} if v.get("beta") == BETA else v) for n, v in VARIANTS]
)
def test_loss_and_gradients_are_finite_for_extreme_errors(name, numbers):
    sizes = [0.0, 1e-8, 1e-3, 1.0, 4.9, 15.0, 100.0, 1e4]
    grid = torch.tensor(sorted({sign * size for size in sizes for sign in (-1, 1)}))
    d_chosen, d_rejected = torch.cartesian_prod(grid, grid).unbind(1)
    parts = (d_chosen.clamp(min=0), d_rejected.clamp(min=0), (-d_chosen).clamp(min=0), (-d_rejected).clamp(min=0))
    errors = errors_of(*(part.tolist() for part in parts), dtype=torch.float32)
    inputs = {key: value.detach() for key, value in inputs_of(name, errors).items()}
    output = loss_of(name, errors, **inputs, **numbers)
    output.loss.sum().backward()
    gradients = torch.cat([error.grad for error in errors[:2] if error.grad is not None])
    assert output.loss.isfinite().all() and output.margin.isfinite().all()
    assert gradients.isfinite().all()
    assert gradients.norm().isfinite()  # what gradient clipping computes


SYMMETRIC = ["diffusion_dpo", "chipo", "ipo", "hinge", "dmpo", "alpha_dpo", "xdpo", "mapo"]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_swapping_chosen_and_rejected_negates_the_margin(name):
    errors = random_errors()
    margin = evaluate(name, errors).margin
    torch.testing.assert_close(evaluate(name, swapped(errors)).margin, -margin, rtol=0, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_swapping_negates_the_margin_of_every_divergence(divergence):
    errors = random_errors()
    margin = loss_of("f_dpo", errors, divergence=divergence, kappa=3.0).margin
    torch.testing.assert_close(
        loss_of("f_dpo", swapped(errors), divergence=divergence, kappa=3.0).margin, -margin, rtol=0, atol=0
    )


@pytest.mark.parametrize("name", [name for name in PAIRED if name not in ("sft", "dspo")])
def test_the_chosen_image_is_drawn_in_and_the_rejected_one_pushed_away(name):
    errors = errors_of(0.2, 0.22, 0.20001, 0.21999)  # the policy is right, by so little that none is satisfied
    evaluate(name, errors).loss.sum().backward()
    assert errors.policy_chosen.grad.item() > 0
    assert errors.policy_rejected.grad.item() < 0


# By hand. d_w = −0.01 and d_l = +0.01, so that s = (β/2)·0.02, which is 1 at β = 100.
BY_HAND = errors_of(0.11, 0.13, 0.12, 0.12)


@pytest.mark.parametrize(
    "name, numbers, loss",
    [
        ("diffusion_dpo", {"beta": 100.0}, math.log1p(math.exp(-1))),
        ("diffusion_dpo", {"beta": 100.0, "label_smoothing": 0.25}, math.log1p(math.exp(-1)) + 0.25),
        ("ipo", {"beta": 100.0}, 0.25),  # (1 − ½)²
        ("hinge", {"beta": 50.0}, 0.5),
        ("hinge", {"beta": 200.0}, 0.0),
        ("dmpo", {"beta": 100 * math.log(99), "alpha": 0.01}, 0.0),  # p = q = 0.99
        ("alpha_dpo", {"beta": 100 * math.log(3), "alpha": 0.5}, 3.5 - 2 * math.sqrt(3)),  # p = ¾: −4(√p − ½ − p/2)
        ("sft", {}, 0.11),
        ("seppo", {"beta": 100.0}, math.log1p(math.exp(-1))),  # better on the anchor: as Diffusion-DPO
        ("f_dpo", {"beta": 100.0, "divergence": "forward_kl", "kappa": 100 * math.log(2)}, None),
    ],
)
def test_by_hand(name, numbers, loss):
    output = loss_of(name, BY_HAND, **numbers)
    if loss is None:  # z_w = 2, z_l = ½: −1/2 + 2 = 3/2, times (β/2)/κ = ½/ln 2
        assert output.margin.item() == pytest.approx(0.75 / math.log(2), rel=1e-12)
    else:
        assert output.loss.item() == pytest.approx(loss, rel=1e-9, abs=1e-12)


def test_dspo_by_hand():
    # a = (2, 0) and a_ref = (1, 1): e_θ = 2, e_ref = 1, <a, a_ref> = 1; s = 0 with such a β, so that k = β/2.
    errors = errors_of(2.0, 2.0, 1.0, 1.0)
    output = loss_of("dspo", errors, policy_dot_reference=torch.tensor([1.0], dtype=torch.float64), beta=0.5)
    # a − ¼·(a − a_ref) = (1.75, 0.25)
    assert output.loss.item() == pytest.approx((1.75**2 + 0.25**2) / 2, rel=1e-12)


def test_mapo_by_hand():
    # f(e) = ke/(exp(ke) − 1): ke = ln 2 gives ln 2, ke = ln 3 gives ln 3 / 2.
    errors = errors_of(math.log(2), math.log(3), 0.0, 0.0)
    output = loss_of("mapo", errors, beta=2.0, k=1.0, scale=10.0)
    margin = 10 * (math.log(2) - math.log(3) / 2)
    assert output.margin.item() == pytest.approx(margin, rel=1e-12)
    assert output.loss.item() == pytest.approx(math.log(2) + 2 * math.log1p(math.exp(-margin)), rel=1e-12)


def test_without_preference_mapo_and_dspo_are_sft():
    errors = random_errors()
    sft = loss_of("sft", errors).loss
    torch.testing.assert_close(loss_of("mapo", errors, beta=0.0).loss, sft, rtol=0, atol=0)
    torch.testing.assert_close(evaluate("dspo", errors, beta=1e-12).loss, sft, rtol=1e-11, atol=0)


def test_mapo_is_smooth_through_an_error_of_zero():
    errors = errors_of([0.0, 2e-3 - 1e-9, 2e-3 + 1e-9], [0.0, 0.0, 0.0], [0.1] * 3, [0.1] * 3)
    margin = loss_of("mapo", errors).margin
    margin.sum().backward()
    # f(e) = 1 − ke/2 + (ke)²/12 − …, on both sides of ke = 1e-3 where the code changes over
    expected = torch.tensor([-250.0, -249.91667, -249.91667], dtype=torch.float64)
    torch.testing.assert_close(errors.policy_chosen.grad, expected)
    assert abs(margin[1] - margin[2]).item() < 1e-6


@pytest.mark.parametrize("name", ["mapo", "sft"])
def test_an_objective_without_reference_takes_none(name):
    errors = random_errors()
    alone = loss_of(name, errors._replace(reference_chosen=None, reference_rejected=None))
    assert not OBJECTIVES[name].needs_reference
    assert torch.equal(alone.loss, loss_of(name, errors).loss)


# Divergences


def test_reverse_kl_is_diffusion_dpo_whatever_the_unit_of_the_ratio():
    errors = random_errors()
    for kappa in (0.1, 1.0, 50.0):
        margin = loss_of("f_dpo", errors, beta=BETA, kappa=kappa).margin
        torch.testing.assert_close(margin, diffusion_dpo_margin(errors, beta=BETA), rtol=1e-14, atol=0)


def test_alpha_divergence_goes_from_reverse_to_forward_kl():
    errors = random_errors()
    reverse, forward = (loss_of("f_dpo", errors, divergence=name).margin for name in ("reverse_kl", "forward_kl"))
    toward_zero = loss_of("f_dpo", errors, divergence="alpha_divergence", alpha=1e-8).margin
    at_one = loss_of("f_dpo", errors, divergence="alpha_divergence", alpha=1.0).margin
    torch.testing.assert_close(toward_zero, reverse, rtol=1e-6, atol=0)
    torch.testing.assert_close(at_one, forward, rtol=0, atol=0)


def test_the_member_xdpo_is_eq9_and_chi_po_is_it_with_unit_numbers():
    errors = random_errors()
    member = loss_of("f_dpo", errors, beta=1000.0, divergence="xdpo").margin
    eq9 = xdpo_margin(errors, beta=1000.0, eta=0.05, gamma=1 / 6, n=6.0, reward="eq9")
    torch.testing.assert_close(member, eq9, rtol=1e-13, atol=0)
    for kappa in (1.0, 6.0):
        chipo = loss_of("chipo", errors, beta=BETA, kappa=kappa, max_reward=1e9).margin
        row = xdpo_margin(errors, beta=BETA, eta=1.0, gamma=1 / kappa, n=kappa, reward="eq9")
        torch.testing.assert_close(chipo, row, rtol=1e-13, atol=0)


def test_xdpo_as_in_appendix_c_is_reverse_kl_and_the_alpha_divergence_of_order_n():
    errors = random_errors()
    reverse = loss_of("f_dpo", errors, beta=BETA).margin
    alpha = loss_of("f_dpo", errors, beta=BETA, divergence="alpha_divergence", alpha=6.0).margin
    appendix_c = xdpo_margin(errors, beta=BETA, eta=0.05, gamma=1 / 6, n=6.0, reward="appendix_c")
    torch.testing.assert_close(0.05 * reverse + alpha, appendix_c, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "divergence, factor",
    [("reverse_kl", 1), ("forward_kl", 1), ("jensen_shannon", 0.5), ("alpha_divergence", 1), ("xdpo", 1.05)],
)
def test_near_zero_every_divergence_is_diffusion_dpo_at_its_effective_beta(divergence, factor):
    errors = errors_of(0.12 - 1e-7, 0.12 + 1e-7, 0.12, 0.12)
    margin = loss_of("f_dpo", errors, beta=1000.0, divergence=divergence).margin
    assert margin.item() == pytest.approx(diffusion_dpo_margin(errors, beta=1000.0 * factor).item(), rel=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_keeps_its_digits_where_chosen_and_rejected_nearly_cancel(divergence):
    errors = errors_of([1e-3 + 1e-7, 1e-3], [1e-3, 1e-3 + 1e-7], [0.0, 0.0], [0.0, 0.0], dtype=torch.float32)
    exact = PairErrors(*(error.double() for error in errors))
    single, double = (loss_of("f_dpo", e, divergence=divergence, kappa=2.0).margin.double() for e in (errors, exact))
    torch.testing.assert_close(single, double, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "numbers, count",
    [({"divergence": "forward_kl"}, 2), ({"divergence": "alpha_divergence"}, 0), ({"divergence": "xdpo"}, 1)],
)
def test_clamped_exponents_are_counted(numbers, count):
    # d_w = (40, 0), d_l = (41, −6), against 30/κ, 30/(ακ) = 60 and, downwards, 30/(nκ) = 5
    errors = errors_of([40.0, 0.0], [41.0, 0.0], [0.0, 0.0], [0.0, 6.0])
    assert loss_of("f_dpo", errors, **numbers).clamped.item() == count


def test_beyond_its_clip_chi_po_is_flat():
    errors = errors_of([0.0, 0.5], [0.5, 0.0], [0.25, 0.25], [0.25, 0.25])
    output = loss_of("chipo", errors, beta=1000.0, max_reward=3.0)
    output.loss.sum().backward()
    assert output.margin.tolist() == [6.0, -6.0]
    assert errors.policy_chosen.grad.tolist() == [0.0, 0.0]


def test_a_very_large_ratio_is_flat_in_forward_kl():
    errors = errors_of(MAX_EXPONENT + 1, 0.0, 0.0, 0.0)
    margin = loss_of("f_dpo", errors, beta=2.0, divergence="forward_kl").margin
    assert margin.item() == pytest.approx(-math.expm1(MAX_EXPONENT), rel=1e-12)


# DMPO, α-DPO, SePPO


def test_dmpo_at_one_half_is_the_entropy_that_is_missing():
    errors = random_errors()
    p = torch.sigmoid(diffusion_dpo_margin(errors, beta=BETA))
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(loss_of("dmpo", errors, beta=BETA, alpha=0.5).loss, math.log(2) - entropy)


def test_dmpo_swapped_is_dmpo_with_the_other_coin():
    errors = random_errors()
    loss = loss_of("dmpo", errors, beta=BETA, alpha=0.2).loss
    torch.testing.assert_close(loss_of("dmpo", swapped(errors), beta=BETA, alpha=0.8).loss, loss)


def test_alpha_dpo_goes_from_dpo_to_the_reverse_kl():
    errors = random_errors()
    p = torch.sigmoid(diffusion_dpo_margin(errors, beta=BETA))
    toward_zero = loss_of("alpha_dpo", errors, beta=BETA, alpha=1e-7).loss
    toward_one = loss_of("alpha_dpo", errors, beta=BETA, alpha=1 - 1e-7).loss
    torch.testing.assert_close(toward_zero, -p.log() - (1 - p), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(toward_one, p * p.log() + 1 - p, rtol=1e-5, atol=1e-8)


def test_alpha_dpo_at_its_published_number_keeps_its_digits_in_float32():
    errors = random_errors()
    single = PairErrors(*(error.float() for error in errors))
    exact = loss_of("alpha_dpo", PairErrors(*(error.double() for error in single)), beta=BETA).loss
    torch.testing.assert_close(loss_of("alpha_dpo", single, beta=BETA).loss.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name, bound", [("dmpo", -math.log(0.01)), ("alpha_dpo", 1 / 0.9999)])
def test_a_hopelessly_wrong_pair_has_a_bounded_loss_and_no_slope(name, bound):
    errors = errors_of(2.0, 0.0, 0.0, 0.0)
    loss = loss_of(name, errors).loss
    loss.sum().backward()
    assert loss.item() == pytest.approx(bound, rel=1e-9)
    assert abs(errors.policy_chosen.grad.item()) < 1e-9


def test_seppo_flips_with_the_anchor():
    # On the anchor the policy is better, worse, equal; on the sampled image it is 0.02 worse.
    errors = errors_of([0.11, 0.13, 0.12], [0.14] * 3, [0.12] * 3, [0.12] * 3)
    half = 50.0
    for flip, expected in {
        "sign": [half * (0.01 + 0.02), -half * (0.01 + 0.02), 0.0],
        "indicator": [half * (0.01 + 0.02), -half * 0.01, 0.0],
    }.items():
        margin = loss_of("seppo", errors, beta=2 * half, flip=flip).margin
        torch.testing.assert_close(margin, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-14)


# Unpaired


def unpaired(policy, reference, desirable):
    policy, reference = (torch.tensor(values, dtype=torch.float64) for values in (policy, reference))
    return UnpairedErrors(policy.requires_grad_(), reference, torch.tensor(desirable))


ZERO = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("utility", UTILITIES)
def test_diffusion_kto_is_its_printed_formula(utility):
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.rand(2, 64, dtype=torch.float64, generator=generator)
    errors = UnpairedErrors(policy, reference, torch.rand(64, generator=generator) < 0.8)
    z0 = 0.03
    numbers = {"beta": 20.0, "utility": utility, "desirable_weight": 0.7, "undesirable_weight": 1.3}
    loss = loss_of("diffusion_kto", errors, z0=torch.tensor(z0), **numbers).loss
    utilities = {
        "kto": sigma,
        "loss_averse": lambda v: math.log(sigma(v)),
        "risk_seeking": lambda v: -math.log(sigma(-v)),
    }
    for got, e, r, desirable in zip(loss, policy, reference, errors.desirable, strict=True):
        v = (1 if desirable else -1) * 20.0 * ((r - e).item() - torch.tensor(z0).item())
        assert got.item() == pytest.approx((0.7 if desirable else 1.3) * (1 - utilities[utility](v)), rel=1e-9)


def test_diffusion_kto_by_hand():
    # g = 0.02 and −0.01; z0 = max(0, 0.005); v = 100·0.015 and −100·(−0.015)
    errors = unpaired([0.10, 0.13], [0.12, 0.12], [True, False])
    z0 = torch.tensor(0.005, dtype=torch.float64)
    output = loss_of("diffusion_kto", errors, z0=z0, beta=100.0)
    assert output.margin.tolist() == pytest.approx([1.5, 1.5], rel=1e-9)
    assert output.loss.tolist() == pytest.approx([sigma(-1.5)] * 2, rel=1e-9)


@pytest.mark.parametrize("utility", UTILITIES)
def test_gradients_of_kto_are_those_of_finite_differences(utility):
    errors = unpaired([0.12, 0.1, 0.4], [0.12, 0.2, 0.1], [True, False, False])

    def loss(policy):
        return loss_of("diffusion_kto", errors._replace(policy=policy), z0=ZERO, beta=10.0, utility=utility).loss

    assert torch.autograd.gradcheck(loss, (errors.policy,), eps=1e-6, atol=1e-8, rtol=1e-7)


def test_an_image_with_both_labels_has_a_constant_loss():
    errors = unpaired([0.1, 0.1, 0.4, 0.4], [0.2] * 4, [True, False, True, False])
    loss = loss_of("diffusion_kto", errors, z0=torch.tensor(0.01)).loss
    loss.sum().backward()
    torch.testing.assert_close(loss[::2] + loss[1::2], torch.ones(2, dtype=torch.float64))
    assert (errors.policy.grad[::2] + errors.policy.grad[1::2]).abs().max().item() < 1e-9


def test_with_balanced_labels_kto_begins_with_the_gradient_of_diffusion_dpo():
    single = unpaired([0.12, 0.15], [0.12, 0.15], [True, False])
    pair = errors_of(0.12, 0.15, 0.12, 0.15)
    loss_of("diffusion_kto", single, z0=ZERO, beta=2000.0).loss.sum().backward()
    loss_of("diffusion_dpo", pair, beta=2000.0).loss.sum().backward()
    assert single.policy.grad.tolist() == [pair.policy_chosen.grad.item(), pair.policy_rejected.grad.item()]


def test_the_other_label_negates_the_value():
    errors = unpaired([0.1, 0.3], [0.2, 0.2], [True, False])
    value = loss_of("diffusion_kto", errors, z0=ZERO).margin
    other = loss_of("diffusion_kto", errors._replace(desirable=~errors.desirable), z0=ZERO).margin
    assert torch.equal(other, -value)


@pytest.mark.parametrize("utility", UTILITIES)
def test_kto_is_finite_for_extreme_errors(utility):
    policy = torch.tensor([0.0, 1e4, 0.0, 1e4]).requires_grad_()
    errors = UnpairedErrors(policy, torch.tensor([1e4, 0.0, 1e4, 0.0]), torch.tensor([True, True, False, False]))
    loss = loss_of("diffusion_kto", errors, z0=torch.tensor(0.0), utility=utility).loss
    loss.sum().backward()
    assert loss.isfinite().all() and policy.grad.isfinite().all()


# Modifiers

# χPO clips its margin; the weights themselves come before the clip.
WEIGHTED = [name for name, objective in OBJECTIVES.items() if "margin_weight" in objective.keys and name != "chipo"]
SMOOTHED = [name for name, objective in OBJECTIVES.items() if "label_smoothing" in objective.keys]


@pytest.mark.parametrize("name", SMOOTHED)
def test_half_smoothed_labels_are_the_mean_of_both_orders(name):
    margin = torch.linspace(-3, 3, 7, dtype=torch.float64)
    both = 0.5 * (negative_log_sigmoid(margin) + negative_log_sigmoid(-margin))
    torch.testing.assert_close(negative_log_sigmoid(margin, 0.5), both)
    errors = random_errors()
    plain, smooth = loss_of(name, errors), loss_of(name, errors, label_smoothing=0.0)
    assert torch.equal(plain.loss, smooth.loss)
    assert not torch.allclose(loss_of(name, errors, label_smoothing=0.1).loss, plain.loss)


def test_a_smoothed_label_is_satisfied_at_its_log_odds():
    margin = torch.tensor(math.log(0.9 / 0.1), dtype=torch.float64, requires_grad=True)
    negative_log_sigmoid(margin, 0.1).backward()
    assert abs(margin.grad.item()) < 1e-15


def test_the_safeguard_scales_the_rejected_gradient_alone():
    # λ = 0.5·0.2/<a_w, a_l>: 0.5/1 (not clipped), more than 1 (clipped), opposed and orthogonal (1).
    errors = errors_of([0.2] * 4, [0.3] * 4, [0.2] * 4, [0.2] * 4)
    dot = torch.tensor([0.2, 0.05, -0.1, 0.0], dtype=torch.float64)
    guarded = safeguard(errors, dot, mu=0.5)
    assert all(torch.equal(after, before) for after, before in zip(guarded, errors, strict=True))
    plain = torch.autograd.grad(loss_of("diffusion_dpo", errors, beta=10.0).loss.sum(), errors[:2])
    scaled = torch.autograd.grad(loss_of("diffusion_dpo", guarded, beta=10.0).loss.sum(), errors[:2])
    assert torch.equal(scaled[0], plain[0])
    torch.testing.assert_close(scaled[1], plain[1] * torch.tensor([0.5, 1.0, 1.0, 1.0]).double())


def test_under_the_safeguard_the_chosen_error_falls_by_the_promised_share():
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(2, 200, 16, dtype=torch.float64, generator=generator) + 0.5
    errors = PairErrors(
        chosen.square().mean(1), rejected.square().mean(1).requires_grad_(), *torch.ones(2, 200).double()
    )
    guarded = safeguard(errors, (chosen * rejected).mean(1), mu=0.9)
    (share,) = torch.autograd.grad(guarded.policy_rejected.sum(), errors.policy_rejected)
    # One step along −∇e_w + λ·∇e_l changes e_w by its product with ∇e_w, which has to be ≤ −μ·‖∇e_w‖².
    step = -chosen + share[:, None] * rejected
    assert (share < 1).any() and (share == 1).any()
    assert ((step * chosen).sum(1) <= -0.9 * chosen.square().sum(1) + 1e-12)[(chosen * rejected).sum(1) > 0].all()


def test_scores_become_weights_of_the_margin():
    # A gap of ln 3 within a range of 1: p = ¾, weight 10·(2p − 1) = 5; equal scores: p = ½, weight 0.
    chosen, rejected = torch.tensor([20 + math.log(3), 20.0]).double(), torch.tensor([20.0, 20.0]).double()
    probability = preference_probability(chosen, rejected, lowest=20.0, highest=21.0)
    weights = margin_weights(probability, scale=10.0)
    torch.testing.assert_close(weights, torch.tensor([5.0, 0.0], dtype=torch.float64), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["seppo", *WEIGHTED])
def test_a_beta_per_pair_weights_the_margins(name):
    errors = random_errors()
    weights = torch.linspace(-2, 4, 64, dtype=torch.float64)
    weighted = loss_of(name, errors, beta=BETA * weights).margin
    torch.testing.assert_close(weighted, weights * loss_of(name, errors, beta=BETA).margin)


# DiffusionNFT


def residuals_of_nft(seed=0, images=5):
    """Residuals v_θ − v and v_old − v of images of three values each, and optimalities."""
    source = torch.Generator().manual_seed(seed)
    policy, old = torch.randn(2, images, 3, generator=source, dtype=torch.float64)
    return policy, old, torch.rand(images, generator=source, dtype=torch.float64)


def nft_of(policy, old, better, **numbers):
    """The objective on residuals (B, D)."""
    labels = better > 0.5
    errors = UnpairedErrors(policy.square().mean(1), old.square().mean(1), labels)
    given = {"optimality": better, "image_dot_reference": (policy * old).mean(1)}
    return loss_of("diffusion_nft", errors, **given, **{"error_weights": torch.ones(2, len(policy)), **numbers})


@pytest.mark.parametrize("beta", [1.0, 0.3, 2.0])
def test_nft_is_its_two_implicit_policies(beta):
    """As printed: v₊ = (1 − β)·v_old + β·v_θ, v₋ = (1 + β)·v_old − β·v_θ, here with the target v = 0."""
    policy, old, better = residuals_of_nft()
    positive, negative = (1 - beta) * old + beta * policy, (1 + beta) * old - beta * policy
    expected = better * positive.square().mean(1) + (1 - better) * negative.square().mean(1)
    output = nft_of(policy, old, better, beta=beta)
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=1e-14)
    gain = old.square().mean(1) - policy.square().mean(1)
    torch.testing.assert_close(output.margin, (2 * better - 1) * gain, rtol=1e-12, atol=1e-14)


def test_nft_by_hand():
    # One image of one value: v_θ − v = 2, v_old − v = 1, r = ¾, β = ½. v₊ − v = 1.5, v₋ − v = 0.5.
    values = [torch.tensor([[value]], dtype=torch.float64) for value in (2.0, 1.0)]
    loss = nft_of(*values, torch.tensor([0.75], dtype=torch.float64), beta=0.5).loss
    assert loss.item() == pytest.approx(0.75 * 2.25 + 0.25 * 0.25)


def test_nft_with_equal_rewards_pulls_to_the_reference_and_with_the_best_is_fine_tuning():
    policy, old, _ = residuals_of_nft()
    half = nft_of(policy, old, torch.full((5,), 0.5), beta=0.7).loss
    distance = 0.49 * (policy - old).square().mean(1)
    torch.testing.assert_close(half, distance + old.square().mean(1), rtol=1e-12, atol=1e-14)
    best = nft_of(policy, old, torch.ones(5, dtype=torch.float64), beta=1.0).loss
    torch.testing.assert_close(best, policy.square().mean(1), rtol=1e-12, atol=1e-14)


def test_the_gradient_of_nft_is_that_of_finite_differences_and_leaves_the_reference_alone():
    policy, old, better = residuals_of_nft()
    assert torch.autograd.gradcheck(lambda policy: nft_of(policy, old, better, beta=0.6).loss, policy.requires_grad_())
    errors = UnpairedErrors(policy.square().mean(1), old.square().mean(1).requires_grad_(), better > 0.5)
    dot = (policy * old).mean(1)
    given = {"optimality": better, "image_dot_reference": dot, "error_weights": torch.ones(2, 5)}
    loss_of("diffusion_nft", errors, **given).loss.sum().backward()
    assert errors.reference.grad is None


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_self_normalized_nft_is_the_public_codes_formula(beta):
    """Of a flow: x̂_0 = x_σ − σ·v, its squared error over its mean deviation, each image by itself."""
    policy, old, better = residuals_of_nft()
    sigmas = torch.tensor([0.1, 0.4, 0.7, 0.9, 1.0], dtype=torch.float64)
    weights = nft_weights(policy.requires_grad_(), old, sigmas, beta=beta, error_weight="self_normalized")
    output = nft_of(policy, old, better, beta=beta, error_weights=weights)
    (gradient,) = torch.autograd.grad(output.loss.sum(), policy)

    residual = policy.detach().numpy()
    expected, slope = [], []
    for a, o, r, sigma in zip(residual, old.numpy(), better.numpy(), sigmas.numpy(), strict=True):
        off = [sigma * (sign * beta * a + (1 - sign * beta) * o) for sign in (1, -1)]  # what x̂_0 of v± lacks to x_0
        mean = [np.abs(one).mean() for one in off]
        expected.append(sum(share * (one**2).mean() / m for share, one, m in zip((r, 1 - r), off, mean, strict=True)))
        terms = zip((r, r - 1), off, mean, strict=True)  # the deviation carries no gradient
        slope.append(sum(share * 2 * one * sigma * beta / m / len(a) for share, one, m in terms))
    np.testing.assert_allclose(output.loss.detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slope, rtol=1e-10, atol=1e-12)


def test_the_weights_of_nft_at_their_limits():
    policy, old, _ = residuals_of_nft()
    sigmas = torch.full((5,), 0.5)
    assert torch.equal(nft_weights(policy, old, sigmas, beta=0.7, error_weight="constant"), torch.ones(2, 5))
    # v₊ − v = 2: s²/(s·2). v₋ − v = 2·1 − 2 = 0, where the deviation counts as 1e-5.
    twos, ones = torch.full((5, 1), 2.0), torch.ones(5, 1)
    weights = nft_weights(twos, ones, sigmas, beta=1.0, error_weight="self_normalized")
    assert weights[0].tolist() == [0.25] * 5 and weights[1].tolist() == pytest.approx([0.25 / 1e-5] * 5)
    with pytest.raises(ValueError, match="unknown error_weight 'l1'; choose from constant, self_normalized"):
        nft_weights(policy, old, sigmas, beta=1.0, error_weight="l1")


def test_the_kl_is_the_distance_of_predictions_and_vanishes_or_rules_at_its_limits():
    policy, old, better = residuals_of_nft(images=6)
    base = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(policy, weight):
        output = mean_by_pair(nft_of(policy, old, better, beta=0.6))
        return with_kl(output, (policy - base).square().mean(1), weight=weight).loss

    images = nft_of(policy, old, better, beta=0.6).loss + 0.3 * (policy - base).square().mean(1)
    torch.testing.assert_close(loss(policy, 0.3), (images[:3] + images[3:]) / 2, rtol=1e-12, atol=1e-14)
    assert torch.equal(loss(policy, 0.0), mean_by_pair(nft_of(policy, old, better, beta=0.6)).loss)
    assert torch.autograd.gradcheck(lambda policy: loss(policy, 0.3), policy.clone().requires_grad_())
    # The loss is quadratic in the policy's residuals, so one Newton step from anywhere is its minimum: for a large k
    # that is the base model, and without k it is v_old + (2r − 1)/β·(v − v_old).
    for weight, minimum in ((1e9, base), (0.0, old + ((2 * better - 1) / 0.6)[:, None] * -old)):
        values = policy.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(values, weight).sum(), values)
        found = policy - slope / (
            2 / 3 / 2 * (0.36 + weight)
        )  # the second derivative: 2·(β² + k), over 3 values, 2 images
        torch.testing.assert_close(found, minimum, rtol=1e-6, atol=1e-6)


# The registry and bad input


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_function_takes_what_its_declaration_says_and_states_no_number_again(name):
    objective = OBJECTIVES[name]
    errors, *keywords = inspect.signature(objective.function).parameters.values()
    assert errors.annotation is (UnpairedErrors if objective.is_unpaired else PairErrors)
    assert {each.name for each in keywords} == {*objective.hyperparameters, *objective.inputs}
    assert all(each.kind is each.KEYWORD_ONLY and each.default is each.empty for each in keywords)
    assert None not in objective.hyperparameters.values()


def test_the_registry_says_what_each_objective_takes():
    assert OBJECTIVES["hinge"].hyperparameters == {"beta": 5000.0}
    assert OBJECTIVES["hinge"].keys == {"beta": 5000.0, "safeguard": None, "margin_weight": None}
    assert OBJECTIVES["dspo"].inputs == ("policy_dot_reference",)
    assert OBJECTIVES["diffusion_kto"].inputs == ("z0",) and "z0" not in OBJECTIVES["diffusion_kto"].keys
    assert OBJECTIVES["diffusion_kto"].is_unpaired and not OBJECTIVES["xdpo"].is_unpaired
    assert OBJECTIVES["sft"].keys == {}
    assert "eta" not in OBJECTIVES["diffusion_dpo"].keys
    no_recording = {name for name, objective in OBJECTIVES.items() if not objective.can_reuse_reference}
    assert no_recording == {"dspo", "mapo", "sft", "seppo", "diffusion_nft"}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_runs_with_its_published_defaults(name):
    if OBJECTIVES[name].is_unpaired:
        inputs = {"z0": ZERO, "optimality": torch.tensor([0.8, 0.3]), "image_dot_reference": torch.tensor([0.1, 0.1])}
        inputs["error_weights"] = torch.ones(2, 2)
        given = {key: inputs[key] for key in OBJECTIVES[name].inputs}
        output = loss_of(name, unpaired([0.1, 0.2], [0.2, 0.1], [True, False]), **given)
    else:
        output = evaluate(name, random_errors(2))
    assert output.loss.shape == output.margin.shape == (2,) and output.loss.isfinite().all()
    assert output.clamped.shape == () and output.clamped.dtype == torch.long


@pytest.mark.parametrize(
    "name, key, choices",
    [
        ("f_dpo", "divergence", "reverse_kl, forward_kl, jensen_shannon, alpha_divergence, xdpo"),
        ("seppo", "flip", "sign, indicator"),
        ("xdpo", "reward", "appendix_c, eq9, eq10"),
    ],
)
def test_an_unknown_name_is_refused_with_the_choices(name, key, choices):
    with pytest.raises(ValueError, match=f"unknown {key} 'none'; choose from {choices}"):
        loss_of(name, random_errors(2), **{key: "none"})


def test_bad_unpaired_input_is_refused():
    errors = unpaired([0.1, 0.2], [0.2, 0.1], [True, False])
    with pytest.raises(ValueError, match="unknown utility 'none'; choose from kto, loss_averse, risk_seeking"):
        loss_of("diffusion_kto", errors, z0=ZERO, utility="none")
    with pytest.raises(ValueError, match=r"desirable must be a bool tensor, got torch.int64"):
        loss_of("diffusion_kto", errors._replace(desirable=torch.tensor([1, 0])), z0=ZERO)
    with pytest.raises(ValueError, match=r"one shape \(B,\), got"):
        loss_of("diffusion_kto", errors._replace(reference=torch.zeros(2, 1)), z0=ZERO)
    half = torch.tensor([0.5, 0.5])
    with pytest.raises(
        ValueError, match=r"optimality, dots and weights must have the errors' shape \(B,\), got \[\(2,\), \(2, 1\)"
    ):
        given = {"image_dot_reference": half, "error_weights": torch.ones(2, 2)}
        loss_of("diffusion_nft", errors, optimality=half.unsqueeze(1), **given)


@pytest.mark.parametrize("name", PAIRED)
def test_errors_of_different_shapes_are_refused_instead_of_broadcast(name):
    errors = random_errors(4)._replace(policy_rejected=torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"one shape \(B,\), got .*\(4, 1\)"):
        loss_of(name, errors, **{key: torch.ones(4) for key in OBJECTIVES[name].inputs})


def test_a_range_of_scores_that_is_empty_is_refused():
    with pytest.raises(ValueError, match=r"highest above lowest, got 1.0 to 1.0"):
        preference_probability(torch.zeros(2), torch.zeros(2), lowest=1.0, highest=1.0)


def test_the_example_of_how_to_add_one_is_an_objective_as_it_is_printed():
    text = (Path(__file__).parent.parent / "docs/adding_an_objective.md").read_text()
    names = dict(vars(pairwise))
    exec(re.search(r"```python\n(def .*?)```", text, re.DOTALL)[1], names)
    found = names["robust_dpo"](errors_of(0.09, 0.11, 0.1, 0.1), beta=100.0, flip_rate=0.25)
    expected = (-0.75 * math.log(sigma(1)) + 0.25 * math.log(sigma(-1))) / 0.5  # s = 50·0.02
    assert found.loss.item() == pytest.approx(expected, rel=1e-6) and found.margin.item() == pytest.approx(1, rel=1e-5)
