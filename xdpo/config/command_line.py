"""The command line of a training: options, overrides, and a help that lists every key."""

import argparse
from collections.abc import Sequence
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from xdpo.config.files import shown
from xdpo.config.sections import KEYS, SECTIONS


def config_parser(description: str) -> argparse.ArgumentParser:
    """`--config FILE [section.key=value …]`, for every program that works on the config of a training.

    Call its `parse_intermixed_args`, so that overrides may stand before, between and after the options.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, such as configs/xdpo_sd15.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override a key; train_xdpo.py --help lists them"
    )
    return parser


def build_parser(description: str) -> argparse.ArgumentParser:
    """A `config_parser` with the switches of a training, and a help that lists every key."""
    parser = config_parser(description)
    parser.epilog = _help_of_keys()
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and what follows from it, then stop"
    )
    parser.add_argument(
        "--find-batch",
        action="store_true",
        help="try micro-batches on this device, print speed, memory and accumulation of each, then stop",
    )
    parser.add_argument(
        "--allow-config-change",
        action="store_true",
        help="resume a run although its config has changed in keys that matter",
    )
    return parser


def _help_of_keys() -> str:
    """All keys with type, range, default and meaning, by section."""
    lines = ["keys (type; default): meaning"]
    section = ""
    for dotted, field in KEYS.items():
        key_section = dotted.rpartition(".")[0]
        if key_section != section:
            section = key_section
            lines += ["", f"{section}: {(SECTIONS[section].__doc__ or '').strip()}"]
        default = "required" if field.is_required() else in_yaml(field.default)
        lines.append(f"  {dotted} ({_type_text(field.annotation, field.metadata)}; {default})")
        lines.append(f"      {field.description}")
    return "\n".join(lines)


def in_yaml(value: Any) -> str:
    """A value on one line, as it could stand in a config file."""
    if isinstance(value, tuple):
        elements = (f'"{each}"' if isinstance(each, str) else in_yaml(each) for each in value)
        return f"[{', '.join(elements)}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else shown(value)


_TYPE_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", NoneType: "null"}
_BOUNDS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"), ("multiple_of", "multiple of"))


def _type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, with the bounds that stand in its metadata: `number > 0`, `text or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    bounds = [
        f"{sign} {getattr(constraint, name)}"
        for constraint in [inner for each in metadata for inner in (each, *getattr(each, "metadata", ()))]
        for name, sign in _BOUNDS
        if getattr(constraint, name, None) is not None
    ]
    if origin is Annotated:
        return _type_text(arguments[0], [*annotation.__metadata__, *metadata])
    if origin is Literal:
        text = " | ".join(map(str, arguments))
    elif origin is tuple:
        text = f"list of {_type_text(arguments[0])}"
    elif arguments:
        text = " or ".join(map(_type_text, arguments))
    else:
        text = _TYPE_NAMES[annotation]
    return " ".join([text, ", ".join(bounds)]) if bounds else text
