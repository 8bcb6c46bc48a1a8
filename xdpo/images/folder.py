"""Write a folder of images that describes itself. A kill at any moment leaves it usable.

```
{output}/{set}/settings.json              what decides the pixels; machine and versions of each start
               manifest.jsonl             one line per image: file, category, index, prompt, seed, model, sha256, …
               {category}/{index:05d}.png
```

An image is written whole, and then recorded in its process's part of the manifest. The parts are merged into
manifest.jsonl at every start and at the end. Only manifest.jsonl says which images are finished.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from PIL import Image

from xdpo.files import PART, check_writable, is_own, reading, replacing, sweep, write_text, writing
from xdpo.images.manifest import MANIFEST, PARTS, ManifestRow
from xdpo.provenance import library_versions

SETTINGS = "settings.json"


class ImageFolderError(ValueError):
    """A folder can't be used for these images. The message says why and what to do."""


def check_image_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder with other content, with images of other settings, or that can't be written. Writes nothing.

    settings: everything that decides a pixel, flat, with JSON values. A folder that a failed start left without images
    accepts new settings. Raises ImageFolderError naming the keys that differ; StorageError if it can't be written.
    """
    check_writable(folder, "output")
    names = sorted(path.name for path in folder.iterdir() if not is_own(path)) if folder.exists() else []
    if not names:
        return
    saved = _read_settings(folder)
    if saved is None:
        some = ", ".join(names[:5])
        raise ImageFolderError(f"output: {folder} holds something else than generated images ({some}); choose another")
    if not _holds_images(folder):
        return
    before = saved["settings"]
    changes = [
        f"{key}: {before.get(key)!r} there, {settings.get(key)!r} asked for"
        for key in dict.fromkeys([*before, *settings])
        if before.get(key) != settings.get(key)
    ]
    if changes:
        raise ImageFolderError(
            f"output: {folder} holds images made with other settings:\n  "
            + "\n  ".join(changes)
            + "\nChoose another --output, or remove that folder"
        )


def open_image_folder(folder: Path, settings: Mapping[str, Any], made_with: Mapping[str, Any]) -> list[str]:
    """Create a checked folder or resume it. One process calls it, before any other reads the manifest.

    made_with: what may differ between starts and then change the last bits of pixels. Returns a line for each
    difference from the last start.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, f"**/*{PART}")  # the folder has one writer, so no other process needs these files
    facts = {**made_with, **library_versions()}
    saved = _read_settings(folder)
    if saved is None or (saved["settings"] != settings and not _holds_images(folder)):
        saved = {"settings": dict(settings), "starts": []}
    last = saved["starts"][-1] if saved["starts"] else facts
    differences = [f"{key}: {last.get(key)}, now {value}" for key, value in facts.items() if last.get(key) != value]
    saved["starts"].append({"time": datetime.now(UTC).isoformat(timespec="seconds"), **facts})
    write_text(folder / SETTINGS, json.dumps(saved, indent=2, ensure_ascii=False) + "\n")
    collect_manifest(folder)
    return differences


def save_image(path: Path, image: Image.Image, quality: int = 75) -> str:
    """Write a PNG, or by its suffix a JPEG of that quality, whole or not at all. Returns the file's sha256.

    What was left aside is for `open_image_folder` to sweep. Raises StorageError.
    """
    buffer = io.BytesIO()
    if path.suffix.lower() in (".jpg", ".jpeg"):
        image.save(buffer, "JPEG", quality=quality)
    else:
        image.save(buffer, "PNG")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb", sweeps=False) as file:
        file.write(buffer.getbuffer())
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def record(folder: Path, rank: int, rows: Iterable[ManifestRow]) -> None:
    """Append the rows of finished images to this process's part of the manifest. Raises StorageError."""
    path = folder / PARTS.replace("*", f"{rank:05d}")
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.writelines(row.to_line() for row in rows)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> list[ManifestRow]:
    """The rows of manifest.jsonl; none without that file. Raises ImageFolderError for a damaged one."""
    if not (folder / MANIFEST).is_file():
        return []
    return list(_rows(folder / MANIFEST, may_be_torn=False))


def collect_manifest(folder: Path) -> list[ManifestRow]:
    """Merge the processes' parts into manifest.jsonl and return its rows, in order of position and image number.

    Rows whose image is gone are dropped, so that it is made again. One process calls it, while no process makes images.
    """
    parts = sorted(folder.glob(PARTS))
    rows = {row.file: row for row in read_manifest(folder)}
    for part in parts:
        rows |= {row.file: row for row in _rows(part, may_be_torn=True)}
    finished = sorted(
        (row for file, row in rows.items() if (folder / file).is_file()),
        key=lambda row: (row.image, row.position),
    )
    write_text(folder / MANIFEST, "".join(row.to_line() for row in finished))
    for part in parts:
        part.unlink()
    return finished


def _holds_images(folder: Path) -> bool:
    """Whether the folder holds anything but settings, manifests, the lock and files written aside."""
    ours = (SETTINGS, MANIFEST, PARTS)
    files = (path for path in folder.rglob("*") if path.is_file() and not is_own(path))
    return any(not any(fnmatch(path.name, pattern) for pattern in ours) for path in files)


def _rows(path: Path, may_be_torn: bool) -> Iterator[ManifestRow]:
    with reading(path):
        content = path.read_bytes()
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            if line:
                yield ManifestRow.from_line(line)
        except (ValueError, TypeError) as error:  # not JSON, or cut within a character: killed while appending
            if not may_be_torn:
                message = f"{path}: line {number} is damaged: {error}; remove the file to make its images again"
                raise ImageFolderError(message) from error


def _read_settings(folder: Path) -> dict[str, Any] | None:
    if not (folder / SETTINGS).is_file():
        return None
    with reading(folder / SETTINGS):
        content = (folder / SETTINGS).read_bytes()
    try:
        saved = json.loads(content)
        return {"settings": dict(saved["settings"]), "starts": list(saved["starts"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ImageFolderError(f"output: {folder / SETTINGS} is damaged; choose another --output") from error
