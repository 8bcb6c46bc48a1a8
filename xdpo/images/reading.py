"""Read image folders that `generate.py` wrote, and report everything that is not as it should be.

    images/sd15/hpsv2/manifest.jsonl            one row per image: file, prompt, category, seed, model, sha256 …
    images/sd15/hpsv2/anime/00012.png           {prompt set}/{style or category}/{index}.png or .jpg
    images/sd15/hpsv2/anime/00012_1.png         a second image of the same prompt

A folder without a manifest is read by this layout; its prompts then come from elsewhere (`with_prompts`).
"""

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from xdpo.files import file_sha256
from xdpo.images.manifest import MANIFEST, ListedImage, ManifestRow
from xdpo.paths import user_path
from xdpo.prompts import load_prompts

WITHOUT_PROMPT = "left out: no prompt is known"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_NUMBERED = re.compile(r"(\d+)(?:[-_](\d+))?")


@dataclass(frozen=True)
class Picture:
    """One image of a model for a prompt. `key` names the prompt within its set ("anime/12"), the same for all models;
    `repeat` counts several images of one prompt; `source` is the manifest's name for the model that made it, with its
    revision, the settings of sampling and the image's own seed."""

    model: str
    prompt_set: str
    category: str
    key: str
    repeat: int
    path: Path
    name: str  # path below the set's folder
    prompt: str | None = None
    sha256: str | None = None
    source: str | None = None
    revision: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    seed: int | None = None


@dataclass(frozen=True)
class Problem:
    """A fault in a model's images of a prompt set: its kind, and the names of the affected images."""

    model: str
    prompt_set: str
    kind: str
    names: tuple[str, ...] = ()

    def describe(self, shown: int = 10) -> str:
        """One line that lists at most `shown` names."""
        if not self.names:
            return f"{self.model}, {self.prompt_set}: {self.kind}"
        more = f", … {len(self.names) - shown} more" if len(self.names) > shown else ""
        return f"{self.model}, {self.prompt_set}: {len(self.names)} {self.kind} ({', '.join(self.names[:shown])}{more})"


def name_folders(words: Sequence[str]) -> dict[str, Path]:
    """Model name → folder, from "images/sd15" or "sd15=images/first run". Raises ValueError for a name given twice."""
    folders: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or user_path(word).is_dir():
            name, path = "", word
        folder = user_path(path)
        if not name:
            is_prompt_set = (folder / MANIFEST).is_file()  # then its parent is the model
            name = folder.resolve().parent.name if is_prompt_set else folder.resolve().name
        if "/" in name or "\\" in name:
            raise ValueError(f"a model cannot be called {name!r}: its name becomes part of file names")
        if name in folders:
            raise ValueError(f"two models are called {name!r}: {folders[name]} and {folder}; write NAME={folder}")
        folders[name] = folder
    return folders


def read_models(folders: Mapping[str, Path], sets: Sequence[str] | None) -> tuple[list[Picture], list[Problem]]:
    """The pictures that can be scored, with prompts and checksums, and the problems of all others.

    sets: only these prompt sets; None: all. Raises ValueError for a set without images, and as `read_model_folder`
    does.
    """
    pictures: list[Picture] = []
    problems: list[Problem] = []
    for model, folder in folders.items():
        model_pictures, model_problems = read_model_folder(folder, model)
        pictures += model_pictures
        problems += model_problems
    if sets is not None:
        available = sorted({picture.prompt_set for picture in pictures})
        if unknown := [name for name in sets if name not in available]:
            raise ValueError(
                f"no images of prompt set {unknown[0]!r} in these folders; there are {', '.join(available)}"
            )
        pictures = [picture for picture in pictures if picture.prompt_set in sets]
        problems = [problem for problem in problems if problem.prompt_set in sets]
    pictures, without_prompt = with_prompts(pictures, known_prompts)
    pictures, changed = with_checksums(pictures)
    plain, missing = of_one_colour(pictures), missing_against_others(pictures)
    return pictures, [*problems, *without_prompt, *changed, *plain, *missing]


def known_prompts(prompt_set: str) -> dict[str, tuple[str, str]]:
    """(category, prompt) by key of a named prompt set; empty for other sets, and if the set cannot be loaded."""
    try:
        prompts = load_prompts(prompt_set).prompts
    except ValueError as error:
        print(f"note: images of {prompt_set!r} have no {MANIFEST}, and {error}", file=sys.stderr)
        return {}
    return {f"{prompt.folder}/{prompt.index}": (prompt.category, prompt.text) for prompt in prompts}


def read_model_folder(folder: Path, model: str) -> tuple[list[Picture], list[Problem]]:
    """All images of one model: of every prompt set below `folder`, or of `folder` if it is a prompt set's folder.

    Raises ValueError for a path that is not a folder, and for a folder without images.
    """
    if not folder.is_dir():
        raise ValueError(f"no image folder {folder}: expected {{folder}}/{{prompt set}}/{{category}}/{{index}}.png")
    pictures: list[Picture] = []
    problems: list[Problem] = []
    for set_folder in _set_folders(folder):
        set_pictures, set_problems = _read_set(set_folder, model)
        pictures += set_pictures
        problems += set_problems
    if not pictures:
        reasons = "".join(f"; {problem.describe()}" for problem in problems if problem.names)
        raise ValueError(
            f"{folder} holds no images: expected {{prompt set}}/{{category}}/{{index}}.png or .jpg there{reasons}"
        )
    return pictures, problems


def _set_folders(folder: Path) -> list[Path]:
    """The folders of prompt sets. Without a manifest the depth decides: {category}/{index}.png is one set."""
    if (folder / MANIFEST).is_file():
        return [folder]
    children = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    with_manifest = [child for child in children if (child / MANIFEST).is_file()]
    by_layout = [child for child in children if any(_is_image(path) for path in child.glob("*/*"))]
    return sorted({*with_manifest, *by_layout}) or [folder]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _read_set(folder: Path, model: str) -> tuple[list[Picture], list[Problem]]:
    prompt_set = folder.resolve().name
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if _is_image(path)}
    if not (folder / MANIFEST).is_file():
        pictures = [_picture(model, prompt_set, folder, name) for name in sorted(on_disk)]
        problems = [
            Problem(model, prompt_set, "no manifest; read by layout, prompts taken from elsewhere"),
            *_clashes(pictures),
        ]
        if gaps := _gaps(pictures):
            problems.append(Problem(model, prompt_set, "missing in the numbering", tuple(gaps)))
        return _without_clashes(pictures), problems if on_disk else []

    rows, unreadable = _manifest_rows(folder / MANIFEST)
    pictures = []
    for name, row in sorted(rows.items()):
        if name in on_disk:
            pictures.append(picture_of(row, model, prompt_set, folder))
    problems = [
        Problem(model, prompt_set, "listed in the manifest but missing", tuple(sorted(set(rows) - on_disk))),
        Problem(model, prompt_set, "left out: not in the manifest", tuple(sorted(on_disk - set(rows)))),
        Problem(model, prompt_set, "unreadable lines of the manifest", tuple(unreadable)),
        *_clashes(pictures),
    ]
    return _without_clashes(pictures), [problem for problem in problems if problem.names]


def picture_of(row: ListedImage | ManifestRow, model: str, prompt_set: str, folder: Path) -> Picture:
    """The image that a line of the manifest in a prompt set's folder describes."""
    picture = _picture(model, prompt_set, folder, Path(row.file).as_posix(), row.category)
    return replace(
        picture,
        prompt=row.prompt,
        sha256=row.sha256,
        source=row.model,
        revision=row.revision,
        settings=row.settings,
        seed=row.seed,
    )


def _picture(model: str, prompt_set: str, folder: Path, name: str, category: str | None = None) -> Picture:
    path = folder / name
    parent = Path(name).parent.as_posix()
    numbered = _NUMBERED.fullmatch(path.stem)
    number, repeat = (int(numbered[1]), int(numbered[2] or 0)) if numbered else (path.stem, 0)
    key = str(number) if parent == "." else f"{parent}/{number}"
    return Picture(model, prompt_set, category or ("" if parent == "." else parent), key, repeat, path, name)


def _by_slot(pictures: Sequence[Picture]) -> list[list[Picture]]:
    """Pictures grouped by prompt and repeat: one in each group, if nothing clashes."""
    slots = defaultdict(list)
    for picture in pictures:
        slots[picture.key, picture.repeat].append(picture)
    return list(slots.values())


def _clashes(pictures: Sequence[Picture]) -> list[Problem]:
    """Files of a set that claim to be the same image, such as 00012.png and 00012.jpg, or 12.png."""
    names = [" and ".join(picture.name for picture in same) for same in _by_slot(pictures) if len(same) > 1]
    if not names:
        return []
    return [Problem(pictures[0].model, pictures[0].prompt_set, "clashes, left out: files for one image", tuple(names))]


def _without_clashes(pictures: Sequence[Picture]) -> list[Picture]:
    return [same[0] for same in _by_slot(pictures) if len(same) == 1]


def _manifest_rows(path: Path) -> tuple[dict[str, ListedImage], list[str]]:
    """Rows by file name (a later row replaces an earlier one), and the numbers of unreadable lines."""
    rows: dict[str, ListedImage] = {}
    unreadable = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):  # str.splitlines would cut within a text
        if not line.strip():
            continue
        try:
            row = ListedImage.from_line(line)
            rows[Path(row.file).as_posix()] = row
        except (ValueError, TypeError, RecursionError):
            unreadable.append(f"line {number}")
    return rows, unreadable


def _gaps(pictures: Sequence[Picture]) -> list[str]:
    present_by_folder: dict[str, set[int]] = defaultdict(set)
    for picture in pictures:
        folder, _, number = picture.key.rpartition("/")
        if number.isdigit():
            present_by_folder[folder].add(int(number))
    return [
        f"{folder}/{number:05d}" if folder else f"{number:05d}"
        for folder, present in sorted(present_by_folder.items())
        for number in range(max(present))
        if number not in present
    ]


def with_prompts(
    pictures: Sequence[Picture], known_prompts: Callable[[str], Mapping[str, tuple[str, str]]]
) -> tuple[list[Picture], list[Problem]]:
    """Give every picture its prompt, and leave out those that contradict another model's manifest.

    A picture without a prompt gets the one that another model's manifest has for its key, else the one of
    `known_prompts(prompt_set)`: (category, prompt) by key. The first model with a manifest decides; pictures of other
    models that were made from another text are left out.
    """
    agreed: dict[tuple[str, str], tuple[str, str]] = {}  # (prompt set, key) → category, prompt
    for picture in pictures:
        if picture.prompt is not None:
            agreed.setdefault((picture.prompt_set, picture.key), (picture.category, picture.prompt))
    for prompt_set in dict.fromkeys(picture.prompt_set for picture in pictures if picture.prompt is None):
        for key, category_and_prompt in known_prompts(prompt_set).items():
            agreed.setdefault((prompt_set, key), category_and_prompt)

    kept, unknown, different = [], defaultdict(list), defaultdict(list)
    for picture in pictures:
        prompt_key, owner = (picture.prompt_set, picture.key), (picture.model, picture.prompt_set)
        if prompt_key not in agreed:
            unknown[owner].append(picture.name)
        elif picture.prompt not in (None, agreed[prompt_key][1]):
            different[owner].append(picture.name)
        else:
            category, prompt = agreed[prompt_key]
            kept.append(replace(picture, prompt=prompt, category=category))
    problems = [Problem(*owner, WITHOUT_PROMPT, tuple(names)) for owner, names in unknown.items()]
    problems += [
        Problem(*owner, "left out: made from another prompt than the first model's", tuple(names))
        for owner, names in different.items()
    ]
    return kept, problems


def with_checksums(pictures: Sequence[Picture]) -> tuple[list[Picture], list[Problem]]:
    """Give every picture the current SHA-256 of its file, and report those that differ from the manifest."""
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        actual = list(pool.map(lambda picture: file_sha256(picture.path), pictures))
    changed = defaultdict(list)
    for picture, checksum in zip(pictures, actual, strict=True):
        if picture.sha256 not in (None, checksum):
            changed[picture.model, picture.prompt_set].append(picture.name)
    problems = [
        Problem(*owner, "changed since the manifest was written; scored as they are now", tuple(names))
        for owner, names in changed.items()
    ]
    return [replace(p, sha256=checksum) for p, checksum in zip(pictures, actual, strict=True)], problems


def of_one_colour(pictures: Sequence[Picture]) -> list[Problem]:
    """For each model and set, the images whose pixels are all the same, which mostly are black.

    They are scored as they are. Only files that are small for their number of pixels are decoded, because an image of
    one colour compresses well.
    """
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda picture: _is_of_one_colour(picture.path), pictures))
    names = defaultdict(list)
    for picture, is_plain in zip(pictures, answers, strict=True):
        if is_plain:
            names[picture.model, picture.prompt_set].append(picture.name)
    kind = "of one colour throughout; scored as they are"
    return [Problem(*owner, kind, tuple(listed)) for owner, listed in names.items()]


def _is_of_one_colour(path: Path) -> bool:
    from xdpo.data.images import decode_rgb

    try:
        with Image.open(path) as image:  # its header alone
            if path.stat().st_size > 2048 + image.width * image.height / 8:  # bytes: a bit per pixel, and the header
                return False
        extremes = [band.getextrema() for band in decode_rgb(str(path)).split()]
        return all(lowest == highest for lowest, highest in extremes)
    except Exception:  # Pillow's errors depend on the damage, which is reported where the image is scored
        return False


def missing_against_others(pictures: Iterable[Picture]) -> list[Problem]:
    """For each model and set, the prompts for which other models have images and this one has none."""
    keys: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for picture in pictures:
        keys[picture.prompt_set][picture.model].add(picture.key)
    problems = []
    for prompt_set, of_model in keys.items():
        everything = set().union(*of_model.values())
        for model, present in of_model.items():
            if lacking := everything - present:
                names = tuple(sorted(lacking, key=natural_order))
                problems.append(Problem(model, prompt_set, "prompts without an image that others have", names))
    return problems


def by_prompt(pictures: Iterable[Picture]) -> dict[tuple[str, str, str], list[Picture]]:
    """(prompt set, model, key) → that prompt's images, in the order of their `repeat`."""
    grouped: dict[tuple[str, str, str], list[Picture]] = defaultdict(list)
    for picture in sorted(pictures, key=lambda picture: picture.repeat):
        grouped[picture.prompt_set, picture.model, picture.key].append(picture)
    return grouped


def natural_order(key: str) -> tuple:
    """A sort key that puts "anime/2" before "anime/10"."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", key))
