"""Push a finished run's model, card and samples to the Hugging Face hub; without --go, only list what would be pushed.

    python scripts/publish.py runs/xdpo_sd15 me/xdpo-sd15           every file with its size, and the card
    python scripts/publish.py runs/xdpo_sd15 me/xdpo-sd15 --go      push, in one commit, to a private repository

The card says how to load the model from there; it holds the whole config, paths included. Log in first: hf auth login.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

from xdpo.config import load_config
from xdpo.paths import user_path

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"


def main(arguments: list[str] | None = None, api: "HfApi | None" = None) -> int:
    """List or push. Returns the exit status. api: the hub, as huggingface_hub has it."""
    options = build_parser().parse_args(arguments)
    try:
        card, others = card_and_files(options.run, options.repository)
        files: dict[str, Path | bytes] = {CARD: card.encode(), **others}
        print(
            f"to https://huggingface.co/{options.repository}, {'public' if options.public else 'private'} if it is new:"
        )
        for name, content in files.items():
            print(f"  {size_of(content):>15,} bytes  {name}")
        print(f"  {sum(map(size_of, files.values())):>15,} bytes in {len(files)} files")
        if not options.go:
            print(f"\n{CARD}:\n\n{card}\nNothing was pushed; --go does it.")
            return 0
        print(f"pushed: {push(files, options.repository, is_public=options.public, api=api)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=user_path, help="the folder of a finished run")
    parser.add_argument("repository", help="its id on the hub, such as me/xdpo-sd15; made if it isn't there")
    parser.add_argument("--go", action="store_true", help="push; without it, only list")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    return parser


def card_and_files(run: Path, repository: str) -> tuple[str, dict[str, Path]]:
    """What is pushed: the card, and the name of each other file in the repository → where it is.

    Raises ValueError for what is no finished run, and for an id that the hub doesn't allow.
    """
    from huggingface_hub.utils import validate_repo_id

    from xdpo import families, runs

    validate_repo_id(repository)
    if repository.count("/") != 1:
        raise ValueError(f"{repository!r} lacks its owner; write OWNER/NAME")
    export, config = run / "export", run / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{run} is no run of train_xdpo.py: it has no config.yaml")
    if not export.is_dir():
        raise ValueError(f"{run} has no export/, which a run writes when it is finished; its command resumes it")
    settings = load_config(config)
    exported = {str(path.relative_to(export)): path for path in sorted(export.rglob("*")) if path.is_file()}
    for name in (CARD, runs.SHEET):  # a card that names the folder, and a sheet that is in samples/ too
        exported.pop(name, None)
    sheets = {f"samples/{path.name}": path for path in runs.sample_sheets(run)}
    newest, family = next(reversed(sheets), None), families.family_of_pipeline(settings.model)
    card = runs.model_card(settings, family, run, location=repository, sheet=newest)
    return card, {"config.yaml": config, **exported, **sheets}


def size_of(content: "Path | bytes") -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def push(files: Mapping[str, "Path | bytes"], repository: str, *, is_public: bool, api: "HfApi | None" = None) -> str:
    """Push in one commit. Returns its address. Raises ValueError for whatever the hub or the network objects to."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = api or HfApi()
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    try:
        api.create_repo(repository, private=not is_public, exist_ok=True)
        return api.create_commit(
            repository, operations, commit_message="The model, its card and its samples"
        ).commit_url
    except Exception as error:  # the hub's client and the network's raise what they like
        raise ValueError(
            f"could not push to {repository}: {error}. Check the network and the name, and log in with a token that may"
            " write (hf auth login); the same command begins again, and files that are there are not sent twice"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
