"""The metrics against their originals' scores, and what happens to files, names and images that are not in order.

tests/vectors/metric_scores.json holds what the originals print for tests/metric_fixtures.py; where ../shared has tiny
checkpoints with golden scores of its own, those are compared too.
"""

import json
import math
import pickle
import shutil
from pathlib import Path

import metric_fixtures as fixtures
import numpy as np
import pytest
import torch
from conftest import Answer
from PIL import Image
from tolerances import ELEMENT

from xdpo.scorers import (
    DEFAULT_SCORERS,
    EMBEDDER_NAMES,
    METRIC_NAMES,
    SCORER_NAMES,
    hpsv3,
    pixels,
    qwen2_vl,
    vqascore,
)
from xdpo.scorers.blip import BLIP_VIT_L_16, build_image_reward, load_bert_tokenizer
from xdpo.scorers.clip import (
    VIT_H_14,
    VIT_H_14_VISION,
    VIT_L_14,
    build_clip,
    clean,
    from_open_clip,
    load_tokenizer,
)
from xdpo.scorers.dino import DINOV2_VIT_L_14
from xdpo.scorers.embedders import DINOV2_L, EMBEDDERS
from xdpo.scorers.head import build_head
from xdpo.scorers.interface import full_precision
from xdpo.scorers.loading import embedder_version, load_embedder, load_scorer, scorer_version
from xdpo.scorers.metrics import ARCHITECTURES, METRICS
from xdpo.scorers.weights import WeightFile, find_files

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "reference" / "metrics"
GOLDEN = json.loads((ROOT / "tests" / "vectors" / "metric_scores.json").read_text())["scores"]
GOLDEN_IN_BFLOAT16 = {name: GOLDEN.pop(f"{name}, bfloat16") for name in ("hpsv3", "vqascore")}
TOLERANCE = 3 * ELEMENT  # of a cosine: the rounding of two networks' outputs and of what normalises them
FACTORS = {"hpsv2": 100, "hpsv2.1": 100}  # ours over the number in the golden file
UNITS = {"pickscore": 100, "hpsv2": 100, "hpsv2.1": 100}  # what multiplies the cosine that the tolerance is for


@pytest.fixture(scope="session")
def judge_weights(tmp_path_factory):
    """An untrained judge."""
    from safetensors.torch import save_file

    from xdpo.tiny.judges import AttributeReader

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    save_file(AttributeReader().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def odd_images():
    return fixtures.odd_images()


def differences(name, scores, golden, factor):
    unit = UNITS.get(name, 1)
    return [abs(ours - factor * theirs) / unit for ours, theirs in zip(scores, golden, strict=True)]


# --- golden scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_metric_equals_its_original_on_odd_images(name, batch_size, metric_weights, odd_images):
    keys = [key for key, score in GOLDEN[name].items() if score is not None]
    scorer = load_scorer(name, weights=metric_weights)
    scores = scorer.score([odd_images[key] for key in keys], [fixtures.PROMPTS[key] for key in keys], batch_size)
    gaps = differences(name, scores, [GOLDEN[name][key] for key in keys], FACTORS.get(name, 1))
    assert max(gaps) < TOLERANCE, dict(zip(keys, gaps, strict=True))


def test_the_features_are_those_of_the_aesthetic_score(metric_weights, odd_images):
    """Whose golden scores are a map of them: the published head on our features gives the original's numbers."""
    preprocess, embed = load_embedder("clip", weights=metric_weights)
    keys = [key for key, score in GOLDEN["aesthetic"].items() if score is not None]
    vectors = embed([preprocess(odd_images[key]) for key in keys])
    path = metric_weights / fixtures.AESTHETIC_HEAD
    scores = build_head(torch.load(path, weights_only=True), path)(vectors).squeeze(1).tolist()
    assert max(differences("aesthetic", scores, [GOLDEN["aesthetic"][key] for key in keys], 1)) < TOLERANCE
    assert embedder_version("clip", metric_weights) != embedder_version("dinov2", metric_weights)


def dinov2_of(images, tensors, heads, patch=14):
    """DINOv2's class token of pixels (B, 3, H, W), written out in float64: a ViT with scaled residual branches."""
    t = {name: torch.from_numpy(values).double() for name, values in tensors.items()}

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * t[f"{name}.weight"] + t[f"{name}.bias"]

    def attention(x, name):
        parts = (linear(x, f"{name}.attention.{kind}") for kind in ("query", "key", "value"))
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v
        return linear(mixed.transpose(1, 2).flatten(2), f"{name}.output.dense")

    def mlp(x, name):
        inner = linear(x, f"{name}.fc1")
        return linear(inner * 0.5 * (1 + torch.erf(inner / 2**0.5)), f"{name}.fc2")

    rows, columns = (length // patch for length in images.shape[2:])
    patches = images.double().unflatten(3, (columns, patch)).unflatten(2, (rows, patch)).permute(0, 2, 4, 1, 3, 5)
    projection = t["embeddings.patch_embeddings.projection.weight"].flatten(1)
    tokens = patches.flatten(3).flatten(1, 2) @ projection.T + t["embeddings.patch_embeddings.projection.bias"]
    positions = t["embeddings.position_embeddings"]
    side = int((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (rows, columns), mode="bicubic").flatten(2).transpose(1, 2)
    first = t["embeddings.cls_token"] + positions[:, :1]
    x = torch.cat([first.expand(len(images), -1, -1), tokens + grid], dim=1)
    for number in range(sum(name.endswith("layer_scale1.lambda1") for name in t)):
        layer = f"encoder.layer.{number}"
        x = x + t[f"{layer}.layer_scale1.lambda1"] * attention(norm(x, f"{layer}.norm1"), f"{layer}.attention")
        x = x + t[f"{layer}.layer_scale2.lambda1"] * mlp(norm(x, f"{layer}.norm2"), f"{layer}.mlp")
    return torch.nn.functional.normalize(norm(x[:, 0], "layernorm"), dim=-1)


def test_dinov2s_features_are_its_formulas_on_its_processors_pixels(metric_weights, odd_images):
    """The pixels are those of transformers' BitImageProcessor with the published numbers."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    numbers = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3}
    processor = BitImageProcessorPil(**numbers, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    preprocess, embed = load_embedder("dinov2", weights=metric_weights)
    images = [odd_images[key].convert("RGB") for key in odd_images if "one pixel" not in key]
    pixels = torch.stack([preprocess(image) for image in images])
    for ours, image in zip(pixels, images, strict=True):
        torch.testing.assert_close(ours, processor(image, return_tensors="pt").pixel_values[0], rtol=0, atol=1e-6)
    sizes = fixtures.SIZES["dinov2_vit_l_14"]
    tensors = fixtures.tensors_of(fixtures.dinov2_shapes(sizes), fixtures.SEED + 7)
    expected = dinov2_of(pixels, tensors, sizes["num_attention_heads"])
    found = torch.cat([embed(list(pixels[:5])), embed(list(pixels[5:]))])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=ELEMENT)
    assert (torch.pdist(expected) > 1000 * ELEMENT).all()  # they tell images apart


def test_dinov2_has_the_published_size_epsilon_and_activation():
    from transformers import Dinov2Config, Dinov2Model

    with torch.device("meta"):
        model = Dinov2Model(Dinov2Config(**DINOV2_VIT_L_14))
    assert 4 * sum(tensor.numel() for tensor in model.parameters()) == DINOV2_L.about_bytes - 48_328  # its header
    config = model.config
    assert (config.layer_norm_eps, config.hidden_act, config.num_attention_heads) == (1e-6, "gelu", 16)
    assert {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-6}


def test_the_golden_scores_tell_images_apart():
    for name, scores in GOLDEN.items():
        known = [score for score in scores.values() if score is not None]
        assert len(known) >= 12 and np.std(known) > 100 * TOLERANCE, name


def test_an_image_that_fails_in_the_original_gets_a_finite_score(metric_weights, odd_images):
    for name, scores in GOLDEN.items():
        keys = [key for key, score in scores.items() if score is None]
        scorer = load_scorer(name, weights=metric_weights)
        assert np.isfinite(scorer.score([odd_images[key] for key in keys], ["a cat"] * len(keys))).all(), name


LINE, GRID = qwen2_vl.positions_in_a_line(4000), qwen2_vl.positions_in_a_grid(30, 12, 20, 4000)


@pytest.mark.parametrize(
    "name, positions, others",
    [
        ("hpsv3", "positions_in_a_line", lambda length: GRID[:, :length]),
        ("vqascore", "positions_in_a_grid", lambda first, rows, columns, length: LINE[:, :length]),
    ],
    ids=["hpsv3", "vqascore"],
)
def test_the_golden_scores_tell_rotary_positions_apart(
    name, positions, others, metric_weights, odd_images, monkeypatch
):
    """HPSv3 counts an image's tokens in a line, VQAScore places them in a grid, and neither may do as the other."""
    image, prompt = odd_images["RGBA"], fixtures.PROMPTS["RGBA"]
    scorer = load_scorer(name, weights=metric_weights)
    (right,) = scorer.score([image], [prompt])
    monkeypatch.setattr(qwen2_vl, positions, others)
    (wrong,) = scorer.score([image], [prompt])
    assert abs(right - wrong) > 100 * TOLERANCE


SHARED_SIZES = {
    "clip_vit_h_14": {
        "projection_dim": 64,
        "text_config": fixtures.TEXT | {"num_hidden_layers": 3},
        "vision_config": fixtures.VISION | {"num_hidden_layers": 3},
    },
    "clip_vit_l_14": {"vision_config": fixtures.VISION | {"num_hidden_layers": 3}},
    "blip_vit_l_16": {
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        },
        "text_config": {
            "vocab_size": 199,
            "encoder_hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
        },
    },
}


@pytest.fixture(scope="session")
def shared_weights(tmp_path_factory):
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("shared") / "weights"
    places = {
        fixtures.PICKSCORE: "pick/model.safetensors",
        f"{fixtures.LAION}/tokenizer.json": "pick/tokenizer.json",
        fixtures.HPS: "HPS_tiny.pt",
        fixtures.HPS_21: "HPS_tiny.pt",
        fixtures.CLIP_L: "vitl/model.safetensors",
        fixtures.AESTHETIC_HEAD: "sac+logos+ava1-l14-linearMSE.pth",
        fixtures.IMAGE_REWARD: "IR_tiny.pt",
        "google-bert/bert-base-uncased/vocab.txt": "bert-base-uncased/vocab.txt",
    }
    for place, source in places.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).symlink_to(SHARED / source)
    hps = torch.load(SHARED / "HPS_tiny.pt", weights_only=True)["state_dict"]
    save_file(hps, folder / fixtures.CLIP_H)
    (folder / "sizes.json").write_text(json.dumps(SHARED_SIZES))
    return folder


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/reference/metrics is not on this machine")
@pytest.mark.parametrize("batch_size", [1, 6])
@pytest.mark.parametrize("name", sorted(DEFAULT_SCORERS))
def test_a_metric_equals_its_original_on_the_shared_checkpoints(name, batch_size, shared_weights):
    golden = json.loads((SHARED / "golden.json").read_text())
    key = {"pickscore": "pickscore_cosine", "hpsv2.1": "hpsv2"}.get(name, name)
    factor = math.exp(4.6052) if name == "pickscore" else FACTORS.get(name, 1)
    images = [Image.open(SHARED / "images" / f"{number}.png") for number in range(6)]
    prompts = json.loads((SHARED / "prompts.json").read_text())
    scores = load_scorer(name, weights=shared_weights).score(images, prompts, batch_size)
    assert max(differences(name, scores, golden[key], factor)) < TOLERANCE


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/reference/metrics is not on this machine")
def test_the_prompt_tokens_are_those_of_image_reward():
    golden = json.loads((SHARED / "golden.json").read_text())
    tokenize = load_bert_tokenizer(SHARED / "bert-base-uncased" / "vocab.txt")
    ids, _ = tokenize(json.loads((SHARED / "prompts.json").read_text()))
    assert ids.tolist() == golden["image_reward_token_ids"]


# --- what small checkpoints cannot show ----------------------------------------------------------------


def flat(sizes):
    return {f"{half}.{key}": value for half in sizes if half.endswith("_config") for key, value in sizes[half].items()}


def test_the_clip_models_have_the_published_sizes_and_activations():
    text = {
        "text_config.vocab_size": 49408,
        "text_config.hidden_size": 1024,
        "text_config.intermediate_size": 4096,
        "text_config.num_hidden_layers": 24,
        "text_config.num_attention_heads": 16,
        "text_config.max_position_embeddings": 77,
        "text_config.hidden_act": "gelu",
        "text_config.layer_norm_eps": 1e-5,
        "text_config.eos_token_id": 2,
    }

    def vision(width, layers, activation):
        return {
            "vision_config.hidden_size": width,
            "vision_config.intermediate_size": 4 * width,
            "vision_config.num_hidden_layers": layers,
            "vision_config.num_attention_heads": 16,
            "vision_config.image_size": 224,
            "vision_config.patch_size": 14,
            "vision_config.hidden_act": activation,
            "vision_config.layer_norm_eps": 1e-5,
        }

    assert flat(VIT_H_14) == text | vision(1280, 32, "gelu")
    assert flat(VIT_L_14) == vision(1024, 24, "quick_gelu")
    assert (VIT_H_14["projection_dim"], VIT_L_14["projection_dim"]) == (1024, 768)


def test_hp_has_the_image_half_of_clip_h_and_a_head_of_its_width():
    assert {half: VIT_H_14[half] for half in ("projection_dim", "vision_config")} == VIT_H_14_VISION
    tensors = {name: torch.zeros(shape) for name, shape in fixtures.head_shapes(1024).items()}
    layers = [module for module in build_head(tensors, Path("head"), 1024) if isinstance(module, torch.nn.Linear)]
    assert [layer.in_features for layer in layers] == [1024, 1024, 128, 64, 16]


# Of Qwen2-VL-2B and 7B with its language head, as published.
@pytest.mark.parametrize(
    "sizes, parameters, is_tied",
    [(qwen2_vl.QWEN2_VL_2B, 2_208_985_600, True), (qwen2_vl.QWEN2_VL_7B, 8_291_375_616, False)],
    ids=["2B", "7B"],
)
def test_qwen2_vl_has_the_published_sizes_epsilons_and_activations(sizes, parameters, is_tied):
    with torch.device("meta"):
        model = qwen2_vl.qwen2_vl_network(sizes)
    embeddings = model.language_model.embed_tokens.weight
    found = sum(tensor.numel() for tensor in model.parameters())
    assert found + (0 if is_tied else embeddings.numel()) == parameters
    text, vision = model.config.text_config, model.config.vision_config
    heads = (text.num_attention_heads, text.num_key_value_heads, vision.num_heads)
    assert heads == ((12, 2, 16) if is_tied else (28, 4, 16))
    assert (text.hidden_act, vision.hidden_act) == ("silu", "quick_gelu")
    assert epsilons(model.visual) == {1e-6}
    norms = [module for module in model.language_model.modules() if "RMSNorm" in type(module).__name__]
    assert {norm.variance_epsilon for norm in norms} == {1e-6} and len(norms) == 2 * text.num_hidden_layers + 1
    assert text.rope_parameters["rope_theta"] == 1e6 and text.rope_parameters["mrope_section"] == [16, 24, 24]
    assert vision.rope_parameters["rope_theta"] == 1e4
    assert not text.use_sliding_window and set(text.layer_types) == {"full_attention"}
    assert (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size) == (14, 2, 2)
    assert sizes["dtype"] == "bfloat16"


def test_hpsv3_has_an_embedding_for_every_token_and_the_published_head():
    sizes = ARCHITECTURES["hpsv3_qwen2_vl_7b"]
    assert sizes["text_config"] == qwen2_vl.QWEN2_VL_7B["text_config"] | {"vocab_size": 151658}
    assert sizes["vision_config"] == qwen2_vl.QWEN2_VL_7B["vision_config"] and sizes["dtype"] == "bfloat16"
    with torch.device("meta"):
        _, head = hpsv3.hpsv3_networks(sizes)
    kinds = [type(module).__name__ for module in head]
    assert kinds == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Linear"]
    assert [(head[n].in_features, head[n].out_features) for n in (0, 3, 5)] == [(3584, 1024), (1024, 16), (16, 2)]


@pytest.fixture
def in_bfloat16(altered):
    """A weights folder whose Qwen2-VL computes as published."""
    sizes = {
        name: value | {"dtype": "bfloat16"} if "dtype" in value else value for name, value in fixtures.SIZES.items()
    }
    (altered / "sizes.json").write_text(json.dumps(sizes))
    return altered


@pytest.mark.parametrize("name", GOLDEN_IN_BFLOAT16)
def test_a_metric_in_bfloat16_is_its_original_in_bfloat16(name, in_bfloat16, odd_images):
    """But for roundings, of which every operation of bfloat16 makes one of up to an eps."""
    golden = {key: score for key, score in GOLDEN_IN_BFLOAT16[name].items() if score is not None}
    scorer = load_scorer(name, weights=in_bfloat16)
    scores = scorer.score([odd_images[key] for key in golden], [fixtures.PROMPTS[key] for key in golden])
    gaps = differences(name, scores, golden.values(), 1)
    assert max(gaps) < 4 * torch.finfo(torch.bfloat16).eps, dict(zip(golden, gaps, strict=True))


def test_in_bfloat16_hpsv3_rounds_the_rotary_frequencies_and_not_the_head(in_bfloat16):
    """Its original casts all that the network holds. A far token's angle moves by more than rounding can."""
    from xdpo.scorers.loading import _sizes_of

    sizes = _sizes_of("hpsv3_qwen2_vl_7b", in_bfloat16)
    network = hpsv3.build_hpsv3(sizes, in_bfloat16 / fixtures.HPSV3)
    assert {tensor.dtype for tensor in network.model.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in network.head.parameters()} == {torch.float32}

    def rounded(width, theta):
        return (theta ** -(torch.arange(0, width, 2) / width)).bfloat16()

    length = 900
    positions = qwen2_vl.positions_in_a_line(length)[:, None]
    cosines, _ = network.model.language_model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions)
    angles = torch.arange(length)[:, None] * rounded(16, 1e6).float()
    torch.testing.assert_close(cosines[0], angles.cos().bfloat16().repeat(1, 2), rtol=0, atol=1e-2)
    places = torch.tensor([[0, 3], [371, 2]])
    cosines, _ = network.model.visual.rotary_pos_emb(None, places)
    angles = (places[..., None].bfloat16() * rounded(8, 1e4)).flatten(1)
    torch.testing.assert_close(cosines, angles.cos().repeat(1, 2), rtol=0, atol=1e-2)


def test_image_reward_has_the_published_sizes_epsilons_and_heads():
    vision, text = BLIP_VIT_L_16["vision_config"], BLIP_VIT_L_16["text_config"]
    assert vision == {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    assert (text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]) == (768, 3072, 12)
    assert (text["num_attention_heads"], text["vocab_size"], text["encoder_hidden_size"]) == (12, 30524, 1024)
    assert (text["layer_norm_eps"], text["hidden_act"]) == (1e-12, "gelu")


def test_the_built_modules_have_the_epsilons_and_activations_of_the_tables(metric_weights):
    def merged(base, changes):
        return {half: base[half] | changes.get(half, {}) for half in ("vision_config", "text_config")}

    sizes = merged(BLIP_VIT_L_16, fixtures.SIZES["blip_vit_l_16"])
    reward = build_image_reward(sizes, metric_weights / fixtures.IMAGE_REWARD)
    assert epsilons(reward.vision) == {1e-6}
    assert epsilons(reward.text) == {1e-12}
    changes = fixtures.SIZES["clip_vit_h_14"]
    clip = build_clip(merged(VIT_H_14, changes) | {"projection_dim": 64}, metric_weights / fixtures.HPS)
    assert epsilons(clip) == {1e-5}
    activations = {type(layer.mlp.activation_fn).__name__ for layer in clip.vision_model.encoder.layers}
    assert activations == {"GELUActivation"}
    assert not any(module.training for module in (*clip.modules(), *reward.modules()))


def epsilons(model):
    return {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)}


def test_every_open_clip_tensor_of_the_full_size_has_its_place():
    from accelerate import init_empty_weights
    from transformers import CLIPConfig, CLIPModel

    shapes = fixtures.open_clip_shapes(1024, VIT_H_14["vision_config"], VIT_H_14["text_config"], 49408)
    converted = from_open_clip({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    with init_empty_weights(include_buffers=False):
        expected = CLIPModel(CLIPConfig(**VIT_H_14)).state_dict()
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert round(sum(math.prod(shape) for shape in shapes.values()) / 1e6, 1) == 986.1


def test_query_key_and_value_are_split_in_that_order():
    fused = torch.arange(6.0).view(6, 1)
    converted = from_open_clip({"visual.transformer.resblocks.3.attn.in_proj_weight": fused})
    parts = [converted[f"vision_model.encoder.layers.3.self_attn.{kind}_proj.weight"].tolist() for kind in "qkv"]
    assert parts == [[[0.0], [1.0]], [[2.0], [3.0]], [[4.0], [5.0]]]


# --- images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preprocess", [pixels.crop_floor, pixels.crop_half_even])
def test_one_colour_stays_one_colour(preprocess):
    result = preprocess(Image.new("RGB", (300, 200), (255, 0, 51)))
    expected = [
        (value - mean) / std
        for value, mean, std in zip((1.0, 0.0, 0.2), pixels.CHANNEL_MEANS, pixels.CHANNEL_STDS, strict=True)
    ]
    assert result.shape == (3, 224, 224) and result.dtype == torch.float32
    assert torch.allclose(result, torch.tensor(expected).view(3, 1, 1).expand(3, 224, 224), atol=1e-6)


def test_padding_centres_a_wide_image_between_black_bars():
    result = pixels.pad(Image.new("RGB", (448, 200), "white"))
    black = torch.tensor([-mean / std for mean, std in zip(pixels.CHANNEL_MEANS, pixels.CHANNEL_STDS, strict=True)])
    rows = (result[:, :, 0] - black[:, None]).abs().amax(0) < 1e-6
    assert rows.tolist() == [True] * 62 + [False] * 100 + [True] * 62


def test_the_two_crops_part_ways_at_an_overhang_of_three_pixels():
    columns = np.arange(227, dtype=np.uint8)[None, :, None].repeat(224, 0).repeat(3, 2)
    image = Image.fromarray(columns)
    first = [
        (preprocess(image)[0, 0, 0] * pixels.CHANNEL_STDS[0] + pixels.CHANNEL_MEANS[0]).item() * 255
        for preprocess in (pixels.crop_floor, pixels.crop_half_even)
    ]
    assert first == pytest.approx([1, 2], abs=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 9000), (9000, 1), (30000, 2)])
@pytest.mark.parametrize("preprocess", [hpsv3.pixels_of, vqascore.pixels_of])
def test_a_whole_image_of_any_ratio_has_sides_of_whole_tokens(preprocess, size):
    found = preprocess(Image.new("RGB", size, "teal"))
    assert found.dtype == torch.float32 and found.shape[0] == 3
    assert all(side > 0 and side % 28 == 0 for side in found.shape[1:])


@pytest.mark.parametrize("size", [(1, 1), (1, 9000), (9000, 1), (30000, 2)])
@pytest.mark.parametrize("preprocess", [pixels.crop_floor, pixels.crop_half_even, pixels.crop_256, pixels.pad])
def test_strips_of_any_ratio_are_preprocessed(preprocess, size):
    assert preprocess(Image.new("RGB", size, "teal")).shape == (3, 224, 224)


@pytest.mark.parametrize("crop", [pixels.crop_floor, pixels.crop_256])
def test_the_shortcut_for_long_strips_shows_the_same_pixels(monkeypatch, crop):
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 900, 3), dtype=np.uint8))
    whole = crop(strip)
    monkeypatch.setattr(pixels, "MAX_RESIZED_PIXELS", 1)
    assert (crop(strip) - whole).abs().max() < 1.5 / 255 / min(pixels.CHANNEL_STDS)


def test_the_orientation_in_exif_is_not_applied(odd_images):
    turned = odd_images["EXIF says turn"]
    plain = Image.fromarray(np.asarray(turned))
    assert turned.getexif()[274] == 6
    for preprocess in (pixels.crop_floor, pixels.crop_half_even, pixels.pad):
        assert torch.equal(preprocess(turned), preprocess(plain))


# --- prompts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, cleaned",
    [
        ("“A  Cat”\n it’s", '"a cat" it\'s'),
        ("fish &amp;amp; chips", "fish & chips"),
        ("  Ünïcode\t", "ünïcode"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_open_clip_does(prompt, cleaned):
    assert clean(prompt) == cleaned


def test_a_long_prompt_keeps_its_end_token_at_the_77th_place(metric_weights):
    tokenize = load_tokenizer(metric_weights / fixtures.LAION / "tokenizer.json")
    start, end = fixtures.CLIP_VOCABULARY - 2, fixtures.CLIP_VOCABULARY - 1
    ids = tokenize(["word " * 200, "a"])
    assert ids.shape == (2, 77)
    assert ids[0, 0] == start and ids[0, 76] == end and (ids[0, 1:76] < start).all()
    assert ids[1].tolist() == [start, fixtures.clip_vocabulary()["a</w>"], end] + [0] * 74


@pytest.mark.parametrize("name", ["hpsv3", "vqascore"])
def test_a_prompt_that_holds_special_tokens_is_scored_alone_and_beside_others(name, metric_weights, odd_images):
    """Where the originals fail or mistake it for the image."""
    prompts = ["a <|image_pad|> in {braces} <|Reward|> <|im_end|>", "a cat"]
    scorer = load_scorer(name, weights=metric_weights)
    together = scorer.score([odd_images["square"]] * 2, prompts)
    assert np.isfinite(together).all()
    assert together == [scorer.score([odd_images["square"]], [prompt])[0] for prompt in prompts]


# --- files ---------------------------------------------------------------------------------------------


@pytest.fixture
def altered(metric_weights, tmp_path):
    """A copy of the weights folder to spoil."""
    return Path(shutil.copytree(metric_weights, tmp_path / "weights"))


def test_missing_files_are_all_named_with_size_and_source(tmp_path):
    with pytest.raises(ValueError) as raised:
        load_scorer("aesthetic", weights=tmp_path)
    message = str(raised.value)
    assert "aesthetic: 2 of 2 files" in message
    assert "openai/clip-vit-large-patch14/model.safetensors (1.71 GB)" in message
    assert "hf download openai/clip-vit-large-patch14 model.safetensors --revision 32bd64288804d66eef" in message
    assert "linearMSE.pth (3.71 MB)" in message and "raw.githubusercontent.com" in message
    assert "--weights DIR" in message


def test_without_a_network_the_same_message_names_the_hub_files(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"pickscore: 2 of 2 files .*\n.*PickScore_v1/model.safetensors \(3.94 GB\)"):
        scorer_version("pickscore")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        scorer_version("aesthetic")


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no weights folder 'nowhere'"):
        load_scorer("clip", weights="nowhere")


@pytest.fixture
def predictor(tmp_path, monkeypatch):
    """Looks for a file with an address of its own, and answers urlopen as given."""
    file = WeightFile("someone/predictor", "head.pth", "1" * 40, 12, url="https://example.org/head.pth")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def find(answer):
        monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: answer)
        return find_files("aesthetic", {"head": file}, None)["head"]

    find.folder = tmp_path / "xdpo" / file.revision
    return find


def test_a_download_is_whole_or_absent(predictor):
    with pytest.raises(ValueError, match="could not be downloaded: IncompleteRead"):
        predictor(Answer(b"half", whole=False))
    assert not predictor.folder.exists()
    assert predictor(Answer(b"whole")).read_bytes() == b"whole"
    assert [path.name for path in predictor.folder.iterdir()] == ["head.pth"]


def test_a_full_disk_is_not_the_networks_fault(predictor, full_disk):
    with pytest.raises(ValueError, match=r"could not write .*head\.pth: the disk is full"):
        predictor(Answer(b"whole"))
    assert not any(predictor.folder.iterdir())


@pytest.mark.parametrize("place, name", [(fixtures.PICKSCORE, "pickscore"), (fixtures.IMAGE_REWARD, "image_reward")])
def test_a_file_cut_short_is_found_before_any_model_is_read(altered, place, name):
    content = (altered / place).read_bytes()
    (altered / place).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"(?s){name}: 1 of 2 files.*{place}.*is broken or cut short at \d"):
        scorer_version(name, altered)


def test_a_pinned_file_with_another_content_is_refused_where_the_originals_are_meant(altered):
    (altered / "sizes.json").unlink()
    with pytest.raises(ValueError, match="is not the original: its sha256 is"):
        scorer_version("clip", altered)


def test_a_model_of_another_size_is_refused_by_name(altered):
    shutil.copy(altered / fixtures.CLIP_L, altered / fixtures.PICKSCORE)
    with pytest.raises(ValueError, match=r"2 of another shape, as text_projection.weight.*sizes.json"):
        load_scorer("pickscore", weights=altered)


def test_pickled_code_is_not_run(altered):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (altered / "sprung",))

    torch.save({"state_dict": Trap()}, altered / fixtures.HPS)
    with pytest.raises(ValueError, match=r"HPS_v2_compressed.pt .* can't be read"):
        load_scorer("hpsv2", weights=altered)
    assert not (altered / "sprung").exists()


def test_the_package_of_hpsv3_is_read_and_not_run(altered):
    import zipfile

    path = altered / fixtures.HPSV3_PACKAGE
    assert hpsv3.read_message(path) == fixtures.HPSV3_INSTRUCTION + fixtures.HPSV3_QUESTION
    for content in ("raise SystemExit", "def"):
        with zipfile.ZipFile(path, "w") as package:
            package.writestr("hpsv3/dataset/data_collator_qwen.py", content)
        with pytest.raises(ValueError, match=r"is not the package hpsv3: .*fetch it again"):
            load_scorer("hpsv3", weights=altered)


@pytest.mark.parametrize("content", ["{", "[]", '{"repetition_penalty": "much"}'])
def test_a_wrong_generation_config_is_named(altered, content):
    (altered / fixtures.QWEN_2B / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json is not a generation config"):
        load_scorer("vqascore", weights=altered)


def test_another_models_tokenizer_is_refused(altered):
    shutil.copy(altered / fixtures.LAION / "tokenizer.json", altered / fixtures.QWEN_7B / "tokenizer.json")
    with pytest.raises(ValueError, match=r"another model's tokenizer: it has no token <\|image_pad\|>"):
        load_scorer("hpsv3", weights=altered)


def test_a_half_of_qwen2_vl_that_is_another_models_is_refused(altered):
    shutil.copy(altered / fixtures.CLIP_L, altered / fixtures.QWEN_2B / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"model-00001.* holds another model than the scorer's"):
        load_scorer("vqascore", weights=altered)


@pytest.mark.parametrize("content", ["{", "[]", '{"clip_vit_b_32": {}}'])
def test_a_wrong_sizes_file_is_named(altered, content):
    (altered / "sizes.json").write_text(content)
    with pytest.raises(ValueError, match=r"sizes\.json"):
        load_scorer("clip", weights=altered)


def test_half_precision_weights_are_computed_in_float32(altered):
    from safetensors.torch import load_file

    whole = load_file(altered / fixtures.CLIP_H)
    torch.save({"state_dict": {name: tensor.half() for name, tensor in whole.items()}}, altered / fixtures.HPS)
    rounded = {name: tensor.half().float() for name, tensor in whole.items()}
    torch.save({"state_dict": rounded}, altered / fixtures.HPS_21)
    image = [Image.new("RGB", (64, 64), "olive")]
    half, full = (load_scorer(name, weights=altered).score(image, ["a cat"]) for name in ("hpsv2", "hpsv2.1"))
    assert half == full


# --- the interface -------------------------------------------------------------------------------------


def test_an_unknown_scorer_lists_the_names_and_the_nearest():
    with pytest.raises(ValueError, match=r"unknown scorer 'hps2'; choose from aesthetic, .*did you mean 'hpsv2'"):
        load_scorer("hps2")


def test_every_metric_and_embedder_has_a_name_that_command_lines_show():
    assert METRICS.keys() == set(METRIC_NAMES)
    assert tuple(EMBEDDERS) == EMBEDDER_NAMES


def test_a_prompt_is_needed_for_every_image(metric_weights):
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        load_scorer("clip", weights=metric_weights).score([Image.new("RGB", (9, 9))] * 2, ["a"])


def test_no_images_have_no_scores(metric_weights):
    assert load_scorer("image_reward", weights=metric_weights).score([], []) == []


@pytest.mark.parametrize("name", SCORER_NAMES)
def test_a_scorer_says_what_a_cache_and_a_worker_need(name, metric_weights, judge_weights):
    weights = judge_weights if name.startswith("tiny_") else metric_weights
    scorer = load_scorer(name, weights=weights)
    assert scorer.name == name and scorer.scale
    assert scorer.version == scorer_version(name, weights)
    assert pickle.loads(pickle.dumps(scorer.preprocess)) is scorer.preprocess


def test_the_version_changes_with_the_weights_and_with_nothing_else(altered, metric_weights):
    assert scorer_version("clip", altered) == scorer_version("clip", metric_weights)
    shutil.copy(altered / fixtures.HPS_21, altered / fixtures.HPS)
    assert scorer_version("hpsv2", altered) != scorer_version("hpsv2", metric_weights)
    assert scorer_version("hpsv2", altered) != scorer_version("hpsv2.1", altered)


def test_preprocessing_apart_from_the_forward_gives_the_same_scores(metric_weights, odd_images):
    scorer = load_scorer("pickscore", weights=metric_weights)
    images = [odd_images["square"], odd_images["CMYK"]]
    items = [scorer.preprocess(image) for image in images]
    assert scorer.score_batch(items, ["a", "b"]) == scorer.score(images, ["a", "b"])


def test_the_judges_of_the_embedded_world_are_scorers_too(judge_weights):
    image = Image.new("LA", (40, 40), (244, 9))
    prompt = "a small red star above a large blue circle on a white background"
    scores = {
        name: load_scorer(name, weights=judge_weights).score([image], [prompt])[0]
        for name in (f"tiny_{quantity}" for quantity in ("alignment", "appeal", "reward"))
    }
    assert 0 <= scores["tiny_alignment"] <= 1 and 0 <= scores["tiny_appeal"] <= 1
    assert scores["tiny_reward"] == pytest.approx(5 * scores["tiny_alignment"] + 2 * scores["tiny_appeal"], abs=1e-5)


def test_a_missing_judge_is_named_and_a_weights_folder_leaves_the_judges_alone(tmp_path, judge_weights, monkeypatch):
    with pytest.raises(ValueError, match=r"tiny_reward: no judge at nowhere\.safetensors; it ships in assets/tiny"):
        load_scorer("tiny_reward", weights="nowhere.safetensors")
    monkeypatch.setattr("xdpo.tiny.judges.judge_weights", lambda quantity: judge_weights)
    assert scorer_version("tiny_reward", tmp_path) == scorer_version("tiny_reward", judge_weights)


OWN_SCORER = """
class Brightness:
    scale = "mean level"

    def __init__(self, device):
        self.device = device

    def score(self, images, prompts):
        assert all(image.mode == "RGB" for image in images)
        return [sum(image.resize((1, 1)).getpixel((0, 0))) / 3 for image in images]


class Forgetful:
    def score(self, images, prompts):
        return []
"""


def test_a_class_in_a_file_is_a_scorer(tmp_path):
    (tmp_path / "own.py").write_text(OWN_SCORER)
    name = f"{tmp_path / 'own.py'}:Brightness"
    scorer = load_scorer(name)
    assert scorer.score([Image.new("L", (5, 5), 30), Image.new("RGB", (9, 3), (90, 0, 0))], ["", ""]) == [30.0, 30.0]
    assert (scorer.scale, scorer.name) == ("mean level", name)
    before = scorer_version(name)
    (tmp_path / "own.py").write_text(OWN_SCORER + "# changed\n")
    assert before == scorer.version != scorer_version(name)


def test_mistakes_in_an_own_scorer_are_named(tmp_path):
    (tmp_path / "own.py").write_text(OWN_SCORER)
    with pytest.raises(ValueError, match="returned 0 scores for 1 images"):
        load_scorer(f"{tmp_path / 'own.py'}:Forgetful").score([Image.new("RGB", (5, 5))], [""])
    with pytest.raises(ValueError, match="has no class 'Absent'"):
        load_scorer(f"{tmp_path / 'own.py'}:Absent")
    with pytest.raises(ValueError, match="no file"):
        load_scorer(f"{tmp_path / 'other.py'}:Brightness")


def test_scoring_restores_the_precision_it_found():
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32"
    try:
        assert full_precision(lambda: (switch.fp32_precision, torch.is_grad_enabled()))() == ("ieee", False)
        assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before
