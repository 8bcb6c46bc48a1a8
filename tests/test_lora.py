"""LoRA files as users bring them: used whole, or refused with counts before a weight is loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xdpo.models import load_model, read_model_spec, resolve_model
from xdpo.models.lora import LORA_FILE

RANK = 2
UNET_LAYERS = ("attn1.to_q", "attn2.to_k", "attn2.to_out.0")
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TEXT_LAYER = "encoder.layers.0.self_attn.q_proj"


def halves(inputs=16, outputs=16, rank=RANK):
    source = torch.Generator().manual_seed(0)
    return torch.randn(rank, inputs, generator=source), torch.randn(outputs, rank, generator=source)


def peft(prefix="unet."):
    """LoRA weights in the names that diffusers writes now."""
    tensors = {}
    for layer in UNET_LAYERS:
        tensors[f"{prefix}{BLOCK}.{layer}.lora_A.weight"], tensors[f"{prefix}{BLOCK}.{layer}.lora_B.weight"] = halves()
    return tensors


def of_old(tensors):
    """The same in the names that diffusers wrote before."""
    new = {".to_q.lora": ".processor.to_q_lora", ".to_k.lora": ".processor.to_k_lora"}
    new |= {".to_out.0.lora": ".processor.to_out_lora", "lora_A": "lora.down", "lora_B": "lora.up"}
    renamed = {}
    for name, tensor in tensors.items():
        for now, then in new.items():
            name = name.replace(now, then)
        renamed[name.replace("_lora_A", "_lora.down").replace("_lora_B", "_lora.up")] = tensor
    return renamed


def kohya(alpha=float(RANK)):
    tensors = {}
    for layer in UNET_LAYERS:
        name = "lora_unet_" + f"{BLOCK}.{layer}".replace(".", "_")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = halves()
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def text(prefix="text_encoder.text_model."):
    down, up = halves()
    return {f"{prefix}{TEXT_LAYER}.lora_A.weight": down, f"{prefix}{TEXT_LAYER}.lora_B.weight": up}


@pytest.fixture
def resolve(small_pipeline, tmp_path):
    """resolve(tensors, "name.safetensors") → the small pipeline with that LoRA, its files found and checked."""

    def call(tensors, name="my_style.safetensors", folder=False):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name)
        source = tmp_path if folder else tmp_path / name
        return resolve_model(*read_model_spec(small_pipeline, lora=str(source)))

    return call


@torch.no_grad()
def outputs(pipeline):
    """What the UNet and the text encoder make of one input."""
    source = torch.Generator().manual_seed(0)
    latents, states = torch.randn(1, 4, 8, 8, generator=source), torch.randn(1, 8, 16, generator=source)
    ids = torch.tensor(pipeline.tokenizer(["abc"], padding="max_length").input_ids)
    return pipeline.unet(latents, 500, states).sample, pipeline.text_encoder(ids).last_hidden_state


@pytest.fixture
def base(small_pipeline):
    return outputs(load_model(resolve_model(*read_model_spec(small_pipeline))))


GOOD = {"diffusers": peft(), "older diffusers": of_old(peft()), "kohya": kohya()}


@pytest.mark.parametrize("tensors", GOOD.values(), ids=GOOD)
def test_a_file_by_its_path_adapts_the_unet_whatever_wrote_it(resolve, base, tensors):
    model = resolve(tensors)
    unet, states = outputs(load_model(model))
    expected, _ = outputs(load_model(resolve(peft())))

    assert model.kind == "lora" and model.revision.startswith("sha256:")
    torch.testing.assert_close(unet, expected)
    assert not torch.allclose(unet, base[0], atol=1e-4) and torch.equal(states, base[1])


@pytest.mark.parametrize("prefix", ["text_encoder.text_model.", "text_encoder."])
def test_a_text_encoders_part_takes_effect(resolve, base, prefix):
    unet, states = outputs(load_model(resolve(peft() | text(prefix))))
    assert not torch.allclose(unet, base[0], atol=1e-4) and not torch.allclose(states, base[1], atol=1e-4)


def test_a_file_and_a_folder_with_it_are_one_model(resolve):
    in_folder, by_path = resolve(peft(), LORA_FILE, folder=True), resolve(peft(), LORA_FILE)
    assert torch.equal(outputs(load_model(in_folder))[0], outputs(load_model(by_path))[0])
    assert resolve(peft(), "other.safetensors").identity == by_path.identity
    changed = {name: tensor + 1 for name, tensor in peft().items()}
    assert resolve(changed, "other.safetensors").identity != by_path.identity


def test_a_folder_without_the_usual_name_says_which_file_to_name(resolve):
    with pytest.raises(ValueError, match=r"has no pytorch_lora_weights\.safetensors, but my_style\.safetensors: name"):
        resolve(peft(), "my_style.safetensors", folder=True)


def transformer():
    down, up = halves()
    return {"transformer.blocks.0.attn.to_q.lora_A.weight": down, "transformer.blocks.0.attn.to_q.lora_B.weight": up}


def half_of(tensors):
    return {name: tensor for name, tensor in tensors.items() if "lora_B" not in name}


def wider(tensors):
    return {name: tensor.repeat(1, 2) if "lora_A" in name else tensor for name, tensor in tensors.items()}


def of_two_ranks(tensors):
    return {name: tensor[:, :1] if "lora_B" in name else tensor for name, tensor in tensors.items()}


BAD = {
    "without the part's name": (peft(""), r"6 of 6 weights .* 0 have one: .*lack the part .*unet\."),
    "of another family": (transformer(), r"2 of 2 weights .* another family of models"),
    "in part of another model": (peft() | transformer(), r"2 of 8 weights .* 6 have one: .*transformer\.blocks"),
    "in PEFT's own format": (peft("base_model.model."), r"6 of 6 .*PEFT's own format"),
    "LyCORIS": ({"lora_unet_mid_block.hada_w1_a": torch.zeros(1)}, r"1 of 1 .*LyCORIS or DoRA"),
    "DoRA": (
        kohya() | {"lora_unet_" + f"{BLOCK}.attn1.to_q".replace(".", "_") + ".dora_scale": torch.ones(16)},
        r"1 of 10 .*LyCORIS or DoRA",
    ),
    "of a wider model": (wider(peft()), r"3 of 3 layers .*is for 32 inputs and 16 outputs, the layer has 16 and 16"),
    "with one half": (half_of(peft()), r"3 of 3 layers .* has no second half"),
    "of two ranks": (of_two_ranks(peft()), r"3 of 3 layers .* has rank 2 in one half and 1 in the other"),
    "with a factor of zero": (kohya(alpha=0.0), r"3 of 3 factors .* is 0\.0"),
    "with a factor that is none": (kohya(alpha=float("nan")), r"3 of 3 factors .* is nan"),
    "empty": ({}, r"0 of 0 weights .*holds no weights"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), BAD.values(), ids=BAD)
def test_a_lora_that_would_change_nothing_or_another_model_is_refused_with_counts(resolve, tensors, message):
    with pytest.raises(ValueError, match=message) as refused:
        resolve(tensors)
    assert str(refused.value).startswith("model.lora: ") and "my_style.safetensors" in str(refused.value)


def test_pickled_lora_weights_are_not_opened(small_pipeline, tmp_path):
    torch.save(peft(), tmp_path / "my_style.pt")
    with pytest.raises(ValueError, match=r"pickled weights"):
        resolve_model(*read_model_spec(small_pipeline, lora=str(tmp_path / "my_style.pt")))


def test_a_file_that_changed_between_check_and_loading_is_still_seen(resolve, tmp_path):
    model = resolve(peft())
    path = Path(tmp_path / "my_style.safetensors")
    save_file({name.removeprefix("unet."): tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="adapts 3 layers, and 0 took effect"):
        load_model(model)
