"""Sheets of images side by side: models as columns, prompts as rows."""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path

from PIL import Image, ImageDraw

from xdpo.data.images import UnreadableImageError, decode_rgb
from xdpo.files import replacing, writing
from xdpo.images.folder import read_manifest
from xdpo.images.fonts import draw_text, text_width
from xdpo.images.manifest import MANIFEST, ManifestRow

_MARGIN, _LINE, _HEADER, _GAP = 8, 15, 26, 6
_FONT_SIZE, _TITLE_SIZE = 11, 14
_FULL_SIZE = 256  # pixels of a cell from which texts grow with it, lest they vanish when a sheet is shown small
_MOST_LINES = 6  # of a caption


def first_images(folder: Path, prompt_set: str) -> dict[tuple[int, str], ManifestRow]:
    """The first image of every prompt of a set in a model's folder, by the prompt's position and text.

    Raises ValueError for a folder without images of that set, ImageFolderError for a damaged manifest.
    """
    rows = read_manifest(folder / prompt_set)
    if not rows:
        sets = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))) or "none"
        raise ValueError(f"no images of {prompt_set!r} in {folder}; sets there: {sets}")
    return {(row.position, row.prompt): row for row in rows if row.image == 0}


def write_sheets(
    columns: Mapping[str, Sequence[Path]], captions: Sequence[str], output: Path, rows: int, cell: int | None = None
) -> Iterator[tuple[Path, int]]:
    """Write contact sheets of image files, `rows` prompts on each. Yields each sheet's file and its number of prompts.

    Sheets after the first get _2, _3, … at the end of their name. Raises ValueError for an image that can't be read.
    """
    for number, start in enumerate(range(0, len(captions), rows), start=1):
        part = slice(start, start + rows)
        images = {title: [_open(path) for path in paths[part]] for title, paths in columns.items()}
        sheet = contact_sheet(images, captions[part], cell=cell)
        path = output.with_stem(f"{output.stem}_{number}") if number > 1 else output
        save_sheet(path, sheet)
        yield path, len(captions[part])


def _open(path: Path) -> Image.Image:
    try:
        return decode_rgb(str(path))
    except UnreadableImageError as error:
        raise ValueError(f"an image can't be read: {error}; remove it and make it again") from None


def save_sheet(path: Path, sheet: Image.Image) -> None:
    """Write a sheet in the format of its file's ending, whole or not at all; its folder is made if necessary.

    Raises ValueError for an ending that no image format has, StorageError if it can't be written.
    """
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format is None:
        raise ValueError(f"{path}: unknown file extension: {path.suffix or 'none'}; choose .png or .jpg")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        sheet.save(file, image_format)


def contact_sheet(
    columns: Mapping[str, Sequence[Image.Image]], captions: Sequence[str], cell: int | None = None
) -> Image.Image:
    """A sheet with one titled column per model and one row per prompt, with its caption beneath.

    Images fill cells of `cell` pixels a side, by default at least 128. They are enlarged without smoothing and reduced
    with it. Captions in any script are wrapped, and cut with an ellipsis after six lines.
    """
    titles, rows = list(columns), list(zip(*columns.values(), strict=True))
    assert rows and len(rows) == len(captions), "a sheet needs a caption for each of its rows"
    if cell is None:
        cell = max(rows[0][0].width, 128 // rows[0][0].width * rows[0][0].width)
    scale = max(1.0, cell / _FULL_SIZE)
    line, header, font, title_font = (round(scale * size) for size in (_LINE, _HEADER, _FONT_SIZE, _TITLE_SIZE))
    width = _MARGIN + len(titles) * (cell + _MARGIN)
    wrapped = [_wrap(caption, width - 2 * _MARGIN, font) for caption in captions]
    height = header + sum(cell + len(lines) * line + _GAP + _MARGIN for lines in wrapped)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        place = (_MARGIN + column * (cell + _MARGIN), (header - title_font) / 2 - 1)
        draw_text(draw, place, _fit(title, cell, title_font), title_font, "black")
    top = header
    for images, lines in zip(rows, wrapped, strict=True):
        for column, image in enumerate(images):
            sheet.paste(_square(image, cell), (_MARGIN + column * (cell + _MARGIN), top))
        top += cell
        for text in lines:
            draw_text(draw, (_MARGIN, top + 2), text, font, "#333333")
            top += line
        top += _GAP + _MARGIN
    return sheet


def _square(image: Image.Image, cell: int) -> Image.Image:
    enlarges = image.width <= cell
    return image.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS)


def _wrap(text: str, width: int, size: int) -> list[str]:
    """The text in lines no wider than `width` pixels, at most six of them."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < _MOST_LINES - 1:
        end = _longest(rest, width, size)
        if end < len(rest):
            space = rest.rfind(" ", 0, end + 1)
            end = space if space > 0 else end  # scripts without spaces break anywhere
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return lines + ([_fit(rest, width, size)] if rest or not lines else [])


def _longest(text: str, width: int, size: int) -> int:
    """How many characters from the start fit into `width` pixels; at least one."""
    counts = range(2, len(text) + 1)
    return 1 + bisect.bisect_right(counts, width, key=lambda count: ceil(text_width(text[:count], size)))


def _fit(text: str, width: int, size: int) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if text_width(text, size) <= width:
        return text
    counts = range(1, len(text) + 1)
    end = bisect.bisect_right(counts, width, key=lambda count: ceil(text_width(text[:count] + "…", size)))
    return text[:end] + "…"
