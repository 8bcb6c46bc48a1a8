"""Loading a pipeline's parts; what is trainable and what the reference is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tolerances import assert_same_output

from xdpo.batch import stack
from xdpo.config import ComputeConfig, ModelConfig
from xdpo.families import check_pipeline_folder, load_parts, pipeline_with
from xdpo.models import adapter_layers, adapter_off, make_policy, make_reference, trainable_parameters
from xdpo.runs import weights_checksum

INPUTS = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 8, 16)


@pytest.fixture
def parts(small_pipeline):
    return load_parts(ModelConfig(pipeline=small_pipeline))


def predict(unet):
    with torch.no_grad():
        return unet(*INPUTS).sample


def test_parts_come_frozen_in_float32_even_from_half_precision_files(small_pipeline, tmp_path):
    from diffusers import StableDiffusionPipeline

    half = StableDiffusionPipeline.from_pretrained(small_pipeline, dtype=torch.float16, safety_checker=None)
    half.save_pretrained(tmp_path / "half")
    parts = load_parts(ModelConfig(pipeline=str(tmp_path / "half")))

    for module in parts.modules.values():
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())
    assert parts.latent_shape(16) == (4, 8, 8)


def test_full_fine_tuning_trains_every_weight_and_its_reference_is_an_untouched_copy(parts):
    model, compute = ModelConfig(), ComputeConfig()
    reference = make_reference(parts, model, compute)
    policy = make_policy(parts, model, compute)
    before = predict(reference)
    with torch.no_grad():
        for parameter in trainable_parameters(policy):
            parameter.add_(0.01)

    assert len(trainable_parameters(policy)) == len(list(policy.parameters()))
    assert torch.equal(predict(reference), before)
    assert not torch.allclose(predict(policy), before)
    assert not trainable_parameters(reference)


def test_lora_trains_adapters_alone_and_is_its_own_reference_bit_for_bit_with_them_off(parts):
    base = predict(parts.denoiser)
    model = ModelConfig(trainable="lora", lora_rank=4, lora_alpha=4)
    assert make_reference(parts, model, ComputeConfig()) is None
    policy = make_policy(parts, model, ComputeConfig())
    assert torch.equal(predict(policy), base), "an untrained adapter changes nothing"
    with torch.no_grad():
        for parameter in trainable_parameters(policy):
            parameter.add_(0.05)

    names = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert names and all("lora_" in name for name in names)
    assert not torch.allclose(predict(policy), base)
    with adapter_off(adapter_layers(policy)):
        assert torch.equal(predict(policy), base)
    assert not torch.allclose(predict(policy), base)


def test_images_become_scaled_latents_around_the_posterior_mean(parts):
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    moments = parts.encode_images(pixels)
    noise = torch.full((2, 4, 8, 8), 2.0)

    assert moments.means.shape == (2, 4, 8, 8)
    with torch.no_grad():
        posterior = parts.vae.encode(pixels).latent_dist
    moments, to_latents = moments._replace(scaling_factor=0.5), parts.family.to_latents
    assert_same_output(to_latents(moments, None), posterior.mean * 0.5)
    assert_same_output(to_latents(moments, noise), (posterior.mean + 2 * posterior.std) * 0.5)


def test_captions_become_the_states_that_the_pipeline_itself_uses(parts):
    tokens, _ = parts.tokenize("abc")
    states, _ = pipeline_with(parts, parts.denoiser).encode_prompt("abc", "cpu", 1, False)

    (ours,) = parts.encode_captions(stack([tokens])).values()
    assert_same_output(ours, states)
    assert parts.family.conditioning_shapes(parts) == {"text": tuple(states.shape[1:])}


def test_the_pipeline_around_the_policy_samples_images(parts):
    images = pipeline_with(parts, parts.denoiser)("a", num_inference_steps=1).images
    assert images[0].size == (16, 16)


# --- what it refuses -----------------------------------------------------------------------------------------


def test_a_folder_without_parts_names_them_all(tmp_path):
    (tmp_path / "vae").mkdir()
    with pytest.raises(ValueError, match=r"lacks model_index\.json, tokenizer, text_encoder, unet, scheduler"):
        check_pipeline_folder(str(tmp_path))


def test_pickled_weights_are_refused(small_pipeline, tmp_path):
    folder = Path(shutil.copytree(small_pipeline, tmp_path / "pickled"))
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"unet/\*\.safetensors"):
        check_pipeline_folder(str(folder))


def test_a_path_that_is_neither_a_folder_nor_a_hub_id_is_refused():
    check_pipeline_folder("owner/name")  # a hub id: nothing to check without a network
    with pytest.raises(ValueError, match=r"no folder '\./missing' here"):
        check_pipeline_folder("./missing")


def test_an_unreachable_hub_model_says_to_check_the_name_or_give_a_folder():
    with pytest.raises(ValueError, match="could not load 'nobody/nothing'"):
        load_parts(ModelConfig(pipeline="nobody/nothing"))


def test_a_damaged_weight_file_is_named(small_pipeline, tmp_path):
    folder = Path(shutil.copytree(small_pipeline, tmp_path / "damaged"))
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors \(1,000 bytes\): .* cut short"):
        load_parts(ModelConfig(pipeline=str(folder)))


def test_a_pipeline_of_another_kind_is_refused(small_pipeline, tmp_path):
    folder = Path(shutil.copytree(small_pipeline, tmp_path / "other"))
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "NoSuchModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="text encoder NoSuchModel"):
        load_parts(ModelConfig(pipeline=str(folder)))


# --- frozen weights in bf16 ----------------------------------------------------------------------------------

HALVED = ModelConfig(trainable="lora", lora_rank=2, frozen_precision="bf16")


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_weights_that_nobody_trains_are_kept_in_bf16_and_no_others(small_pipeline, trainable):
    model = HALVED.model_copy(update={"pipeline": small_pipeline, "trainable": trainable})
    parts = load_parts(model)
    policy = make_policy(parts, model, ComputeConfig())
    kinds = {name: {weight.dtype for weight in module.parameters()} for name, module in parts.modules.items()}
    base = {torch.bfloat16, torch.float32} if trainable == "lora" else {torch.float32}
    assert kinds == {"vae": {torch.float32}, "text_encoder": {torch.bfloat16}, "unet": base}
    assert {weight.dtype for weight in trainable_parameters(policy)} == {torch.float32}


def test_with_its_adapter_off_a_model_in_bf16_is_its_base_in_bf16(small_pipeline):
    model = HALVED.model_copy(update={"pipeline": small_pipeline})
    parts = load_parts(model)
    with torch.autocast("cpu", torch.bfloat16):
        base = predict(parts.denoiser)
        policy = make_policy(parts, model, ComputeConfig())
        with torch.no_grad():
            for parameter in trainable_parameters(policy):
                parameter.add_(0.05)
        assert not torch.equal(predict(policy), base)
        with adapter_off(adapter_layers(policy)):
            assert torch.equal(predict(policy), base)
    checksum = weights_checksum(policy)
    with torch.no_grad():
        next(policy.parameters()).view(torch.int16)[0] ^= 1
    assert weights_checksum(policy) != checksum


def test_weights_in_bf16_are_refused_where_the_networks_run_in_float32(run, capsys):
    assert run("run", "model.frozen_precision=bf16", "data.path=nowhere")[0] == 1
    assert "model.frozen_precision: bf16 weights are used where" in capsys.readouterr().err
