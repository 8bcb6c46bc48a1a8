"""Small models in the original metrics' own file formats, made from nothing: no weight is committed, only scores.

`write_weights` lays a weights folder out as --weights wants it: every tensor is drawn from numpy's generator in the
order of the sorted names, so anyone can make the same folder and run the original packages on it.
tests/make_metric_fixtures.py did; tests/vectors/metric_scores.json is what they printed.
"""

import json

import numpy as np
from PIL import Image

SEED = 20250723
VISION = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {
    "bos_token_id": 0,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CLIP_VOCABULARY = 256 + 256 + 2  # bytes, bytes that end a word, start and end; no merges
BERT_WORDS = [
    "[PAD]",
    *(f"[unused{number}]" for number in range(99)),
    *("[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *"!\"#$%&'()*+,-./:;<=>?@",
    *"0123456789abcdefghijklmnopqrstuvwxyz",
    *(f"##{letter}" for letter in "0123456789abcdefghijklmnopqrstuvwxyz"),
]
BERT_VOCABULARY = len(BERT_WORDS) + 2  # the two that BLIP adds

QWEN_MERGES = [("Y", "e"), ("Ye", "s"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
QWEN_SPECIAL = [
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end"),
        *("quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
]
QWEN_TOKENS = 256 + len(QWEN_MERGES) + len(QWEN_SPECIAL)
QWEN_VOCABULARY = QWEN_TOKENS + 5  # more embeddings than tokens, as published
QWEN_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"mrope_section": [2, 3, 3]},
}
QWEN_VISION = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}
QWEN_PENALTY = 1.3
HPSV3_INSTRUCTION = "\nRate from 0 to 10.  \n**Both:**\nTextual prompt - {text_prompt}\n\n\n"
HPSV3_QUESTION = "\nPlease rate this image: <|Reward|>\n\nEND\n"

SIZES = {
    "clip_vit_h_14": {
        "projection_dim": 64,
        "text_config": TEXT | {"vocab_size": CLIP_VOCABULARY},
        "vision_config": VISION,
    },
    "clip_vit_l_14": {"vision_config": VISION},
    "blip_vit_l_16": {
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "text_config": {
            "vocab_size": BERT_VOCABULARY,
            "encoder_hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
        },
    },
    "dinov2_vit_l_14": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 70},
    "clip_vit_h_14_vision": {"projection_dim": 64, "vision_config": VISION},
    "hpsv3_qwen2_vl_7b": {
        "dtype": "float32",
        "text_config": QWEN_TEXT | {"vocab_size": QWEN_TOKENS + 1},
        "vision_config": QWEN_VISION,
    },
    "qwen2_vl_2b": {
        "dtype": "float32",
        "text_config": QWEN_TEXT | {"vocab_size": QWEN_VOCABULARY},
        "vision_config": QWEN_VISION,
    },
}

LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1/model.safetensors"
HPS = "xswu/HPSv2/HPS_v2_compressed.pt"
HPS_21 = "xswu/HPSv2/HPS_v2.1_compressed.pt"
CLIP_H = f"{LAION}/open_clip_model.safetensors"
CLIP_L = "openai/clip-vit-large-patch14/model.safetensors"
AESTHETIC_HEAD = "christophschuhmann/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth"
IMAGE_REWARD = "zai-org/ImageReward/ImageReward.pt"
DINOV2 = "facebook/dinov2-large/model.safetensors"
ICT = "8y/ICT/pytorch_model.bin"
HP_BACKBONE = "8y/HP/hp_backbone/pytorch_model.bin"
HP_HEAD = "8y/HP/hp_scorer/mlp_pytorch_model.bin"
HPSV3 = "MizzenAI/HPSv3/HPSv3.safetensors"
HPSV3_PACKAGE = "pypi/hpsv3/hpsv3-1.0.0-py3-none-any.whl"
QWEN_7B = "Qwen/Qwen2-VL-7B-Instruct"
QWEN_2B = "Qwen/Qwen2-VL-2B-Instruct"


def tensors_of(shapes, seed):
    """Names and shapes → float32 arrays: norms' weights near 1, matrices that keep an input's size, others small."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in sorted(shapes):
        values = rng.standard_normal(shapes[name])
        if name == "logit_scale":
            values = np.full((), np.log(100.0))
        elif name.endswith("weight") and len(shapes[name]) == 1:
            values = 1 + 0.1 * values
        elif len(shapes[name]) >= 2 and "embed" not in name:
            values = values / np.sqrt(np.prod(shapes[name][1:]))
        else:
            values = 0.1 * values
        tensors[name] = np.asarray(values, dtype=np.float32)
    return tensors


def open_clip_shapes(projection, vision, text, vocabulary, patch=14, side=224, positions=77):
    """Names and shapes of an open_clip ViT, from its two towers' sizes."""
    wide, narrow = vision["hidden_size"], text["hidden_size"]
    shapes = {
        "logit_scale": (),
        "positional_embedding": (positions, narrow),
        "text_projection": (narrow, projection),
        "token_embedding.weight": (vocabulary, narrow),
        "visual.class_embedding": (wide,),
        "visual.positional_embedding": ((side // patch) ** 2 + 1, wide),
        "visual.proj": (wide, projection),
        "visual.conv1.weight": (wide, 3, patch, patch),
    }
    for norm, width in (("visual.ln_pre", wide), ("visual.ln_post", wide), ("ln_final", narrow)):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for tower, sizes in (("visual.transformer", vision), ("transformer", text)):
        width, inner = sizes["hidden_size"], sizes["intermediate_size"]
        for layer in range(sizes["num_hidden_layers"]):
            block = f"{tower}.resblocks.{layer}"
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
            for part, rows, columns in (
                ("attn.in_proj_", 3 * width, width),
                ("attn.out_proj.", width, width),
                ("mlp.c_fc.", inner, width),
                ("mlp.c_proj.", width, inner),
            ):
                shapes |= {f"{block}.{part}weight": (rows, columns), f"{block}.{part}bias": (rows,)}
    return shapes


def transformers_clip_shapes(projection, vision, text, vocabulary, patch=14, side=224, positions=77):
    """Names and shapes of a transformers CLIPModel, from its two towers' sizes."""
    wide, narrow = vision["hidden_size"], text["hidden_size"]
    shapes = {
        "logit_scale": (),
        "text_projection.weight": (projection, narrow),
        "visual_projection.weight": (projection, wide),
        "text_model.embeddings.token_embedding.weight": (vocabulary, narrow),
        "text_model.embeddings.position_embedding.weight": (positions, narrow),
        "vision_model.embeddings.class_embedding": (wide,),
        "vision_model.embeddings.position_embedding.weight": ((side // patch) ** 2 + 1, wide),
        "vision_model.embeddings.patch_embedding.weight": (wide, 3, patch, patch),
    }
    for norm, width in (
        ("text_model.final_layer_norm", narrow),
        ("vision_model.pre_layrnorm", wide),
        ("vision_model.post_layernorm", wide),
    ):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for tower, sizes in (("vision_model", vision), ("text_model", text)):
        width, inner = sizes["hidden_size"], sizes["intermediate_size"]
        for layer in range(sizes["num_hidden_layers"]):
            block = f"{tower}.encoder.layers.{layer}"
            for norm in ("layer_norm1", "layer_norm2"):
                shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
            for part, rows, columns in (
                *((f"self_attn.{kind}_proj", width, width) for kind in ("q", "k", "v", "out")),
                ("mlp.fc1", inner, width),
                ("mlp.fc2", width, inner),
            ):
                shapes |= {f"{block}.{part}.weight": (rows, columns), f"{block}.{part}.bias": (rows,)}
    return shapes


def image_reward_shapes(vision, text, patch=16, side=224, hidden=768, positions=512):
    """Names and shapes in ImageReward.pt, from its two towers' sizes."""
    wide, inner = vision["hidden_size"], vision["intermediate_size"]
    shapes = {
        "cls_token": (1, 1, wide),
        "pos_embed": (1, (side // patch) ** 2 + 1, wide),
        "patch_embed.proj.weight": (wide, 3, patch, patch),
        "patch_embed.proj.bias": (wide,),
        "norm.weight": (wide,),
        "norm.bias": (wide,),
    }
    for layer in range(vision["num_hidden_layers"]):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{layer}.{norm}.weight": (wide,), f"blocks.{layer}.{norm}.bias": (wide,)}
        for part, rows, columns in (
            ("attn.qkv", 3 * wide, wide),
            ("attn.proj", wide, wide),
            ("mlp.fc1", inner, wide),
            ("mlp.fc2", wide, inner),
        ):
            shapes |= {f"blocks.{layer}.{part}.weight": (rows, columns), f"blocks.{layer}.{part}.bias": (rows,)}
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}

    bert = {
        "embeddings.word_embeddings.weight": (text["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (positions, hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }
    for layer in range(text["num_hidden_layers"]):
        block = f"encoder.layer.{layer}"
        for attention, keys_from in (("attention", hidden), ("crossattention", wide)):
            for part, columns in (("query", hidden), ("key", keys_from), ("value", keys_from)):
                bert |= {
                    f"{block}.{attention}.self.{part}.weight": (hidden, columns),
                    f"{block}.{attention}.self.{part}.bias": (hidden,),
                }
            outputs = {"dense.weight": (hidden, hidden), "dense.bias": (hidden,)}
            outputs |= {"LayerNorm.weight": (hidden,), "LayerNorm.bias": (hidden,)}
            bert |= {f"{block}.{attention}.output.{part}": shape for part, shape in outputs.items()}
        inner = text["intermediate_size"]
        bert |= {
            f"{block}.intermediate.dense.weight": (inner, hidden),
            f"{block}.intermediate.dense.bias": (inner,),
            f"{block}.output.dense.weight": (hidden, inner),
            f"{block}.output.dense.bias": (hidden,),
            f"{block}.output.LayerNorm.weight": (hidden,),
            f"{block}.output.LayerNorm.bias": (hidden,),
        }
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in bert.items()}
    shapes |= {"blip.vision_proj.weight": (256, wide), "blip.vision_proj.bias": (256,)}
    shapes |= {"blip.text_proj.weight": (256, hidden), "blip.text_proj.bias": (256,)}
    return shapes | {f"mlp.{name}": shape for name, shape in head_shapes().items()}


def dinov2_shapes(sizes, patch=14):
    """Names and shapes of the published file, which are those of transformers 4."""
    width = sizes["hidden_size"]
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, (sizes["image_size"] // patch) ** 2 + 1, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    for number in range(sizes["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{layer}.{norm}.weight": (width,), f"{layer}.{norm}.bias": (width,)}
        shapes |= {f"{layer}.layer_scale{scale}.lambda1": (width,) for scale in (1, 2)}
        for part, rows, columns in (
            *((f"attention.attention.{kind}", width, width) for kind in ("query", "key", "value")),
            ("attention.output.dense", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes |= {f"{layer}.{part}.weight": (rows, columns), f"{layer}.{part}.bias": (rows,)}
    return shapes


def qwen2_vl_shapes(text, vision, patch=14, frames=2, merged=2):
    """Names and shapes in the published files of Qwen2-VL, which are those of transformers 4."""
    width, inner, vocabulary = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    keys = width * text["num_key_value_heads"] // text["num_attention_heads"]
    seen, joined = vision["embed_dim"], vision["embed_dim"] * merged**2
    shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
        "visual.patch_embed.proj.weight": (seen, 3, frames, patch, patch),
        "visual.merger.ln_q.weight": (seen,),
        "visual.merger.ln_q.bias": (seen,),
        "visual.merger.mlp.0.weight": (joined, joined),
        "visual.merger.mlp.0.bias": (joined,),
        "visual.merger.mlp.2.weight": (width, joined),
        "visual.merger.mlp.2.bias": (width,),
    }
    for number in range(text["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        for part, rows in (("q", width), ("k", keys), ("v", keys)):
            shapes |= {f"{layer}.self_attn.{part}_proj.weight": (rows, width)}
            shapes |= {f"{layer}.self_attn.{part}_proj.bias": (rows,)}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (width, width), f"{layer}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{layer}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
    for number in range(vision["depth"]):
        block = f"visual.blocks.{number}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (seen,), f"{block}.{norm}.bias": (seen,)}
        for part, rows, columns in (
            ("attn.qkv", 3 * seen, seen),
            ("attn.proj", seen, seen),
            ("mlp.fc1", 4 * seen, seen),
            ("mlp.fc2", seen, 4 * seen),
        ):
            shapes |= {f"{block}.{part}.weight": (rows, columns), f"{block}.{part}.bias": (rows,)}
    return shapes


def hpsv3_shapes(text, vision):
    """Names and shapes in HPSv3.safetensors."""
    width, vocabulary = text["hidden_size"], text["vocab_size"]
    shapes = qwen2_vl_shapes(text, vision) | {"lm_head.weight": (vocabulary, width)}
    for layer, rows, columns in ((0, 1024, width), (3, 16, 1024), (5, 2, 16)):
        shapes |= {f"rm_head.{layer}.weight": (rows, columns), f"rm_head.{layer}.bias": (rows,)}
    return shapes


def head_shapes(width=768):
    """Names and shapes of the head that the aesthetic predictor, ImageReward and HP have alike."""
    layers = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    return {f"layers.{number}.weight": shape for number, shape in layers.items()} | {
        f"layers.{number}.bias": shape[:1] for number, shape in layers.items()
    }


def clip_vocabulary():
    """CLIP's vocabulary before its first merge: token → id."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


def clip_tokenizer():
    """What CLIP's tokenizer.json holds, with the vocabulary above."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = clip_vocabulary()
    start, end = "<|startoftext|>", "<|endoftext|>"
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], end_of_word_suffix="</w>", unk_token=end, fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(token, vocabulary[token]) for token in (start, end)]
    )
    tokenizer.add_special_tokens([start, end])
    return tokenizer


def qwen_vocabulary():
    """Qwen2's vocabulary before most of its merges, without the special tokens: token → id."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), *(first + second for first, second in QWEN_MERGES)]
    return {token: number for number, token in enumerate(tokens)}


def qwen_tokenizer():
    """What Qwen2-VL's tokenizer.json holds, with the vocabulary above."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE(vocab=qwen_vocabulary(), merges=QWEN_MERGES))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(QWEN_SPECIAL)
    return tokenizer


def write_package(path):
    """The part of the package hpsv3 that holds what its network is asked, with a question of ours."""
    import zipfile

    source = f"INSTRUCTION = {HPSV3_INSTRUCTION!r}\nprompt_with_special_token = {HPSV3_QUESTION!r}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("hpsv3/dataset/data_collator_qwen.py", f"import torch\n\n{source}\n\nclass Collator: ...\n")


def write_weights(folder):
    """Lay the folder out; takes a quarter of a second or so. Returns it."""
    import torch
    from safetensors.numpy import save_file

    def save(place, tensors, **wrapped):
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(tensors, path)
            return
        content = {name: torch.from_numpy(values) for name, values in tensors.items()}
        torch.save({"state_dict": content} if wrapped.get("state_dict") else content, path)

    towers = (VISION, TEXT, CLIP_VOCABULARY)
    save(PICKSCORE, tensors_of(transformers_clip_shapes(64, *towers), SEED))
    save(HPS, tensors_of(open_clip_shapes(64, *towers), SEED + 1), state_dict=True)
    save(HPS_21, tensors_of(open_clip_shapes(64, *towers), SEED + 2), state_dict=True)
    save(CLIP_H, tensors_of(open_clip_shapes(64, *towers), SEED + 3))
    save(CLIP_L, tensors_of(transformers_clip_shapes(768, *towers), SEED + 4))
    save(AESTHETIC_HEAD, tensors_of(head_shapes(), SEED + 5))
    sizes = SIZES["blip_vit_l_16"]
    save(IMAGE_REWARD, tensors_of(image_reward_shapes(sizes["vision_config"], sizes["text_config"]), SEED + 6))

    save(DINOV2, tensors_of(dinov2_shapes(SIZES["dinov2_vit_l_14"]), SEED + 7))

    save(ICT, tensors_of(transformers_clip_shapes(64, *towers), SEED + 8))
    save(HP_BACKBONE, tensors_of(transformers_clip_shapes(64, *towers), SEED + 9))
    save(HP_HEAD, tensors_of(head_shapes(64), SEED + 10))
    sizes = SIZES["hpsv3_qwen2_vl_7b"]
    save(HPSV3, tensors_of(hpsv3_shapes(sizes["text_config"], sizes["vision_config"]), SEED + 11))
    write_package(folder / HPSV3_PACKAGE)
    sizes = SIZES["qwen2_vl_2b"]
    qwen = tensors_of(qwen2_vl_shapes(sizes["text_config"], sizes["vision_config"]), SEED + 12)
    qwen["model.norm.weight"] *= 2
    qwen["model.embed_tokens.weight"][qwen_vocabulary()["Yes"]] *= 4  # an answer as likely as not
    halves = {1: [name for name in qwen if name < "model.m"], 2: [name for name in qwen if name >= "model.m"]}
    for number, names in halves.items():
        save(f"{QWEN_2B}/model-0000{number}-of-00002.safetensors", {name: qwen[name] for name in names})
    (folder / QWEN_2B / "generation_config.json").write_text(json.dumps({"repetition_penalty": QWEN_PENALTY}))

    for place in (QWEN_2B, QWEN_7B):
        (folder / place).mkdir(parents=True, exist_ok=True)
        qwen_tokenizer().save(str(folder / place / "tokenizer.json"))
    clip_tokenizer().save(str(folder / LAION / "tokenizer.json"))
    bert = folder / "google-bert/bert-base-uncased"
    bert.mkdir(parents=True)
    (bert / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    (folder / "sizes.json").write_text(json.dumps(SIZES))
    return folder


def _picture(size, seed, channels=3):
    """A smooth picture with a little noise, so that resizing matters and models tell pictures apart."""
    rng = np.random.default_rng(seed)
    width, height = size
    rows, columns = np.mgrid[0:height, 0:width] / max(size)
    waves = [
        np.sin(2 * np.pi * (rng.uniform(0.5, 3) * rows + rng.uniform(0.5, 3) * columns + rng.uniform()))
        for _ in range(channels)
    ]
    pixels = 127.5 + 100 * np.stack(waves, -1) + rng.normal(0, 20, (height, width, channels))
    return pixels.clip(0, 255).astype(np.uint8)


def _turned():
    """A picture whose EXIF tag says to turn it; no original does."""
    import io

    exif = Image.Exif()
    exif[274] = 6
    file = io.BytesIO()
    Image.fromarray(_picture((90, 61), 9)).save(file, "PNG", exif=exif)
    return Image.open(file)


PROMPTS = {
    "square": "a photo of a cat",
    "wide, odd overhang": "A space man sat on a beach chair on the MOON, pixel art.",
    "tall": "“Curly” quotes &amp;amp; entities — it’s  spaced",
    "RGBA": "café in 日本, naïve",
    "grey": "",
    "grey and alpha": "a red cube\tand\n a robot tiger",
    "palette": "a castle, a dragon & a knight; " * 12,
    "CMYK": "it's 100% there's 3 dogs' ears #!?",
    "one bit": "  leading and trailing  ",
    "EXIF says turn": "portrait of Archduke Franz Ferdinand",
    "one pixel wide": "x",
    "one pixel high": "y",
    "224 on its longer side": "a small picture",
    "extreme ratio": "a very wide panorama",
}


def odd_images():
    """One image per prompt of PROMPTS, by the same names."""

    def rgb(size, seed):
        return Image.fromarray(_picture(size, seed))

    images = {
        "square": rgb((128, 128), 0),
        "wide, odd overhang": rgb((227, 224), 1),
        "tall": rgb((61, 97), 2),
        "RGBA": Image.fromarray(_picture((150, 100), 3, channels=4)),
        "grey": rgb((100, 80), 4).convert("L"),
        "grey and alpha": Image.fromarray(_picture((90, 120), 5, channels=4)).convert("LA"),
        "palette": rgb((130, 110), 6).quantize(32),
        "CMYK": rgb((110, 130), 7).convert("CMYK"),
        "one bit": rgb((120, 90), 8).convert("1"),
        "EXIF says turn": _turned(),
        "one pixel wide": rgb((1, 50), 10),
        "one pixel high": rgb((50, 1), 11),
        "224 on its longer side": rgb((224, 160), 12),
        "extreme ratio": rgb((2000, 7), 13),
    }
    assert images.keys() == PROMPTS.keys(), "every image has a prompt"
    return images
