"""Sheets of images side by side: models as columns, prompts as rows."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from xdpo.data.images import UnreadableImageError, decode_rgb
from xdpo.files import replacing, writing
from xdpo.images.folder import read_manifest
from xdpo.images.manifest import MANIFEST, ManifestRow

_MARGIN, _LINE, _HEADER, _GAP = 8, 15, 26, 6
_FONT_SIZE, _TITLE_SIZE = 11, 14


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
        sheet = contact_sheet(images, captions[part], cell=cell, caption_lines=3)
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
    columns: Mapping[str, Sequence[Image.Image]],
    captions: Sequence[str],
    cell: int | None = None,
    caption_lines: int = 1,
) -> Image.Image:
    """A sheet with one titled column per model and one row per prompt, with its caption beneath.

    Images fill cells of `cell` pixels a side, by default at least 128. They are enlarged without smoothing and reduced
    with it. Captions wrap to at most `caption_lines` lines and are then cut with an ellipsis.
    """
    titles, rows = list(columns), list(zip(*columns.values(), strict=True))
    assert rows and len(rows) == len(captions), "a sheet needs a caption for each of its rows"
    if cell is None:
        cell = max(rows[0][0].width, 128 // rows[0][0].width * rows[0][0].width)
    width = _MARGIN + len(titles) * (cell + _MARGIN)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    wrapped = [_wrap(ruler, caption, width - 2 * _MARGIN, caption_lines) for caption in captions]
    height = _HEADER + sum(cell + len(lines) * _LINE + _GAP + _MARGIN for lines in wrapped)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        fitted = _fit(draw, title, cell, _TITLE_SIZE)
        draw.text((_MARGIN + column * (cell + _MARGIN), 6), fitted, fill="black", font_size=_TITLE_SIZE)
    top = _HEADER
    for images, lines in zip(rows, wrapped, strict=True):
        for column, image in enumerate(images):
            sheet.paste(_square(image, cell), (_MARGIN + column * (cell + _MARGIN), top))
        top += cell
        for line in lines:
            draw.text((_MARGIN, top + 2), line, fill="#333333", font_size=_FONT_SIZE)
            top += _LINE
        top += _GAP + _MARGIN
    return sheet


def _square(image: Image.Image, cell: int) -> Image.Image:
    enlarges = image.width <= cell
    return image.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS)


def _wrap(draw: ImageDraw.ImageDraw, text: str, width: int, most: int) -> list[str]:
    """The text in lines no wider than `width` pixels, at most `most` of them."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < most - 1:
        line = words.pop(0)
        while words and draw.textlength(f"{line} {words[0]}", font_size=_FONT_SIZE) <= width:
            line += " " + words.pop(0)
        lines.append(_fit(draw, line, width, _FONT_SIZE))
    return lines + ([_fit(draw, " ".join(words), width, _FONT_SIZE)] if words or not lines else [])


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int, font_size: int) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if draw.textlength(text, font_size=font_size) <= width:
        return text
    while text and draw.textlength(text + "…", font_size=font_size) > width:
        text = text[:-1]
    return text + "…"
