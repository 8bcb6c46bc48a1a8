"""The look that pages share, light and dark: colours, sections, tiles, tables."""

from pathlib import Path

STYLE = (Path(__file__).parent / "base.css").read_text(encoding="utf-8")
