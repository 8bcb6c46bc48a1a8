"""Score the tests' tiny models with the metrics' ORIGINAL code and write tests/vectors/metric_scores.json

    python tests/make_metric_fixtures.py

Needed only when tests/metric_fixtures.py changes, and in an environment of its own, since the originals do not import
beside this project's libraries: transformers==4.53.3 with tokenizers==0.21.4, torch==2.13.0, torchvision==0.28.0,
timm==1.0.31, fairscale==0.4.13, ftfy==6.3.1, safetensors, and `pip install --no-deps hpsv2==1.2.0
image-reward==1.5`. Both packages import more than they need when opened as a whole, so their modules are opened one by
one. What runs is theirs from PIL image and prompt to score: hpsv2's transform, tokenizer and model (for clip too, which
Diffusion-DPO computes with that code), image-reward's transform, tokenizer and model, and for PickScore and aesthetic
transformers 4's CLIPProcessor and CLIPModel as their authors call them. Everything is float32 on the CPU, one by one.

An image that an original cannot score is null: hpsv2 keeps the alpha of RGBA and then fails, does not pad an image
whose longer side is 224, and rounds a side of an extreme ratio to 0; transformers 4 takes images one pixel high for
something else.
"""

import gzip
import importlib
import io
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import metric_fixtures as fixtures
import torch
from safetensors.torch import load_file

from xdpo.files import write_text

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "tests" / "vectors" / "metric_scores.json"


def open_module(name: str):
    """Import one module of an installed package without running the __init__ files above it."""
    parts = name.split(".")
    folder = next(Path(entry) / parts[0] for entry in sys.path if (Path(entry) / parts[0]).is_dir())
    for depth in range(1, len(parts)):
        package = ".".join(parts[:depth])
        if package not in sys.modules:
            module = types.ModuleType(package)
            module.__path__ = [str(folder.joinpath(*parts[1:depth]))]
            sys.modules[package] = module
    return importlib.import_module(name)


def open_image_reward():
    """image-reward's modules with its class, its BLIP and its ViT; BLIP first, lest it pull in the other metrics."""
    blip, vit = (open_module(f"ImageReward.models.BLIP.{name}") for name in ("blip_pretrain", "vit"))
    return open_module("ImageReward.ImageReward"), blip, vit


def score_each(score, images) -> dict[str, float | None]:
    """Name → score, or None where the original fails."""
    scores = {}
    for name, image in images.items():
        try:
            with torch.no_grad():
                scores[name] = float(score(image, fixtures.PROMPTS[name]))
        except (RuntimeError, ValueError) as error:
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
            scores[name] = None
    return scores


def hpsv2_scorer(tensors):
    """hpsv2.img_score.score without its CUDA autocast: the cosine."""
    package = "hpsv2.src.open_clip"
    model_code, transform = open_module(f"{package}.model"), open_module(f"{package}.transform")
    # The wheel lacks its vocabulary; an empty list of merges gives the tests' one.
    with mock.patch.object(gzip, "open", lambda *_: io.BytesIO(b"#version: 0.2")):
        tokenizer = open_module(f"{package}.tokenizer")
    vision, text = fixtures.VISION, fixtures.TEXT
    head_width = vision["hidden_size"] // vision["num_attention_heads"]
    model = model_code.CLIP(
        embed_dim=64,
        vision_cfg={
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": head_width,
            "patch_size": 14,
            "image_size": 224,
        },
        text_cfg={
            "context_length": 77,
            "vocab_size": tokenizer._tokenizer.vocab_size,
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
        },
        output_dict=True,
    )
    model.load_state_dict(tensors)
    model.eval()
    preprocess = transform.image_transform(224, is_train=False, resize_longest_max=True)

    def score(image, prompt):
        outputs = model(preprocess(image)[None], tokenizer.tokenize([prompt]))
        return (outputs["image_features"] @ outputs["text_features"].T)[0, 0]

    return score


def clip_model_of_transformers_4(folder: Path, place: str, projection: int, activation: str):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps(fixtures.clip_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(str(vocabulary), str(folder / "merges.txt"), model_max_length=77)
    shared = {"hidden_act": activation}
    text = fixtures.TEXT | shared | {"vocab_size": fixtures.CLIP_VOCABULARY, "eos_token_id": 2}
    vision = fixtures.VISION | shared | {"patch_size": 14, "image_size": 224}
    model = CLIPModel(CLIPConfig(projection_dim=projection, text_config=text, vision_config=vision))
    model.load_state_dict(load_file(folder / place))
    return model.eval(), CLIPProcessor(CLIPImageProcessor(), tokenizer)


def pickscore_scorer(folder: Path):
    """The snippet of PickScore's model card."""
    model, processor = clip_model_of_transformers_4(folder, fixtures.PICKSCORE, 64, "gelu")

    def score(image, prompt):
        options = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
        image_embedding = model.get_image_features(**processor(images=image, **options))
        image_embedding = image_embedding / torch.norm(image_embedding, dim=-1, keepdim=True)
        text_embedding = model.get_text_features(**processor(text=prompt, **options))
        text_embedding = text_embedding / torch.norm(text_embedding, dim=-1, keepdim=True)
        return model.logit_scale.exp() * (text_embedding @ image_embedding.T)[0]

    return score


def aesthetic_scorer(folder: Path):
    """Diffusion-DPO's aes_utils: CLIPModel, unit norm, the predictor's MLP (ImageReward's has the same class)."""
    model, processor = clip_model_of_transformers_4(folder, fixtures.CLIP_L, 768, "quick_gelu")
    head = open_image_reward()[0].MLP(768)
    head.load_state_dict(torch.load(folder / fixtures.AESTHETIC_HEAD, weights_only=True))
    head.eval()

    def score(image, prompt):
        embedding = model.get_image_features(**processor(images=image, return_tensors="pt"))
        return head(embedding / torch.norm(embedding, dim=-1, keepdim=True))

    return score


def image_reward_scorer(folder: Path):
    """image-reward's own class, its ViT-L replaced by the tests' small one."""
    image_reward, blip, vit = open_image_reward()
    vision, text = fixtures.SIZES["blip_vit_l_16"]["vision_config"], fixtures.SIZES["blip_vit_l_16"]["text_config"]
    width = vision["hidden_size"]

    def small_vit(*_):
        encoder = vit.VisionTransformer(
            img_size=224,
            patch_size=16,
            embed_dim=width,
            depth=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
        )
        return encoder, width

    bert = folder / "bert-base-uncased"  # the name that the package asks for, found in the working directory
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(fixtures.BERT_WORDS) + "\n")
    (bert / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "tokenizer_class": "BertTokenizer"}))
    (bert / "config.json").write_text(json.dumps({"model_type": "bert"}))
    config = folder / "med_config.json"
    config.write_text(
        json.dumps(
            {
                "architectures": ["BertModel"],
                "attention_probs_dropout_prob": 0.1,
                "hidden_act": "gelu",
                "hidden_dropout_prob": 0.1,
                "hidden_size": 768,
                "intermediate_size": text["intermediate_size"],
                "layer_norm_eps": 1e-12,
                "max_position_embeddings": 512,
                "model_type": "bert",
                "num_attention_heads": 12,
                "num_hidden_layers": text["num_hidden_layers"],
                "pad_token_id": 0,
                "type_vocab_size": 2,
                "vocab_size": text["vocab_size"],
                "encoder_width": width,
                "add_cross_attention": True,
            }
        )
    )
    with mock.patch.object(blip, "create_vit", small_vit):
        model = image_reward.ImageReward(str(config))
    tensors = torch.load(folder / fixtures.IMAGE_REWARD, weights_only=True)
    missing, extra = model.load_state_dict(tensors, strict=False)
    assert not extra and all("position_ids" in name for name in missing), (missing, extra)
    model.eval()
    return lambda image, prompt: model.score(prompt, image)


def main() -> None:
    images = fixtures.odd_images()
    with tempfile.TemporaryDirectory() as temporary:
        folder = fixtures.write_weights(Path(temporary) / "weights")
        os.chdir(folder)
        hps = torch.load(folder / fixtures.HPS, weights_only=True)["state_dict"]
        hps_21 = torch.load(folder / fixtures.HPS_21, weights_only=True)["state_dict"]
        scorers = {
            "pickscore": pickscore_scorer(folder),
            "hpsv2": hpsv2_scorer(hps),
            "hpsv2.1": hpsv2_scorer(hps_21),
            "clip": hpsv2_scorer(load_file(folder / fixtures.CLIP_H)),
            "aesthetic": aesthetic_scorer(folder),
            "image_reward": image_reward_scorer(folder),
        }
        scores = {}
        for metric, scorer in scorers.items():
            print(metric)
            scores[metric] = score_each(scorer, images)
        os.chdir(ROOT)
    about = (
        "Scores that the metrics' original code gives to the models, images and prompts of tests/metric_fixtures.py; "
        "made by tests/make_metric_fixtures.py, which names the versions. hpsv2, hpsv2.1 and clip are bare cosines. "
        "null: the original fails on that image."
    )
    write_text(OUTPUT, json.dumps({"about": about, "seed": fixtures.SEED, "scores": scores}, indent=1) + "\n")
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
