"""What annotators read and may answer: the questions, a tie, the first page, what they get at the end.

`user_study.py build --config FILE` reads it from YAML; docs/user_study.md shows every key.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIDES = ("left", "right")
TIE = "tie"
QUESTIONS = (
    {"id": "preference", "text": "Given the same prompt, which image do you personally prefer?"},
    {"id": "alignment", "text": "Which image better matches the textual description?"},
)
"""The paper's two questions."""
ALIGNMENT = "alignment"  # its answer is known for an obvious pair, where no other question says `check: true`
INSTRUCTIONS = (
    "You will see pairs of images. Both images of a pair were made by a computer from the same text, which stands "
    "above them.\n\n"
    "Look at both, answer the questions below them and submit; then the next pair comes. Select an image to enlarge "
    "it. You can pause at any time and take your last answers back. Answer as you see it: we do not know which images "
    "ought to be better."
)
CONSENT = (
    "I take part of my own free will and may stop at any time. I agree that my answers, how long they took and the "
    "size of the images on my screen are kept without my name and may be published."
)
EXAMPLE_PROMPT = "a red circle above a blue square"
EXAMPLE_WORDS = (
    "The left image shows what the text says; in the right one the colours are the wrong way round. Asked which image "
    "matches the text, one would choose the left. Asked which one you prefer, there is no wrong answer."
)


class FormError(ValueError):
    """A form can't be used. The message names the file and says what to change."""


@dataclass(frozen=True)
class Example:
    """A pair that nobody votes on, and what is said of it. images: files of the two sides; None: a drawn pair."""

    prompt: str = EXAMPLE_PROMPT
    words: str = EXAMPLE_WORDS
    images: Mapping[str, Path] | None = None


@dataclass(frozen=True)
class Introduction:
    """The first page: what to do, an example, and what an annotator agrees to before the first pair."""

    instructions: str = INSTRUCTIONS
    consent: str = CONSENT
    example: Example = field(default_factory=Example)


@dataclass(frozen=True)
class Form:
    """The questions with their possible answers, and the pages around them.

    tie: words of a third answer to every question; None: one image has to be chosen. introduction: None in older
    studies, in which the first pair comes at once. completion_code: one for all; None: one for each annotator.
    """

    questions: Sequence[Mapping[str, Any]] = QUESTIONS
    tie: str | None = None
    introduction: Introduction | None = None
    completion_link: str | None = None
    completion_code: str | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        return SIDES if self.tie is None else (*SIDES, TIE)

    @property
    def check(self) -> str | None:
        """The question whose answer is known for an obvious pair; None: no question is of that kind."""
        asked = [question["id"] for question in self.questions]
        return next(
            (question["id"] for question in self.questions if question.get("check")),
            ALIGNMENT if ALIGNMENT in asked else None,
        )


def read_form(path: Path | None) -> Form:
    """The form of a YAML file, or of a study without one: the paper's questions and a first page.

    Raises FormError for a file that can't be read, for unknown keys, and for values of the wrong kind.
    """
    if path is None:
        return Form(introduction=Introduction())
    from xdpo.config import parse_yaml

    try:
        content, repeated = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise FormError(f"{path}: {error}") from None
    if repeated:
        raise FormError(f"{path}: {repeated[0]}")
    keys = ("questions", "tie", "instructions", "consent", "example", "completion_code", "completion_link")
    given = _mapping(path, "", content or {}, keys)
    example = _mapping(path, "example", given.get("example", {}), ("prompt", "left", "right", "words"))
    link = _text(path, given, "completion_link", None)
    if link is not None and not re.match("https?://", link):
        raise FormError(f"{path}: completion_link must begin with https://, got {link!r}")
    return Form(
        questions=_questions(path, given["questions"]) if "questions" in given else QUESTIONS,
        tie=_text(path, given, "tie", None),
        introduction=Introduction(
            _text(path, given, "instructions", INSTRUCTIONS),
            _text(path, given, "consent", CONSENT),
            _example(path, example),
        ),
        completion_link=link,
        completion_code=_text(path, given, "completion_code", None),
    )


def _questions(path: Path, listed: Any) -> list[dict[str, Any]]:
    if not isinstance(listed, list) or not listed:
        raise FormError(f"{path}: questions must be a list, each with id and text")
    questions = []
    for number, question in enumerate(listed, start=1):
        where = f"questions, number {number}"
        given = _mapping(path, where, question, ("id", "text", "check"))
        name, text = (_text(path, given, key, None, where) for key in ("id", "text"))
        if name is None or text is None:
            raise FormError(f"{path}: {where} needs an id and a text")
        if not re.fullmatch(r"\w+", name):
            raise FormError(f"{path}: {where}: an id is one word of letters and digits, got {name!r}")
        if not isinstance(given.get("check", False), bool):
            raise FormError(f"{path}: {where}: check must be true or false, got {given['check']!r}")
        questions.append({"id": name, "text": text} | ({"check": True} if given.get("check") else {}))
    names = [question["id"] for question in questions]
    if twice := [name for name in names if names.count(name) > 1]:
        raise FormError(f"{path}: two questions have the id {twice[0]!r}")
    if len([question for question in questions if "check" in question]) > 1:
        raise FormError(f"{path}: only one question can have check: true")
    return questions


def _example(path: Path, given: Mapping[str, Any]) -> Example:
    if not given:
        return Example()
    prompt, words, left, right = (_text(path, given, key, None, "example") for key in ("prompt", "words", *SIDES))
    if prompt is None or words is None or left is None or right is None:
        raise FormError(f"{path}: example needs prompt, words, left and right; leave it out for a drawn one")
    return Example(prompt, words, {"left": path.parent / left, "right": path.parent / right})


def _mapping(path: Path, where: str, value: Any, keys: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise FormError(f"{path}: {where or 'the file'} must hold {', '.join(keys)}, got {value!r}")
    if unknown := [key for key in value if key not in keys]:
        inside = f" in {where}" if where else ""
        raise FormError(f"{path}: unknown key {unknown[0]!r}{inside}; choose from {', '.join(keys)}")
    return value


def _text(path: Path, given: Mapping[str, Any], key: str, default: Any, where: str = "") -> Any:
    value = given.get(key)
    if value is None:
        return default
    if not isinstance(value, str) or not value.strip():
        inside = f" in {where}" if where else ""
        raise FormError(f"{path}: {key}{inside} must be text, got {value!r}; put it into quotation marks")
    return value.strip()
