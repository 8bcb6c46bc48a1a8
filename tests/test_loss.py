import json
import math
from pathlib import Path

import pytest
import torch

from xdpo.loss import (
    MAX_EXPONENT,
    OBJECTIVES,
    PairErrors,
    clamp_count,
    diffusion_dpo_loss,
    diffusion_dpo_margin,
    xdpo_loss,
    xdpo_margin,
)

REWARDS = ["appendix_c", "eq9", "eq10"]
HEADLINE = {"beta": 1000.0, "eta": 0.05, "gamma": 1 / 6, "n": 6.0}
VECTORS = json.loads((Path(__file__).parent / "vectors" / "loss_vectors.json").read_text())["cases"]
ERROR_KEYS = ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"]
ROUNDING = 2.0**-24  # of one float32 number, relative

each_reward = pytest.mark.parametrize("reward", REWARDS)
each_vector = pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"{case['form']}-m={case['margin']:.3g}")


def errors_of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, dtype=torch.float64):
    """Pairs from four lists or numbers; the policy's and the reference's tensors all ask for a gradient."""
    values = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return PairErrors(*(torch.tensor(v, dtype=dtype).reshape(-1).requires_grad_() for v in values))


def loss_of(name, errors, **given):
    """An objective's output with its published numbers, but for those given."""
    return OBJECTIVES[name].function(errors, **{**OBJECTIVES[name].hyperparameters, **given})


def swapped(errors):
    return PairErrors(errors.policy_rejected, errors.policy_chosen, errors.reference_rejected, errors.reference_chosen)


def random_errors(count=64, seed=0):
    return PairErrors(*torch.rand(4, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def evaluate(case, dtype):
    """(margin, loss, gradient of the chosen, of the rejected) of one vector, as Python numbers."""
    errors = errors_of(*(case[key] for key in ERROR_KEYS), dtype=dtype)
    numbers = {key: case[key] for key in ("beta", "eta", "gamma", "n")}
    margin = xdpo_margin(errors, **numbers, reward=case["form"])
    loss = xdpo_loss(errors, **numbers, reward=case["form"])
    loss.sum().backward()
    return margin.item(), loss.item(), errors.policy_chosen.grad.item(), errors.policy_rejected.grad.item()


def expected(case):
    return case["margin"], case["loss"], case["grad_policy_chosen"], case["grad_policy_rejected"]


@each_vector
def test_float64_agrees_with_the_vectors_to_nine_digits(case):
    for got, want in zip(evaluate(case, torch.float64), expected(case), strict=True):
        assert math.isclose(got, want, rel_tol=1e-9, abs_tol=0.0)


@each_vector
def test_float32_is_off_by_no_more_than_the_rounding_of_its_inputs_explains(case):
    m, loss, *gradients = expected(case)
    errors = [case[key] for key in ERROR_KEYS]
    differences = [errors[0] - errors[2], errors[1] - errors[3]]
    largest = max(map(abs, errors if case["form"] == "eq10" else differences))
    # No |∂m/∂e| is larger than this: β/2 · (η + γ·n·exp(n·largest)).
    slope = case["beta"] / 2 * (case["eta"] + case["gamma"] * case["n"] * math.exp(case["n"] * largest))
    # Relative error of an exponential or a slope: n times the inputs' absolute rounding, and ten operations.
    relative = (case["n"] * sum(errors) + 10) * ROUNDING
    margin_bound = slope * sum(errors) * ROUNDING + abs(m) * relative
    # |∂L/∂m| = σ(−m) ≤ min(1, L); |∂ ln σ(−m)/∂m| = σ(m) ≤ min(1, exp(m)).
    loss_bound = min(margin_bound, loss * math.expm1(margin_bound)) + 4 * ROUNDING * loss
    gradient_bound = math.expm1(margin_bound * (1 if m > -margin_bound else math.exp(m + margin_bound))) + relative
    underflow = torch.finfo(torch.float32).tiny

    got = evaluate(case, torch.float32)
    assert abs(got[0] - m) <= margin_bound
    assert abs(got[1] - loss) <= loss_bound + underflow
    for got_gradient, gradient in zip(got[2:], gradients, strict=True):
        assert abs(got_gradient - gradient) <= abs(gradient) * gradient_bound + slope * underflow


@each_reward
def test_gradients_are_those_of_finite_differences(reward):
    chosen = torch.tensor([0.12, 0.10, 0.40, 0.30], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.12, 0.30, 0.20, 0.30], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.12, 0.12, 0.25, 0.20], dtype=torch.float64)  # the first pair: policy = reference

    def loss(policy_chosen, policy_rejected):
        errors = PairErrors(policy_chosen, policy_rejected, reference, reference)
        return xdpo_loss(errors, beta=10.0, eta=0.05, gamma=1 / 6, n=6.0, reward=reward)

    assert torch.autograd.gradcheck(loss, (chosen, rejected), eps=1e-6, atol=1e-8, rtol=1e-7)


@each_reward
def test_no_gradient_reaches_the_reference(reward):
    errors = errors_of(0.1, 0.2, 0.15, 0.15)
    (xdpo_loss(errors, **HEADLINE, reward=reward) + diffusion_dpo_loss(errors, beta=1000.0)).sum().backward()
    assert errors.reference_chosen.grad is None
    assert errors.reference_rejected.grad is None
    assert errors.policy_chosen.grad is not None


@each_reward
def test_without_power_term_every_reward_is_diffusion_dpo(reward):
    errors = random_errors()
    margin = xdpo_margin(errors, beta=2000.0, eta=1.0, gamma=0.0, n=6.0, reward=reward)
    torch.testing.assert_close(margin, diffusion_dpo_margin(errors, beta=2000.0), rtol=0, atol=0)
    loss = xdpo_loss(errors, beta=2000.0, eta=1.0, gamma=0.0, n=6.0, reward=reward)
    torch.testing.assert_close(loss, diffusion_dpo_loss(errors, beta=2000.0), rtol=0, atol=0)


def test_diffusion_dpo_by_hand():
    # d_w = −0.01, d_l = +0.01, so m = −(2000/2) · (−0.02) = 20 and the loss is ln(1 + e⁻²⁰).
    errors = errors_of(0.11, 0.13, 0.12, 0.12)
    assert diffusion_dpo_margin(errors, beta=2000.0).item() == pytest.approx(20.0, rel=1e-12)
    assert diffusion_dpo_loss(errors, beta=2000.0).item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-12)


def test_eq9_with_unit_numbers_is_the_chi_po_link():
    errors = random_errors()
    z_chosen = torch.exp(errors.reference_chosen - errors.policy_chosen)
    z_rejected = torch.exp(errors.reference_rejected - errors.policy_rejected)
    link = (z_chosen + z_chosen.log()) - (z_rejected + z_rejected.log())
    margin = xdpo_margin(errors, beta=2.0, eta=1.0, gamma=1.0, n=1.0, reward="eq9")
    torch.testing.assert_close(margin, link, rtol=1e-12, atol=1e-14)


@each_reward
def test_an_untrained_policy_has_loss_ln_2_and_the_slope_of_the_effective_beta(reward):
    error = 0.12
    errors = errors_of(error, error, error, error)
    assert xdpo_margin(errors, **HEADLINE, reward=reward).item() == 0.0
    loss = xdpo_loss(errors, **HEADLINE, reward=reward)
    assert loss.item() == math.log(2)
    loss.sum().backward()
    # |∂L/∂e| = σ(0) · β_eff/2; β_eff = β(η + γn) = 1050, and in eq10 the power's part carries exp(n·e).
    effective_beta = 1000 * (0.05 + math.exp(6 * error)) if reward == "eq10" else 1050
    assert errors.policy_chosen.grad.item() == pytest.approx(effective_beta / 4, rel=1e-12)
    assert errors.policy_rejected.grad.item() == pytest.approx(-effective_beta / 4, rel=1e-12)


@pytest.mark.parametrize("eta, effective_beta", [(0.05, 1050.0), (1.0, 2000.0)])
@pytest.mark.parametrize("reward", ["appendix_c", "eq9"])
def test_near_zero_the_margin_is_diffusion_dpo_at_the_effective_beta(reward, eta, effective_beta):
    errors = errors_of(0.12 - 1e-6, 0.12 + 1e-6, 0.12, 0.12)
    margin = xdpo_margin(errors, beta=1000.0, eta=eta, gamma=1 / 6, n=6.0, reward=reward)
    assert margin.item() == pytest.approx(diffusion_dpo_margin(errors, beta=effective_beta).item(), rel=1e-8)


def test_at_the_size_of_differences_in_practice_the_power_hardly_acts():
    # h(1e-3) − h(0) = 0.05e-3 + (exp(6e-3) − 1)/6 = 0.0010530, against 0.0010500 for its linear term.
    errors = errors_of(1e-3, 0.0, 0.0, 0.0)
    margin = xdpo_margin(errors, beta=2.0, eta=0.05, gamma=1 / 6, n=6.0, reward="appendix_c")
    assert -margin.item() == pytest.approx(0.0010530, abs=5e-8)


def test_away_from_zero_appendix_c_pushes_the_worse_image_harder_and_eq9_the_better():
    differences = torch.tensor([-0.2, 0.0, 0.2], dtype=torch.float64)
    slopes = {}
    for reward in ("appendix_c", "eq9"):
        chosen = (differences + 0.3).requires_grad_()
        rest = torch.full_like(differences, 0.3)
        errors = PairErrors(chosen, rest, rest, rest)
        xdpo_margin(errors, beta=2.0, eta=0.05, gamma=1 / 6, n=6.0, reward=reward).sum().backward()
        slopes[reward] = chosen.grad
    torch.testing.assert_close(slopes["appendix_c"], -(0.05 + torch.exp(6 * differences)))
    torch.testing.assert_close(slopes["eq9"], -(0.05 + torch.exp(-6 * differences)))


@each_reward
def test_swapping_chosen_and_rejected_negates_the_margin(reward):
    errors = random_errors()
    margin = xdpo_margin(errors, **HEADLINE, reward=reward)
    torch.testing.assert_close(xdpo_margin(swapped(errors), **HEADLINE, reward=reward), -margin, rtol=0, atol=0)
    dpo_margin = diffusion_dpo_margin(errors, beta=1000.0)
    assert torch.equal(diffusion_dpo_margin(swapped(errors), beta=1000.0), -dpo_margin)


@pytest.mark.parametrize("reward", ["appendix_c", "eq9"])
def test_float32_keeps_its_digits_where_chosen_and_rejected_nearly_cancel(reward):
    # d_w − d_l = 1e-7: the exponentials differ by a few last bits, so subtracting them would be off by 10 %.
    errors = errors_of([1e-3 + 1e-7, 1e-3], [1e-3, 1e-3 + 1e-7], [0.0, 0.0], [0.0, 0.0], dtype=torch.float32)
    exact = PairErrors(*(error.double() for error in errors))
    numbers = {"beta": 1000.0, "eta": 0.0, "gamma": 1 / 6, "n": 6.0, "reward": reward}
    torch.testing.assert_close(
        xdpo_margin(errors, **numbers).double(), xdpo_margin(exact, **numbers), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_reward
def test_half_precision_is_computed_in_float32(reward, dtype):
    errors = errors_of([0.1, 0.3], [0.2, 0.1], [0.15, 0.2], [0.15, 0.2], dtype=dtype)
    loss = xdpo_loss(errors, **HEADLINE, reward=reward)
    single = xdpo_loss(PairErrors(*(error.float() for error in errors)), **HEADLINE, reward=reward)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, single)
    assert diffusion_dpo_loss(errors, beta=1000.0).dtype == torch.float32


@each_reward
@pytest.mark.parametrize("eta, gamma", [(0.0, 1.0), (0.05, 1 / 6), (1.0, 1.0)])
def test_loss_and_gradients_are_finite_for_extreme_errors(reward, eta, gamma):
    sizes = [0.0, 1e-8, 1e-3, 1.0, 4.9, 5.1, 15.0, 100.0, 1e4]
    grid = torch.tensor(sorted({sign * size for size in sizes for sign in (-1, 1)}))
    d_chosen, d_rejected = torch.cartesian_prod(grid, grid).unbind(1)
    errors = errors_of(  # errors are not negative: a negative d is an error of the reference
        d_chosen.clamp(min=0).tolist(),
        d_rejected.clamp(min=0).tolist(),
        (-d_chosen).clamp(min=0).tolist(),
        (-d_rejected).clamp(min=0).tolist(),
        dtype=torch.float32,
    )
    loss = xdpo_loss(errors, beta=5000.0, eta=eta, gamma=gamma, n=6.0, reward=reward)
    loss.sum().backward()
    gradients = torch.cat([errors.policy_chosen.grad, errors.policy_rejected.grad])
    assert loss.isfinite().all()
    assert gradients.isfinite().all()
    assert gradients.norm().isfinite()  # what gradient clipping computes
    assert (errors.policy_chosen.grad >= 0).all() and (errors.policy_rejected.grad <= 0).all()


def test_beyond_the_limit_the_power_is_flat_and_only_eta_pushes():
    beyond = errors_of(MAX_EXPONENT / 6 + 1, 0.0, 0.0, 0.0)
    margin = xdpo_margin(beyond, beta=2.0, eta=0.5, gamma=1.0, n=6.0, reward="appendix_c")
    margin.sum().backward()
    assert margin.item() == pytest.approx(-(0.5 * (MAX_EXPONENT / 6 + 1) + math.expm1(MAX_EXPONENT)), rel=1e-12)
    assert beyond.policy_chosen.grad.item() == -0.5


@pytest.mark.parametrize("reward, count", [("appendix_c", 2), ("eq9", 1), ("eq10", 3)])
def test_clamped_exponents_are_counted(reward, count):
    # d_w = (6, 0), d_l = (7, −6): appendix_c meets the limit with both of pair 0, eq9 with d_l of pair 1.
    errors = errors_of([6.0, 0.0], [7.0, 0.0], [0.0, 0.0], [0.0, 6.0])
    counted = clamp_count(errors, 6.0, reward)
    assert counted.shape == () and counted.item() == count
    assert loss_of("xdpo", errors, **HEADLINE, reward=reward).clamped.item() == count


@each_reward
def test_the_table_of_losses_gives_the_public_functions_results(reward):
    errors, section = random_errors(), {**HEADLINE, "reward": reward}
    xdpo = loss_of("xdpo", errors, **section)
    assert torch.equal(xdpo.loss, xdpo_loss(errors, **section))
    assert torch.equal(xdpo.margin, xdpo_margin(errors, **section))
    dpo = loss_of("diffusion_dpo", errors, beta=HEADLINE["beta"])
    assert torch.equal(dpo.loss, diffusion_dpo_loss(errors, beta=HEADLINE["beta"]))
    assert dpo.clamped.item() == 0


def test_an_unknown_reward_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown reward 'eq11'; choose from appendix_c, eq9, eq10"):
        xdpo_loss(random_errors(), **HEADLINE, reward="eq11")


def test_errors_of_different_shapes_are_refused_instead_of_broadcast():
    errors = random_errors(4)._replace(reference_chosen=torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"one shape \(B,\), got .*\(4, 1\)"):
        diffusion_dpo_loss(errors, beta=1000.0)
