"""A study's folder, and the part of it that an annotator may see.

```
STUDY/
  study.json    title, form, items with their prompts, every annotator's tasks: nothing that reveals models
  key.json      which image is which model's, benchmark, style, checks. Read by the analysis, never served
  links.json    the secret links, and the codes that annotators get at the end
  images/       only pixels, all in one format, under random names
  example/      the two images of the first page
  votes.sqlite  the votes
```

An annotator's task shows an item's two images, left and right as drawn for this annotator. The names of items, images
and tasks are random; only key.json knows more.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from xdpo.study.form import Example, Form, Introduction

DEFAULT_TITLE = "Which image is better?"


class StudyError(ValueError):
    """A study can't be built, read or voted in. The message says why and what to do."""


@dataclass(frozen=True)
class Task:
    """An item as one annotator sees it; left and right are image names."""

    task: str
    item: str
    left: str
    right: str


@dataclass(frozen=True)
class Item:
    """What an item is, for the analysis.

    kind: "pair", one image of the tested model and one of a baseline; or "obvious", a check with a known answer to the
    question of alignment. images: image name → model; for a check, image name → "right" or "wrong".
    """

    kind: str
    benchmark: str
    category: str
    key: str  # of the prompt within its benchmark
    prompt: str
    images: Mapping[str, str]
    baseline: str | None = None


@dataclass(frozen=True)
class Study:
    """The content of study.json. Annotators are numbered from 1: tasks[n − 1] are annotator n's, in order."""

    folder: Path
    id: str
    title: str
    form: Form
    seed: int
    votes_per_pair: int
    prompts: Mapping[str, str]  # by item
    tasks: Sequence[Sequence[Task]]

    def save(self) -> None:
        content = {
            "id": self.id,
            "title": self.title,
            "questions": list(self.form.questions),
            "tie": self.form.tie,
            "introduction": self.introduction,
            "completion_link": self.form.completion_link,
            "seed": self.seed,
            "votes_per_pair": self.votes_per_pair,
            "prompts": dict(self.prompts),
            "annotators": [[asdict(task) for task in tasks] for tasks in self.tasks],
        }
        _write(self.folder / "study.json", content)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises StudyError for a folder without a study, or with a damaged one."""
        content = _read(folder / "study.json")
        try:
            return cls(
                folder=folder,
                id=content["id"],
                title=content["title"],
                form=_form(content),
                seed=content["seed"],
                votes_per_pair=content["votes_per_pair"],
                prompts=content["prompts"],
                tasks=[[Task(**task) for task in tasks] for tasks in content["annotators"]],
            )
        except (KeyError, TypeError) as error:
            raise _damaged(folder / "study.json", error) from None

    @property
    def introduction(self) -> dict[str, Any] | None:
        """The first page's words. Its images are example/left.png and example/right.png."""
        page = self.form.introduction
        if page is None:
            return None
        example = {"prompt": page.example.prompt, "words": page.example.words}
        return {"instructions": page.instructions, "consent": page.consent, "example": example}

    @cached_property
    def owner_of(self) -> Mapping[str, tuple[int, Task]]:
        """Task name → (annotator's number, task)."""
        return {task.task: (number, task) for number, tasks in enumerate(self.tasks, start=1) for task in tasks}

    def check_answers(self, answers: Any) -> dict[str, str]:
        """The answers, a choice for each question. Raises StudyError for anything else."""
        wanted = [question["id"] for question in self.form.questions]
        if not isinstance(answers, dict) or sorted(answers) != sorted(wanted):
            raise StudyError(f"a vote needs one answer to each of {', '.join(wanted)}, got {answers!r}")
        if wrong := [answer for answer in answers.values() if answer not in self.form.choices]:
            raise StudyError(f"an answer must be {' or '.join(self.form.choices)}, got {wrong[0]!r}")
        return {question: answers[question] for question in wanted}


@dataclass(frozen=True)
class Key:
    """The content of key.json. repeats: task → the earlier task that it repeats with the sides exchanged."""

    model: str
    baselines: Sequence[str]
    items: Mapping[str, Item]
    repeats: Mapping[str, str]

    def save(self, folder: Path, study_id: str) -> None:
        items = {name: asdict(item) for name, item in self.items.items()}
        rest = {"model": self.model, "baselines": list(self.baselines), "repeats": dict(self.repeats)}
        _write(folder / "key.json", {"study": study_id, **rest, "items": items}, secret=True)

    @classmethod
    def load(cls, study: Study) -> Self:
        """Raises StudyError if the key is missing, damaged or another study's."""
        path = study.folder / "key.json"
        content = _read(path)
        if content.get("study") != study.id:
            raise StudyError(f"{path} is of another study ({content.get('study')}, not {study.id})")
        try:
            items = {name: Item(**item) for name, item in content["items"].items()}
            return cls(content["model"], content["baselines"], items, content["repeats"])
        except (KeyError, TypeError) as error:
            raise _damaged(path, error) from None


@dataclass(frozen=True)
class Links:
    """The secrets of the links: one for the administrator, one for each annotator. codes: what each annotator is shown
    at the end; none in older studies."""

    administrator: str
    annotators: Sequence[str]
    codes: Sequence[str] = ()

    def code_of(self, annotator: int) -> str | None:
        return self.codes[annotator - 1] if self.codes else None

    def save(self, folder: Path) -> None:
        _write(folder / "links.json", asdict(self), secret=True)

    @classmethod
    def load(cls, folder: Path) -> Self:
        try:
            return cls(**_read(folder / "links.json"))
        except TypeError as error:
            raise _damaged(folder / "links.json", error) from None


def _form(content: Mapping[str, Any]) -> Form:
    """The form in study.json, which older studies have only the questions of."""
    introduction = content.get("introduction")
    if introduction is not None:
        example = Example(**introduction["example"])
        introduction = Introduction(introduction["instructions"], introduction["consent"], example)
    return Form(content["questions"], content.get("tie"), introduction, content.get("completion_link"))


def _write(path: Path, content: Any, secret: bool = False) -> None:
    if secret:
        path.touch(mode=0o600)  # restricted before it has content
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"no study in {path.parent}: {error}; make one with scripts/user_study.py build") from None
    except ValueError as error:
        raise _damaged(path, error) from None
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no object")
    return content


def _damaged(path: Path, why: object) -> StudyError:
    return StudyError(f"{path} is damaged: {why}; take it from a copy of the study")
