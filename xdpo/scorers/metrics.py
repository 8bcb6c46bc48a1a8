"""The five metrics of the paper and HPS v2.1, each as its original computes it: files, preprocessing, formula.

The paper's Tables 2 and 3 print means of these scores over images. The paper measures HPS v2.0, and as CLIP the plain
cosine of OpenCLIP's ViT-H-14. Everything is computed in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdpo.scorers import pixels
from xdpo.scorers.blip import BLIP_VIT_L_16, build_image_reward, load_bert_tokenizer
from xdpo.scorers.clip import (
    VIT_H_14,
    VIT_L_14,
    build_clip,
    build_clip_vision,
    clean,
    image_embeddings,
    load_tokenizer,
    text_embeddings,
)
from xdpo.scorers.dino import DINOV2_VIT_L_14
from xdpo.scorers.head import build_head
from xdpo.scorers.weights import WeightFile, read_tensors

COMPUTATION = 1  # raise it when a change here moves scores: it is part of every version

ScoreBatch = Callable[[Sequence[Tensor], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Metric:
    """A metric whose weights are not loaded yet.

    files: by role. architecture: key in ARCHITECTURES. load: paths by role, sizes and device → the function that
    scores a list of preprocessed images and their prompts.
    """

    scale: str
    files: Mapping[str, WeightFile]
    architecture: str
    preprocess: Callable[[Any], Tensor]
    load: Callable[[Mapping[str, Path], dict, str | torch.device], ScoreBatch]


ARCHITECTURES: dict[str, dict] = {
    "clip_vit_h_14": VIT_H_14,
    "clip_vit_l_14": VIT_L_14,
    "blip_vit_l_16": BLIP_VIT_L_16,
    "dinov2_vit_l_14": DINOV2_VIT_L_14,
}

_LAION = {
    "repository": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "revision": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
}
_HPS = {"repository": "xswu/HPSv2", "revision": "697403c78157020a1ae59d23f111aa58ced35b0a"}
CLIP_TOKENIZER = WeightFile(name="tokenizer.json", about_bytes=2_220_000, **_LAION)
CLIP_H = WeightFile(
    name="open_clip_model.safetensors",
    about_bytes=3_944_517_836,
    sha256="0084e75319a50ad85ef45377bad5bc38f2f58824459eb690048d51c9f8863be5",
    **_LAION,
)
PICKSCORE_V1 = WeightFile(
    repository="yuvalkirstain/PickScore_v1",
    name="model.safetensors",
    revision="a4e4367c6dfa7288a00c550414478f865b875800",
    about_bytes=3_940_000_000,
)
HPS_V2 = WeightFile(name="HPS_v2_compressed.pt", about_bytes=1_970_000_000, **_HPS)
HPS_V21 = WeightFile(
    name="HPS_v2.1_compressed.pt",
    about_bytes=1_972_490_005,
    sha256="c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
    **_HPS,
)
CLIP_L = WeightFile(
    repository="openai/clip-vit-large-patch14",
    name="model.safetensors",
    revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
    about_bytes=1_710_540_580,
    sha256="a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
)
_PREDICTOR = "christophschuhmann/improved-aesthetic-predictor"
_PREDICTOR_REVISION = "6934dd81792f086e613a121dbce43082cb8be85e"
AESTHETIC_HEAD = WeightFile(
    repository=_PREDICTOR,
    name="sac+logos+ava1-l14-linearMSE.pth",
    revision=_PREDICTOR_REVISION,
    about_bytes=3_714_759,
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    url=f"https://raw.githubusercontent.com/{_PREDICTOR}/{_PREDICTOR_REVISION}/sac%2Blogos%2Bava1-l14-linearMSE.pth",
)
IMAGE_REWARD = WeightFile(
    repository="zai-org/ImageReward",  # formerly THUDM/ImageReward
    name="ImageReward.pt",
    revision="5736be03b2652728fb87788c9797b0570450ab72",
    about_bytes=1_790_000_000,
)
BERT_VOCABULARY = WeightFile(
    repository="google-bert/bert-base-uncased",
    name="vocab.txt",
    revision="86b5e0934494bd15c9632b12f734a8a67f723594",
    about_bytes=232_000,
)


def _load_pickscore(paths: Mapping[str, Path], sizes: dict, device: str | torch.device) -> ScoreBatch:
    """exp(logit_scale) · cos(image, text), the prompt tokenized as it stands."""
    tokenize, model = load_tokenizer(paths["tokenizer"]), build_clip(sizes, paths["model"]).to(device)

    def score(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        image = image_embeddings(model, torch.stack(list(images)).to(device))
        text = text_embeddings(model, tokenize(prompts).to(device))
        return (model.logit_scale.exp() * (image * text).sum(-1)).tolist()

    return score


def _load_open_clip_cosine(factor: float) -> Callable[[Mapping[str, Path], dict, str | torch.device], ScoreBatch]:
    """factor · cos(image, text), the prompt cleaned as open_clip cleans it."""

    def load(paths: Mapping[str, Path], sizes: dict, device: str | torch.device) -> ScoreBatch:
        tokenize, model = load_tokenizer(paths["tokenizer"]), build_clip(sizes, paths["model"]).to(device)

        def score(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
            image = image_embeddings(model, torch.stack(list(images)).to(device))
            text = text_embeddings(model, tokenize([clean(prompt) for prompt in prompts]).to(device))
            return (factor * (image * text).sum(-1)).tolist()

        return score

    return load


def _load_aesthetic(paths: Mapping[str, Path], sizes: dict, device: str | torch.device) -> ScoreBatch:
    """Linear layers on the unit image embedding; the prompt is not used."""
    head = build_head(read_tensors(paths["head"]), paths["head"]).to(device)
    model = build_clip_vision(sizes, paths["model"]).to(device)

    def score(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        embeddings = model(pixel_values=torch.stack(list(images)).to(device)).image_embeds
        return head(torch.nn.functional.normalize(embeddings, dim=-1)).squeeze(1).tolist()

    return score


def _load_image_reward(paths: Mapping[str, Path], sizes: dict, device: str | torch.device) -> ScoreBatch:
    tokenize, model = load_bert_tokenizer(paths["vocabulary"]), build_image_reward(sizes, paths["model"]).to(device)

    def score(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        token_ids, token_mask = (part.to(device) for part in tokenize(prompts))
        return model(torch.stack(list(images)).to(device), token_ids, token_mask).tolist()

    return score


_HPS_SCALE = "100 × cosine; 26.95 for SD 1.4 over the four styles with v2.0, 25.35 with v2.1"
METRICS: dict[str, Metric] = {
    "pickscore": Metric(
        scale="about 100 × cosine (times exp(logit_scale)); 20 to 22 for Stable Diffusion models",
        files={"model": PICKSCORE_V1, "tokenizer": CLIP_TOKENIZER},
        architecture="clip_vit_h_14",
        preprocess=pixels.crop_floor,
        load=_load_pickscore,
    ),
    "hpsv2": Metric(
        scale=_HPS_SCALE,
        files={"model": HPS_V2, "tokenizer": CLIP_TOKENIZER},
        architecture="clip_vit_h_14",
        preprocess=pixels.pad,
        load=_load_open_clip_cosine(100.0),
    ),
    "hpsv2.1": Metric(
        scale=_HPS_SCALE,
        files={"model": HPS_V21, "tokenizer": CLIP_TOKENIZER},
        architecture="clip_vit_h_14",
        preprocess=pixels.pad,
        load=_load_open_clip_cosine(100.0),
    ),
    "clip": Metric(
        scale="cosine; about 0.3 to 0.4 for images that show their prompt",
        files={"model": CLIP_H, "tokenizer": CLIP_TOKENIZER},
        architecture="clip_vit_h_14",
        preprocess=pixels.pad,
        load=_load_open_clip_cosine(1.0),
    ),
    "aesthetic": Metric(
        scale="estimated rating from 1 to 10",
        files={"model": CLIP_L, "head": AESTHETIC_HEAD},
        architecture="clip_vit_l_14",
        preprocess=pixels.crop_floor,
        load=_load_aesthetic,
    ),
    "image_reward": Metric(
        scale="standard deviations from the mean reward of ImageReward's training set",
        files={"model": IMAGE_REWARD, "vocabulary": BERT_VOCABULARY},
        architecture="blip_vit_l_16",
        preprocess=pixels.crop_half_even,
        load=_load_image_reward,
    ),
}
