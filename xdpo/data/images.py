"""Encoded image → square RGB tensor."""

import io
import struct
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

# What Pillow is known to raise on files that are cut, damaged, huge or not images at all.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    IndexError,
    OverflowError,
    struct.error,
    Image.DecompressionBombError,
)


class UnreadableImageError(Exception):
    """The image cannot be decoded; the message says why."""


def decode_rgb(cell: bytes | str | dict[str, Any] | None) -> Image.Image:
    """Decode image bytes, the file at a path, or {"bytes", "path"} to mode RGB.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8, and of an animation the
    first frame is taken. Raises UnreadableImageError, also for a missing file.
    """
    if isinstance(cell, dict):
        cell = cell["path"] if cell.get("bytes") is None else cell["bytes"]
    if cell is None:
        raise UnreadableImageError("there is no image")
    try:
        with Image.open(cell if isinstance(cell, str) else io.BytesIO(cell)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # Pillow would clip these at 255
                return Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return image.convert("RGB")
    except DECODING_ERRORS as error:
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def square_pixels(
    image: Image.Image, resolution: int, *, offset: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> torch.Tensor:
    """The largest square of an RGB image as (3, resolution, resolution) float32 in [−1, 1].

    offset: where the square lies along (width, height), from 0 (left, top) to 1 (right, bottom).
    One bilinear, antialiased resize of the square equals resizing the shorter side and then cropping, and does not
    build the large intermediate of a very long image.
    """
    side = min(image.size)
    left, top = ((length - side) * share for length, share in zip(image.size, offset, strict=True))
    square = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    if flip:
        square = ImageOps.mirror(square)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1
