"""The plan of a reproduction, a checked YAML file: methods, tuning, measurements and questions."""

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from xdpo.config import Section
from xdpo.paths import user_path
from xdpo.tables import read_text

BASE = "base"
"""The model before training; methods are measured against it, and questions may name it."""

Names = Annotated[tuple[str, ...], Field(min_length=1)]


class Method(Section):
    """A config to train, and how it is tuned."""

    config: Path  # relative to the plan's file
    group: str  # heading in the results
    also_in: tuple[str, ...] = ()  # other groups whose table shows it too
    tuned_as: str | None = None  # uses that method's tuned value; None: is tuned
    curves: bool = False  # measured at every checkpoint of the plan, not only at the end
    set: tuple[str, ...] = ()


class Tuning(Section):
    """The budget of every tuned method: one run for each value, scored on prompts that nothing else uses."""

    key: str
    values: Names
    seed: int
    prompts: Names


class Question(Section):
    """A comparison of two methods, answered by the interval of their difference."""

    ask: str
    kind: Literal["better", "differs", "holds"] = "better"
    method: str
    than: str
    score: str | None = None  # a scorer; None: the plan's score
    logged: str | None = None  # instead of a score: a metric's last value in metrics.jsonl; lower is better


class Plan(Section):
    """Everything that `scripts/reproduce.py` does at one scale."""

    title: str
    steps: Annotated[int, Field(gt=0)]
    checkpoints: Annotated[tuple[int, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    prompts: Names  # generate.py's --prompts
    generate: tuple[str, ...] = ()  # its further arguments
    scorers: Names
    score: str  # decides the tuning, the curves and the questions
    alignment: str
    baseline: str
    tuning: Tuning
    common: tuple[str, ...] = ()  # overrides of all configs
    methods: dict[str, Method]
    questions: tuple[Question, ...] = ()

    @field_validator("generate", mode="before")
    @classmethod
    def _as_words(cls, words: object) -> object:
        return [str(word) for word in words] if isinstance(words, list | tuple) else words

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        known = {*self.methods, BASE}
        named = [self.baseline, *(m.tuned_as for m in self.methods.values() if m.tuned_as)]
        if unknown := [name for name in named if name not in self.methods]:
            raise ValueError(f"{unknown[0]!r} is no method of the plan")
        asked = [name for question in self.questions for name in (question.method, question.than)]
        if unknown := [name for name in asked if name not in known]:
            raise ValueError(f"a question is about {unknown[0]!r}, which is no method of the plan")
        if BASE in self.methods:
            raise ValueError(f"{BASE!r} is the model before training; call the method otherwise")
        if chained := [n for n, m in self.methods.items() if m.tuned_as and self.methods[m.tuned_as].tuned_as]:
            raise ValueError(f"{chained[0]} is tuned as a method that is not tuned itself")
        if self.checkpoints[-1] != self.steps or list(self.checkpoints) != sorted(set(self.checkpoints)):
            raise ValueError(f"checkpoints must rise to steps = {self.steps}, got {list(self.checkpoints)}")
        scores = {self.score, self.alignment, *(q.score for q in self.questions if q.score)}
        if absent := sorted(scores - set(self.scorers)):
            raise ValueError(f"{absent[0]} is asked for and not among the scorers")
        if self.tuning.seed in self.seeds:
            raise ValueError(f"the tuning's seed {self.tuning.seed} is one of those reported")
        if shared := sorted(set(self.prompts) & set(self.tuning.prompts)):
            raise ValueError(f"{shared[0]} is for tuning and for the results; they need prompts of their own")
        return self

    @property
    def tuned(self) -> list[str]:
        """The methods that are tuned."""
        return [name for name, method in self.methods.items() if method.tuned_as is None]

    def measured_steps(self, method: str) -> tuple[int, ...]:
        """The optimizer steps after which a method's images are made."""
        return self.checkpoints if self.methods[method].curves else (self.steps,)


def load_plan(path: Path) -> Plan:
    """Read a plan; resolve its configs' paths from the plan's folder. Raises ValueError naming the faults."""
    text = read_text(path)
    try:
        content = yaml.safe_load(text)
    except Exception as error:  # PyYAML's constructors raise any error
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    try:
        plan = Plan.model_validate(content)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, each['loc'])) or 'plan'}: {each['msg']}" for each in error.errors()]
        raise ValueError("\n  ".join([f"{path}:", *lines])) from None
    methods = {
        name: method.model_copy(update={"config": path.parent / user_path(method.config)})
        for name, method in plan.methods.items()
    }
    return plan.model_copy(update={"methods": methods})
