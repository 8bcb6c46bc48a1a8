"""Download, index or convert a config's pairs ahead of its training, in one process without a GPU.

    python scripts/prepare_data.py --config configs/xdpo_sd15.yaml

Training finds the result in the caches of `datasets` and of the hub, and starts at once. After a kill, the same command
resumes: downloaded files stay, an interrupted conversion starts again.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xdpo.config import Config, config_parser, load_config

if TYPE_CHECKING:
    from xdpo.data import Split


def main(arguments: list[str] | None = None) -> int:
    """Prepare training pairs, and held-out ones where the config evaluates. Returns the exit status."""
    options = config_parser(__doc__).parse_intermixed_args(arguments)
    try:
        settings = load_config(options.config, options.overrides)
        from xdpo.data import Split  # not before: with PyTorch it takes seconds

        for split in Split.of(settings):
            prepare(settings, split)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("prepared; training with these settings finds it")
    return 0


def prepare(settings: Config, split: "Split") -> None:
    """Print what there is to do, do it, and print how many pairs came of it. Raises DataError."""
    from xdpo import data, precompute

    title, source = split.title, split.source(settings)
    in_order = split.is_held_out or settings.cache.examples is not None
    files = data.source_files(source)
    if settings.cache.examples and any("://" in file for file in files):
        print(f"{title}: {len(files):,} remote files; scripts/cache_examples.py reads them into cache.examples itself")
        return
    if files:
        copied = data.is_converted(source, files, in_order=in_order)
        print(f"{title}: {describe(files, copied)}", flush=True)
    # As many processes as there are cores, each with files of its own.
    num_proc = min(len(files), os.cpu_count() or 1) or None
    filters = precompute.filters_of(settings, split)
    table = data.load_pairs(source, filters=filters, in_order=in_order, num_proc=num_proc)
    print(f"{title}: {table.counts}", flush=True)


def describe(files: list[str], copied: bool) -> str:
    """The number of files and gigabytes, where they or their index go, and the free space there."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    size = sum(sizes_of(files))
    lines = [f"{len(files):,} files, {size / 1e9:.3g} GB"]
    if not copied:
        return f"{lines[0]}, read where they are; their index goes into {HF_DATASETS_CACHE}"
    folders = {"converted": Path(HF_DATASETS_CACHE)}
    if "://" in files[0]:
        folders = {"fetched": Path(HF_HUB_CACHE)} | folders
    for what, folder in folders.items():
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        lines.append(f"{what} in {folder}: about {size / 1e9:.3g} GB, less what is there; {free / 1e9:.3g} GB are free")
    return "\n  ".join(lines)


def sizes_of(files: list[str]) -> list[int]:
    """Bytes of local files, or of files on the hub, whose folders are listed once."""
    from fsspec.core import url_to_fs

    by_folder: dict[str, set[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        by_folder.setdefault(folder, set()).add(name)
    sizes = []
    for folder, names in by_folder.items():
        system, path = url_to_fs(folder or ".")
        entries = system.ls(path, detail=True)
        sizes += [entry["size"] for entry in entries if entry["name"].rpartition("/")[2] in names]
    return sizes


if __name__ == "__main__":
    sys.exit(main())
