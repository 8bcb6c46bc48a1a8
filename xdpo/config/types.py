"""The types of config values (numbers that may be fractions, paths, shares), and the base class of all sections."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StrictStr

from xdpo.paths import expanded

_FRACTION = re.compile(r"\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*/\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*")


def _number(value: Any) -> float:
    """An int, a float, or a fraction written as text ("1/6"), as a float."""
    if isinstance(value, str) and (fraction := _FRACTION.fullmatch(value)):
        numerator, denominator = (float(part) for part in fraction.groups())
        if denominator == 0:
            raise ValueError("must be a number, and a fraction cannot divide by zero")
        return numerator / denominator
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("must be a finite number") from None


def _paths(value: Any) -> str | tuple[str, ...]:
    """One path, or several as a tuple; `~` expanded."""
    if isinstance(value, str) and value:
        return expanded(value)
    if isinstance(value, list | tuple) and value and all(isinstance(path, str) and path for path in value):
        return tuple(expanded(path) for path in value)
    raise ValueError("must be a path or a list of paths, none of them empty")


def _columns(value: Any) -> Any:
    """What a column stands for → its name in the files; the names must be known ones, and make one layout."""
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(name, str) and name for name in value.values()):
        raise ValueError("must be a mapping such as {caption: prompt}, from what a column stands for to its name")
    if unknown := [name for name in value if name not in COLUMNS]:
        raise ValueError(f"has {unknown[0]}, and a column may stand for {', '.join(COLUMNS)}")
    for one, other in (("chosen", "rejected"), ("votes_0", "votes_1")):
        if (one in value) != (other in value):
            there, missing = (one, other) if one in value else (other, one)
            raise ValueError(f"has {there}, and not {missing}; name both")
    layouts = (("chosen", "rejected"), ("jpg_0", "jpg_1"), ("image",))  # ways of saying which images there are
    if len(named := [found[0] for names in layouts if (found := [name for name in names if name in value])]) > 1:
        raise ValueError(f"has {' and '.join(named)}, which are different layouts; leave one out")
    if "image" in value and ("rank" in value) == ("votes" in value):
        raise ValueError("has image, which needs rank (the lowest is the best) or votes (the highest is)")
    if idle := [name for name in ("rank", "votes", "group") if name in value and "image" not in value]:
        raise ValueError(f"has {idle[0]}, which goes with image; votes for two images are votes_0, votes_1")
    return value


def _bounds(value: Any) -> Any:
    """The names of columns → lowest and highest value, None: no bound."""
    if value is None:
        return None
    problem = "must be a mapping such as {nsfw: [null, 0.5]}, from a column's name to its lowest and highest value"
    if not isinstance(value, dict) or not all(isinstance(name, str) and name for name in value):
        raise ValueError(problem)
    if not all(isinstance(each, list | tuple) and len(each) == 2 for each in value.values()):
        raise ValueError(problem)
    bounds = {name: tuple(None if each is None else _number(each) for each in pair) for name, pair in value.items()}
    for name, given in bounds.items():
        ordered = [each for each in given if each is not None]
        if not ordered or ordered != sorted(ordered):
            raise ValueError(f"has bounds of {name} that nothing or everything keeps to; give the lowest, the highest")
    return bounds


COLUMNS = (
    *("caption", "jpg_0", "jpg_1", "label_0", "label_1", "chosen", "rejected", "votes_0", "votes_1"),
    *("image", "rank", "votes", "group"),
    *("has_label", "are_different", "ranking_id", "image_0_uid", "image_1_uid", "score_0", "score_1"),
)
"""What a column may stand for: see data.columns."""

Number = Annotated[float, BeforeValidator(_number)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NonNegativeNumber = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Decay = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[StrictInt, Field(gt=0)]
CountOrZero = Annotated[StrictInt, Field(ge=0)]
Seed = Annotated[StrictInt, Field(ge=0, le=2**32 - 1)]
Text = Annotated[StrictStr, Field(min_length=1)]
FilePath = Annotated[Text, AfterValidator(expanded)]
Columns = Annotated[dict[str, str], BeforeValidator(_columns)]
Bounds = Annotated[dict[str, tuple[float | None, float | None]], BeforeValidator(_bounds)]
Paths = Annotated[str | tuple[str, ...], BeforeValidator(_paths)]


class Section(BaseModel):
    """The base of all sections: frozen, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
