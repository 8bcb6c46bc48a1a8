"""The plan of a reproduction: which methods, what is tuned, what is measured, what is asked. A YAML file, checked."""

from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from xdpo.config import Section

BASE = "base"
"""The model before training; methods are measured against it, and questions may name it."""


class Method(Section):
    """A config to train, and how it is tuned."""

    config: Path
    group: str  # heading in the results
    tuned_as: str | None = None  # takes that method's tuned value; None: tuned itself
    curves: bool = False  # measured at every checkpoint of the plan, not only at the end
    set: tuple[str, ...] = ()


class Tuning(Section):
    """The budget that every tuned method gets: one run for each value."""

    key: str
    values: tuple[str, ...]
    seed: int


class Question(Section):
    """Whether one method's score, or a number of its log, is better than another's."""

    ask: str
    better: str
    than: str
    score: str | None = None  # "alignment"; None: the plan's score
    lower: str | None = None  # a number of metrics.jsonl instead, of which less is better


class Plan(Section):
    """Everything that `scripts/reproduce.py` does at one scale."""

    steps: Annotated[int, Field(gt=0)]
    checkpoints: tuple[int, ...]
    seeds: tuple[int, ...]
    prompts: str
    generate: tuple[str, ...] = ()
    scorers: tuple[str, ...]
    score: str
    alignment: str
    baseline: str
    tuning: Tuning
    common: tuple[str, ...] = ()
    methods: dict[str, Method]
    questions: tuple[Question, ...] = ()

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        known = {*self.methods, BASE}
        named = [self.baseline, *(m.tuned_as for m in self.methods.values() if m.tuned_as)]
        named += [name for question in self.questions for name in (question.better, question.than)]
        if unknown := [name for name in named if name not in known]:
            raise ValueError(f"{unknown[0]!r} is no method of the plan")
        if chained := [n for n, m in self.methods.items() if m.tuned_as and self.methods[m.tuned_as].tuned_as]:
            raise ValueError(f"{chained[0]} is tuned as a method that is not tuned itself")
        if self.checkpoints[-1] != self.steps or list(self.checkpoints) != sorted(set(self.checkpoints)):
            raise ValueError(f"checkpoints must rise to steps = {self.steps}, got {list(self.checkpoints)}")
        if self.score not in self.scorers or self.alignment not in self.scorers:
            raise ValueError("score and alignment must be among scorers")
        return self

    @property
    def tuned(self) -> list[str]:
        """The methods that are tuned themselves."""
        return [name for name, method in self.methods.items() if method.tuned_as is None]

    def measured_steps(self, method: str) -> tuple[int, ...]:
        """Where a method's images are made."""
        return self.checkpoints if self.methods[method].curves else (self.steps,)


def load_plan(path: Path) -> Plan:
    """Read a plan. Raises ValueError naming what is wrong in it."""
    try:
        return Plan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, each['loc'])) or 'plan'}: {each['msg']}" for each in error.errors()]
        raise ValueError("\n  ".join([f"{path}:", *lines])) from None
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None
