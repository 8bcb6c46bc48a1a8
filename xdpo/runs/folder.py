"""The run folder: the config that it belongs to, and the record of its starts, libraries and data."""

import json
import sys
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from xdpo.config import Config, changed_keys, dump_config, load_config
from xdpo.files import check_writable, is_untouched, write_text, writing
from xdpo.provenance import git_commit, library_versions


def check_run_folder(folder: Path, settings: Config, allow_config_change: bool) -> None:
    """Raise ValueError for a folder that can't be written to, or that holds another run or something else.

    The error names the keys in which the earlier run's config differs. Nothing is written.
    """
    check_writable(folder, "output_dir")
    if is_untouched(folder):
        return
    saved = folder / "config.yaml"
    if not saved.is_file():
        content = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        raise ValueError(f"output_dir: {folder} holds something that is not a run ({content}); choose another folder")
    changes = changed_keys(load_config(saved), settings)
    if changes and not allow_config_change:
        raise ValueError(
            f"output_dir: {folder} holds a run with another config:\n  "
            + "\n  ".join(changes)
            + "\nChoose another output_dir, or continue it under the new config with --allow-config-change"
        )


def check_pairs(folder: Path, fingerprint: str, allow_change: bool, report: Callable[[str], None]) -> None:
    """Raise ValueError where a run would resume with other training pairs; with allow_change, report it instead.

    fingerprint: of the training pairs. A run passes whose run.json has none.
    """
    before = _read_record(folder / "run.json").get("pairs_fingerprint")
    if before in (None, fingerprint):
        return
    change = f"the data have changed: the training pairs are not those that the run in {folder} began with"
    if not allow_change:
        raise ValueError(
            f"output_dir: {change}; at each position of its order there would be another pair. Put the data back, "
            "choose another output_dir, or go on all the same with --allow-config-change"
        )
    report(f"note: {change}; going on in the order of the new ones")


def describe_run(folder: Path, settings: Config, **facts: object) -> str:
    """Write config.yaml and run.json: the run's starts, library versions and commit; `facts` are added as given.

    Returns the run's identifier, which is the same at every start.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", dump_config(settings))
    path = folder / "run.json"
    before = _read_record(path)
    start = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv}
    identifier = before.get("id") or uuid.uuid4().hex[:12]
    record = {
        "id": identifier,
        "starts": [*before.get("starts", []), start],
        "versions": library_versions(),
        "git_commit": git_commit(),
        **facts,
    }
    write_text(path, json.dumps(record, indent=2) + "\n")
    return identifier


def _read_record(path: Path) -> dict:
    """What run.json holds, nothing where there is none. Raises ValueError for a damaged one."""
    try:
        record = json.loads(path.read_bytes()) if path.is_file() else {}
        if not isinstance(record, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Put back a copy, or remove it: the run then resumes, its earlier starts are "
            "forgotten, and whether its pairs are still the same is not checked"
        ) from None
    return record
