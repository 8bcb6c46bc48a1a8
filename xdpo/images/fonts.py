"""Text in any script on images: each character in the first font that has it.

DejaVu Sans comes with matplotlib and has Latin, Greek, Cyrillic, Arabic, Hebrew and signs. For other scripts the fonts
of this machine are searched. A character that no font has is drawn as the mark of its script, and noted once.
"""

import sys
import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageDraw, ImageFont


def text_width(text: str, size: int) -> float:
    """The width in pixels of a line of text, drawn at that size."""
    return sum(_font(path, size).getlength(part) for path, part in _runs(text))


def draw_text(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, colour: str) -> None:
    """Draw a line of text whose upper left corner is at `place`."""
    x, y = place
    for path, part in _runs(text):
        font = _font(path, size)
        draw.text((x, y + size), part, fill=colour, font=font, anchor="ls")  # on one base line, whatever the font
        x += font.getlength(part)


def _runs(text: str) -> Iterator[tuple[str | None, str]]:
    """The text in parts of one font each, with the font's path."""
    current, part = _font_with("a"), ""
    for character in text:
        joins = character.isspace() or unicodedata.category(character) in ("Mn", "Me", "Cf")  # goes with its neighbour
        path = current if joins else _font_with(character)
        if path != current and part:
            yield current, part
            part = ""
        current = path
        part += character
    if part:
        yield current, part


@lru_cache(maxsize=4096)
def _font_with(character: str) -> str | None:
    """The path of the first font that has a character; None for Pillow's own, where matplotlib isn't installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    shipped = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    if ord(character) in _characters(path := str(shipped / "DejaVuSans.ttf")):
        return path
    for path in _system_fonts():
        if ord(character) in _characters(path):
            return path
    _note_missing(character)
    return str(shipped / "LastResortHE-Regular.ttf")


@cache
def _characters(path: str) -> frozenset[int]:
    """The characters that a font has; none of one that can't be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@lru_cache(maxsize=1)
def _system_fonts() -> tuple[str, ...]:
    """This machine's fonts, upright sans-serif ones first. Those of coloured bitmaps have one size and are left out."""
    from matplotlib.font_manager import findSystemFonts

    paths = [path for path in findSystemFonts() if "Emoji" not in Path(path).name]
    wanted = ("Sans", "Regular")
    return tuple(sorted(paths, key=lambda path: (-sum(word in Path(path).name for word in wanted), path)))


_noted: set[str] = set()


def _note_missing(character: str) -> None:
    if not _noted:
        name = unicodedata.name(character, f"U+{ord(character):04X}")
        print(
            f"note: no font on this machine has {character} ({name}); its script's mark stands in sheets. Install a "
            "font that has it, such as Debian's fonts-noto-core or fonts-noto-cjk",
            file=sys.stderr,
        )
    _noted.add(character)


@lru_cache(maxsize=64)
def _font(path: str | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)
