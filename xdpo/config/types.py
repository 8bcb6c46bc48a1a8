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
Paths = Annotated[str | tuple[str, ...], BeforeValidator(_paths)]


class Section(BaseModel):
    """The base of all sections: frozen, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
