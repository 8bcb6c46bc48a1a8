"""Flow matching: times, noise, targets and weights against the sampler and against formulas in float64."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from xdpo.noise import FlowProcess, Process, Weighting, draw_normals

SHAPE = (16, 8, 12)  # 4 × 6 tokens
FLUX = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64}
SCHEDULERS = {
    "SD 3": {"shift": 3.0},
    "no shift": {},
    "FLUX": FLUX,
    "FLUX, linear": {**FLUX, "time_shift_type": "linear"},
}
each_scheduler = pytest.mark.parametrize("options", SCHEDULERS.values(), ids=SCHEDULERS)


def process_of(**options):
    return FlowProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(**options))


@pytest.fixture
def batch():
    """Latents, noise and times from the cleanest to the noisiest."""
    source = torch.Generator().manual_seed(0)
    times = torch.tensor([0.0, 0.7, 250.0, 512.4, 999.0, 1000.0])
    latents, noise = torch.randn(2, len(times), *SHAPE, generator=source)
    return latents, noise, times


def test_noise_target_and_what_is_denoised_equal_the_formulas_in_float64(batch):
    latents, noise, times = batch
    exact, exact_noise = latents.double(), noise.double()
    sigma = times.double().view(-1, 1, 1, 1) / 1000
    process = process_of(shift=3.0)
    noisy, target = process.add_noise(*batch), process.target(*batch)

    torch.testing.assert_close(noisy.double(), (1 - sigma) * exact + sigma * exact_noise, rtol=0, atol=1e-6)
    torch.testing.assert_close(target.double(), exact_noise - exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(process.denoised(noisy, target, times), latents, rtol=0, atol=2e-6)
    assert torch.equal(noisy[0], latents[0]) and torch.equal(noisy[-1], noise[-1])


def test_noised_latents_equal_those_of_the_scheduler(batch):
    latents, noise, _ = batch
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = scheduler.timesteps[::200].sort().values
    theirs = scheduler.scale_noise(latents[: len(times)], times, noise[: len(times)])
    ours = FlowProcess.from_scheduler(scheduler).add_noise(latents[: len(times)], noise[: len(times)], times)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_half_precision_is_promoted(batch):
    latents, noise, times = batch
    process = process_of()
    for function in (process.add_noise, process.target, process.denoised):
        got = function(latents.bfloat16(), noise.bfloat16(), times)
        assert got.dtype == torch.float32
        assert torch.equal(got, function(latents.bfloat16().float(), noise.bfloat16().float(), times))


@each_scheduler
def test_times_are_shifted_as_the_sampler_shifts_its_own(options):
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    sigmas = torch.linspace(1, 0.1, 10)
    mu = calculate_shift(24, 16, 64) if scheduler.config.use_dynamic_shifting else None
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=mu)
    process = FlowProcess.from_scheduler(scheduler)
    torch.testing.assert_close(process.shifted(sigmas, SHAPE), scheduler.sigmas[:-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(1000 * process.shifted(sigmas, SHAPE), scheduler.timesteps, rtol=1e-6, atol=0)


@each_scheduler
def test_a_drawn_time_is_the_shifted_sigmoid_of_a_normal_number(options):
    process = process_of(**options)
    times = process.draw_times(7, [3, 10, 11], SHAPE)
    shift = options.get("shift", 1.0)
    if "use_dynamic_shifting" in options:
        mu = 0.5 + (1.15 - 0.5) * (24 - 16) / (64 - 16)
        shift = mu if options.get("time_shift_type") == "linear" else math.exp(mu)
    odds = draw_normals(7, [3, 10, 11], "timestep").double().exp() * shift  # σ/(1−σ)
    torch.testing.assert_close(times.double(), 1000 * odds / (1 + odds), rtol=1e-6, atol=0)
    assert times.dtype == torch.float32
    assert torch.equal(process.draw_times(7, torch.tensor([10]), SHAPE), times[1:2])


def test_drawn_times_are_logit_normal():
    normals = draw_normals(0, range(4000), "timestep")
    assert normals.mean().abs() < 4 / 4000**0.5 and (normals.var() - 1).abs() < 4 * (2 / 4000) ** 0.5
    times = process_of().draw_times(0, range(200), SHAPE)
    assert (times > 0).all() and (times < 1000).all()


def test_larger_images_get_noisier_times_where_the_shift_is_by_resolution():
    process = process_of(**FLUX)
    small, large = process.draw_times(0, range(20), (16, 8, 8)), process.draw_times(0, range(20), (16, 16, 16))
    assert (large > small).all()


def test_a_config_s_shift_replaces_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler(**FLUX)
    assert FlowProcess.from_scheduler(scheduler, shift=2.0).shift == 2.0


def test_min_snr_is_that_of_an_error_of_x0():
    process = FlowProcess(weighting=Weighting("min_snr", min_snr_gamma=5.0))
    times = torch.tensor([0.0, 100.0, 300.0, 309.0, 310.0, 900.0, 1000.0])
    sigma = times.double() / 1000
    want = ((1 - sigma) ** 2 / sigma**2).clamp(max=5.0) * sigma**2
    torch.testing.assert_close(process.weights(times).double(), want, rtol=1e-5, atol=0)
    assert torch.equal(FlowProcess().weights(times), torch.ones(7))


def test_what_is_no_flow_is_refused():
    with pytest.raises(ValueError, match="DDIMScheduler doesn't sample a flow"):
        FlowProcess.from_scheduler(DDIMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match="has invert_sigmas"):
        process_of(invert_sigmas=True)
    with pytest.raises(ValueError, match="has shift 0"):
        process_of(shift=0.0)
    with pytest.raises(ValueError, match="temporal_discount counts the timesteps of a diffusion"):
        FlowProcess(weighting=Weighting("temporal_discount"))


def test_it_is_a_process():
    process: Process = process_of()
    assert process.to("meta") == process
