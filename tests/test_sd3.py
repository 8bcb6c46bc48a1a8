"""Stable Diffusion 3: what its transformer is told equals what the library's pipeline tells it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from flow_pipelines import sd3_pipeline

from xdpo.batch import Conditioning, stack
from xdpo.config import ModelConfig, NoiseConfig
from xdpo.families import check_pipeline_folder, load_parts, pipeline_with

CAPTIONS = ["a cat", "", "a caption that is longer than the eight tokens of CLIP", "word " * 300]


@pytest.fixture(scope="module", params=[True, False], ids=["with T5", "without T5"])
def parts(request, tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("sd3") / "pipeline"
    return load_parts(ModelConfig(pipeline=sd3_pipeline(folder, tiny_tokenizer, t5=request.param)))


def encoded(parts, captions):
    return parts.encode_captions(stack([parts.tokenize(caption)[0] for caption in captions]))


def test_conditioning_equals_the_pipelines_own_bit_for_bit(parts):
    pipeline = pipeline_with(parts, parts.denoiser)
    states, empty_states, pooled, empty_pooled = pipeline.encode_prompt(CAPTIONS, None, None)
    arguments = parts.family.prompt_arguments(encoded(parts, CAPTIONS), encoded(parts, [""] * len(CAPTIONS)))
    assert torch.equal(arguments["prompt_embeds"], states)
    assert torch.equal(arguments["pooled_prompt_embeds"], pooled)
    assert torch.equal(arguments["negative_prompt_embeds"], empty_states)
    assert torch.equal(arguments["negative_pooled_prompt_embeds"], empty_pooled)


def test_entries_have_the_shapes_that_a_cache_is_made_for(parts):
    shapes = {name: tuple(value.shape[1:]) for name, value in encoded(parts, ["a", "b"]).items()}
    assert shapes == parts.family.conditioning_shapes(parts)


def test_a_caption_is_truncated_where_no_encoder_reads_all_of_it(parts):
    has_t5 = "text_encoder_3" in parts.modules
    assert [parts.tokenize(caption)[1] for caption in CAPTIONS] == [False, False, not has_t5, True]


def test_latents_are_shifted_and_scaled_and_decode_to_what_the_pipeline_decodes(parts):
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments, noise = parts.encode_images(pixels), torch.randn(2, *parts.latent_shape(32))
    posterior, config = parts.vae.encode(pixels).latent_dist, parts.vae.config
    latents = parts.family.to_latents(moments, None)
    assert latents.shape[1:] == parts.latent_shape(32)
    assert torch.equal(latents, (posterior.mode() - config.shift_factor) * config.scaling_factor)
    sampled = posterior.mean + posterior.std * noise
    sampled = (sampled - config.shift_factor) * config.scaling_factor
    assert torch.equal(parts.family.to_latents(moments, noise), sampled)
    pipeline = pipeline_with(parts, parts.denoiser)
    theirs = pipeline("a", height=32, width=32, num_inference_steps=1, latents=latents[:1], output_type="pt").images
    latents = pipeline(
        "a", height=32, width=32, num_inference_steps=1, latents=latents[:1], output_type="latent"
    ).images
    ours = parts.family.decode(pipeline, latents) / 2 + 0.5
    assert torch.equal(ours.clamp(0, 1), theirs)


def test_the_prediction_is_what_the_pipeline_asks_of_the_transformer(parts, monkeypatch):
    """At its first step, whose time and noise are known."""
    pipeline, asked = pipeline_with(parts, parts.denoiser), []
    original = parts.denoiser.forward

    def recorded(*arguments, **options):
        asked.append((options, original(*arguments, **options)))
        return asked[-1][1]

    monkeypatch.setattr(parts.denoiser, "forward", recorded)
    latents = torch.randn(1, *parts.latent_shape(32))
    options = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 1, "output_type": "latent"}
    pipeline("a red square", latents=latents, **options)
    monkeypatch.undo()
    ((told, (theirs,)),) = asked
    conditioning = encoded(parts, ["a red square"])
    ours = parts.family.predict(parts.denoiser, latents, told["timestep"], conditioning)
    assert torch.equal(ours, theirs) and told["timestep"].item() == 1000


def test_its_process_is_the_schedulers_flow(parts):
    assert parts.process(NoiseConfig()).shift == 3.0
    assert parts.process(NoiseConfig(shift=1)).shift == 1.0
    with pytest.raises(ValueError, match="temporal_discount counts the timesteps of a diffusion"):
        parts.process(NoiseConfig(weighting="temporal_discount"))


# --- refusals ----------------------------------------------------------------------------------------------


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CONFIGS = {
    "another transformer": (
        "transformer",
        {"_class_name": "FluxTransformer2DModel"},
        "and SD3Transformer2DModel is meant",
    ),
    "a transformer with a mask": ("transformer", {"in_channels": 9}, r"takes 9 channels and gives 4 .* have 4"),
    "another autoencoder": ("vae", {"latent_channels": 8}, r"takes 4 channels .* have 8"),
    "an autoencoder without a shift": ("vae", {"shift_factor": None}, "no shift_factor"),
    "other pooled states": ("text_encoder_2", {"projection_dim": 8}, r"are 16 wide together .* takes 20"),
    "wider states": ("transformer", {"joint_attention_dim": 24}, r"are 32 wide together .* T5's 40 .* attends to 24"),
    "another T5": ("text_encoder_3", {"d_model": 48}, r"T5's 48 \(d_model\)"),
    "words that T5 doesn't know": ("text_encoder_3", {"vocab_size": 20}, r"tokenizer_3's last token is number \d+"),
    "a diffusion's scheduler": ("scheduler", {"_class_name": "DDIMScheduler"}, "DDIMScheduler doesn't sample a flow"),
}


@pytest.mark.parametrize(("part", "changes", "message"), CONFIGS.values(), ids=CONFIGS)
def test_what_does_not_fit_is_refused_before_weights_are_read(sd3, tmp_path, part, changes, message):
    folder = Path(shutil.copytree(sd3, tmp_path / "mine"))
    edit(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **changes)
    with pytest.raises(ValueError, match=message):
        check_pipeline_folder(str(folder))


def test_conditioning_travels_by_its_entries(parts):
    """A cache keeps no zeros for a T5 that isn't there."""
    entries = encoded(parts, ["a"])
    assert isinstance(entries, Conditioning) and ("t5" in entries) == ("text_encoder_3" in parts.modules)
