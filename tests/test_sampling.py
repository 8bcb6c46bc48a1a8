"""Which image is made from which seed in which chunk, and which are none."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from xdpo import families
from xdpo.config import ModelConfig
from xdpo.prompts import load_prompts
from xdpo.sampling import images as sampling
from xdpo.sampling.settings import SCHEDULERS, SamplingSettings

QUICK = SamplingSettings(num_inference_steps=2, batch_size=4)


@pytest.fixture(scope="module")
def pipeline(small_pipeline):
    parts = families.load_parts(ModelConfig(pipeline=small_pipeline))
    return families.pipeline_with(parts, parts.denoiser)


def pixels(images):
    return [np.asarray(image).tobytes() for image in images]


# --- images --------------------------------------------------------------------------------------------


def test_seeds_and_files_follow_from_position_and_number():
    prompts = load_prompts("tinyprompts", categories=["relation"], limit=5).prompts
    chunks = sampling.plan_chunks(prompts, images_per_prompt=2, seed=7, batch_size=4, suffix=".png")

    assert [len(chunk) for chunk in chunks] == [4, 1, 4, 1]
    first, again = chunks[0][1], chunks[2][1]
    assert (first.file, first.seed) == ("relation/00101.png", 7 + 101)
    assert (again.file, again.seed) == ("relation/00101_1.png", 7 + 101 + 1_000_000)


def test_neither_more_prompts_nor_more_images_move_an_image_to_another_place_in_its_chunk():
    def places(limit, images):
        prompts = load_prompts("tinyprompts", limit=limit).prompts
        chunks = sampling.plan_chunks(prompts, images, 0, 8, ".png")
        return {task.file: (slot, task.seed) for chunk in chunks for slot, task in enumerate(chunk)}

    few, many = places(11, 1), places(200, 3)
    assert few.items() <= many.items() and len(many) == 600


def test_seeds_beyond_what_a_generator_can_tell_apart_are_refused():
    prompts = load_prompts("tinyprompts", limit=2).prompts
    with pytest.raises(ValueError, match="between 0 and 2³² − 1"):
        sampling.plan_chunks(prompts, 1, 2**32 - 1, 4, ".png")
    assert sampling.plan_chunks(prompts, 1, 2**32 - 2, 4, ".png")


def test_an_image_does_not_depend_on_what_fills_the_rest_of_its_chunk(pipeline):
    prompts, seeds = ["a", "b", "c d", "e"], [3, 4, 5, 6]
    whole = sampling.sample_chunk(pipeline, prompts, seeds, QUICK)

    assert pixels(sampling.sample_chunk(pipeline, prompts[:3], seeds[:3], QUICK)) == pixels(whole)[:3]
    other = sampling.sample_chunk(pipeline, ["a", "x", "y", "z"], [3, 90, 91, 92], QUICK)
    assert pixels(other)[0] == pixels(whole)[0]
    assert len(set(pixels(whole) + pixels(other))) == 7


def test_a_chunk_is_what_the_pipeline_itself_makes(pipeline):
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    theirs = pipeline(["a", "b"], num_inference_steps=2, guidance_scale=7.5, generator=seeds).images
    settings = SamplingSettings(num_inference_steps=2, batch_size=2)
    assert pixels(sampling.sample_chunk(pipeline, ["a", "b"], [3, 4], settings)) == pixels(theirs)


@pytest.mark.parametrize(
    ("part", "layer", "value", "fault"),
    [
        ("unet", "conv_in", float("nan"), "latents"),
        ("unet", "conv_out", float("inf"), "latents"),
        ("vae", "decoder.conv_out", float("inf"), "pixels"),  # which the pipeline itself would clamp to white
        ("text_encoder", "final_layer_norm", float("nan"), "latents"),
    ],
)
def test_numbers_that_are_not_finite_are_no_image(small_pipeline, capsys, part, layer, value, fault):
    parts = families.load_parts(ModelConfig(pipeline=small_pipeline))
    parts.modules[part].get_submodule(layer).bias.data[0] = value
    pipeline = families.pipeline_with(parts, parts.denoiser)

    with pytest.raises(sampling.NotFiniteError, match=rf"2 of 2 .* the {fault} of 'a prompt' .* in fp32"):
        sampling.sample_chunk(pipeline, ["a prompt", "b"], [3, 4], QUICK)
    assert len(sampling.sample_images(pipeline, ["a prompt"] * 5, seed=3, num_inference_steps=2)) == 5
    assert f"5 of 5 sample images are not finite: {fault} of 'a prompt'" in capsys.readouterr().err


def test_sampling_a_list_uses_one_seed_per_prompt_in_order(pipeline):
    images = sampling.sample_images(pipeline, ["a"] * 5, seed=3, num_inference_steps=2)

    assert len(set(pixels(images))) == 5
    assert pixels(sampling.sample_images(pipeline, ["a"], seed=7, num_inference_steps=2))[0] == pixels(images)[4]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_samples_from_its_generators_alone(small_pipeline, name):
    parts = families.load_parts(ModelConfig(pipeline=small_pipeline))
    settings = SamplingSettings(num_inference_steps=3, scheduler=name, batch_size=2)
    pipeline = sampling.prepare_pipeline(families.pipeline_with(parts, parts.denoiser), settings, torch.device("cpu"))

    first, second = (sampling.sample_chunk(pipeline, ["a", "b"], [1, 2], settings) for _ in range(2))
    assert type(pipeline.scheduler).__name__ == SCHEDULERS[name][0]
    assert pixels(first) == pixels(second) and np.asarray(first[0]).std() > 0


@pytest.mark.parametrize("name", ["pipeline", "euler", "unipc", "dpm++"])
def test_more_steps_than_timesteps_are_refused(small_pipeline, name):
    """Whatever a scheduler would do with them: raise, assert, or sample noise."""
    parts = families.load_parts(ModelConfig(pipeline=small_pipeline), encoders=False)
    settings = SamplingSettings(num_inference_steps=1001, scheduler=name)
    with pytest.raises(ValueError, match="1001 sampling steps are more than the 1000 timesteps"):
        sampling.prepare_pipeline(families.pipeline_with(parts, parts.denoiser), settings, torch.device("cpu"))


def test_half_precision_changes_pixels_but_little(small_pipeline):
    images = {}
    for precision in ("fp32", "bf16"):
        parts = families.load_parts(ModelConfig(pipeline=small_pipeline))
        settings = SamplingSettings(num_inference_steps=2, precision=precision, batch_size=2)
        pipeline = sampling.prepare_pipeline(
            families.pipeline_with(parts, parts.denoiser), settings, torch.device("cpu")
        )
        images[precision] = np.asarray(sampling.sample_chunk(pipeline, ["a"], [1], settings)[0], np.float32)

    difference = abs(images["fp32"] - images["bf16"])
    assert 0 < difference.mean() < 16


@pytest.fixture
def switches():
    """PyTorch's switches of kernels as they were, afterwards."""
    places = [(torch.backends.cuda.matmul, "allow_tf32")]
    places += [(torch.backends.cudnn, name) for name in ("allow_tf32", "benchmark", "deterministic")]
    before = [getattr(*place) for place in places]
    yield
    for place, value in zip(places, before, strict=True):
        setattr(*place, value)


def test_on_a_gpu_float32_is_float32_in_products_and_convolutions(switches):
    class Pipeline:
        scheduler = DDIMScheduler()

        def to(self, *_):
            return self

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    sampling.prepare_pipeline(Pipeline(), SamplingSettings(), torch.device("cuda"))
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_a_prompt_is_truncated_where_its_tokens_are_more_than_are_read(pipeline):
    assert not sampling.is_truncated(pipeline, "a b c d e f")  # 6 and the two ends: 8
    assert sampling.is_truncated(pipeline, "a b c d e f g")
