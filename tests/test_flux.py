"""FLUX.1: what its transformer is told equals what the library's pipeline tells it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from xdpo.batch import stack
from xdpo.config import ModelConfig, NoiseConfig
from xdpo.families import check_pipeline_folder, load_parts, pipeline_with
from xdpo.families.flux import FLUX, image_ids, pack, unpack

CAPTIONS = ["a cat", "", "a caption that is longer than the eight tokens of CLIP", "word " * 600]


@pytest.fixture(scope="module")
def parts(flux):
    return load_parts(ModelConfig(pipeline=flux))


def encoded(parts, captions):
    return parts.encode_captions(stack([parts.tokenize(caption)[0] for caption in captions]))


def test_conditioning_equals_the_pipelines_own_bit_for_bit(parts):
    pipeline, captions = pipeline_with(parts, parts.denoiser), encoded(parts, CAPTIONS)
    states, pooled, text_ids = pipeline.encode_prompt(CAPTIONS)
    arguments = parts.family.prompt_arguments(captions, encoded(parts, [""]))
    assert torch.equal(arguments["prompt_embeds"], states) and not text_ids.any()
    assert torch.equal(arguments["pooled_prompt_embeds"], pooled)
    shapes = {name: tuple(value.shape[1:]) for name, value in captions.items()}
    assert shapes == parts.family.conditioning_shapes(parts)


def test_t5_is_not_run_in_fp16_which_it_overflows(parts):
    with torch.autocast("cpu", torch.float16):
        states = encoded(parts, ["a cat"])["text"]
    assert torch.equal(states, encoded(parts, ["a cat"])["text"])


def test_a_caption_is_truncated_where_t5_does_not_read_all_of_it(parts):
    assert [parts.tokenize(caption)[1] for caption in CAPTIONS] == [False, False, False, True]


def test_latents_are_packed_as_the_pipeline_packs_them():
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    tokens = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(pack(latents), tokens)
    assert torch.equal(unpack(tokens, 6), latents)
    assert torch.equal(FluxPipeline._unpack_latents(tokens, 48, 64, 8), latents)
    theirs = FluxPipeline._prepare_latent_image_ids(2, 3, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(3, 4).float(), theirs)


def test_latents_are_shifted_and_scaled_and_decode_to_what_the_pipeline_decodes(parts):
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior, config = parts.vae.encode(pixels).latent_dist, parts.vae.config
    latents = parts.family.to_latents(parts.encode_images(pixels), None)
    assert torch.equal(latents, (posterior.mode() - config.shift_factor) * config.scaling_factor)
    pipeline, options = pipeline_with(parts, parts.denoiser), {"height": 32, "width": 32, "num_inference_steps": 1}
    theirs = pipeline("a", latents=pack(latents), output_type="pt", **options).images
    tokens = pipeline("a", latents=pack(latents), output_type="latent", **options).images
    assert torch.equal((parts.family.decode(pipeline, tokens) / 2 + 0.5).clamp(0, 1), theirs)


def test_the_prediction_is_what_the_pipeline_asks_of_the_transformer(parts, flux, monkeypatch):
    """At its first step, with the guidance that the config asks for."""
    pipeline, asked = pipeline_with(parts, parts.denoiser), []
    original = parts.denoiser.forward

    def recorded(*arguments, **options):
        asked.append((options, original(*arguments, **options)))
        return asked[-1][1]

    latents = torch.randn(1, *parts.latent_shape(32))
    options = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent"}
    monkeypatch.setattr(parts.denoiser, "forward", recorded)
    for guidance in (3.5, 1.0):
        pipeline("a red square", latents=pack(latents), guidance_scale=guidance, **options)
    monkeypatch.undo()
    conditioning = encoded(parts, ["a red square"])
    predictions = []
    for guidance, (told, (theirs,)) in zip((3.5, 1.0), asked, strict=True):
        family = load_parts(ModelConfig(pipeline=flux, guidance=guidance)).family
        times = 1000 * told["timestep"]
        predictions.append(family.predict(parts.denoiser, latents, times, conditioning))
        assert torch.equal(predictions[-1], unpack(theirs, latents.shape[-1])) and times.item() == 1000
    assert not torch.equal(*predictions)
    assert torch.equal(parts.family.predict(parts.denoiser, latents, times, conditioning), predictions[0])


def test_times_are_shifted_by_the_resolution(parts):
    process = parts.process(NoiseConfig())
    small, large = process.draw_times(0, [0], (4, 2, 2)), process.draw_times(0, [0], (4, 8, 8))
    assert large > small
    assert torch.equal(parts.process(NoiseConfig(shift=1)).draw_times(0, [0], (4, 8, 8)) < large, torch.tensor([True]))


# --- refusals ----------------------------------------------------------------------------------------------


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CONFIGS = {
    "another transformer": (
        "transformer",
        {"_class_name": "SD3Transformer2DModel"},
        "and FluxTransformer2DModel is meant",
    ),
    "a Fill model": ("transformer", {"in_channels": 96, "out_channels": 16}, "takes 96 channels .* Fill, Canny"),
    "another autoencoder": ("vae", {"latent_channels": 8}, r"takes 16 channels .* have 32"),
    "an autoencoder without a shift": ("vae", {"shift_factor": None}, "no shift_factor"),
    "another CLIP": ("transformer", {"pooled_projection_dim": 8}, r"is 16 wide .* takes 8"),
    "another T5": ("text_encoder_2", {"d_model": 48}, r"are 48 wide .* attends to 24"),
    "a diffusion's scheduler": ("scheduler", {"_class_name": "DDIMScheduler"}, "DDIMScheduler doesn't sample a flow"),
}


@pytest.mark.parametrize(("part", "changes", "message"), CONFIGS.values(), ids=CONFIGS)
def test_what_does_not_fit_is_refused_before_weights_are_read(flux, tmp_path, part, changes, message):
    folder = Path(shutil.copytree(flux, tmp_path / "mine"))
    edit(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **changes)
    with pytest.raises(ValueError, match=message):
        check_pipeline_folder(str(folder))


def test_the_distilled_model_is_refused_and_one_without_guidance_is_not_told_any(flux, tmp_path):
    folder = Path(shutil.copytree(flux, tmp_path / "schnell"))
    edit(folder / "transformer" / "config.json", guidance_embeds=False)
    edit(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False)
    with pytest.raises(ValueError, match=r"it is FLUX\.1-schnell, .* schnell is distilled to four steps"):
        check_pipeline_folder(str(folder))

    edit(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    assert FLUX.predict_arguments(folder, ModelConfig()) == {"guidance": None}
    with pytest.raises(ValueError, match=r"guidance \(got 3\) is told to a guidance-distilled model"):
        FLUX.predict_arguments(folder, ModelConfig(guidance=3))
