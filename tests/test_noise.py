from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from xdpo.noise import (
    DiffusionProcess,
    Weighting,
    draw_noise,
    draw_timesteps,
    generator,
    permutation,
)

SHAPE = (4, 8, 8)
ALL_TIMESTEPS = torch.arange(1000)
each_beta_schedule = pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
each_prediction = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])


def scheduler_of(beta_schedule="scaled_linear", prediction_type="epsilon", **others):
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        **others,
    )


def first_numbers(*key):
    return torch.rand(4, generator=generator(*key))


@pytest.fixture
def batch():
    source = torch.Generator().manual_seed(0)
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    latents, noise = torch.randn(2, len(timesteps), *SHAPE, generator=source)
    return latents, noise, timesteps


@each_beta_schedule
@each_prediction
def test_noised_latents_and_targets_equal_diffusers(batch, beta_schedule, prediction_type):
    latents, noise, timesteps = batch
    scheduler = scheduler_of(beta_schedule, prediction_type)
    schedule = DiffusionProcess.from_scheduler(scheduler)
    theirs = scheduler.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(schedule.add_noise(*batch), theirs, rtol=0, atol=1e-6)
    their_target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(schedule.target(*batch), their_target, rtol=0, atol=1e-6)


@each_beta_schedule
@each_prediction
def test_latents_come_back_from_the_right_prediction(batch, beta_schedule, prediction_type):
    latents, _, timesteps = batch
    schedule = DiffusionProcess.from_scheduler(scheduler_of(beta_schedule, prediction_type))
    restored = schedule.denoised(schedule.add_noise(*batch), schedule.target(*batch), timesteps)
    signal = schedule.alphas_cumprod[timesteps].sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(restored * signal, latents * signal, rtol=0, atol=1e-6)


@each_prediction
def test_half_precision_latents_are_noised_in_float32(batch, prediction_type):
    latents, noise, timesteps = batch
    schedule = DiffusionProcess.from_scheduler(scheduler_of(prediction_type=prediction_type))
    for function in (schedule.add_noise, schedule.target):
        got = function(latents.bfloat16(), noise.bfloat16(), timesteps)
        want = function(latents.bfloat16().float(), noise.bfloat16().float(), timesteps)
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


def test_a_sample_draws_the_same_whatever_batch_it_is_in():
    together = draw_noise(7, [3, 10, 11], SHAPE)
    alone = draw_noise(7, [10], SHAPE)
    assert torch.equal(together[1], alone[0])
    assert torch.equal(draw_timesteps(7, [3, 10, 11], 1000)[1:2], draw_timesteps(7, torch.tensor([10]), 1000))


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    draw_noise(0, [0], SHAPE)
    draw_timesteps(0, [0], 1000)
    permutation(0, 0, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_position_and_stream_each_change_the_draw():
    keys = [(0, 0, "noise"), (1, 0, "noise"), (0, 1, "noise"), (0, 0, "timestep"), (1, 1, "noise")]
    draws = [tuple(first_numbers(*key).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    assert torch.equal(first_numbers(*keys[0]), first_numbers(*keys[0]))


def test_seeds_that_differ_above_the_low_32_bits_differ():
    assert not torch.equal(first_numbers(5, 0, "noise"), first_numbers(5 + 2**32, 0, "noise"))
    assert not torch.equal(first_numbers(5, 9, "noise"), first_numbers(5, 9 + 2**32, "noise"))


def test_an_epochs_order_is_a_permutation_of_its_own():
    order = permutation(0, 0, 1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(order, permutation(0, 0, 1000))
    assert not torch.equal(order, permutation(0, 1, 1000))
    assert not torch.equal(order, permutation(1, 0, 1000))


def test_timesteps_are_uniform():
    bins = 20
    timesteps = draw_timesteps(0, range(4000), 1000)
    assert timesteps.shape == (4000,) and timesteps.dtype == torch.long
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    counts = torch.bincount(timesteps * bins // 1000, minlength=bins).double()
    chi_square = ((counts - 4000 / bins) ** 2 / (4000 / bins)).sum()
    assert chi_square < 43.8  # 99.9th percentile at 19 degrees of freedom


def test_noise_is_standard_normal_over_neighbouring_positions():
    noise = draw_noise(0, range(200), SHAPE, shared=False)
    assert noise.dtype == torch.float32
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5
    assert (noise.var() - 1).abs() < 4 * (2 / noise.numel()) ** 0.5


def test_a_pair_shares_its_noise_unless_told_otherwise():
    shared = draw_noise(0, [4, 5], SHAPE)
    own = draw_noise(0, [4, 5], SHAPE, shared=False)
    assert shared.shape == own.shape == (4, *SHAPE)
    assert torch.equal(shared[:2], shared[2:])
    assert torch.equal(own[:2], shared[:2])  # the chosen image's noise doesn't depend on the choice
    assert (own[:2] != own[2:]).float().mean() > 0.99


def test_noise_for_another_purpose_is_another_draw():
    noise, posterior = draw_noise(0, [4], SHAPE), draw_noise(0, [4], SHAPE, stream="posterior")
    assert (noise != posterior).float().mean() > 0.99


def test_constant_weights_are_one():
    schedule = DiffusionProcess.from_scheduler(scheduler_of())
    assert torch.equal(schedule.weights(ALL_TIMESTEPS), torch.ones(1000))


@each_beta_schedule
@each_prediction
def test_min_snr_agrees_with_diffusers_snr(beta_schedule, prediction_type):
    scheduler = scheduler_of(beta_schedule, prediction_type)
    snr = compute_snr(scheduler, ALL_TIMESTEPS)
    want = snr.clamp(max=5.0) / (snr if prediction_type == "epsilon" else snr + 1)
    schedule = DiffusionProcess.from_scheduler(scheduler, Weighting("min_snr"))
    torch.testing.assert_close(schedule.weights(ALL_TIMESTEPS), want, rtol=1e-5, atol=0)


@each_prediction
def test_min_snr_is_finite_where_the_last_step_has_no_signal(prediction_type):
    scheduler = scheduler_of(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    alphas_cumprod = scheduler.alphas_cumprod.clone().index_fill(0, torch.tensor(999), 0)
    schedule = DiffusionProcess(alphas_cumprod, prediction_type, Weighting("min_snr"))
    assert schedule.weights(ALL_TIMESTEPS).isfinite().all()


def test_the_temporal_discount_falls_by_its_factor_per_sampling_step_from_the_noisiest():
    schedule = DiffusionProcess.from_scheduler(scheduler_of(), Weighting("temporal_discount", discount=0.9))
    weights = schedule.weights(ALL_TIMESTEPS)
    assert weights.dtype == torch.float32
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-6)
    assert (weights.diff() > 0).all()  # largest at t = T−1
    assert (weights[979] / weights[999]).item() == pytest.approx(0.9, rel=1e-6)  # 20 of 1000 = 1 of 50 steps
    some = schedule.weights(torch.tensor([999, 0]))
    assert torch.equal(some, weights[[999, 0]])


def test_an_unknown_weighting_is_named_with_the_choices():
    with pytest.raises(ValueError, match="unknown timestep weighting 'snr'; choose from constant, min_snr"):
        DiffusionProcess.from_scheduler(scheduler_of(), Weighting("snr"))


def test_an_untrainable_scheduler_is_refused():
    with pytest.raises(ValueError, match="prediction type 'sample' can't be trained"):
        DiffusionProcess.from_scheduler(scheduler_of(prediction_type="sample"))
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        DiffusionProcess.from_scheduler(FlowMatchEulerDiscreteScheduler())


CONTRADICTIONS = {
    "no signal at the last step, and noise predicted": ({"rescale_betas_zero_snr": True}, "holds no signal"),
    "betas above 1": ({"trained_betas": [0.5, 1.5, 0.5, 1.5]}, "between 1 and 0"),
    "betas below 0": ({"trained_betas": [0.1, -0.5, 0.1]}, "between 1 and 0"),
    "betas that are no numbers": ({"trained_betas": [0.1, float("nan")]}, "between 1 and 0"),
}


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_scheduler_whose_settings_contradict_each_other_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionProcess.from_scheduler(scheduler_of(**options))


def test_a_last_step_without_signal_is_trained_where_v_is_predicted():
    schedule = DiffusionProcess.from_scheduler(
        scheduler_of(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    )
    assert schedule.alphas_cumprod[-1] < 1e-6


def test_a_schedule_keeps_float32_and_moves_between_devices():
    half = SimpleNamespace(
        alphas_cumprod=torch.linspace(0.9, 0.1, 10).half(), config=SimpleNamespace(prediction_type="epsilon")
    )
    schedule = DiffusionProcess.from_scheduler(half)
    assert schedule.alphas_cumprod.dtype == torch.float32 and len(schedule) == 10
    moved = schedule.to("meta")
    assert moved.alphas_cumprod.device.type == "meta" and moved.prediction_type == "epsilon"
