"""Whole trainings of flows: Stable Diffusion 3 and FLUX.1, and what becomes of them."""

import math

import diffusers
import numpy as np
import pytest
import torch
from flow_pipelines import sd3_pipeline
from forks import launch
from PIL import Image
from tolerances import assert_same_but_for_rounding, assert_same_image
from training_runs import SMALL_RUN, assert_same_run, command, rows_of

import generate
from xdpo import families, precompute, watch
from xdpo.batch import Batch, stack
from xdpo.config import ModelConfig, load_config
from xdpo.data import Split
from xdpo.families import check_config, check_model, load_parts
from xdpo.families.flux import FLUX
from xdpo.loss import OBJECTIVES
from xdpo.models import load_model, make_policy, make_reference, read_model_spec, resolve_model
from xdpo.noisy import NoisyBatchMaker
from xdpo.reference import AdapterOff, Frozen
from xdpo.sampling.images import is_truncated, sample_images
from xdpo.step import inputs_of, measure, preference_loss

SIZE = ("data.resolution=32", "loss.name=diffusion_dpo", "loss.beta=100", "optim.learning_rate=1e-3")
SAMPLES = ("samples.every=4", "samples.prompts=[a cat]", "train.max_steps=4", "checkpoint.every=2")
LORA = ("model.trainable=lora", "model.lora_rank=2", "model.lora_alpha=2")
HALVED = "model.frozen_precision=bf16"
each_flow = pytest.mark.parametrize("flow", ["sd3", "flux"])
sd3_and_slow_flux = pytest.mark.parametrize("flow", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
flux_and_slow_sd3 = pytest.mark.parametrize("flow", ["flux", pytest.param("sd3", marks=pytest.mark.slow)])


@pytest.fixture
def pipeline(request, flow):
    return request.getfixturevalue(flow)


@pytest.fixture
def samples(monkeypatch):
    """The images of sample sheets: policy and reference in turn."""
    drawn, original = [], watch.sample_images
    monkeypatch.setattr(watch, "sample_images", lambda *a, **k: drawn.append(original(*a, **k)) or drawn[-1])
    return drawn


def draw(pipeline, guidance=7.5):
    """The one sample of these runs, drawn by a pipeline of the library in a batch of the same size."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(0) for _ in range(4)]
    options = {"num_inference_steps": 2, "guidance_scale": guidance, "height": 32, "width": 32}
    return np.asarray(pipeline(["a cat"] * 4, generator=generators, **options).images[0])


@each_flow
def test_a_full_training_starts_at_ln_2_and_its_export_draws_what_it_drew(run, pipeline, samples):
    status, folder = run("run", f"model.pipeline={pipeline}", *SIZE, *SAMPLES)
    assert status == 0
    first, *_, last = rows_of(folder)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7) and first["margin"] == first["d_chosen"] == 0
    assert last["margin"] != 0

    (reference,), (policy,) = samples[-2:]
    base = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    assert_same_image(draw(base), reference)
    kind = type(base.transformer)
    base.transformer = kind.from_pretrained(folder / "export", subfolder="transformer")
    drawn = draw(base)
    assert_same_image(drawn, policy)
    with pytest.raises(AssertionError):
        assert_same_image(drawn, reference)


@sd3_and_slow_flux
@pytest.mark.slow
def test_adapters_resume_bit_for_bit_and_are_loaded_by_the_library(run, pipeline, samples, tmp_path):
    options = (f"model.pipeline={pipeline}", *SIZE, *SAMPLES, *LORA)
    _, whole = run("whole", *options)
    run("parts", *options, "train.max_steps=2", "samples.every=0")
    status, parts = run("parts", *options)
    assert status == 0
    assert_same_run(whole, parts)
    assert rows_of(whole)[0]["margin"] == 0

    (reference,), (policy,) = samples[-2:]
    base = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    assert_same_image(draw(base), reference)  # with its adapter off it is the base
    base.load_lora_weights(whole / "export")
    assert_same_image(draw(base), policy)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    quick = ["--steps", "2", "--image-size", "32", "--batch-size", "4"]
    output = tmp_path / "images"
    arguments = ["--model", str(whole), "--prompts", str(prompts), "--output", str(output), *quick]
    assert generate.main([*arguments, "--guidance", "7.5"]) == 0
    (image,) = output.rglob("*.png")
    assert_same_image(Image.open(image), policy)


@pytest.mark.parametrize(
    ("flow", "trained"), [("flux", ()), pytest.param("sd3", (), marks=pytest.mark.slow), ("sd3", (*LORA, HALVED))]
)
def test_caches_give_the_same_run_in_bf16(run, pipeline, tmp_path, capsys, trained):
    options = (f"model.pipeline={pipeline}", *SIZE, "train.max_steps=2", "checkpoint.every=2", "compute.precision=bf16")
    options += trained
    caches = [f"cache.{name}={tmp_path / name}" for name in ("examples", "reference")] + ["cache.dtype=fp32"]
    _, plain = run("plain", *options)
    run("recording", *options, *caches)
    capsys.readouterr()
    _, cached = run("cached", *options, *caches)
    assert "so the reference is not loaded" in capsys.readouterr().out
    assert_same_run(plain, cached)
    assert rows_of(plain)[0]["margin"] == 0


@pytest.mark.slow
@each_flow
def test_one_process_and_two_log_the_same_figures(run, pipeline, small_pairs, tmp_path):
    options = (f"model.pipeline={pipeline}", *SIZE, "train.micro_batch_pairs=1", "train.max_steps=4")
    _, one = run("one", *options)
    ended = launch("train_xdpo.py", command(pipeline, small_pairs, tmp_path / "two", *options), processes=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_same_but_for_rounding(one, tmp_path / "two")


# --- the micro-step ----------------------------------------------------------------------------------------


def micro_step(pipeline, *overrides):
    """Settings, parts, and the noisy batch of two pairs of random pixels."""
    fixed = [word for word in SMALL_RUN if not word.startswith("data.resolution")]
    paths = [f"model.pipeline={pipeline}", "data.path=none", "output_dir=none"]
    settings = load_config("configs/base.yaml", [*fixed, *SIZE, *paths, *overrides])
    parts = load_parts(settings.model)
    make_noisy = NoisyBatchMaker(parts, parts.process(settings.noise), settings, torch.device("cpu"))
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = [parts.tokenize(caption)[0] for caption in ("a cat", "a dog")]
    tokens = type(tokens[0])({name: torch.stack([each[name] for each in tokens]) for name in tokens[0]})
    batch = Batch(torch.arange(2), torch.arange(2), ["0", "1"], pixels, tokens, 0, [])
    return settings, parts, make_noisy(batch, 0)


@each_flow
def test_loss_and_gradient_equal_an_independent_formula_in_float64(pipeline):
    settings, parts, noisy = micro_step(pipeline, "compute.gradient_checkpointing=true")
    reference = make_reference(parts, settings.model, settings.compute)
    policy = make_policy(parts, settings.model, settings.compute)
    with torch.no_grad():  # somewhere else than the reference
        for index, weight in enumerate(policy.parameters()):
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
    errors = measure(policy, Frozen(reference), noisy, settings.loss).errors
    loss = preference_loss(errors, settings.loss).loss.mean()
    loss.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in policy.parameters()]).double()
    policy.zero_grad()

    sigma = noisy.timesteps.double().view(-1, 1, 1, 1) / 1000
    x_0 = noisy.latents.double() - sigma * noisy.targets.double()
    velocity = (noisy.latents.double() - x_0) / sigma
    double = type(noisy.conditioning)({name: value.double() for name, value in noisy.conditioning.items()})
    means = []
    for network in (policy.double(), reference.double()):
        predicted = parts.family.predict(network, noisy.latents.double(), noisy.timesteps.double(), double)
        means.append((predicted - velocity).square().mean((1, 2, 3)))
    difference = means[0] - means[1].detach()
    exact = torch.log1p(torch.exp(50.0 * (difference[:2] - difference[2:]))).mean()
    exact.backward()
    exact_gradient = torch.cat([weight.grad.flatten() for weight in policy.parameters()])
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert (gradient - exact_gradient).norm() < 1e-3 * exact_gradient.norm()


@sd3_and_slow_flux
def test_every_objective_takes_a_step(pipeline):
    settings, parts, noisy = micro_step(pipeline, *LORA)
    policy = make_policy(parts, settings.model, settings.compute)
    reference = AdapterOff(policy)
    for name in OBJECTIVES:
        config = load_config("configs/base.yaml", [f"loss.name={name}", "output_dir=none"]).loss
        measured = measure(policy, reference, noisy, config)
        inputs = dict(measured.inputs)
        if "z0" in inputs_of(config):
            inputs["z0"] = torch.zeros(())
        if "optimality" in inputs_of(config):
            inputs["optimality"] = torch.tensor([0.9, 0.2]).repeat_interleave(len(measured.errors.policy_chosen))
        policy.zero_grad()
        preference_loss(measured.errors, config, inputs).loss.mean().backward()
        gradients = [weight.grad for weight in policy.parameters() if weight.grad is not None]
        norms = [gradient.norm() for gradient in gradients]
        assert all(norm.isfinite() for norm in norms) and sum(norms) > 0, name


@flux_and_slow_sd3
def test_self_play_samples_with_the_pipeline(run, pipeline):
    play = ("loss.name=seppo", "loss.beta=100", "self_play.every=2", "self_play.num_inference_steps=2")
    status, folder = run("run", f"model.pipeline={pipeline}", *SIZE, *play, "train.max_steps=3", "checkpoint.every=3")
    assert status == 0
    latents = [row for row in rows_of(folder) if "loss" in row]
    assert len(latents) == 3 and (folder / "snapshots").is_dir()


# --- how much of a caption T5 reads ------------------------------------------------------------------------


@each_flow
def test_t5_reads_as_many_tokens_as_asked_for_in_training_and_sampling(pipeline, flow):
    caption, length = "word " * 8, 24
    parts = load_parts(ModelConfig(pipeline=pipeline, t5_tokens=length))
    sampler = families.pipeline_with(parts, parts.denoiser)
    tokens, is_cut = parts.tokenize(caption)
    conditioning = parts.encode_captions(stack([tokens]))
    prompts = (caption, None, None) if flow == "sd3" else (caption,)
    states, *_ = sampler.encode_prompt(*prompts, max_sequence_length=length)
    arguments = parts.family.prompt_arguments(conditioning, conditioning)
    assert torch.equal(arguments["prompt_embeds"], states) and states.shape[1] == (32 if flow == "sd3" else 24)
    whole = load_parts(ModelConfig(pipeline=pipeline))
    assert is_cut and is_truncated(sampler, caption) and not whole.tokenize(caption)[1]
    shapes = {name: tuple(value.shape[1:]) for name, value in conditioning.items()}
    assert shapes == parts.family.conditioning_shapes(parts)

    options = {"num_inference_steps": 1, "guidance_scale": 2.0}
    (drawn,) = sample_images(sampler, [caption], seed=0, image_size=32, chunk_size=1, **options)
    theirs = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    generator = [torch.Generator().manual_seed(0)]
    options |= {"height": 32, "width": 32, "generator": generator, "max_sequence_length": length}
    assert np.array_equal(np.asarray(theirs([caption], **options).images[0]), np.asarray(drawn))


def test_a_cache_of_another_length_is_another_cache(sd3, small_pipeline):
    """A length that is the pipeline's is no choice: caches from before there was one are its own."""
    for length, kept in ((None, {}), (256, {}), (24, {"T5 tokens": 24})):
        assert families.caption_choices(ModelConfig(pipeline=sd3, t5_tokens=length)) == kept
    settings = load_config("configs/base.yaml", [f"model.pipeline={sd3}", "output_dir=none", "model.t5_tokens=24"])
    assert precompute.example_key(settings, Split.TRAIN)["T5 tokens"] == 24
    with pytest.raises(ValueError, match=r"model\.t5_tokens: Stable Diffusion 1\.x and 2\.x has no such choice"):
        check_model(ModelConfig(pipeline=small_pipeline, t5_tokens=24))


def test_without_t5_there_are_no_tokens_to_choose(tmp_path, tiny_tokenizer):
    folder = sd3_pipeline(tmp_path / "sd3", tiny_tokenizer, t5=False)
    with pytest.raises(ValueError, match=r"model\.t5_tokens \(got 24\): this pipeline has no T5"):
        check_model(ModelConfig(pipeline=folder, t5_tokens=24))


def test_images_of_a_run_and_of_a_named_model_are_made_with_their_tokens(run, sd3):
    _, folder = run("run", f"model.pipeline={sd3}", *SIZE, *LORA, "model.t5_tokens=24", "train.max_steps=1")
    model = resolve_model(*read_model_spec(str(folder)))
    assert model.identity["t5_tokens"] == 24
    assert load_model(model).caption_choices == {"T5 tokens": 24}
    spec = folder.parent / "spec.yaml"
    spec.write_text(f"base: {sd3}\nt5_tokens: 12\n")
    base = resolve_model(*read_model_spec(str(spec)))
    assert base.identity["t5_tokens"] == 12 and load_model(base).caption_choices == {"T5 tokens": 12}
    assert resolve_model(*read_model_spec(sd3, t5_tokens=12)).identity == base.identity


# --- what can't be sampled or trained ----------------------------------------------------------------------

GENERATED = {
    "half a token": (["--image-size", "24"], "must be a multiple of 16"),
    "a diffusion's scheduler": (["--scheduler", "ddim"], "--scheduler ddim samples diffusions, and FLUX.1 is a flow"),
}


@pytest.mark.parametrize(("options", "message"), GENERATED.values(), ids=GENERATED)
def test_what_a_flow_can_not_sample_is_refused_before_weights_are_loaded(flux, tmp_path, capsys, options, message):
    arguments = ["--model", flux, "--prompts", "tinyprompts", "--output", str(tmp_path / "images"), *options]
    assert generate.main(arguments) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "images").exists()


def test_images_are_drawn_with_the_familys_guidance_unless_another_is_asked_for():
    for options, scale in ([], 3.5), (["--guidance", "2"], 2.0):
        options = generate.build_parser().parse_args(["--model", "m", "--prompts", "p", "--output", "o", *options])
        assert generate.settings_of_family(generate.build_settings(options), options, FLUX).guidance_scale == scale


REFUSED = {
    "a diffusion's weighting": ("sd3", "noise.weighting=temporal_discount", "counts the timesteps of a diffusion"),
    "a side of half a token": (
        "flux",
        "data.resolution=24",
        r"\(got 24\) must be a multiple of 16 for FLUX",
    ),
    "kernels that aren't there": ("sd3", "compute.attention=eager", "eager isn't available for Stable Diffusion 3"),
    "guidance that nobody is told": ("sd3", "model.guidance=3", r"model\.guidance: Stable Diffusion 3 and 3\.5 has no"),
    "another family": ("sd3", "model.family=FluxPipeline", r"config is for FLUX\.1, .* is Stable Diffusion 3 and 3\.5"),
    "no empty caption of its own": ("flux", "model.empty_caption=zeros", r"model\.empty_caption: FLUX\.1 has no such"),
    "a flow's shift in a diffusion": ("small_pipeline", "noise.shift=3", r"noise\.shift \(got 3\) acts in flows alone"),
}


@pytest.mark.parametrize(("model", "override", "message"), REFUSED.values(), ids=REFUSED)
def test_a_config_for_another_model_is_refused(request, model, override, message):
    paths = [f"model.pipeline={request.getfixturevalue(model)}", "output_dir=none"]
    with pytest.raises(ValueError, match=message):
        check_config(load_config("configs/base.yaml", [*paths, override]))


def test_it_is_refused_before_weights_are_loaded(run, flux, monkeypatch, capsys):
    monkeypatch.setattr(families, "load_parts", lambda *_, **__: pytest.fail("weights were loaded"))
    assert run("run", f"model.pipeline={flux}", "data.resolution=24")[0] == 1
    assert "must be a multiple of 16" in capsys.readouterr().err
