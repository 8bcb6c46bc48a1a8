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


def in_dimensions(tensors, *added):
    """Matrices as convolutions of this kernel: kohya's way, for layers that are convolutions."""
    return {
        name: tensor.reshape(*tensor.shape, *added) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()
    }


def for_layer(name):
    down, up = halves()
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def convolution(kernel=3):
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    source = torch.Generator().manual_seed(0)
    down = torch.randn(RANK, 16, kernel, kernel, generator=source)
    return {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": torch.randn(16, RANK, 1, 1, generator=source),
        f"{name}.alpha": torch.tensor(float(RANK)),
    }


def kohya_text(*layers, encoder="lora_te_"):
    tensors = {}
    for layer in layers:
        name = f"{encoder}text_model.encoder.layers.0.{layer}".replace(".", "_")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = halves()
        tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
    return tensors


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
ODD_AND_GOOD = {  # what each changes: the UNet, the text encoder
    "without factors": ({name: tensor for name, tensor in kohya().items() if "alpha" not in name}, (True, False)),
    "one factor missing": ({n: t for place, (n, t) in enumerate(kohya().items()) if place != 2}, (True, False)),
    "whole numbers as factors": (
        {name: torch.tensor(RANK) if "alpha" in name else tensor for name, tensor in kohya().items()}, (True, False),
    ),
    "the text encoder alone": (text(), (False, True)),
    "the text encoder alone, of kohya": (kohya_text(*ATTENTION), (False, True)),
    "all of kohya's layers": (kohya() | convolution() | kohya_text(*ATTENTION, "mlp.fc1", "mlp.fc2"), (True, True)),
    "named as XL's first encoder": (kohya_text("mlp.fc1", encoder="lora_te1_"), (False, True)),
    "a convolution": (convolution(), (True, False)),
    "half precision": ({name: tensor.half() for name, tensor in peft().items()}, (True, False)),
    "ranks that differ by layer": (
        {n: t if "to_k" not in n else t[:1] if "lora_A" in n else t[:, :1] for n, t in peft().items()}, (True, False),
    ),
    "zero in some layers": (
        {name: tensor * ("to_q" not in name) for name, tensor in peft().items()}, (True, False),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "changed"), ODD_AND_GOOD.values(), ids=ODD_AND_GOOD)
def test_an_odd_lora_that_is_good_takes_effect(resolve, base, tensors, changed):
    adapted = outputs(load_model(resolve(tensors)))
    assert tuple(not torch.allclose(*pair, atol=1e-5) for pair in zip(adapted, base, strict=True)) == changed


def test_a_factor_is_applied(resolve, base):
    """α over rank scales what a layer adds; without one it is added as it is."""
    plain, half, none = (
        outputs(load_model(resolve(tensors)))[0] - base[0]
        for tensors in (kohya(), kohya(alpha=RANK * 1e-3), ODD_AND_GOOD["without factors"][0])
    )
    assert torch.equal(plain, none) and 0 < half.abs().max() < 0.1 * plain.abs().max()


def test_a_folder_of_kohyas_with_factors_is_used(resolve, base):
    adapted = outputs(load_model(resolve(kohya(), LORA_FILE, folder=True)))
    assert torch.equal(adapted[0], outputs(load_model(resolve(kohya())))[0]) and not torch.equal(adapted[0], base[0])


def test_a_lora_that_the_library_reads_in_part_is_refused(resolve):
    for layers in (ATTENTION[:1], (ATTENTION[0], "mlp.fc1")):
        with pytest.raises(
            ValueError, match=r"can't load lora weights of .*my_style\.safetensors: .*(infer|took effect)"
        ):
            load_model(resolve(kohya_text(*layers)))


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
    "with a factor that is several": (
        {name: torch.ones(3) if "alpha" in name else tensor for name, tensor in kohya().items()},
        r"3 of 3 factors .* is nan",
    ),
    "of a wider text encoder": (wider(text()), r"1 of 1 layers .*text_encoder\.encoder.*is for 32 inputs"),
    "of another kernel": (convolution(1), r"1 of 1 layers .*\(2, 16, 1, 1\) .*the layer's weight has \(16, 16, 3, 3\)"),
    "of convolutions for matrices": (in_dimensions(kohya(), 1, 1), r"3 of 3 layers .*layer's weight has \(16, 16\)"),
    "flat": (
        {name: tensor.flatten() for name, tensor in peft().items()}, r"3 of 3 layers .*\(32,\), which are no matrices",
    ),
    "for a layer without a matrix": (
        for_layer("unet.conv_norm_out"), r"1 of 1 layers .*unet\.conv_norm_out is no layer with a matrix",
    ),
    "for a whole block": (
        for_layer("unet.mid_block"), r"1 of 1 layers .*unet\.mid_block is no layer with a matrix",
    ),
    "of whole numbers": ({name: tensor.to(torch.int8) for name, tensor in peft().items()}, r"are of type torch\.int8"),
    "untrained": (
        {name: tensor * ("lora_B" not in name) for name, tensor in peft().items()}, r"all 3 layers .* add zero",
    ),
    "with biases": (
        peft() | {f"unet.{BLOCK}.attn1.to_q.lora_B.bias": torch.zeros(16)}, r"1 of 7 weights .*lora_B\.bias",
    ),
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
