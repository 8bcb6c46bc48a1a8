"""The `loss` section, made from the objectives' declarations (xdpo.loss.registry): its keys, and where each acts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model, model_validator

from xdpo.config.types import Number, Section
from xdpo.loss import KEYS, OBJECTIVES, Key, Objective


def _names() -> str:
    """The objectives in the groups that a user chooses among."""
    groups: dict[str, list[str]] = {}
    for name, objective in OBJECTIVES.items():
        groups.setdefault(_group(objective), []).append(name)
    return "; ".join(f"{group}: {', '.join(names)}" for group, names in groups.items())


def _group(objective: Objective) -> str:
    if objective.is_unpaired:
        return "on single images"
    if objective.samples_rejected:
        return "self-play"
    return "on pairs" if objective.needs_reference else "without a reference"


class _LossSection(Section):
    """The preference objective and the numbers of its formula; docs/objectives.md has formulas and sources."""

    if TYPE_CHECKING:  # the fields that code asks for by name; LossConfig below makes these and all others
        name: str = ""
        beta: float | None = None
        safeguard: float | None = None
        margin_weight: float | None = None
        error_weight: str = ""
        kl_weight: float = 0.0

    @model_validator(mode="before")
    @classmethod
    def _published_beta(cls, values: Any) -> Any:
        """Replace a null β by the published value. Other keys stay null, also in a saved config (see `values`)."""
        if isinstance(values, Mapping) and values.get("beta") is None:
            name = values.get("name", cls.model_fields["name"].default)
            if name in list(OBJECTIVES):
                return {**values, "beta": OBJECTIVES[name].published.get("beta")}
        return values

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.name]

    @property
    def values(self) -> dict[str, Any]:
        """The keys that act in the objective, null replaced by the published value; None for a modifier that is off."""
        given = {key: getattr(self, key) for key in self.objective.keys}
        return self.objective.keys | {key: value for key, value in given.items() if value is not None}

    @property
    def hyperparameters(self) -> dict[str, float | str]:
        """The `values` that the objective's function takes as arguments."""
        return {key: value for key, value in self.values.items() if KEYS[key].is_argument and value is not None}

    @property
    def needs_reference(self) -> bool:
        return self.objective.needs_reference

    @property
    def samples_rejected(self) -> bool:
        return self.objective.samples_rejected

    @model_validator(mode="after")
    def _hyperparameters_go_together(self):
        if problem := self.objective.problem(**self.hyperparameters):
            raise ValueError(f"{problem} (loss.name: {self.name})")
        return self

    @model_validator(mode="after")
    def _keys_belong_to_the_objective(self):
        for key, field in type(self).model_fields.items():
            if key != "name" and key not in self.objective.keys and getattr(self, key) != field.default:
                raise ValueError(
                    f"{key} (got {getattr(self, key)}) does not act in {self.name}; it belongs to "
                    f"{', '.join(_owners(key))}. Remove it, or choose one of these as loss.name"
                )
        return self


def _owners(key: str) -> list[str]:
    return [name for name, objective in OBJECTIVES.items() if key in objective.keys]


def _field(name: str, key: Key) -> tuple[Any, Any]:
    """Type and field of one key, as create_model takes them: null is allowed where there is no common default."""
    number = Annotated[Number, Field(gt=key.gt, ge=key.ge, lt=key.lt, le=key.le)]
    kind: Any = Literal[key.choices] if key.choices else number
    return (kind | None if key.default is None else kind), Field(key.default, description=_description(name, key))


def _description(name: str, key: Key) -> str:
    """Where a key acts, what it is, and its published values: `chipo, f_dpo: κ, unit of the ratio; null: 1`."""
    owners = _owners(name)
    published = {owner: OBJECTIVES[owner].published[name] for owner in owners if name in OBJECTIVES[owner].published}
    shown = {owner: value if isinstance(value, str) else f"{value:g}" for owner, value in published.items()}
    if len(set(shown.values())) > 1:  # the list of values shows where it acts
        return f"{key.description}; null: {', '.join(f'{owner} {value}' for owner, value in shown.items())}"
    others = [each for each in OBJECTIVES if each not in owners]
    where = f"all but {', '.join(others)}" if len(others) < len(owners) else ", ".join(owners)
    return f"{where}: {key.description}" + (f"; null: {next(iter(shown.values()))}" if shown else "")


_FIELDS: dict[str, Any] = {
    "name": (Literal[tuple(OBJECTIVES)], Field(next(iter(OBJECTIVES)), description=_names())),
    **{name: _field(name, key) for name, key in KEYS.items()},
}

if TYPE_CHECKING:
    LossConfig = _LossSection
else:
    LossConfig = create_model(
        "LossConfig", __base__=_LossSection, __module__=__name__, __doc__=_LossSection.__doc__, **_FIELDS
    )
