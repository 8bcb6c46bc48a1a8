"""Networks that turn images into vectors, for diversity and drift: an image without its prompt → a unit vector."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from xdpo.scorers import pixels
from xdpo.scorers.clip import build_clip_vision
from xdpo.scorers.dino import build_dinov2
from xdpo.scorers.metrics import CLIP_L
from xdpo.scorers.weights import WeightFile

Embed = Callable[[Sequence[Tensor]], Tensor]  # preprocessed images → unit vectors (B, D) on the CPU


@dataclass(frozen=True)
class Embedder:
    """A network whose weights are not loaded yet.

    title: in reports. weights: its one file. architecture: key in ARCHITECTURES. preprocess: an image of any mode →
    an input. load: path of the weights, sizes and device → the function that embeds a list of preprocessed images.
    """

    title: str
    weights: WeightFile
    architecture: str
    preprocess: Callable[[Image.Image], Tensor]
    load: Callable[[Path, dict, str | torch.device], Embed]


DINOV2_L = WeightFile(
    repository="facebook/dinov2-large",
    name="model.safetensors",
    revision="47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
    about_bytes=1_217_522_888,
    sha256="399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
)


def _load_clip(path: Path, sizes: dict, device: str | torch.device) -> Embed:
    """The image embeddings of OpenAI's ViT-L/14, 768 numbers: the aesthetic predictor's."""
    model = build_clip_vision(sizes, path).to(device)
    return lambda images: _unit(model(pixel_values=_batch(images, device)).image_embeds)


def _load_dinov2(path: Path, sizes: dict, device: str | torch.device) -> Embed:
    """The class token after the last normalisation, 1,024 numbers."""
    model = build_dinov2(sizes, path).to(device)
    return lambda images: _unit(model(pixel_values=_batch(images, device)).pooler_output)


def _batch(images: Sequence[Tensor], device: str | torch.device) -> Tensor:
    return torch.stack(list(images)).to(device)


def _unit(embeddings: Tensor) -> Tensor:
    return nn.functional.normalize(embeddings, dim=-1).cpu()


EMBEDDERS: Mapping[str, Embedder] = {
    "clip": Embedder("CLIP (ViT-L/14, 224 pixels)", CLIP_L, "clip_vit_l_14", pixels.crop_floor, _load_clip),
    "dinov2": Embedder("DINOv2 (ViT-L/14, 224 pixels)", DINOV2_L, "dinov2_vit_l_14", pixels.crop_256, _load_dinov2),
}
