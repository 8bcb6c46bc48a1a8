"""The metrics, each as its original computes it: files, preprocessing, formula.

The paper's Tables 2 and 3 print means of five of these scores over images. The paper measures HPS v2.0, and as CLIP the
plain cosine of OpenCLIP's ViT-H-14. Everything is computed in float32, but Qwen2-VL in bfloat16, as its originals do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdpo.scorers import hpsv3, pixels, qwen2_vl, vqascore
from xdpo.scorers.blip import BLIP_VIT_L_16, build_image_reward, load_bert_tokenizer
from xdpo.scorers.clip import (
    VIT_H_14,
    VIT_H_14_VISION,
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
    "clip_vit_h_14_vision": VIT_H_14_VISION,
    "clip_vit_l_14": VIT_L_14,
    "blip_vit_l_16": BLIP_VIT_L_16,
    "dinov2_vit_l_14": DINOV2_VIT_L_14,
    "hpsv3_qwen2_vl_7b": hpsv3.HPSV3_QWEN2_VL_7B,
    "qwen2_vl_2b": qwen2_vl.QWEN2_VL_2B,
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
# No commit of these two repositories is known here.
ICT = WeightFile(repository="8y/ICT", name="pytorch_model.bin", revision="main", about_bytes=3_944_000_000)
HP_BACKBONE = WeightFile(
    repository="8y/HP", name="hp_backbone/pytorch_model.bin", revision="main", about_bytes=3_944_000_000
)
HP_HEAD = WeightFile(repository="8y/HP", name="hp_scorer/mlp_pytorch_model.bin", revision="main", about_bytes=4_770_000)
HPSV3 = WeightFile(
    repository="MizzenAI/HPSv3",
    name="HPSv3.safetensors",
    revision="4f81e3e09edd82fe3c5f636444c721b592a735ca",
    about_bytes=16_591_800_000,
)
HPSV3_PACKAGE = WeightFile(
    repository="pypi/hpsv3",
    name="hpsv3-1.0.0-py3-none-any.whl",
    revision="1.0.0",
    about_bytes=68_966,
    sha256="1a1b3ed1f538315ddf0e90c55b9f5c8ab3248d772cd713c11f7dfe35bf867ab3",
    url="https://files.pythonhosted.org/packages/20/ed/6feb979b0086f57dc7a8b545693e1dbeffd60c8d942971e0445c65fcf438/"
    "hpsv3-1.0.0-py3-none-any.whl",
)
QWEN2_VL_7B_TOKENIZER = WeightFile(
    repository="Qwen/Qwen2-VL-7B-Instruct",
    name="tokenizer.json",
    revision="eed13092ef92e448dd6875b2a00151bd3f7db0ac",
    about_bytes=7_030_000,
)
_QWEN_2B = {
    "repository": "Qwen/Qwen2-VL-2B-Instruct",
    "revision": "895c3a49bc3fa70a340399125c650a463535e71c",
}
QWEN2_VL_2B_FIRST = WeightFile(
    name="model-00001-of-00002.safetensors",
    about_bytes=3_988_609_112,
    sha256="994ac2b03f97de8bc647d0fe5eba2e4b632b3e28dc03574c29bdfc36cf47e1b9",
    **_QWEN_2B,
)
QWEN2_VL_2B_SECOND = WeightFile(
    name="model-00002-of-00002.safetensors",
    about_bytes=429_441_656,
    sha256="92540d8353c8d226a589a3b179bdb33851c970ee2cc2ac7ba035f79425e7b833",
    **_QWEN_2B,
)
QWEN2_VL_2B_TOKENIZER = WeightFile(
    name="tokenizer.json",
    about_bytes=7_029_741,
    sha256="cb63a0a23eef3d5b01063a9880a1925a65aaf4d1591d519910ee3527852950a0",
    **_QWEN_2B,
)
QWEN2_VL_2B_GENERATION = WeightFile(
    name="generation_config.json",
    about_bytes=272,
    sha256="d2864bf1edea5863d331edfff48106b586a366f5a2c41aa77731fadc53aa25d2",
    **_QWEN_2B,
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


def _load_hp(paths: Mapping[str, Path], sizes: dict, device: str | torch.device) -> ScoreBatch:
    """A sigmoid of linear layers on the image embedding as it is; the prompt is not used."""
    head = build_head(read_tensors(paths["head"]), paths["head"], sizes["projection_dim"]).to(device)
    model = build_clip_vision(sizes, paths["model"]).to(device)

    def score(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        embeddings = model(pixel_values=torch.stack(list(images)).to(device)).image_embeds
        return head(embeddings).squeeze(1).sigmoid().tolist()

    return score


def _load_hpsv3(paths: Mapping[str, Path], sizes: dict, device: str | torch.device) -> ScoreBatch:
    """One image at a time: there is no padding, and a batch takes no more memory than an image."""
    message = hpsv3.read_message(paths["message"])
    tokenizer = qwen2_vl.load_tokenizer(paths["tokenizer"], [hpsv3.REWARD_TOKEN])
    reward_id = qwen2_vl.token_id(tokenizer, hpsv3.REWARD_TOKEN)
    model = hpsv3.build_hpsv3(sizes, paths["model"]).to(device)

    def score_one(image: Tensor, prompt: str) -> float:
        ids, first = qwen2_vl.tokenize(tokenizer, message.format(text_prompt=prompt), image)
        return model(image, ids, first, int(ids.eq(reward_id).nonzero()[-1])).item()

    def score(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        return [score_one(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    return score


def _load_vqascore(paths: Mapping[str, Path], sizes: dict, device: str | torch.device) -> ScoreBatch:
    """One image at a time, as the original."""
    penalty = vqascore.read_penalty(paths["generation"])
    tokenizer = qwen2_vl.load_tokenizer(paths["tokenizer"])
    answer = tokenizer.encode(vqascore.ANSWER).ids[0]
    model = vqascore.build_vqascore(sizes, paths["model"], paths["model, continued"]).to(device)

    def score_one(image: Tensor, prompt: str) -> float:
        ids, first = qwen2_vl.tokenize(tokenizer, vqascore.QUESTION.format(prompt), image)
        return vqascore.probability(model, image, ids, first, answer, penalty)

    def score(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        return [score_one(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

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
    "ict": Metric(
        scale="cosine; how fully the image contains what the prompt says, without a penalty for more",
        files={"model": ICT, "tokenizer": CLIP_TOKENIZER},
        architecture="clip_vit_h_14",
        preprocess=pixels.crop_floor,
        load=_load_open_clip_cosine(1.0),
    ),
    "hp": Metric(
        scale="0 to 1; quality of the image alone, without its prompt",
        files={"model": HP_BACKBONE, "head": HP_HEAD},
        architecture="clip_vit_h_14_vision",
        preprocess=pixels.crop_floor,
        load=_load_hp,
    ),
    "hpsv3": Metric(
        scale="estimated mean of the reward, in no unit",
        files={"model": HPSV3, "tokenizer": QWEN2_VL_7B_TOKENIZER, "message": HPSV3_PACKAGE},
        architecture="hpsv3_qwen2_vl_7b",
        preprocess=hpsv3.pixels_of,
        load=_load_hpsv3,
    ),
    "vqascore": Metric(
        scale="probability of Yes to the question whether the image shows the prompt, by Qwen2-VL-2B",
        files={
            "model": QWEN2_VL_2B_FIRST,
            "model, continued": QWEN2_VL_2B_SECOND,
            "tokenizer": QWEN2_VL_2B_TOKENIZER,
            "generation": QWEN2_VL_2B_GENERATION,
        },
        architecture="qwen2_vl_2b",
        preprocess=vqascore.pixels_of,
        load=_load_vqascore,
    ),
}
