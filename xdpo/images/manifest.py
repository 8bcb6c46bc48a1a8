"""The manifest of an image folder: one line for each image, a JSON object. Only this module knows its keys."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from xdpo.tables import as_text

MANIFEST, PARTS = "manifest.jsonl", "manifest.part-*.jsonl"
_OTHER_NAMES = {"category": "style", "sha256": "checksum"}  # of these keys, in manifests of other programs


@dataclass(frozen=True)
class ManifestRow:
    """A line of our own manifests. The fields, in this order, are the keys of its JSON object."""

    file: str  # path below the set's folder
    category: str
    index: int  # of the prompt in its category
    position: int  # of the prompt in the whole set
    image: int  # counts several images of one prompt, from 0
    prompt: str
    truncated: bool  # whether the text encoder did not see the prompt's end
    seed: int
    model: str
    revision: str | None
    settings: dict[str, Any]  # the fields of SamplingSettings
    set: str
    batch_size: int
    sha256: str  # of the file

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Raises ValueError for a line that is not JSON in UTF-8, TypeError for other keys."""
        return cls(**json.loads(line))

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"  # ASCII: no separator that a reader might split at


class ListedImage(NamedTuple):
    """What a reader needs of a line, which another program may have written: only the file is required."""

    file: str
    category: str | None = None
    prompt: str | None = None
    sha256: str | None = None
    model: str | None = None
    revision: str | None = None
    settings: Mapping[str, Any] = MappingProxyType({})  # of sampling; empty where the line has no object of that name
    seed: int | None = None  # None where the line has no whole number of that name

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Raises ValueError, TypeError or RecursionError for a line without a file or with a value that isn't text."""
        row = json.loads(line)
        if not isinstance(row, dict):
            raise TypeError(f"a line must be a JSON object, got {type(row).__name__}")
        settings, seed = row.pop("settings", None), row.pop("seed", None)
        names = (*cls._fields, *_OTHER_NAMES.values())
        texts: dict[str, Any] = {name: as_text(row[name], name) for name in names if name in row}
        for name, other in _OTHER_NAMES.items():
            synonym = texts.pop(other, None)
            texts[name] = texts.get(name) or synonym
        return cls(
            **texts,
            settings=settings if isinstance(settings, dict) else {},
            seed=seed if type(seed) is int else None,
        )
