"""The plan of a reproduction, a checked YAML file: methods, tuning, measurements and questions."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from xdpo.config import Section
from xdpo.paths import user_path
from xdpo.scores.image_statistics import NAMES, SPREAD
from xdpo.tables import read_text

BASE = "base"
"""The model before training; methods are measured against it, and questions may name it."""
TUNING = "tuning"
"""The part of a plan that tunes all tuned methods and trains none of the reported runs."""
COSTS = ("pairs", "seconds")
"""What a training has spent: pairs seen, and the seconds that its method takes for them, with sampling and scoring."""

Names = Annotated[tuple[str, ...], Field(min_length=1)]


class Parts(NamedTuple):
    """A choice from a plan: methods that are tuned, and methods that are trained and measured. In the plan's order."""

    tuned: list[str]
    methods: list[str]


class Method(Section):
    """A config to train, and how it is tuned and measured."""

    config: Path  # relative to the plan's file
    group: str  # heading in the results
    also_in: tuple[str, ...] = ()  # other groups whose table shows it too
    tuned_as: str | None = None  # uses that method's tuned value; None: is tuned
    times: Annotated[float, Field(gt=0)] = 1.0  # a factor of the tuned value
    curves: bool = False  # measured at every checkpoint up to its last step, not only after the plan's steps
    steps: int | None = None  # its last step; None: the plan's last checkpoint with curves, else the plan's steps
    num_seeds: Annotated[int, Field(gt=0)] | None = None  # the first so many of the plan's seeds; None: all
    set: tuple[str, ...] = ()  # overrides; {name} is the folder of a preparation


class Tuning(Section):
    """The budget of every tuned method: one run for each value, scored on prompts that nothing else uses."""

    key: str
    values: Names
    seed: int
    prompts: Names


class Question(Section):
    """A comparison of two methods, answered by the interval of their difference.

    A quantity is a scorer, a statistic of images, "eval/…" for a metric on held-out pairs, or one of COSTS.
    """

    ask: str
    kind: Literal["better", "differs", "holds"] = "better"
    method: str
    than: str
    quantity: str | None = None  # what is compared; None: the plan's score
    step: int | None = None  # when; None: after the plan's steps
    than_step: int | None = None  # when the other one is measured; None: at the same step
    guidance: float | None = None  # None: the plan's first
    at_equal: str | None = None  # when this quantity, which rises in training, first reaches what both reach


class Plan(Section):
    """Everything that `scripts/reproduce.py` does at one scale.

    It names files from the repository's folder, but configs from its own.
    """

    title: str
    steps: Annotated[int, Field(gt=0)]  # after which the tables compare all methods
    checkpoints: Annotated[tuple[int, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    prompts: Names  # generate.py's --prompts
    guidances: Annotated[tuple[float, ...], Field(min_length=1)]  # the first decides; the others are for the tables
    generate: tuple[str, ...] = ()  # its further arguments
    scorers: Names
    score: str  # decides the tuning, the curves and the questions
    alignment: str
    baseline: str
    prepare: Annotated[dict[str, tuple[str, ...]], Field(default_factory=dict)]  # {name} in `set` → what fills it
    tuning: Tuning
    common: tuple[str, ...] = ()  # overrides of all configs
    methods: dict[str, Method]
    questions: tuple[Question, ...] = ()

    @field_validator("generate", mode="before")
    @classmethod
    def _as_words(cls, words: object) -> object:
        return [str(word) for word in words] if isinstance(words, list | tuple) else words

    @field_validator("prepare", mode="before")
    @classmethod
    def _as_commands(cls, commands: object) -> object:
        return (
            {name: cls._as_words(words) for name, words in commands.items()} if isinstance(commands, dict) else commands
        )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        named = [self.baseline, *(m.tuned_as for m in self.methods.values() if m.tuned_as)]
        if unknown := [name for name in named if name not in self.methods]:
            raise ValueError(f"{unknown[0]!r} is no method of the plan")
        if reserved := {BASE, TUNING} & {*self.methods, *self.groups}:
            raise ValueError(f"{min(reserved)!r} has a meaning of its own; call the method or group otherwise")
        if chained := [n for n, m in self.methods.items() if m.tuned_as and self.methods[m.tuned_as].tuned_as]:
            raise ValueError(f"{chained[0]} is tuned as a method that is not tuned itself")
        if factors := [n for n, m in self.methods.items() if m.times != 1 and not m.tuned_as]:
            raise ValueError(f"{factors[0]} is tuned itself, so that times has nothing to multiply; give it tuned_as")
        if self.steps not in self.checkpoints or list(self.checkpoints) != sorted(set(self.checkpoints)):
            raise ValueError(f"checkpoints must rise and have steps = {self.steps}, got {list(self.checkpoints)}")
        for name, method in self.methods.items():
            if method.steps and not (method.curves and method.steps in self.checkpoints and method.steps >= self.steps):
                raise ValueError(f"{name}: steps must be a checkpoint from {self.steps} on, of a method with curves")
            if (method.num_seeds or 1) > len(self.seeds):
                raise ValueError(f"{name}: num_seeds is {method.num_seeds}, and the plan has {len(self.seeds)} seeds")
        if absent := sorted({self.score, self.alignment} - set(self.scorers)):
            raise ValueError(f"{absent[0]} is asked for and not among the scorers")
        if self.tuning.seed in self.seeds:
            raise ValueError(f"the tuning's seed {self.tuning.seed} is one of those reported")
        if shared := sorted(set(self.prompts) & set(self.tuning.prompts)):
            raise ValueError(f"{shared[0]} is for tuning and for the results; they need prompts of their own")
        for question in self.questions:
            if problem := self._problem_of(question):
                raise ValueError(f"{question.ask!r}: {problem}")
        return self

    def _problem_of(self, question: Question) -> str | None:
        asked = (question.method, question.than)
        steps = (question.step, question.than_step or question.step)
        if unknown := [name for name in asked if name not in (BASE, *self.methods)]:
            return f"a question is about {unknown[0]!r}, which is no method of the plan"
        for quantity in filter(None, (question.quantity, question.at_equal)):
            known = {*self.scorers, *NAMES, *COSTS}
            if quantity not in known and not quantity.startswith("eval/"):
                return f"{quantity} is asked for and not among the scorers"
            if quantity == SPREAD and not self.has_several_images:
                return f"{SPREAD} is between images of one prompt; add --images-per-prompt 2 to generate"
        if question.kind != "differs" and question.quantity and question.quantity not in self.scorers:
            return f"only of a scorer is it known that more is better; ask whether {question.quantity} differs"
        if question.at_equal and (BASE in asked or any(steps) or not all(self.methods[n].curves for n in asked)):
            return "at_equal compares two methods with curves, at no step that is given"
        for name, step in zip(asked, steps, strict=True):
            if step and name != BASE and step not in self.measured_steps(name):
                return f"{name} is not measured at step {step}"
        if question.guidance is not None and (question.guidance not in self.guidances or any(steps)):
            return f"guidance {question.guidance:g} is none of the plan's, or not measured at that step"
        return None

    @property
    def guidance(self) -> float:
        """The guidance that decides."""
        return self.guidances[0]

    @property
    def has_several_images(self) -> bool:
        """Whether each prompt has more than one image."""
        words = " ".join(self.generate).replace("=", " ").split()
        return any(pair[0] == "--images-per-prompt" and pair[1] != "1" for pair in itertools.pairwise(words))

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(method.group for method in self.methods.values()))

    @property
    def tuned(self) -> list[str]:
        """The methods that are tuned."""
        return [name for name, method in self.methods.items() if method.tuned_as is None]

    @property
    def timed(self) -> list[str]:
        """The methods that a question compares at equal seconds."""
        asked = {name for q in self.questions if q.at_equal == "seconds" for name in (q.method, q.than)}
        return [name for name in self.methods if name in asked]

    def parts(self, only: Sequence[str] = ()) -> Parts:
        """The parts of these groups and methods, with the baseline and what they are tuned as; all if none is named.

        TUNING stands for the tuning of all methods. Raises ValueError for an unknown name.
        """
        choices = [TUNING, *self.groups, *self.methods]
        if unknown := [name for name in only if name not in choices]:
            raise ValueError(f"--only {unknown[0]}: no group or method of the plan; choose from {', '.join(choices)}")
        methods = [
            name
            for name, method in self.methods.items()
            if not only or {name, method.group, *method.also_in} & set(only)
        ]
        if methods and self.baseline not in methods:
            methods = [name for name in self.methods if name in (*methods, self.baseline)]
        needed = {self.methods[name].tuned_as or name for name in methods}
        return Parts([name for name in self.tuned if TUNING in only or name in needed], methods)

    def value_of(self, method: str, chosen: Mapping[str, str]) -> str | None:
        """A method's value of the tuned key, from those chosen for the tuned methods; None without one."""
        of_method = self.methods[method]
        value = chosen.get(of_method.tuned_as or method)
        return value if value is None or of_method.times == 1 else f"{float(value) * of_method.times:g}"

    def seeds_of(self, method: str) -> tuple[int, ...]:
        return self.seeds[: self.methods[method].num_seeds]

    def last_step(self, method: str) -> int:
        """The optimizer steps that a method is trained for."""
        of_method = self.methods[method]
        return of_method.steps or (self.checkpoints[-1] if of_method.curves else self.steps)

    def measured_steps(self, method: str) -> tuple[int, ...]:
        """The optimizer steps after which a method's images are made."""
        if not self.methods[method].curves:
            return (self.steps,)
        return tuple(step for step in self.checkpoints if step <= self.last_step(method))

    def measurements(self, method: str) -> list[tuple[int, float]]:
        """The (step, guidance) of a method's images: every measured step at the first guidance, the plan's at all."""
        steps = self.measured_steps(method)
        return [(step, g) for step in steps for g in (self.guidances if step == self.steps else (self.guidance,))]


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
