"""YAML files with one parent each and overrides → a Config, every mistake reported at once; and back."""

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from xdpo.config.sections import KEYS, SECTIONS, Config
from xdpo.paths import expanded, user_path


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file and has one line per problem."""


# ---- Reading files ---------------------------------------------------------------------------------------

_PLAIN_SCALARS = (  # YAML 1.2's core schema, so that 1e-8 is a number and `no` is text
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's plain scalars; it collects the keys that are given twice."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's registry, filled below

    def __init__(self, text: str):
        super().__init__(text)
        self.repeated_keys: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first_lines: dict[str, int] = {}
        for key_node, _ in getattr(node, "value", ()):
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key, str):
                continue
            if key in first_lines:
                problem = f"line {line}: key '{key}' is given twice (first on line {first_lines[key]})"
                self.repeated_keys.append(problem)
            first_lines.setdefault(key, line)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


for _tag, _pattern, _first_characters in _PLAIN_SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first_characters)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


class _Setting(NamedTuple):
    value: Any
    where: str  # the file that it was read from, or the command line


class _File(NamedTuple):
    label: str  # its path, as messages show it
    settings: dict
    repeated_keys: list[str]


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """One YAML document and the keys that it repeats. Raises ValueError with line and column of a syntax error."""
    try:
        loader = _Loader(text)
        return loader.get_single_data(), loader.repeated_keys
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"not valid YAML: {where}{error.problem or error.context}") from None
    except RecursionError:
        raise ValueError("not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML forbids, or digits beyond Python's limit
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except (LookupError, AttributeError, TypeError):  # PyYAML's own words for `!!bool maybe` and the like
        raise ValueError("not valid YAML: a value does not fit its `!!` tag") from None


def _files_beside(path: Path) -> str:
    """The end of a "no such file" message: the configs with a similar name, else those of the folder."""
    if not path.parent.is_dir():
        return f"its folder {path.parent} does not exist either"
    names = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml"))
    if not names:
        return f"there is no YAML file in {path.parent}"
    shown = difflib.get_close_matches(path.name, names, n=3) or names[:8]
    return "there are " + ", ".join(str(path.parent / name) for name in shown)


def _read_file(path: Path, asked_by: str | None) -> _File:
    """The mapping of one file; `asked_by` is the file whose `inherits:` led here."""
    label = str(path)
    suffix = f" (inherited by {asked_by})" if asked_by else ""
    if path.is_dir():
        raise ConfigError(f"{label}: is a folder, not a config file{suffix}")
    if not path.exists():
        raise ConfigError(f"{label}: no such config file{suffix}; {_files_beside(path)}")
    try:
        settings, repeated_keys = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ConfigError(f"{label}: is not UTF-8 text{suffix}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{label}: {error}{suffix}") from None
    if settings is None:
        raise ConfigError(f"{label}: the file is empty; a config has at least one `section:` or `inherits:`{suffix}")
    if not isinstance(settings, dict):
        raise ConfigError(f"{label}: must be a mapping of sections (got {shown(settings)}){suffix}")
    return _File(label, settings, repeated_keys)


def _lineage(path: Path) -> list[_File]:
    """The file and its ancestors, the oldest first."""
    files: list[_File] = []
    visited: list[Path] = []
    asked_by = None
    while True:
        if path.resolve() in visited:
            circle = " → ".join([*(file.label for file in files), str(path)])
            raise ConfigError(f"{files[0].label}: `inherits:` goes in a circle: {circle}")
        file = _read_file(path, asked_by)
        files.append(file)
        visited.append(path.resolve())
        parent = file.settings.pop("inherits", None)
        if parent is None:
            return files[::-1]
        if not isinstance(parent, str) or not parent:
            raise ConfigError(f"{file.label}: inherits: must be one path, relative to this file (got {shown(parent)})")
        path, asked_by = Path(os.path.normpath(path.parent / expanded(parent))), file.label


def _settings_of(file: _File) -> tuple[dict[str, _Setting], list[str]]:
    """The settings of a file by dotted key, and its problems that need no types to be seen."""
    settings, problems = {}, list(file.repeated_keys)
    for name, content in file.settings.items():
        if name not in SECTIONS:
            dotted = {str(name): content}
            if isinstance(content, dict) and content:  # a misspelt section: its keys show which one was meant
                dotted = {f"{name}.{key}": value for key, value in content.items()}
        elif content is None:  # all its keys are commented out
            dotted = {}
        elif isinstance(content, dict):
            dotted = {f"{name}.{key}": value for key, value in content.items()}
        else:
            problems.append(f"{name}: must be a section of `key: value` lines (got {shown(content)})")
            continue
        for key, value in dotted.items():
            if key in KEYS:
                settings[key] = _Setting(value, file.label)
            else:
                problems.append(_unknown_key(key, value))
    return settings, problems


_COMMAND_LINE = "the command line"


def _settings_of_overrides(overrides: Sequence[str]) -> tuple[dict[str, _Setting], list[str]]:
    """The same for `section.key=value` words; the value is read as YAML, so `=` alone sets null."""
    settings, problems = {}, []
    for word in overrides:
        key, equals, text = word.partition("=")
        if not key or not equals:
            problems.append(f"{word}: an override is written section.key=value, as in loss.beta=2000")
            continue
        try:
            value, repeated_keys = parse_yaml(text)
        except ValueError as error:
            problems.append(f"""{key}: {error} (got '{text}'); if it is text, quote it twice: {key}='"…"'""")
            continue
        problems += [f"{key}: {problem}" for problem in repeated_keys]
        if key in KEYS:
            settings[key] = _Setting(value, _COMMAND_LINE)
        else:
            problems.append(_unknown_key(key, value))
    return settings, problems


# ---- Saying what is wrong --------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as an error message shows it: null, true and false as in YAML, long ones cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _unknown_key(dotted: str, value: Any) -> str:
    """The problem line of a key that does not exist, with the nearest one that does."""
    if dotted in SECTIONS:
        example = next(key for key in KEYS if key.startswith(f"{dotted}."))
        return f"{dotted}: is a section (got {shown(value)}); set one of its keys, as in {example}=…"
    section, _, name = dotted.rpartition(".")

    def name_first(key: str) -> float:
        key_section, _, key_name = key.rpartition(".")
        return _likeness(name, key_name) + _likeness(section, key_section) / 3

    nearest = max(KEYS, key=name_first)
    if _likeness(name, nearest.rpartition(".")[2]) >= 0.6:
        hint = f"did you mean {nearest}?"
    elif section in SECTIONS:
        hint = f"{section} has {', '.join(SECTIONS[section].model_fields)}"
    elif near_sections := difflib.get_close_matches(section or name, list(SECTIONS), n=1):
        hint = f"did you mean the section {near_sections[0]}?"
    else:
        hint = f"the sections are {', '.join(SECTIONS)}"
    return f"{dotted}: unknown key (got {shown(value)}); {hint}"


_PROBLEMS = {  # pydantic's error types, in our words; the fields in braces are pydantic's
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "literal_error": "must be {expected}",
    "too_long": "must have {max_length} values",
    "value_error": "{error}",
}


def _invalid_value(error: Mapping[str, Any], settings: Mapping[str, _Setting]) -> tuple[str, str | None]:
    """One of pydantic's errors as (problem line, where the value was set)."""
    names = [part for part in error["loc"] if isinstance(part, str)]
    key = ".".join(names)
    element = key + "".join(f"[{part}]" for part in error["loc"] if isinstance(part, int))
    where = settings[key].where if key in settings else None
    if error["type"] == "missing":
        if key in settings:  # an element of a list
            return f"{element}: is missing (got {shown(settings[key].value)})", where
        return f"{key}: is missing; {KEYS[key].description}", None
    template = _PROBLEMS.get(error["type"])
    problem = template.format(**error.get("ctx", {})) if template else error["msg"]
    if key in SECTIONS:  # a rule over several keys, whose message has the values
        return f"{key}: {problem}", None
    return f"{element}: {problem} (got {shown(error['input'])})", where


# ---- Loading and saving ----------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a file, its parents (`inherits:`, relative to the file) and `section.key=value` overrides.

    A child's key replaces its parent's, an override both; lists are replaced whole.

    Raises:
        ConfigError: with every problem of all of them at once, one line each: unknown and repeated keys, wrong
            types, values out of range, keys that contradict each other. Alone, when a file cannot be read or
            parsed, or `inherits:` goes in a circle.
    """
    files = _lineage(user_path(path))
    layers = [(file.label, *_settings_of(file)) for file in files]
    layers.append((_COMMAND_LINE, *_settings_of_overrides(overrides)))
    settings: dict[str, _Setting] = {}
    problems: list[tuple[str, str | None]] = []
    for label, layer, layer_problems in layers:
        settings |= layer
        problems += [(problem, label) for problem in layer_problems]
    try:
        config = Config.model_validate(_nested({key: setting.value for key, setting in settings.items()}))
    except ValidationError as error:
        problems += [_invalid_value(each, settings) for each in error.errors()]
    if not problems:
        return config
    asked = files[-1].label
    lines = [
        problem if where in (None, asked) else f"{problem} [{'on' if where == _COMMAND_LINE else 'in'} {where}]"
        for problem, where in problems
    ]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    raise ConfigError("\n  ".join([f"{asked}: {count}", *lines]))


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for dotted, value in settings.items():
        section, _, key = dotted.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = value
    return nested


def dump_config(config: Config) -> str:
    """The whole config as YAML that `load_config` reads back to an equal one, floats to the last bit."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def values_of(config: Config) -> dict[str, Any]:
    """Every value by dotted key."""
    return {key: _value(config, key) for key in KEYS}


def _value(config: Config, dotted: str) -> Any:
    section, _, key = dotted.rpartition(".")
    return getattr(getattr(config, section) if section else config, key)


def flatten(config: Config) -> dict[str, bool | int | float | str]:
    """Every value by dotted key, as trackers take them: lists, mappings and null become JSON text."""
    return {
        key: json.dumps(value, ensure_ascii=False) if value is None or isinstance(value, tuple | dict) else value
        for key, value in values_of(config).items()
    }
