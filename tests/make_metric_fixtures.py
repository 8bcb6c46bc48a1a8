"""Score the tests' tiny models with the metrics' ORIGINAL code and write tests/vectors/metric_scores.json

    python tests/make_metric_fixtures.py NAME...

Needed only when tests/metric_fixtures.py changes, and in environments of their own, since the originals import neither
beside this project's libraries nor beside one another. All have torch==2.13.0, torchvision==0.28.0, ftfy==6.3.1 and
safetensors.

* pickscore, hpsv2, hpsv2.1, clip, aesthetic, image_reward, ict, hp: transformers==4.53.3 with tokenizers==0.21.4,
  timm==1.0.31, fairscale==0.4.13, and `pip install --no-deps hpsv2==1.2.0 image-reward==1.5`. For ict and hp
  trainer/eval/eval.py of github.com/BarretBa/ICTHP at bd5769f634f4cbc403eeb079813d4fc1088bc177 lies as icthp_eval.py on
  PYTHONPATH.
* hpsv3: transformers==4.45.2, trl==0.11.4, peft==0.13.2, accelerate==1.0.1, datasets, omegaconf, fire, matplotlib,
  tensorboard, rich, and `pip install --no-deps hpsv3==1.0.0`.
* vqascore: transformers==4.49.0, accelerate==1.0.1, qwen-vl-utils==0.0.14, decord, and `pip install --no-deps
  t2v-metrics==3.0`.

Some packages import more than they need when opened as a whole, so their modules are opened one by one. What runs is
theirs from PIL image and prompt to score: hpsv2's transform, tokenizer and model (for clip too, which Diffusion-DPO
computes with that code), image-reward's transform, tokenizer and model, for PickScore and aesthetic transformers 4's
CLIPProcessor and CLIPModel as their authors call them, ICTHP's function, hpsv3's HPSv3RewardInferencer, and
t2v-metrics' Qwen2VLModel. Everything is float32 on the CPU, one by one. "…, bfloat16" is in the precision that hpsv3
and t2v-metrics ship with; hpsv3's autocast, which works on CUDA alone, is done by hand there.

An image that an original cannot score is null: hpsv2 keeps the alpha of RGBA and then fails, does not pad an image
whose longer side is 224, and rounds a side of an extreme ratio to 0; transformers 4 takes images one pixel high for
something else, as ict and hp then do; and Qwen2-VL refuses an image more than 200 times as long as wide.
"""

import argparse
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


def icthp_scorer(folder: Path, name: str):
    """ICTHP's eval.py, its models filled as its main() fills them."""
    package = "hpsv2.src.open_clip"
    with mock.patch.object(gzip, "open", lambda *_: io.BytesIO(b"#version: 0.2")):
        tokenizer = open_module(f"{package}.tokenizer")
    sys.modules[package].get_tokenizer = lambda _: tokenizer.tokenize  # what it gives for ViT-H-14
    original = importlib.import_module("icthp_eval")

    (ict, processor), (backbone, _) = (
        clip_model_of_transformers_4(folder, fixtures.PICKSCORE, 64, "gelu") for _ in "12"
    )
    for model, place in ((ict, fixtures.ICT), (backbone, fixtures.HP_BACKBONE)):
        model.load_state_dict(torch.load(folder / place, weights_only=True))
    head = original.MLP(input_dim=64, hidden_dim=1024)
    head.load_state_dict(torch.load(folder / fixtures.HP_HEAD, weights_only=True))
    head.eval()

    def score(image, prompt):
        pixels = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        models = (ict, backbone, head)
        tokenize = original.get_tokenizer("ViT-H-14")
        return original.calculate_ict_hp_scores(pixels, prompt, tokenize, models, "cpu")[f"{name}_score"]

    return score


CHAT_TEMPLATE = (  # the published one, for a user's turn with an image and a text
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for message in messages %}<|im_start|>"
    "{{ message['role'] }}\n{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_qwen2_vl(folder: Path, tensors: dict, tied: bool) -> Path:
    """A folder as Qwen2-VL's on the hub, with small sizes."""
    from safetensors.torch import save_file

    folder.mkdir()
    tokens = {name: 256 + len(fixtures.QWEN_MERGES) + number for number, name in enumerate(fixtures.QWEN_SPECIAL)}
    text, vision = fixtures.QWEN_TEXT, fixtures.QWEN_VISION
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "bos_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
        "vision_token_id": tokens["<|vision_pad|>"],
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": text["hidden_size"],
        "intermediate_size": text["intermediate_size"],
        "max_position_embeddings": 32768,
        "max_window_layers": text["num_hidden_layers"],
        "model_type": "qwen2_vl",
        "num_attention_heads": text["num_attention_heads"],
        "num_hidden_layers": text["num_hidden_layers"],
        "num_key_value_heads": text["num_key_value_heads"],
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", **text["rope_parameters"]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vision_config": vision | {"mlp_ratio": 4, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2},
        "vocab_size": fixtures.QWEN_VOCABULARY,
    }
    processor = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    tokenizer = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(number): {"content": name, "special": True} for name, number in tokens.items()},
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
        "model_max_length": 32768,
    }
    generation = {
        "bos_token_id": tokens["<|endoftext|>"],
        "pad_token_id": tokens["<|endoftext|>"],
        "do_sample": True,
        "eos_token_id": [tokens["<|im_end|>"], tokens["<|endoftext|>"]],
        "repetition_penalty": fixtures.QWEN_PENALTY,
        "temperature": 0.01,
        "top_p": 0.001,
        "top_k": 1,
    }
    for name, content in (
        ("config", config),
        ("preprocessor_config", processor),
        ("tokenizer_config", tokenizer),
        ("generation_config", generation),
        ("chat_template", {"chat_template": CHAT_TEMPLATE}),
        ("vocab", fixtures.qwen_vocabulary()),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    merges = "".join(f"{first} {second}\n" for first, second in fixtures.QWEN_MERGES)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def qwen_2b_tensors(folder: Path) -> dict:
    return {
        name: tensor
        for number in (1, 2)
        for name, tensor in load_file(folder / fixtures.QWEN_2B / f"model-0000{number}-of-00002.safetensors").items()
    }


def hpsv3_scorer(folder: Path, dtype: str):
    """hpsv3's own class on a small Qwen2-VL, asked a question of ours."""
    import yaml
    from hpsv3 import inference

    base = qwen_2b_tensors(folder)  # replaced by the checkpoint, which must fit
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    place = write_qwen2_vl(folder / f"base in {dtype}", base, tied=False)
    shipped = Path(inference.__file__).parent / "config" / "HPSv3_7B.yaml"
    is_rounded = dtype == "bfloat16"
    settings = yaml.safe_load(shipped.read_text()) | {
        "model_name_or_path": str(place),
        "torch_dtype": dtype,
        "bf16": is_rounded,
        "use_cpu": True,
        "output_dir": str(folder / "outputs"),
        "report_to": "none",
    }
    (folder / f"{dtype}.yaml").write_text(yaml.safe_dump(settings))
    inference.INSTRUCTION = fixtures.HPSV3_INSTRUCTION
    inference.prompt_with_special_token = fixtures.HPSV3_QUESTION
    original = inference.HPSv3RewardInferencer(str(folder / f"{dtype}.yaml"), str(folder / fixtures.HPSV3), "cpu")
    original.model.rm_head.register_forward_pre_hook(lambda _, states: states[0].float())
    assert original.model.rm_head[0].weight.dtype == torch.float32
    assert original.model.dtype == getattr(torch, dtype)
    return lambda image, prompt: original.reward([image], [prompt])[0][0]


def vqascore_scorer(folder: Path, dtype: str):
    """t2v-metrics' own class on a small Qwen2-VL, with the attention that CPUs have."""
    original = open_module("t2v_metrics.models.vqascore_models.qwen2vl_model")
    place = str(write_qwen2_vl(folder / f"asked in {dtype}", qwen_2b_tensors(folder), tied=True))
    model = {"path": place, "torch_dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    original.QWEN2_VL_MODELS["small"] = {"tokenizer": {"path": place}, "model": model}
    asked = original.Qwen2VLModel("small", device="cpu")

    def score(image, prompt):
        with mock.patch.object(original.Image, "open", lambda _: image):
            return asked.forward(["image.png"], [prompt])[0]

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="metrics whose originals this environment has")
    names = parser.parse_args().names
    images = fixtures.odd_images()
    with tempfile.TemporaryDirectory() as temporary:
        folder = fixtures.write_weights(Path(temporary) / "weights")
        os.chdir(folder)
        makers = {
            "pickscore": lambda: pickscore_scorer(folder),
            "hpsv2": lambda: hpsv2_scorer(torch.load(folder / fixtures.HPS, weights_only=True)["state_dict"]),
            "hpsv2.1": lambda: hpsv2_scorer(torch.load(folder / fixtures.HPS_21, weights_only=True)["state_dict"]),
            "clip": lambda: hpsv2_scorer(load_file(folder / fixtures.CLIP_H)),
            "aesthetic": lambda: aesthetic_scorer(folder),
            "image_reward": lambda: image_reward_scorer(folder),
            "ict": lambda: icthp_scorer(folder, "ict"),
            "hp": lambda: icthp_scorer(folder, "hp"),
            "hpsv3": lambda: hpsv3_scorer(folder, "float32"),
            "hpsv3, bfloat16": lambda: hpsv3_scorer(folder, "bfloat16"),
            "vqascore": lambda: vqascore_scorer(folder, "float32"),
            "vqascore, bfloat16": lambda: vqascore_scorer(folder, "bfloat16"),
        }
        scores = json.loads(OUTPUT.read_text())["scores"]
        for metric in names:
            print(metric)
            scores[metric] = score_each(makers[metric](), images)
            assert any(scores[metric].values()), f"{metric}: the original scored no image"
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
