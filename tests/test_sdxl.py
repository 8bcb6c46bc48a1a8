"""Stable Diffusion XL: its inputs are the library's own, its loss is the formula, and runs keep what they promise."""

import dataclasses
import json
import math
import shutil
from copy import deepcopy as copy_of
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encoded_image, pick_a_pic_row, write_pick_a_pic
from forks import launch
from PIL import Image
from safetensors.torch import load_file
from tolerances import assert_same_image
from training_runs import ROOT, SMALL_RUN, assert_same_run, command, rows_of, slow_but

import generate
from xdpo import families, models, noise, precompute, step, watch
from xdpo.batch import Batch, stack
from xdpo.compute import build_accelerator
from xdpo.config import ComputeConfig, ModelConfig, load_config
from xdpo.data import PairWeights, Split, UnpairedDataset
from xdpo.data.images import size_and_crop
from xdpo.families import check_model, load_parts, part_checksum, pipeline_with
from xdpo.learner import RecordedErrors, build_learner
from xdpo.loss import OBJECTIVES
from xdpo.models import (
    adapter_layers,
    adapter_off,
    load_model,
    make_policy,
    make_reference,
    read_model_spec,
    resolve_model,
)
from xdpo.noisy import NoisyBatchMaker
from xdpo.reference import Frozen

SIDE = 16  # pixels
CPU = torch.device("cpu")


def build_xl_pipeline(folder, tokenizer):
    """Save a Stable Diffusion XL pipeline of a few thousand weights: 16-pixel images, (4, 8, 8) latents."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer.save_pretrained(folder / "words")
    second = CLIPTokenizer.from_pretrained(folder / "words", pad_token="!")  # as the original's, unlike the first one's
    shutil.rmtree(folder / "words")

    def text(width):
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=16,
            projection_dim=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=SIDE,
            scaling_factor=0.13025,
        ),
        text_encoder=CLIPTextModel(text(16)),
        text_encoder_2=CLIPTextModelWithProjection(text(8)),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=16 + 8,
            attention_head_dim=(1, 2),
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
            norm_num_groups=4,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def xl_pipeline(tmp_path_factory, tiny_tokenizer):
    return build_xl_pipeline(tmp_path_factory.mktemp("xl") / "pipeline", tiny_tokenizer)


@pytest.fixture(scope="module")
def parts(xl_pipeline):
    return load_parts(ModelConfig(pipeline=xl_pipeline))


@pytest.fixture(scope="module")
def theirs(xl_pipeline):
    """The pipeline as diffusers loads it."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_pipeline, dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def run_xl(run, xl_pipeline):
    def call(name, *overrides):
        return run(name, f"model.pipeline={xl_pipeline}", "train.max_steps=2", "checkpoint.every=1", *overrides)

    return call


@pytest.fixture
def copy(xl_pipeline, tmp_path):
    """A copy of the pipeline to spoil."""
    return Path(shutil.copytree(xl_pipeline, tmp_path / "mine"))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what the denoiser is given ------------------------------------------------------------------------------


def encoded(parts, *captions):
    return parts.encode_captions(stack([parts.tokenize(caption)[0] for caption in captions]))


def assert_same_bits(conditioning, states, pooled):
    assert conditioning.keys() == {"text", "pooled"}
    assert torch.equal(conditioning["text"], states) and torch.equal(conditioning["pooled"], pooled)


def test_captions_are_encoded_to_the_bits_of_the_library(parts, theirs):
    captions = ["abc", "a b c d e f g h"]
    states, none, pooled, none_pooled = theirs.encode_prompt(captions, device="cpu")
    ours = encoded(parts, *captions)
    assert_same_bits(ours, states, pooled)
    assert_same_bits(encoded(parts, "", ""), none, none_pooled)
    assert [parts.tokenize(caption)[1] for caption in captions] == [False, True]
    assert parts.family.conditioning_shapes(parts) == {name: tuple(value.shape[1:]) for name, value in ours.items()}


@pytest.mark.parametrize(("index", "key", "is_zero"), [(True, None, True), (False, None, False), (True, "text", False)])
def test_an_empty_caption_is_what_the_sampler_starts_guidance_from_unless_the_config_says_otherwise(
    copy, index, key, is_zero
):
    edit(copy / "model_index.json", force_zeros_for_empty_prompt=index)
    model = ModelConfig(pipeline=str(copy), empty_caption=key)
    parts = load_parts(model)
    pipeline = pipeline_with(parts, parts.denoiser)
    assert pipeline.config.force_zeros_for_empty_prompt == index
    _, states, _, pooled = pipeline.encode_prompt(["a", "b"], device="cpu", negative_prompt=None if is_zero else "")
    assert_same_bits(encoded(parts, "", ""), states, pooled)
    assert (not states.any()) == is_zero
    assert families.caption_choices(model) == {"empty caption": "zeros" if is_zero else "text"}


def test_the_size_is_told_in_the_order_of_the_pipeline(parts, theirs):
    expected = theirs._get_add_time_ids((24, 24), (0, 0), (24, 24), torch.float32, 12)
    found = parts.family.with_size(encoded(parts, "a", "b"), 24)["time_ids"]
    assert torch.equal(found, expected.expand(2, -1)) and found.dtype == expected.dtype


# --- the size of an image ----------------------------------------------------------------------------------

ORIGINAL = "model.size_conditioning=original"


@pytest.fixture(scope="module")
def uneven_pairs(tmp_path_factory):
    """Four pairs of images of different sizes: chosen ones of 40 × 20, 41 × 20, … pixels, rejected ones of 16 × 24."""
    rows = [
        pick_a_pic_row(
            number,
            jpg_0=encoded_image(colour, (40 + number, 20)),
            jpg_1=encoded_image("red", (16, 24)),
        )
        for number, colour in enumerate(["lime", "blue", "white", "black"])
    ]
    return write_pick_a_pic(tmp_path_factory.mktemp("uneven") / "train.parquet", rows)


def test_what_was_cropped_is_told_in_pixels_of_the_resized_image():
    image = Image.new("RGB", (40, 20))
    assert size_and_crop(image, 16).tolist() == [20, 40, 0, 8]
    assert size_and_crop(image, 16, offset=(0.25, 1.0)).tolist() == [20, 40, 0, 4]
    assert size_and_crop(image, 16, offset=(0.25, 1.0), flip=True).tolist() == [20, 40, 0, 12]
    assert size_and_crop(Image.new("RGB", (16, 24)), 32, offset=(0.5, 0.25)).tolist() == [24, 16, 4, 0]


@pytest.mark.slow
def test_each_image_of_a_pair_is_told_its_own_size(run_xl, xl_pipeline, uneven_pairs, tmp_path):
    options = (f"data.path={uneven_pairs}", "loss.name=diffusion_dpo", "model.trainable=lora", "model.lora_rank=2")
    caches = [f"cache.examples={tmp_path / 'cache'}", "cache.dtype=fp32"]
    _, constant = run_xl("constant", *options)
    _, plain = run_xl("plain", *options, ORIGINAL)
    _, cached = run_xl("cached", *options, ORIGINAL, *caches)
    assert_same_run(plain, cached)
    assert rows_of(plain)[0]["policy_error"] != rows_of(constant)[0]["policy_error"]

    arguments = command(xl_pipeline, uneven_pairs, tmp_path / "x", ORIGINAL)
    settings = load_config(arguments[1], arguments[2:])
    parts, accelerator = load_parts(settings.model), build_accelerator(settings)
    table = precompute.load_table(settings, accelerator, Split.TRAIN, in_order=False)
    with_cache = settings.model_copy(
        update={"cache": settings.cache.model_copy(update={"examples": str(tmp_path / "cache"), "dtype": "fp32"})}
    )
    of_cache = precompute.open_pairs(with_cache, accelerator, Split.TRAIN)
    process = parts.process(settings.noise)
    batches = [
        precompute.make_dataset(pairs, parts.tokenize, settings, Split.TRAIN).batch([0, 1, 2, 3])
        for pairs in (table, of_cache)
    ]
    told = [NoisyBatchMaker(parts, process, settings, CPU)(batch, 0).conditioning["time_ids"] for batch in batches]
    assert torch.equal(*told)
    heights, widths, tops, lefts, *aims = told[0].T.tolist()
    assert heights == [20] * 4 + [24] * 4 and sorted(widths[:4]) == [40, 41, 42, 43] and widths[4:] == [16] * 4
    assert tops == [0] * 4 + [4] * 4 and lefts[4:] == [0] * 4 and all(left >= 8 for left in lefts[:4])
    assert aims == [[16] * 8] * 2

    sampled = batches[0]._replace(rejected_latents=torch.zeros(4, 4, 8, 8))
    told = NoisyBatchMaker(parts, process, settings, CPU)(sampled, 0).conditioning["time_ids"]
    assert told[4:].tolist() == [[16, 16, 0, 0, 16, 16]] * 4 and told[0, 0] == 20, "what was sampled is whole"
    singles = [
        UnpairedDataset(precompute.make_dataset(pairs, parts.tokenize, settings, Split.TRAIN), 0.5).batch([0, 1])
        for pairs in (table, of_cache)
    ]
    assert torch.equal(singles[0].sizes, singles[1].sizes) and {*singles[0].sizes[:, 0].tolist()} <= {20, 24}

    plan = tmp_path / "cache" / "train" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"has_sizes": False}))
    with pytest.raises(ValueError, match=r"was made before caches held the images' sizes"):
        precompute.build_missing_examples(with_cache, accelerator)


def test_images_are_encoded_to_the_bits_of_the_library_in_any_precision(parts):
    pixels = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        posterior = parts.vae.encode(pixels).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(0)) * parts.vae.config.scaling_factor
    drawn = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    latents = parts.family.to_latents(parts.encode_images(pixels), drawn)
    assert torch.equal(latents, expected) and parts.vae.config.scaling_factor == 0.13025
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(parts.family.to_latents(parts.encode_images(pixels), drawn), latents)


# --- the loss ------------------------------------------------------------------------------------------------


def test_the_loss_is_the_formula_in_float64(xl_pipeline, theirs):
    """Noise, schedule, denoiser and Diffusion-DPO's loss written out here, on what the library encodes."""
    settings = load_config("configs/base.yaml", [f"model.pipeline={xl_pipeline}", "loss.name=diffusion_dpo"])
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"resolution": SIDE})})
    parts = load_parts(settings.model)
    reference = make_reference(parts, settings.model, settings.compute)
    policy = make_policy(parts, settings.model, settings.compute)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    pixels, captions, positions = torch.rand(4, 3, SIDE, SIDE) * 2 - 1, ["abc", ""], [5, 9]
    tokens = stack([parts.tokenize(caption)[0] for caption in captions])
    batch = Batch(torch.tensor(positions), torch.arange(2), ["a", "b"], pixels, tokens, 0, [])
    noisy = NoisyBatchMaker(parts, parts.process(settings.noise), settings, CPU)(batch, 3)
    measured = step.measure(policy, Frozen(reference), noisy, settings.loss)
    loss = step.preference_loss(measured.errors, settings.loss, dict(measured.inputs)).loss

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    times = noise.draw_timesteps(3, positions, 1000).repeat(2)
    kept = (1 - betas).cumprod(0)[times][:, None, None, None]
    with torch.no_grad():
        posterior = theirs.vae.encode(pixels).latent_dist
        states, none, pooled, none_pooled = theirs.encode_prompt(captions, device="cpu")
    drawn = noise.draw_noise(3, positions, (4, 8, 8), shared=False, stream="posterior")
    clean = (posterior.mean.double() + posterior.std.double() * drawn) * 0.13025
    target = noise.draw_noise(3, positions, (4, 8, 8)).double()
    inputs = kept.sqrt() * clean + (1 - kept).sqrt() * target
    told = {
        "text_embeds": torch.stack([pooled[0], none_pooled[1]]).repeat(2, 1).double(),
        "time_ids": torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 4, dtype=torch.float64),
    }
    attended = torch.stack([states[0], none[1]]).repeat(2, 1, 1).double()
    errors = []
    for network in (policy, reference):
        double = network.double()
        with torch.no_grad():
            prediction = double(inputs, times, attended, added_cond_kwargs=told).sample
        errors.append((prediction - target).square().mean((1, 2, 3)))
    gained = errors[0] - errors[1]
    expected = -torch.nn.functional.logsigmoid(-2000 / 2 * (gained[:2] - gained[2:]))
    # Four errors' roundings of a hundred operations each, times β/2.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1000 * 4e-6 * errors[0].max().item())
    assert (expected - math.log(2)).abs().min() > 0.01


@pytest.fixture
def world(xl_pipeline, small_pairs):
    """The accelerator of a run, its overrides, and its pairs."""
    paths = [f"model.pipeline={xl_pipeline}", f"data.path={small_pairs}", "output_dir=none"]
    overrides = [*SMALL_RUN, *paths, "train.total_batch_pairs=2"]
    settings = load_config(ROOT / "configs" / "base.yaml", overrides)
    accelerator = build_accelerator(settings)
    return accelerator, overrides, precompute.load_table(settings, accelerator, Split.TRAIN, in_order=True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_takes_a_step(world, parts, name):
    accelerator, overrides, pairs = world
    settings = load_config(ROOT / "configs" / "base.yaml", [*overrides, f"loss.name={name}"])
    own = dataclasses.replace(parts, modules=copy_of(parts.modules))
    learner = build_learner(settings, accelerator, own, RecordedErrors(None, None, False), PairWeights(None, None))
    batch = precompute.make_dataset(pairs, parts.tokenize, settings, Split.TRAIN).batch([0, 1])
    if settings.loss.samples_rejected:
        batch = batch._replace(rejected_latents=torch.randn(2, 4, 8, 8))
    output = learner.micro_step(batch)
    assert torch.isfinite(output.loss).all() and learner.clip_gradients() > 0
    learner.update(1, {"gain": 0.0})
    before = parts.denoiser.state_dict()
    assert any(not torch.equal(weight, before[key]) for key, weight in learner.bare_policy.state_dict().items())


def test_self_play_samples_its_rejected_images(run_xl):
    status, folder = run_xl("run", "loss.name=seppo", "train.max_steps=1", "self_play.num_inference_steps=1")
    assert status == 0 and rows_of(folder)[0]["gradient_norm"] > 0
    assert [path.name for path in folder.glob("snapshots/*/*")] == ["unet.safetensors"]


# --- runs ----------------------------------------------------------------------------------------------------


def test_the_first_loss_is_ln_2_and_caches_change_no_bit(run_xl, tmp_path):
    folders = [f"cache.{name}={tmp_path / name}" for name in ("examples", "reference")]
    caches = (*folders, "cache.dtype=fp32")
    _, plain = run_xl("plain", "loss.name=diffusion_dpo")
    _, recording = run_xl("recording", "loss.name=diffusion_dpo", *caches)
    _, cached = run_xl("cached", "loss.name=diffusion_dpo", *caches)
    first = rows_of(plain)[0]
    assert first["margin"] == 0 and first["loss"] == torch.tensor(2.0).log().item()
    assert_same_run(plain, recording)
    assert_same_run(plain, cached)
    plan = json.loads((tmp_path / "examples" / "train" / "plan.json").read_text())
    assert plan["conditioning_shapes"] == {"text": [8, 24], "pooled": [12]}
    assert plan["key"]["empty caption"] == "zeros"


@pytest.mark.slow
def test_resumed_equals_uninterrupted(run_xl):
    _, whole = run_xl("whole")
    run_xl("parts", "train.max_steps=1")
    status, resumed = run_xl("parts")
    assert status == 0
    assert_same_run(whole, resumed)


@pytest.mark.parametrize("trainable", slow_but({"full"}, ["full", "lora"]))
def test_the_exported_model_draws_in_diffusers_the_image_that_the_run_drew(
    run_xl, xl_pipeline, tmp_path, monkeypatch, trainable
):
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    sheets, original = [], watch.contact_sheet
    monkeypatch.setattr(watch, "contact_sheet", lambda columns, *_: sheets.append(columns) or original(columns, *_))
    options = ("samples.every=2", "optim.learning_rate=1e-2", "loss.beta=100", f"model.trainable={trainable}")
    status, folder = run_xl("run", *options)
    assert status == 0
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_pipeline, dtype=torch.float32, add_watermarker=False)
    if trainable == "full":
        pipeline.unet = UNet2DConditionModel.from_pretrained(folder / "export", subfolder="unet")
    else:
        pipeline.load_lora_weights(folder / "export")
    pipeline.vae.enable_slicing()
    # A chunk is filled up with its last prompt, here the only one.
    seeds = [torch.Generator().manual_seed(0) for _ in range(watch.SAMPLE_CHUNK)]
    images = pipeline(["a red square"] * len(seeds), num_inference_steps=2, guidance_scale=7.5, generator=seeds).images
    drawn = np.asarray(sheets[-1]["policy"][0])
    assert_same_image(images[0], drawn)
    assert not np.array_equal(np.asarray(sheets[0]["policy"][0]), drawn), "training changed the image"

    # generate.py draws it too, from the run's folder, and other pixels from the base.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red square\n")
    made = {}
    for name, model in {"trained": folder, "base": xl_pipeline}.items():
        prompts = [
            "--prompts",
            "prompts.txt",
            "--steps",
            "2",
            "--batch-size",
            "4",
            "--guidance",
            "7.5",
            "--output",
            name,
        ]
        assert generate.main(["--model", str(model), *prompts]) == 0
        (made[name],) = (tmp_path / name).rglob("*.png")
    trained, base = (np.asarray(watch.Image.open(made[name])) for name in ("trained", "base"))
    assert_same_image(trained, drawn)
    assert not np.array_equal(base, drawn)


def test_an_adapter_that_is_off_leaves_the_base_to_the_bit(xl_pipeline):
    parts = load_parts(ModelConfig(pipeline=xl_pipeline))
    conditioning = parts.family.with_size(encoded(parts, "a", ""), SIDE)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), conditioning
    with torch.no_grad():
        base = parts.family.predict(parts.denoiser, *inputs)
        policy = make_policy(parts, ModelConfig(trainable="lora", lora_rank=2), ComputeConfig())
        for parameter in models.trainable_parameters(policy):
            parameter.add_(0.05)
        assert not torch.allclose(parts.family.predict(policy, *inputs), base)
        with adapter_off(adapter_layers(policy)):
            assert torch.equal(parts.family.predict(policy, *inputs), base)


@pytest.mark.slow
def test_two_processes_equal_one(run_xl, xl_pipeline, small_pairs, tmp_path):
    from tolerances import assert_same_but_for_rounding

    options = ("train.max_steps=2", "checkpoint.every=1", "train.micro_batch_pairs=1")
    _, one = run_xl("one", "train.micro_batch_pairs=1")
    ended = launch("train_xdpo.py", command(xl_pipeline, small_pairs, tmp_path / "two", *options), processes=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_same_but_for_rounding(one, tmp_path / "two")


def test_the_original_autoencoder_decodes_in_float32_and_another_one_as_the_rest(xl_pipeline):
    parts = load_parts(ModelConfig(pipeline=xl_pipeline))
    latents = torch.randn(1, 4, 8, 8).bfloat16()
    for force_upcast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        parts.vae.register_to_config(force_upcast=force_upcast)
        pipeline = pipeline_with(parts, parts.denoiser).to(torch.bfloat16)
        assert parts.family.decode(pipeline, latents).dtype == dtype


# --- what is refused, before a weight is loaded --------------------------------------------------------------

UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
REFUSED = {
    "inpainting": ({UNET: {"in_channels": 9}}, r"takes 9 channels .* as in inpainting"),
    "the refiner": (
        {
            "model_index.json": {
                "_class_name": "StableDiffusionXLImg2ImgPipeline",
                "text_encoder": [None, None],
                "tokenizer": [None, None],
            }
        },
        "refiner, which finishes the base model's images and is not trained here",
    ),
    "the refiner's UNet": ({UNET: {"projection_class_embeddings_input_dim": 12 + 5 * 4}}, "it is the refiner's"),
    "Turbo": (
        {SCHEDULER: {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}},
        "as SDXL-Turbo's, which was distilled to four timesteps",
    ),
    "a distilled UNet": ({UNET: {"time_cond_proj_dim": 8}}, r"distilled to few steps \(LCM\)"),
    "a UNet of 1.x": ({UNET: {"addition_embed_type": None}}, "has addition_embed_type None where 'text_time' is meant"),
    "narrower states": ({UNET: {"cross_attention_dim": 16}}, r"states are 24 wide together .* attends to 16"),
    "another text encoder": (
        {"model_index.json": {"text_encoder_2": ["transformers", "T5EncoderModel"]}},
        "text_encoder_2 is a T5EncoderModel",
    ),
    "an unknown class": ({"model_index.json": {"_class_name": "NewPipeline", "prior": ["a", "B"]}}, "which has prior"),
    "another family's class": (
        {"model_index.json": {"_class_name": "StableDiffusionPipeline"}},
        "has addition_embed_type 'text_time': it is told",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_other_models_are_refused_by_what_they_are(copy, monkeypatch, changes, message):
    monkeypatch.setattr("torch.nn.Module.load_state_dict", lambda *_, **__: pytest.fail("weights were loaded"))
    for file, keys in changes.items():
        edit(copy / file, **keys)
    with pytest.raises(ValueError, match=rf"(?s)model\.pipeline: .* can't be used:.*{message}"):
        check_model(ModelConfig(pipeline=str(copy)))


def test_a_pipeline_saved_for_another_use_is_the_base(copy):
    edit(copy / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")
    assert load_parts(ModelConfig(pipeline=str(copy))).family.name == "Stable Diffusion XL"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"family": "StableDiffusionXLPipeline"}, r"is for Stable Diffusion XL, and .* is Stable Diffusion 1\.x"),
        ({"family": "sdxl"}, "'sdxl' is none; choose from StableDiffusionPipeline, StableDiffusionXLPipeline"),
        (
            {"size_conditioning": "original"},
            r"model\.size_conditioning: Stable Diffusion 1\.x and 2\.x has no such choice",
        ),
        ({"empty_caption": "zeros"}, r"model\.empty_caption: Stable Diffusion 1\.x and 2\.x has no such choice"),
    ],
)
def test_a_config_of_another_family_is_refused(small_pipeline, keys, message):
    with pytest.raises(ValueError, match=message):
        check_model(ModelConfig(pipeline=small_pipeline, **keys))


@pytest.mark.parametrize("path", ["configs/xdpo_sdxl.yaml", "configs/xdpo_sd15.yaml"])
def test_shipped_configs_name_their_family(xl_pipeline, small_pipeline, path):
    own, other = (xl_pipeline, small_pipeline) if "xl" in path else (small_pipeline, xl_pipeline)
    check_model(load_config(path, [f"model.pipeline={own}", "model.vae=null"]).model)
    with pytest.raises(ValueError, match=r"model\.family: the config is for"):
        check_model(load_config(path, [f"model.pipeline={other}", "model.vae=null", "model.empty_caption=null"]).model)


# --- another autoencoder -------------------------------------------------------------------------------------


@pytest.fixture
def other_vae(copy):
    """The pipeline's autoencoder with other weights, in a folder of its own."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(copy / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.bias.add_(1)
        vae.decoder.conv_out.bias.add_(0.5)
    vae.save_pretrained(copy.parent / "fixed")
    return copy.parent / "fixed"


@pytest.mark.parametrize("name", ["the folder itself", "a folder with vae/"])
def test_another_autoencoder_takes_the_place_of_the_pipelines(xl_pipeline, other_vae, name):
    if name == "a folder with vae/":
        (other_vae.parent / "of a pipeline").mkdir()
        shutil.move(other_vae, other_vae.parent / "of a pipeline" / "vae")
        other_vae = other_vae.parent / "of a pipeline"
    own, other = ModelConfig(pipeline=xl_pipeline), ModelConfig(pipeline=xl_pipeline, vae=str(other_vae))
    pixels = torch.rand(1, 3, SIDE, SIDE)
    first, second = (load_parts(model).encode_images(pixels).means for model in (own, other))
    assert not torch.allclose(first, second)
    assert part_checksum(own, "vae") != part_checksum(other, "vae")
    assert part_checksum(own, "unet") == part_checksum(other, "unet")


def test_a_run_with_another_autoencoder_is_another_model_to_generate_with(run_xl, other_vae):
    _, folder = run_xl("run", f"model.vae={other_vae}", "train.max_steps=1")
    model = resolve_model(*read_model_spec(str(folder)))
    assert model.identity["vae"] == part_checksum(model.base, "vae")
    bias = load_file(other_vae / "diffusion_pytorch_model.safetensors")["encoder.conv_in.bias"]
    assert torch.equal(load_model(model).vae.encoder.conv_in.bias, bias)


def test_images_are_decoded_by_the_autoencoder_that_generate_is_given(xl_pipeline, other_vae, tmp_path, capsys):
    arguments = ["--model", xl_pipeline, "--prompts", "tinyprompts", "--limit", "1", "--steps", "1"]
    for name, options in {"own": [], "other": ["--vae", str(other_vae)]}.items():
        assert generate.main([*arguments, "--output", str(tmp_path / name), *options]) == 0
    own, other = (next((tmp_path / name).rglob("*.png")).read_bytes() for name in ("own", "other"))
    assert own != other
    assert generate.main([*arguments, "--output", str(tmp_path / "own"), "--vae", str(other_vae)]) == 1
    assert "holds images made with other settings:\n  model.vae: None there" in capsys.readouterr().err
    edit(other_vae / "config.json", latent_channels=16)
    assert generate.main([*arguments, "--output", str(tmp_path / "third"), "--vae", str(other_vae)]) == 1
    assert "latent_channels is 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": 0.18215}, r"scaling_factor is 0\.18215, and the pipeline's own autoencoder has 0\.13025"),
        ({"latent_channels": 16}, "latent_channels is 16"),
        ({"block_out_channels": [8, 8, 8]}, "shrinks images by another factor"),
        ({"block_out_channels": [16, 16]}, "weights have another shape than vae/config.json says"),
        ({"_class_name": "AutoencoderTiny"}, "of the kind AutoencoderTiny"),
    ],
)
def test_an_autoencoder_of_another_family_is_refused(xl_pipeline, other_vae, changes, message):
    edit(other_vae / "config.json", **changes)
    with pytest.raises(ValueError, match=rf"(?s)model\.vae: .*{message}"):
        check_model(ModelConfig(pipeline=xl_pipeline, vae=str(other_vae)))
