"""Turn PIL images into the 224×224 tensors of the original metrics: three ways to crop, one to pad.

Images are converted as the originals convert them: alpha and palettes by Pillow's `convert("RGB")`, grey repeated, EXIF
orientation not applied. The originals crop in two ways. PickScore and the aesthetic predictor use transformers'
processor (RGB first, the crop's offset rounded down); ImageReward uses torchvision (RGB last, the offset rounded half
to even). On RGB images with an even overhang both give the same crop.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIDE = 224  # pixels a side, of all metrics and features
CHANNEL_MEANS = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, also used by BLIP
CHANNEL_STDS = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEANS = (0.485, 0.456, 0.406)
IMAGENET_STDS = (0.229, 0.224, 0.225)

# Past this, only the part that the crop keeps is resized: a strip of 1×20,000 pixels would need gigabytes.
MAX_RESIZED_PIXELS = 2**27


def crop_floor(image: Image.Image) -> Tensor:
    """Shorter side to 224, bicubic, then the middle, as transformers' CLIPImageProcessor: (3, 224, 224) float32.

    For PickScore (Kirstain et al. 2023) and the aesthetic predictor.
    """
    return normalise(to_unit(_shrink_and_crop(image.convert("RGB"), lambda overhang: overhang // 2)))


def crop_256(image: Image.Image) -> Tensor:
    """Shorter side to 256, bicubic, then the middle 224, as transformers' BitImageProcessor: (3, 224, 224) float32.

    For DINOv2 (Oquab et al. 2024), whose published evaluation crops so; normalised as ImageNet is.
    """
    middle = _shrink_and_crop(image.convert("RGB"), lambda overhang: overhang // 2, short_side=256)
    return normalise(to_unit(middle), IMAGENET_MEANS, IMAGENET_STDS)


def crop_half_even(image: Image.Image) -> Tensor:
    """Shorter side to 224, bicubic, then the middle, as torchvision's Resize and CenterCrop: (3, 224, 224) float32.

    For ImageReward (Xu et al. 2023), which converts to RGB after the resize. Transparent pixels therefore have no
    weight, and palette or 1-bit images are not interpolated.
    """
    return normalise(to_unit(_shrink_and_crop(image, lambda overhang: round(overhang / 2)).convert("RGB")))


def pad(image: Image.Image) -> Tensor:
    """Longer side to 224, bicubic on unclamped floats, padded with black to a square: (3, 224, 224) float32.

    For HPS v2 (Wu et al. 2023) and for CLIP as Diffusion-DPO and xDPO measure it. A side that would round to 0 keeps
    one pixel, and an image of exactly 224 pixels on its longer side is padded too; the originals fail in both cases.
    """
    pixels = to_unit(image.convert("RGB"))
    scale = SIDE / max(pixels.shape[1:])
    height, width = (max(1, round(length * scale)) for length in pixels.shape[1:])
    if scale != 1:
        pixels = torch.nn.functional.interpolate(
            pixels[None], (height, width), mode="bicubic", align_corners=False, antialias=True
        )[0]
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    padding = (left, SIDE - width - left, top, SIDE - height - top)
    return normalise(torch.nn.functional.pad(pixels, padding))


def to_unit(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)


def normalise(
    pixels: Tensor, means: Sequence[float] = CHANNEL_MEANS, deviations: Sequence[float] = CHANNEL_STDS
) -> Tensor:
    """Normalise (3, H, W) in [0, 1] by each channel's mean and deviation, CLIP's unless given, in place."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (means, deviations))
    return pixels.sub_(mean).div_(deviation)


def _shrink_and_crop(image: Image.Image, margin: Callable[[int], int], short_side: int = SIDE) -> Image.Image:
    """The image with its shorter side at `short_side` pixels, of which the middle 224 × 224 are cut.

    `margin`: overhang → pixels cut at left or top.
    """
    short = min(image.size)
    width, height = (short_side if length == short else int(short_side * length / short) for length in image.size)
    left, top = margin(width - SIDE), margin(height - SIDE)
    if width * height <= MAX_RESIZED_PIXELS:
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + SIDE, top + SIDE))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + SIDE) * across, (top + SIDE) * down)
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
