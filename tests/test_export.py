"""Exported models in other programs' forms: loaded by the library, each draws what the run's own export draws."""

from runpy import run_path

import numpy as np
import pytest
import torch
from benchmarks.true_models import TRUE_MODELS
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file
from test_sdxl import build_xl_pipeline

from xdpo.config import load_config
from xdpo.families import FAMILIES, check_formats
from xdpo.families.stable_diffusion import STABLE_DIFFUSION
from xdpo.models import load_model, read_model_spec, resolve_model

EXPORT = run_path("scripts/export.py")["main"]
CLASSES = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}
each_family = pytest.mark.parametrize("name", ["sd", "xl"])


@pytest.fixture(scope="module")
def pipelines(small_pipeline, tmp_path_factory, tiny_tokenizer):
    return {"sd": small_pipeline, "xl": build_xl_pipeline(tmp_path_factory.mktemp("xl") / "xl", tiny_tokenizer)}


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    return pipeline(["a cat"], generator=torch.Generator().manual_seed(0), **options).images


def same(one, other):
    """Two images that one network made in different memory, whose sums may be rounded otherwise: within a level."""
    return np.abs(one - other).max() < 1 / 255


@each_family
def test_a_whole_checkpoint_in_one_file_draws_what_the_pipeline_draws(pipelines, name, tmp_path, capsys):
    folder, forms = pipelines[name], ["single_file", "single_file_fp16", "unet", "diffusers_fp16"]
    assert EXPORT([folder, "--formats", *forms, "--output", str(tmp_path / "out"), "--name", "mine"]) == 0
    assert EXPORT([folder, "--formats", *forms, "--output", str(tmp_path / "out")]) == 1
    assert "exists already" in capsys.readouterr().err
    single = tmp_path / "out" / "single_file"
    assert {path.name for path in single.iterdir()} == {
        "mine.safetensors",
        "mine_fp16.safetensors",
        "mine_unet.safetensors",
    }
    own = CLASSES[name].from_pretrained(folder)
    expected = draw(own)
    whole = CLASSES[name].from_single_file(str(single / "mine.safetensors"), config=folder)
    assert same(draw(whole), expected)
    half = CLASSES[name].from_single_file(str(single / "mine_fp16.safetensors"), config=folder, dtype=torch.float32)
    assert np.abs(draw(half) - expected).max() < 0.01
    options = {"config": folder, "subfolder": "unet"}
    own.unet = UNet2DConditionModel.from_single_file(str(single / "mine_unet.safetensors"), **options)
    assert same(draw(own), expected)
    own.unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "fp16", subfolder="unet")
    assert own.unet.dtype == torch.float32 and np.abs(draw(own) - expected).max() < 0.01
    weights = load_file(tmp_path / "out" / "fp16" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


@each_family
@pytest.mark.slow
def test_a_run_exports_its_adapter_in_kohyas_names_with_its_alpha(run, pipelines, name, tmp_path):
    options = ("model.trainable=lora", "model.lora_rank=2", "model.lora_alpha=6", "optim.learning_rate=1e-2")
    formats = "export.formats=[diffusers,diffusers_fp16,single_file,single_file_fp16]"
    status, folder = run("mine", f"model.pipeline={pipelines[name]}", *options, "train.max_steps=2", formats)
    assert status == 0

    def drawn(*file):
        pipeline = CLASSES[name].from_pretrained(pipelines[name])
        if file:
            pipeline.load_lora_weights(*file[:1], weight_name=file[1])
        return draw(pipeline)

    export = folder / "export"
    expected = drawn(export, "pytorch_lora_weights.safetensors")
    assert not np.allclose(expected, drawn())
    assert same(drawn(export / "single_file", "mine.safetensors"), expected)
    for place, file in (("single_file", "mine_fp16.safetensors"), ("fp16", "pytorch_lora_weights.safetensors")):
        assert np.abs(drawn(export / place, file) - expected).max() < 0.01
    weights = load_file(export / "single_file" / "mine.safetensors")
    layer = {"sd": "down_blocks_0_attentions_0", "xl": "input_blocks_3_1"}[name]
    key = f"lora_unet_{layer}_transformer_blocks_0_attn1_to_out_0"
    assert {f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"} <= weights.keys()
    assert weights[f"{key}.alpha"] == 6 and weights[f"{key}.lora_down.weight"].shape[0] == 2

    # An old run's checkpoint gives the same files, and generate.py reads them.
    checkpoint = next((folder / "checkpoints").iterdir())
    assert (
        EXPORT([str(checkpoint), "--formats", "single_file", "--output", str(tmp_path / "old"), "--name", "old"]) == 0
    )
    old = load_file(tmp_path / "old" / "single_file" / "old.safetensors")
    assert old.keys() == weights.keys() and all(torch.equal(old[name], weights[name]) for name in old)
    file = export / "single_file" / "mine.safetensors"
    loaded = load_model(resolve_model(*read_model_spec(pipelines[name], lora=str(file))))
    assert same(draw(loaded), expected)


@pytest.mark.slow
def test_a_run_writes_its_whole_checkpoint_from_its_moving_average_and_other_autoencoder(run, small_pipeline, tmp_path):
    """With cached examples, whose runs have no encoders otherwise."""
    formats = "export.formats=[diffusers,single_file]"
    caches = (f"cache.examples={tmp_path / 'cache'}", "model.ema_decay=0.5", "optim.learning_rate=1e-3")
    status, folder = run("mine", "train.max_steps=2", formats, *caches)
    assert status == 0
    single = StableDiffusionPipeline.from_single_file(
        str(folder / "export" / "single_file" / "mine.safetensors"), config=small_pipeline
    )
    assert same(draw(single), draw(load_model(resolve_model(*read_model_spec(str(folder))))))


@pytest.mark.parametrize(("model", "counts"), [("sd15", (686, 248, 196)), ("sdxl", (1680, 248, 196, 389))])
def test_names_are_those_of_the_published_checkpoints(model, counts):
    """The library turns them back into its own, with the same shapes."""
    with torch.device("meta"):
        parts = TRUE_MODELS[model].build()
    found = []
    for part, rename in parts.family.single_file.items():
        module = parts.modules[part]
        weights = module.state_dict()
        named = rename(weights, module.config)
        found.append(len(named))
        if part == "unet":
            back = single_file_utils.convert_ldm_unet_checkpoint(named, module.config)
        elif part == "vae":
            back = single_file_utils.convert_ldm_vae_checkpoint(named, module.config)
        else:
            continue
        assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in weights.items()}
    assert tuple(found) == counts


def test_the_text_encoder_of_2_x_has_open_clips_names():
    with torch.device("meta"):
        encoder = TRUE_MODELS["sd15"].build().modules["text_encoder"]
    encoder.config.hidden_act = "gelu"
    named = STABLE_DIFFUSION.single_file["text_encoder"](encoder.state_dict(), encoder.config)
    assert named["cond_stage_model.model.transformer.resblocks.11.attn.in_proj_weight"].shape == (3 * 768, 768)
    assert "cond_stage_model.model.ln_final.bias" in named


REFUSED = {
    "another family": ("FluxPipeline", ["diffusers", "unet"], False, r"unet isn't available for FLUX\.1"),
    "another family's adapter": ("StableDiffusion3Pipeline", ["single_file_fp16"], True, "single_file_fp16 isn't"),
    "an adapter's UNet": ("StableDiffusionPipeline", ["unet_fp16"], True, "unet_fp16 is the file of a whole UNet"),
}


@pytest.mark.parametrize(("family", "formats", "is_adapter", "message"), REFUSED.values(), ids=REFUSED)
def test_forms_that_a_model_does_not_have_are_refused(family, formats, is_adapter, message):
    with pytest.raises(ValueError, match=rf"export\.formats: {message}"):
        check_formats(FAMILIES[family], formats, is_adapter=is_adapter)


def test_a_config_of_forms_is_refused_before_anything_is_loaded(run, capsys):
    assert run("run", "export.formats=[diffusers,unet]", "model.trainable=lora", "data.path=nowhere")[0] == 1
    assert "export.formats: unet is the file of a whole UNet" in capsys.readouterr().err
    rounded = ["export.formats=[diffusers,single_file]", "model.frozen_precision=bf16"]
    with pytest.raises(ValueError, match="a whole checkpoint would have text encoders rounded"):
        load_config("configs/base.yaml", rounded)
    with pytest.raises(ValueError, match="diffusers is always written"):
        load_config("configs/base.yaml", ["export.formats=[unet]"])
