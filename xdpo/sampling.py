"""Image i of a prompt list from seed s is one definite image, whatever else is drawn beside it.

Each image has a CPU generator of its own, seeded s + i. Kernels round differently at different batch sizes, so
prompts are cut into chunks of one fixed size, the last one padded; chunks are what processes share out.
"""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw


@torch.no_grad()
def sample_images(
    pipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    image_size: int | None = None,
    chunk_size: int = 4,
    first_index: int = 0,
) -> list[Image.Image]:
    """Sample one image per prompt with a StableDiffusionPipeline; image i uses seed `seed + first_index + i`.

    `first_index` must be a multiple of `chunk_size` for an image to be the same as in one call over the whole list.
    """
    assert first_index % chunk_size == 0, "chunks must start where they start in the whole list"
    images: list[Image.Image] = []
    for start in range(0, len(prompts), chunk_size):
        chunk = list(prompts[start : start + chunk_size])
        padded = chunk + [chunk[-1]] * (chunk_size - len(chunk))
        generators = [
            torch.Generator("cpu").manual_seed(seed + first_index + start + offset) for offset in range(chunk_size)
        ]
        output = pipeline(
            padded,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators,
            height=image_size,
            width=image_size,
            output_type="pil",
        )
        images += output.images[: len(chunk)]
    return images


def contact_sheet(
    columns: dict[str, Sequence[Image.Image]], captions: Sequence[str], cell: int | None = None
) -> Image.Image:
    """A sheet with one column per model, titled, and one row per prompt, its caption beneath.

    Images are enlarged without smoothing to `cell` pixels a side; by default to at least 128.
    """
    titles, rows = list(columns), list(zip(*columns.values(), strict=True))
    if cell is None:
        cell = max(rows[0][0].width, 128 // rows[0][0].width * rows[0][0].width)
    margin, line, header = 8, 18, 26
    width = margin + len(titles) * (cell + margin)
    height = header + len(rows) * (cell + line + margin)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((margin + column * (cell + margin), 6), title, fill="black", font_size=14)
    for row, images in enumerate(rows):
        top = header + row * (cell + line + margin)
        for column, image in enumerate(images):
            enlarged = image.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (margin + column * (cell + margin), top))
        draw.text((margin, top + cell + 2), _fit(draw, captions[row], width - 2 * margin), fill="#333333", font_size=11)
    return sheet


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if draw.textlength(text, font_size=11) <= width:
        return text
    while text and draw.textlength(text + "…", font_size=11) > width:
        text = text[:-1]
    return text + "…"
