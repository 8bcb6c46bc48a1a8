"""Every key with its type, default and meaning: for the help of the command line, and as configs/base.yaml."""

import re
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from xdpo.config.files import shown
from xdpo.config.sections import KEYS, SECTIONS

_WIDTH = 120
_COMMENT_COLUMN = 31
_HEAD = """\
# Every key with its default. The other files say only what they change:
#
#     inherits: base.yaml        # one parent, relative to the file that names it
#     loss:
#       beta: 2000
#
# and the command line has the last word: train_xdpo.py --config FILE loss.beta=2000 optim.max_grad_norm=null
# Unknown keys are errors. Numbers may be written 1e-8 or 1/6. Paths are relative to the folder one starts from.
# Written by scripts/write_base_config.py from xdpo/config/sections.py and xdpo/loss/registry.py: change it there.
"""
_REQUIRED = {"output_dir": "runs/xdpo"}  # keys without a default, as configs/base.yaml has them


def help_of_keys() -> str:
    """All keys with type, range, default and meaning, by section."""
    lines = ["keys (type; default): meaning"]
    section = ""
    for dotted, field in KEYS.items():
        key_section = dotted.rpartition(".")[0]
        if key_section != section:
            section = key_section
            lines += ["", f"{section}: {_meaning(section)}"]
        default = "required" if field.is_required() else in_yaml(field.default)
        lines.append(f"  {dotted} ({type_text(field.annotation, field.metadata)}; {default})")
        lines.append(f"      {field.description}")
    return "\n".join(lines)


def base_yaml() -> str:
    """The text of configs/base.yaml."""
    lines, section = [_HEAD], ""
    for dotted, field in KEYS.items():
        key_section, _, name = dotted.rpartition(".")
        if key_section != section:
            section = key_section
            lines += ["", *_commented(f"{section}:", _meaning(section))]
        lines += _entry("  " if section else "", name, _REQUIRED.get(dotted, field.default), field)
    return "\n".join(lines) + "\n"


def _meaning(section: str) -> str:
    return (SECTIONS[section].__doc__ or "").strip().removesuffix(".")


def _entry(indent: str, name: str, value: Any, field: FieldInfo) -> list[str]:
    """The lines of one key: its value, its choices where the description does not name them all, the description.

    A list of sentences has one a line.
    """
    choices, comment = _choices(field.annotation), field.description or ""
    if not all(re.search(rf"\b{choice}\b", comment) for choice in choices):
        comment = f"{' | '.join(choices)}; {comment}"
    if isinstance(value, tuple) and any(isinstance(each, str) and " " in each for each in value):
        return _commented(f"{indent}{name}:", comment) + [f"{indent}  - {each}" for each in value]
    return _commented(f"{indent}{name}: {in_yaml(value)}", comment)


def _choices(annotation: Any) -> Sequence[str]:
    """What a text may be, of a type `Literal[…]` or `Literal[…] | None`; nothing for any other type."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((get_args(each) for each in get_args(annotation) if get_origin(each) is Literal), ())


def _commented(line: str, comment: str) -> list[str]:
    """A line followed by a comment, which is wrapped and continues below in one column."""
    begin = line.ljust(max(len(line) + 3, _COMMENT_COLUMN))
    below = " " * _COMMENT_COLUMN + "# "
    return textwrap.wrap(f"{begin}# {comment}", _WIDTH, subsequent_indent=below, break_on_hyphens=False)


def in_yaml(value: Any) -> str:
    """A value on one line, as in a config file: floats to the last bit, but as people write them (1e-8, 1/6)."""
    if isinstance(value, tuple):
        each_text = (f'"{each}"' if " " in str(each) else in_yaml(each) for each in value)
        return f"[{', '.join(each_text)}]"
    if isinstance(value, float):
        return _number_text(value)
    return value if isinstance(value, str) else shown(value)


def _number_text(value: float) -> str:
    short = re.sub(r"e([+-])0", r"e\1", f"{value:g}")
    if float(short) == value:
        return short
    fraction = Fraction(value).limit_denominator(100)
    return str(fraction) if float(fraction) == value else repr(value)


_TYPE_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", NoneType: "null"}
_BOUNDS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"), ("multiple_of", "multiple of"))


def type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, with the bounds from its metadata: `number > 0`, `text or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    bounds = [
        f"{sign} {getattr(constraint, name)}"
        for constraint in [inner for each in metadata for inner in (each, *getattr(each, "metadata", ()))]
        for name, sign in _BOUNDS
        if getattr(constraint, name, None) is not None
    ]
    if origin is Annotated:
        return type_text(arguments[0], [*annotation.__metadata__, *metadata])
    if origin is Literal:
        text = " | ".join(map(str, arguments))
    elif origin is dict:
        text = f"mapping of {type_text(arguments[0])} to {type_text(arguments[1])}"
    elif origin is tuple:
        text = f"list of {type_text(arguments[0])}"
    elif arguments:
        text = " or ".join(map(type_text, arguments))
    else:
        text = _TYPE_NAMES[annotation]
    return " ".join([text, ", ".join(bounds)]) if bounds else text
