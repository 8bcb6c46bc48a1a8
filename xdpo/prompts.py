"""Prompt sets as indexed prompts: published benchmarks, the paper's figures, the embedded set, any file of prompts.

A published set is taken from an explicit path, else from the cache ($XDPO_CACHE/prompts or ~/.cache/xdpo/prompts), else
from its source. It is checked against a checksum of its content: categories and texts, in order.
"""

import difflib
import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from xdpo.files import replacing
from xdpo.paths import user_path
from xdpo.tables import TableError, as_text, read_json, read_json_lines, read_table, read_text, scalar

TEXT_COLUMNS = ("prompt", "caption", "text")
CATEGORY_COLUMNS = ("category", "style", "figure")
SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
NO_CATEGORY = "all"
_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_DOWNLOAD_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set. `position` in the whole set identifies it; `index` numbers its image within its category."""

    position: int
    category: str
    index: int
    text: str

    @property
    def folder(self) -> str:
        """The category as a folder name: "Food & Beverage" → "food_beverage"; "concept-art" stays."""
        return re.sub(r"[^\w.-]+", "_", self.category.lower()).strip("_.") or NO_CATEGORY


@dataclass(frozen=True)
class PromptSet:
    """Selected prompts, in the order of their set.

    `sha256` is the checksum of the whole set, `total` its length. `selection` says which part was selected, without a
    limit, which only cuts the end.
    """

    name: str
    prompts: tuple[Prompt, ...]
    total: int
    sha256: str
    selection: Mapping[str, Any]


@dataclass(frozen=True)
class _Source:
    """A named set: its files (one per category or one for all), their URLs, and the checksum of their content.

    `combined` is another accepted file, a JSON object from category to prompts. `shipped` is a file of this repository.
    """

    about: str
    files: Mapping[str, str] = field(default_factory=dict)  # file → URL
    combined: str | None = None
    shipped: Path | None = None
    sha256: str | None = None


_HPSV2 = "https://huggingface.co/datasets/zhwang/HPDv2/resolve/260dbde75ab1c68e86d32a8e7739f1b49b100578/benchmark"
_PARTI = "https://raw.githubusercontent.com/google-research/parti/2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071"
_PICKAPIC = "https://huggingface.co/datasets/yuvalkirstain/pickapic_v2_no_images/resolve/main/data"

PROMPT_SETS: Mapping[str, _Source] = {
    "partiprompts": _Source(
        "PartiPrompts, 1632 prompts in 12 categories",
        {"PartiPrompts.tsv": f"{_PARTI}/PartiPrompts.tsv"},
        sha256="ee7b13498b1c827eb565d4df987c439cbc02c4c40e02de9100e0d3f26a6f2f72",
    ),
    "hpsv2": _Source(
        "the HPSv2 benchmark, 800 prompts in each of 4 styles, 3172 distinct",
        {f"{style}.json": f"{_HPSV2}/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")},
        combined="hpsv2_benchmark_prompts.json",
        sha256="77378403299b395ff5b71aab9527776482a03e5b97bd8ef76811a8f5320a3e25",
    ),
    "pickapic_test_unique": _Source(  # no revision or checksum is known to pin
        "captions of Pick-a-Pic v2's split test_unique, 500 prompts",
        {"test_unique.parquet": f"{_PICKAPIC}/test_unique-00000-of-00001-e852c19ead276a89.parquet"},
    ),
    "paper_figures": _Source(
        "the 45 prompts of the paper's Figures 1, 5, A1 and A2", shipped=_ASSETS / "prompts" / "paper_figures.tsv"
    ),
    "tinyprompts": _Source(
        "held-out scenes of the embedded world, 50 in each of 4 categories", shipped=_ASSETS / "tiny" / "prompts.tsv"
    ),
}
"""All named sets."""


def load_prompts(
    name_or_path: str,
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    categories: Sequence[str] = (),
    sample: int | None = None,
    sample_seed: int = 0,
) -> PromptSet:
    """Load a set by name, or any file of prompts, and select from it.

    path: a file or folder that holds the named set. A file is txt (one prompt a line), csv or tsv with a header, json
    (a list, or an object from category to prompts), jsonl or parquet; its set has the file's name. categories: only
    these. sample: this many, drawn at random; with one seed a larger sample contains a smaller one. limit: the first
    ones of the result.

    Raises ValueError for an unknown set, file or category; for a file that can't be read or has another checksum; and
    for a set that can't be downloaded, with the files to place and their folder.
    """
    if name_or_path in PROMPT_SETS:
        name, source = name_or_path, PROMPT_SETS[name_or_path]
        prompts = _numbered(_rows_of_set(name, source, path))
        if source.sha256 and _checksum(prompts) != source.sha256:
            raise ValueError(
                f"prompt set {name!r}: the file found is not {source.about}: its content has the checksum "
                f"{_checksum(prompts)[:12]}…, the published one {source.sha256[:12]}…. Remove it from the cache to "
                "fetch it again, or use it under a name of its own, by its path"
            )
    elif (file := user_path(name_or_path)).suffix.lower() in SUFFIXES or file.exists():
        name = file.stem
        prompts = _numbered(_read([_existing_file(file)]))
        if name in PROMPT_SETS:
            raise ValueError(
                f"{name_or_path}: a set of your own can't be called {name!r}; rename the file, or give the name as the "
                "set and the file as its path"
            )
    else:
        near = difflib.get_close_matches(name_or_path, PROMPT_SETS, n=1)
        raise ValueError(
            f"unknown prompt set {name_or_path!r}; choose from {', '.join(PROMPT_SETS)}, or give a file "
            f"({', '.join(SUFFIXES)})" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if not prompts:
        raise ValueError(f"prompt set {name!r} is empty")
    selected, selection = _select(name, prompts, categories, sample, sample_seed)
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} leaves no prompt; give at least 1")
    return PromptSet(name, tuple(selected[:limit]), len(prompts), _checksum(prompts), selection)


def cache_folder() -> Path:
    """The folder of published sets: $XDPO_CACHE/prompts, or ~/.cache/xdpo/prompts."""
    return Path(os.environ.get("XDPO_CACHE") or "~/.cache/xdpo").expanduser() / "prompts"


# --- selecting and numbering ---------------------------------------------------------------------------


def _select(
    name: str, prompts: list[Prompt], categories: Sequence[str], sample: int | None, sample_seed: int
) -> tuple[list[Prompt], dict[str, Any]]:
    available = list(dict.fromkeys(prompt.category for prompt in prompts))
    unknown = [category for category in categories if category not in available]
    if unknown:
        near = difflib.get_close_matches(unknown[0], available, n=1)
        raise ValueError(
            f"prompt set {name!r} has no category {unknown[0]!r}; choose from {', '.join(available)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    selected = [prompt for prompt in prompts if not categories or prompt.category in categories]
    if sample is not None:
        if not 1 <= sample <= len(selected):
            raise ValueError(f"cannot sample {sample} of {len(selected)} prompts of {name!r}")
        # By hash, not by a generator, so that the sample does not depend on a library's version.
        by_chance = sorted(selected, key=lambda p: hashlib.sha256(f"{sample_seed}:{p.position}".encode()).digest())
        selected = sorted(by_chance[:sample], key=lambda p: p.position)
    return selected, {
        "categories": sorted(set(categories)) or None,
        "sample": sample,
        "sample_seed": None if sample is None else sample_seed,
    }


@dataclass(frozen=True)
class _Rows:
    """(category, text) in order. `is_grouped`: each category is a list of its own, counted from 0."""

    rows: list[tuple[str, str]]
    is_grouped: bool


def _numbered(read: _Rows) -> list[Prompt]:
    counts: Counter[str] = Counter()
    prompts = []
    for position, (category, text) in enumerate(read.rows):
        prompts.append(Prompt(position, category, counts[category] if read.is_grouped else position, text))
        counts[category] += 1
    folders: dict[str, str] = {}
    for prompt in prompts:
        other = folders.setdefault(prompt.folder, prompt.category)
        if other != prompt.category:
            raise ValueError(
                f"the categories {other!r} and {prompt.category!r} would share the folder {prompt.folder!r}; rename one"
            )
    return prompts


def _checksum(prompts: Sequence[Prompt]) -> str:
    content = json.dumps([[prompt.category, prompt.text] for prompt in prompts], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


# --- finding a published set ---------------------------------------------------------------------------


def _rows_of_set(name: str, source: _Source, path: str | Path | None) -> _Rows:
    if path is not None:
        path = user_path(path)
        if path.is_dir():
            if files := _files_in(path, source):
                return _read(files)
            raise ValueError(f"prompt set {name!r}: {path} lacks {_needed(source)}")
        return _read([_existing_file(path)])
    if source.shipped is not None:
        return _read([_existing_file(source.shipped)])
    folder = cache_folder() / name
    if files := _files_in(folder, source):
        return _read(files)
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise OSError("HF_HUB_OFFLINE is set")
        return _read([_download(url, folder / file) for file, url in source.files.items()])
    except (OSError, HTTPException) as error:  # urllib's errors are OSErrors; a truncated answer is an HTTPException
        urls = "\n  ".join(source.files.values())
        raise ValueError(
            f"prompt set {name!r} is not in the cache and could not be fetched: {error}\n"
            f"Place {_needed(source)} in {folder} (XDPO_CACHE changes where that is), or give the path of the file or "
            f"of a folder with these files. They come from\n  {urls}"
        ) from error


def _files_in(folder: Path, source: _Source) -> list[Path] | None:
    files = [folder / file for file in source.files]
    if files and all(file.is_file() for file in files):
        return files
    if source.combined and (folder / source.combined).is_file():
        return [folder / source.combined]
    return None


def _needed(source: _Source) -> str:
    names = source.files or ([source.shipped.name] if source.shipped else [])
    return ", ".join(names) + (f" (or {source.combined})" if source.combined else "")


def _download(url: str, target: Path) -> Path:
    if target.is_file():
        return target
    url = url.replace("https://huggingface.co", os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_SECONDS) as answer:
        content = answer.read()
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, "wb") as file:
        file.write(content)
    return target


# --- reading files -------------------------------------------------------------------------------------


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"no prompt file {str(path)!r} here; paths are relative to where the command is run")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: can't read prompts from {path.suffix or 'a file without suffix'}; use {SUFFIXES}")
    return path


def _read(paths: list[Path]) -> _Rows:
    """Rows of one file, or of several files named after their categories."""
    readers = {".txt": _text, ".json": _json, ".jsonl": _json_lines}
    reads = [readers.get(path.suffix.lower(), _table)(path) for path in paths]
    if len(reads) == 1:
        return reads[0]
    rows = [(path.stem, text) for path, read in zip(paths, reads, strict=True) for _, text in read.rows]
    return _Rows(rows, is_grouped=True)


def _text(path: Path) -> _Rows:
    lines = read_text(path).rstrip("\n").split("\n")  # str.splitlines would cut at exotic separators
    return _Rows([(NO_CATEGORY, line) for line in lines] if lines != [""] else [], is_grouped=False)


def _table(path: Path) -> _Rows:
    """Rows of a csv, tsv or parquet file, by its header. A missing cell of a parquet file counts as empty."""
    table = read_table(path, wanted=lambda name: name.strip().lower() in TEXT_COLUMNS + CATEGORY_COLUMNS)
    names = [name.strip().lower() for name in table.names]
    text = next((name for name in TEXT_COLUMNS if name in names), None)
    category = next((name for name in CATEGORY_COLUMNS if name in names), None)
    if twice := [name for name in (text, category) if name and names.count(name) > 1]:
        raise TableError(f"{path} has several columns called {twice[0]!r}; rename or remove all but one")
    if text is None:
        if not table.names:
            return _Rows([], is_grouped=False)
        raise TableError(f"{path}: has the columns {', '.join(table.names)}; one must be {' or '.join(TEXT_COLUMNS)}")
    texts = table.texts(table.names[names.index(text)])
    categories: list[str | None] = [NO_CATEGORY] * len(texts)
    if category is not None:
        categories = table.scalars(table.names[names.index(category)])
    return _Rows([(group or "", cell or "") for group, cell in zip(categories, texts, strict=True)], is_grouped=False)


def _json(path: Path) -> _Rows:
    content = read_json(path)
    if isinstance(content, dict):
        if content and all(isinstance(value, list) for value in content.values()):
            entries = [
                (
                    as_text(category, f"{path}: a category"),
                    _entry(item, f"{path}: {category!r:.40}, prompt {number}")[1],
                )
                for category, items in content.items()
                for number, item in enumerate(items)
            ]
            return _Rows(entries, is_grouped=True)
        content = list(content.values())
    if not isinstance(content, list):
        raise TableError(f"{path}: must be a list of prompts, or an object from category to a list of prompts")
    return _Rows([_entry(item, f"{path}: prompt {number}") for number, item in enumerate(content)], is_grouped=False)


def _json_lines(path: Path) -> _Rows:
    return _Rows([_entry(item, f"{path} line {number}") for number, item in read_json_lines(path)], is_grouped=False)


def _entry(item: Any, where: str) -> tuple[str, str]:
    """(category, text) of a string, or of an object with a prompt and perhaps a category."""
    if isinstance(item, str):
        return NO_CATEGORY, as_text(item, where)
    fields = {key.lower(): value for key, value in item.items()} if isinstance(item, dict) else {}
    text = next((fields[name] for name in TEXT_COLUMNS if name in fields), None)
    if not isinstance(text, str):
        raise TableError(
            f"{where}: every prompt must be a string or an object with {' or '.join(TEXT_COLUMNS)}, got {item!r:.80}"
        )
    category = next((fields[name] for name in CATEGORY_COLUMNS if name in fields), None)
    category = as_text(scalar(category), f"{where}: its category")
    return NO_CATEGORY if category is None else category, as_text(text, where)
