"""A study without a server: one folder per annotator, opened from the disk, and the import of their votes."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdpo.files import replacing_folder
from xdpo.study.folder import Links, Study, StudyError
from xdpo.study.form import SIDES
from xdpo.study.server import PAGES
from xdpo.study.votes import ConflictError, Vote, VoteStore, as_display, as_seconds, as_time
from xdpo.tables import TableError, read_json

PAGE_FILES = ("page.css", "page.js", "backends.js", "icon.svg")
_FIRST_SCRIPT = '<script src="backends.js"'


def export(study: Study, folder: Path, annotators: Sequence[int] | None = None) -> list[Path]:
    """Write annotator_NN/index.html with everything it needs, for each annotator. Returns the pages.

    Raises StudyError for an unknown annotator's number, and for folders that exist already.
    """
    chosen = list(annotators or range(1, len(study.tasks) + 1))
    if unknown := [number for number in chosen if not 1 <= number <= len(study.tasks)]:
        raise StudyError(f"the study has annotators 1 to {len(study.tasks)}, got {unknown[0]}")
    targets = {number: folder / f"annotator_{number:02d}" for number in chosen}
    if there := [target for target in targets.values() if target.exists()]:
        raise StudyError(f"{there[0]} is there already; choose another folder")
    return [_export_one(study, number, target) for number, target in targets.items()]


def _export_one(study: Study, number: int, target: Path) -> Path:
    with replacing_folder(target) as aside:
        (aside / "images").mkdir()
        tasks = []
        for task in study.tasks[number - 1]:
            urls = {}
            for side in SIDES:  # a name per task and side, as on the server: a repeated image gets another name
                urls[side] = f"images/{task.task}_{side}.png"
                shutil.copyfile(study.folder / "images" / f"{getattr(task, side)}.png", aside / urls[side])
            tasks.append({"task": task.task, "prompt": study.prompts[task.item], **urls})
        introduction = study.introduction
        if introduction is not None:
            shutil.copytree(study.folder / "example", aside / "example")
            introduction["example"] |= {side: f"example/{side}.png" for side in SIDES}
        content: dict[str, Any] = {
            "id": study.id,
            "title": study.title,
            "questions": [{"id": question["id"], "text": question["text"]} for question in study.form.questions],
            "tie": study.form.tie,
            "introduction": introduction,
            "code": Links.load(study.folder).code_of(number),
            "link": study.form.completion_link,
            "annotator": number,
            "tasks": tasks,
        }
        (aside / "study.js").write_text(f"window.STUDY = {json.dumps(content)};\n", encoding="utf-8")
        for name in PAGE_FILES:
            shutil.copyfile(PAGES / name, aside / name)
        page = (PAGES / "page.html").read_text(encoding="utf-8").replace("../static/", "")
        script = '<script src="study.js" defer></script>\n'
        (aside / "index.html").write_text(page.replace(_FIRST_SCRIPT, script + _FIRST_SCRIPT, 1), encoding="utf-8")
    return target / "index.html"


def import_votes(study: Study, file: Path) -> tuple[int, int]:
    """Import a file of votes that the page saved, completely or not at all. Returns (new votes, votes known before).

    Raises StudyError for a file of another study or of another annotator's tasks, and for one that isn't such a file;
    ConflictError for votes that contradict earlier ones.
    """
    votes, agreed = _read_votes(study, file)
    store = VoteStore(study)
    try:
        new = store.add(*votes)
    except ConflictError:
        raise ConflictError(f"{file} contradicts votes that are there already; nothing was taken in") from None
    if votes and agreed is not None:
        store.agree(votes[0].annotator, as_time(agreed))
    return new, len(votes) - new


def _read_votes(study: Study, file: Path) -> tuple[list[Vote], Any]:
    """The votes of a file, and when their annotator agreed to the first page."""
    try:
        content = read_json(file)
        study_id, number, rows = content["study"], content["annotator"], content["votes"]
        agreed = content.get("agreed")
        rows = [(row["task"], row["answers"], row) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, TableError) else repr(error)
        raise StudyError(f"{file} holds no votes: {reason}; it must be what the page's “Save votes” wrote") from None
    if study_id != study.id:
        raise StudyError(f"{file} holds votes of another study ({study_id}, not {study.id}); nothing was taken in")
    if study.form.introduction is not None and agreed is None:
        raise StudyError(f"{file}: its annotator has not agreed to the study's first page; nothing was taken in")
    votes = []
    for task, answers, row in rows:
        owner, _ = study.owner_of.get(task, (None, None)) if isinstance(task, str) else (None, None)
        if owner is None or owner != number:
            raise StudyError(f"{file}: task {task!r} is not annotator {number}'s; nothing was taken in")
        answers = study.check_answers(answers)
        when, seconds, display = as_time(row.get("at")), as_seconds(row.get("seconds")), as_display(row.get("display"))
        votes.append(Vote(task, number, answers, seconds, when, display))
    if len({vote.task for vote in votes}) < len(votes):
        raise StudyError(f"{file} has two votes on one task; nothing was taken in")
    return votes, agreed
