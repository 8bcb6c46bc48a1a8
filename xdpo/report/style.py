"""What pages share: their look, light and dark, and how their text is filled in."""

import re
from collections.abc import Mapping
from pathlib import Path

STYLE = (Path(__file__).parent / "base.css").read_text(encoding="utf-8")


def fill(template: Path, filling: Mapping[str, str]) -> str:
    """The text of a page in which each {{name}} is replaced."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filling[match[1]], template.read_text(encoding="utf-8"))
