"""Encoded image → square RGB tensor. The one decoder of training, caches, relabelling, evaluation and studies."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from xdpo.files import STORAGE_ERRORS, StorageError, lfs_pointer, storage_fault

_UPRIGHT = {  # EXIF orientation → what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # whose 32-bit mode holds the file's 16 bits


class UnreadableImageError(Exception):
    """The image cannot be decoded; the message names its file where it has one, and says why."""


def decode_rgb(cell: bytes | str | dict[str, Any] | None) -> Image.Image:
    """Decode image bytes, the file at a path, or {"bytes", "path"} to mode RGB.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8, and of an animation the
    first frame is taken. 32-bit values are scaled by the smallest white that none of them exceeds: 1 or 255 for floats,
    255 or 65,535 for integers. Values that exceed both, or stay below a tenth of the larger one, are ambiguous.

    Raises UnreadableImageError for ambiguous values, for whatever a decoder raises and for a missing file; StorageError
    where the storage is at fault and not the image.
    """
    path: str | None = None
    content: bytes | None = None
    if isinstance(cell, dict):
        path, content = cell.get("path"), cell.get("bytes")
    elif isinstance(cell, str):
        path = cell
    else:
        content = cell
    if path is None and content is None:
        raise UnreadableImageError("there is no image")
    try:
        file: Any = path if content is None else io.BytesIO(content)
        with Image.open(file) as image:
            image.load()
            if 0 in image.size:
                raise UnreadableImageError(f"its size is {image.width} × {image.height}")
            turn = _UPRIGHT.get(_orientation(image))
            rgb = _as_rgb(image.copy(), image.format)  # a copy keeps the palette, which some formats' classes lose
            return rgb if turn is None else rgb.transpose(turn)
    except MemoryError:
        raise
    except Exception as error:  # decoders are many, and what they raise on damage has nothing in common
        if content is None and isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            raise StorageError(f"could not read {path}: {storage_fault(error, Path(str(path)))}") from error
        reason = str(error) if isinstance(error, UnreadableImageError) else f"{type(error).__name__}: {error}"
        reason = lfs_pointer(_start(path, content)) or reason
        raise UnreadableImageError(reason if path is None else f"{path}: {reason}") from error


def _start(path: Any, content: Any) -> bytes:
    """How a file that could not be decoded begins; nothing where there is none."""
    if content is not None:
        return content[:40] if isinstance(content, bytes) else b""
    try:
        with open(path, "rb") as file:
            return file.read(40)
    except (OSError, ValueError, TypeError):
        return b""


def _orientation(image: Image.Image) -> Any:
    """The EXIF orientation of a loaded image; None where it has none, or where only its metadata are damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as in decode_rgb
        return None


def _as_rgb(image: Image.Image, format: str | None) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip these at 255
        values = np.asarray(image)
        has_sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and format in _SIXTEEN_BIT_FORMATS)
        white = 65_535.0 if has_sixteen_bits else _white_of(values, image.mode)
        scaled = np.rint(values * 255.0) if white == 1 else values / (white / 255)
        return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _white_of(values: np.ndarray, mode: str) -> float:
    """Which value is white, by the rule in decode_rgb. Floats may exceed it by a tenth, due to resizing."""
    whites, margin = ((1.0, 255.0), 0.1) if mode == "F" else ((255.0, 65_535.0), 0.0)
    low, high = float(values.min()), float(values.max())
    for white in whites:
        if -margin * white <= low and high <= (1 + margin) * white:  # never so with NaN
            if white == whites[-1] and high < 0.1 * white:
                break
            return white
    kind = "floats from 0 to 1 or to 255" if mode == "F" else "integers from 0 to 255 or to 65,535"
    raise UnreadableImageError(f"its 32-bit values go from {low:g} to {high:g}; save it in 8 bits, or as {kind}")


def square_pixels(
    image: Image.Image, resolution: int, *, offset: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> torch.Tensor:
    """The largest square of an RGB image as (3, resolution, resolution) float32 in [−1, 1].

    offset: position of the square along (width, height), from 0 (left, top) to 1 (right, bottom).
    One bilinear, antialiased resize of the square equals resizing the shorter side and then cropping, and does not
    build the large intermediate of a very long image.
    """
    side = min(image.size)
    left, top = ((length - side) * share for length, share in zip(image.size, offset, strict=True))
    square = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    if flip:
        square = ImageOps.mirror(square)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


def size_and_crop(
    image: Image.Image, resolution: int, *, offset: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> torch.Tensor:
    """(4,) float32: an image's height and width, and what `square_pixels` cuts off at the top and at the left.

    What is cut off is in whole pixels of the resized image. The other arguments are those of `square_pixels`.
    """
    side = min(image.size)
    across, down = offset
    left, top = ((image.width - side) * (1 - across if flip else across), (image.height - side) * down)
    cut = [float(round(length * resolution / side)) for length in (top, left)]
    return torch.tensor([float(image.height), float(image.width), *cut])
