"""The settings of a run: typed sections, YAML files with one parent each, overrides, and what follows from them.

`load_config` reads a file, follows `inherits:`, applies `section.key=value` overrides and reports every mistake
at once. The rest of the package gets sections, tensors and numbers, never a file. `configs/base.yaml` explains
the keys at length; `KEYS` has them all by dotted name.
"""

import argparse
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

PICKAPIC_V2_PAIRS = 851_293
"""Training pairs of Pick-a-Pic v2 without ties, as the Diffusion-DPO paper counts them."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file and has one line per problem."""


# ---- Values ----------------------------------------------------------------------------------------------

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
    """One path, or several as a tuple."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(path, str) and path for path in value):
        return tuple(value)
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
Paths = Annotated[str | tuple[str, ...], BeforeValidator(_paths)]


# ---- Sections --------------------------------------------------------------------------------------------


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which pipeline is trained, and which of its weights."""

    pipeline: Text = Field(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        description="hub id or folder of a pipeline in Stable Diffusion format",
    )
    revision: Text | None = Field(None, description="hub revision of the pipeline (branch, tag or commit)")
    trainable: Literal["full", "lora"] = Field(
        "full", description="train the whole UNet, or low-rank adapters on its attention"
    )
    lora_rank: Count = Field(64, description="rank of the adapters; used when trainable is lora")
    lora_alpha: PositiveNumber = Field(64.0, description="adapters are scaled by lora_alpha / lora_rank")
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None, description="decay per optimizer step of a moving average of the weights; null: none"
    )


class ComputeConfig(Section):
    """How the arithmetic is done; no key here changes the method."""

    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="autocast type; auto: bf16 where the GPU has it, else fp16, and fp32 on a CPU"
    )
    tf32: StrictBool = Field(True, description="TensorFloat-32 for what stays in float32 on NVIDIA GPUs")
    compile: StrictBool = Field(False, description="torch.compile of the whole UNet; minutes at the start")
    channels_last: StrictBool = Field(False, description="channels-last memory format for the UNet")
    gradient_checkpointing: StrictBool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="attention kernels of the UNet")


class DataConfig(Section):
    """Which preference pairs are read and how their images are prepared."""

    source: Literal["hub", "parquet", "webdataset", "folder"] = Field("hub", description="what path points to")
    path: Paths = Field(
        "liuhuohuo2/pick-a-pic-v2", description="hub id, or files, globs or a folder; a list for several"
    )
    revision: Text | None = Field(None, description="hub revision of the data set (branch, tag or commit)")
    split: Text = Field("train", description="split of a hub data set")
    max_pairs: Count | None = Field(None, description="pairs to use at most; null: all")
    resolution: Annotated[StrictInt, Field(gt=0, multiple_of=8)] = Field(
        512, description="side of the square training images, in pixels"
    )
    crop: Literal["center", "random"] = Field(
        "center", description="square cut out of each image, decided once per pair"
    )
    horizontal_flip: StrictBool = Field(True, description="mirror both images of a pair, every second time")
    sample_latents: StrictBool = Field(True, description="sample the autoencoder's posterior; false: its mean")
    caption_dropout: Share = Field(0.2, description="share of the pairs whose caption is replaced by an empty one")
    num_workers: CountOrZero = Field(
        4, description="data loading processes per training process; 0: load in the training process"
    )
    max_unreadable_share: Share = Field(0.01, description="share of rows that may be unreadable before the run stops")


class NoiseConfig(Section):
    """What is random in the diffusion objective, and the weight of a timestep."""

    shared_by_pair: StrictBool = Field(True, description="chosen and rejected image get the same noise")
    weighting: Literal["constant", "min_snr", "temporal_discount"] = Field(
        "constant", description="weight of a pair by its timestep"
    )
    min_snr_gamma: PositiveNumber = Field(5.0, description="signal-to-noise ratio at which min_snr cuts the weight off")
    discount: Annotated[Number, Field(gt=0, le=1)] = Field(
        0.9, description="factor per fiftieth of the schedule for temporal_discount"
    )


class LossConfig(Section):
    """The preference objective and the numbers of its formula."""

    name: Literal["xdpo", "diffusion_dpo"] = Field(
        "xdpo", description="objective; diffusion_dpo uses beta alone and ignores eta, gamma, n and reward"
    )
    beta: PositiveNumber = Field(1000.0, description="β, strength of the pull to the reference")
    eta: NonNegativeNumber = Field(0.05, description="η, weight of the linear (logarithmic) reward")
    gamma: NonNegativeNumber = Field(1 / 6, description="γ, weight of the exponential (power) reward")
    n: PositiveNumber = Field(6.0, description="n, exponent of the power reward")
    reward: Literal["appendix_c", "eq9", "eq10"] = Field(
        "appendix_c", description="which of the paper's printed rewards"
    )

    @model_validator(mode="after")
    def _has_a_gradient(self):
        if self.name == "xdpo" and self.eta == 0 and self.gamma == 0:
            raise ValueError("eta and gamma are both 0, so that the loss has no gradient; raise one of them")
        return self


class OptimConfig(Section):
    """The optimizer and its learning rate."""

    name: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit keeps its state in 8 bits and needs bitsandbytes"
    )
    learning_rate: PositiveNumber = Field(1e-8, description="learning rate, before scale_lr")
    scale_lr: StrictBool = Field(True, description="multiply the learning rate by the total batch in pairs")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="decay of AdamW's two moments")
    eps: PositiveNumber = Field(1e-8, description="AdamW's ε, added to the root of the second moment")
    weight_decay: NonNegativeNumber = Field(1e-2, description="decoupled weight decay")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up; linear and cosine reach 0 at train.max_steps"
    )
    warmup_steps: CountOrZero = Field(500, description="optimizer steps of linear warm-up from 0")
    max_grad_norm: PositiveNumber | None = Field(
        1.0, description="longer gradients are shortened to this norm; null: never"
    )


class TrainConfig(Section):
    """How long, and in what pieces."""

    max_steps: Count = Field(6000, description="optimizer steps of the whole run")
    total_batch_pairs: Count = Field(256, description="pairs per optimizer step, over all processes")
    micro_batch_pairs: Count = Field(1, description="pairs in one forward pass of one process")

    @model_validator(mode="after")
    def _splits_evenly(self):
        if self.total_batch_pairs % self.micro_batch_pairs:
            raise ValueError(_splitting_message(self, num_processes=1))
        return self


class EvalConfig(Section):
    """Implicit accuracy and margin on held-out pairs, at fixed timesteps and noise."""

    every: CountOrZero = Field(200, description="optimizer steps between evaluations; 0: never")
    path: Paths | None = Field(None, description="held-out pairs, read as data.source; null: data.path")
    split: Text = Field("validation_unique", description="split of a hub data set")
    pairs: Count = Field(256, description="pairs evaluated, the first ones of the split")
    draws: Count = Field(4, description="fixed draws of timestep and noise per pair")


class SamplesConfig(Section):
    """Images for fixed prompts and seeds, policy beside reference."""

    every: CountOrZero = Field(500, description="optimizer steps between sample sheets; 0: never")
    prompts: tuple[Text, ...] = Field(
        (
            "a lighthouse on a cliff in a thunderstorm, oil painting",
            "portrait of an old fisherman, natural light, 85mm photograph",
            "a red bicycle leaning against a yellow wall",
            "a fox reading a newspaper in a cafe, watercolour",
        ),
        description="one image each",
    )
    seed: Seed = Field(0, description="prompt i starts from noise of seed + i")
    num_inference_steps: Count = Field(50, description="sampler steps")
    guidance_scale: NonNegativeNumber = Field(7.5, description="classifier-free guidance; 1: none")


class CheckpointConfig(Section):
    """What a killed run can go on from."""

    every: Count = Field(200, description="optimizer steps between checkpoints")
    keep: Count = Field(2, description="checkpoints kept, newest first")


class LogConfig(Section):
    """Where the numbers go besides metrics.jsonl and the progress bar."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(("tensorboard",), description="[]: none")
    project: Text = Field("xdpo", description="project name in the trackers")


class Config(Section):
    """Everything that defines a run. Immutable; equal configs describe the same run."""

    seed: Seed = Field(0, description="the root of all randomness of the training")
    output_dir: Text = Field(description="run folder: checkpoints, metrics, samples, the resolved config")
    model: ModelConfig = ModelConfig()
    compute: ComputeConfig = ComputeConfig()
    data: DataConfig = DataConfig()
    noise: NoiseConfig = NoiseConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    samples: SamplesConfig = SamplesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


SECTIONS: Mapping[str, type[Section]] = MappingProxyType(
    {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
)


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    for name, field in Config.model_fields.items():
        if name not in SECTIONS:
            yield name, field
            continue
        for key, inner in SECTIONS[name].model_fields.items():
            yield f"{name}.{key}", inner


KEYS: Mapping[str, FieldInfo] = MappingProxyType(dict(_fields()))
"""Every key by its dotted name, in the order of the file."""


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

    def construct_mapping(self, node, deep=False):
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


def _parse(text: str) -> tuple[Any, list[str]]:
    """One YAML document and the keys that it repeats. Raises ValueError with the place of a syntax error."""
    try:
        loader = _Loader(text)
        return loader.get_single_data(), loader.repeated_keys
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"not valid YAML: {place}{error.problem or error.context}") from None
    except RecursionError:
        raise ValueError("not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML forbids, or digits beyond Python's limit
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except (KeyError, AttributeError, TypeError):  # PyYAML's own words for `!!bool maybe` and the like
        raise ValueError("not valid YAML: a value does not fit its `!!` tag") from None


def _files_beside(path: Path) -> str:
    """What to say after "no such file": the configs with a similar name, else those of the folder."""
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
        settings, repeated_keys = _parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ConfigError(f"{label}: is not UTF-8 text{suffix}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{label}: {error}{suffix}") from None
    if settings is None:
        raise ConfigError(f"{label}: the file is empty; a config has at least one `section:` or `inherits:`{suffix}")
    if not isinstance(settings, dict):
        raise ConfigError(f"{label}: must be a mapping of sections (got {_shown(settings)}){suffix}")
    return _File(label, settings, repeated_keys)


def _lineage(path: Path) -> list[_File]:
    """The file and its ancestors, the oldest first."""
    files, visited = [], []
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
            raise ConfigError(f"{file.label}: inherits: must be one path, relative to this file (got {_shown(parent)})")
        path, asked_by = Path(os.path.normpath(path.parent / parent)), file.label


def _settings_of(file: _File) -> tuple[dict[str, _Setting], list[str]]:
    """The settings of a file by dotted key, and its problems that need no types to be seen."""
    settings, problems = {}, list(file.repeated_keys)
    for name, content in file.settings.items():
        if name not in SECTIONS:
            dotted = {str(name): content}
            if isinstance(content, dict) and content:  # a misspelt section: its keys say what was meant
                dotted = {f"{name}.{key}": value for key, value in content.items()}
        elif content is None:  # all its keys are commented out
            dotted = {}
        elif isinstance(content, dict):
            dotted = {f"{name}.{key}": value for key, value in content.items()}
        else:
            problems.append(f"{name}: must be a section of `key: value` lines (got {_shown(content)})")
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
            value, repeated_keys = _parse(text)
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


def _shown(value: Any) -> str:
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
        return f"{dotted}: is a section (got {_shown(value)}); set one of its keys, as in {example}=…"
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
    return f"{dotted}: unknown key (got {_shown(value)}); {hint}"


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
    place = key + "".join(f"[{part}]" for part in error["loc"] if isinstance(part, int))
    where = settings[key].where if key in settings else None
    if error["type"] == "missing":
        if key in settings:  # an element of a list
            return f"{place}: is missing (got {_shown(settings[key].value)})", where
        return f"{key}: is missing; {KEYS[key].description}", None
    template = _PROBLEMS.get(error["type"])
    problem = template.format(**error.get("ctx", {})) if template else error["msg"]
    if key in SECTIONS:  # a rule over several keys, which says itself what it got
        return f"{key}: {problem}", None
    return f"{place}: {problem} (got {_shown(error['input'])})", where


# ---- Loading and saving ----------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a file, its parents (`inherits:`, relative to the file) and `section.key=value` overrides.

    A child's key replaces its parent's, an override both; lists are replaced whole.

    Raises:
        ConfigError: with every problem of all of them at once, one line each: unknown and repeated keys, wrong
            types, values out of range, keys that contradict each other. Alone, when a file cannot be read or
            parsed, or `inherits:` goes in a circle.
    """
    files = _lineage(Path(path))
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


def _values(config: Config) -> dict[str, Any]:
    """Every value by dotted key."""
    return {key: _value(config, key) for key in KEYS}


def _value(config: Config, dotted: str) -> Any:
    section, _, key = dotted.rpartition(".")
    return getattr(getattr(config, section) if section else config, key)


def flatten(config: Config) -> dict[str, bool | int | float | str]:
    """Every value by dotted key, as trackers take them: lists and null become JSON text."""
    return {
        key: json.dumps(value, ensure_ascii=False) if value is None or isinstance(value, tuple) else value
        for key, value in _values(config).items()
    }


# ---- Comparing -------------------------------------------------------------------------------------------

KEYS_WITHOUT_EFFECT = frozenset(
    {
        "output_dir",
        "train.micro_batch_pairs",  # the same pairs per step, to float rounding
        "data.num_workers",
        "data.max_unreadable_share",
        *(key for key in KEYS if key.partition(".")[0] in ("eval", "samples", "checkpoint", "log")),
    }
)
"""The keys that may differ between two parts of one run: they change what is seen of it, not what it computes.

`train.max_steps` is one too while the learning rate is constant; with a decaying one it sets the decay.
Precision, compilation and checkpointed gradients are not: they leave the method alone but change bits.
"""


def changed_keys(old: Config, new: Config) -> list[str]:
    """Lines such as `loss.beta: 1000.0 → 2000.0`, for the keys that change what a run computes."""
    ignored = KEYS_WITHOUT_EFFECT
    if old.optim.schedule == new.optim.schedule == "constant":
        ignored = ignored | {"train.max_steps"}
    before, after = _values(old), _values(new)
    return [
        f"{key}: {_shown(before[key])} → {_shown(after[key])}"
        for key in KEYS
        if key not in ignored and before[key] != after[key]
    ]


# ---- What follows from a config --------------------------------------------------------------------------


def accumulation_steps(config: Config, num_processes: int) -> int:
    """Micro-steps per optimizer step: total batch / (micro batch × processes).

    Raises:
        ValueError: when that is not a whole number; the message names the sizes that would work.
    """
    pairs_at_once = config.train.micro_batch_pairs * num_processes
    if config.train.total_batch_pairs % pairs_at_once:
        raise ValueError(_splitting_message(config.train, num_processes))
    return config.train.total_batch_pairs // pairs_at_once


def _splitting_message(train: TrainConfig, num_processes: int) -> str:
    total, micro = train.total_batch_pairs, train.micro_batch_pairs
    pairs_at_once = micro * num_processes
    below = total // pairs_at_once * pairs_at_once
    totals = [size for size in (below, below + pairs_at_once) if size > 0]
    choices = [f"train.total_batch_pairs {' or '.join(map(str, totals))}"]
    per_process, uneven = divmod(total, num_processes)
    if not uneven:
        micros = [size for size in range(1, per_process + 1) if per_process % size == 0]
        nearest = sorted(sorted(micros, key=lambda size: abs(size - micro))[:3])
        choices.append(f"train.micro_batch_pairs {' or '.join(map(str, nearest))}")
    pieces = f"micro batches of {micro}"
    if num_processes > 1:
        pieces = f"{num_processes} processes with {pieces}"
    return f"a total batch of {total} pairs cannot be split into {pieces}; choose {', or '.join(choices)}"


def effective_learning_rate(config: Config) -> float:
    """The learning rate after warm-up: the configured one, times the total batch in pairs with `scale_lr`."""
    scale = config.train.total_batch_pairs if config.optim.scale_lr else 1
    return config.optim.learning_rate * scale


def effective_beta(config: Config) -> float:
    """The β of the Diffusion-DPO loss that this loss equals near the reference, where d is about 0.

    β·(η + γ·n), from the derivative of Appendix C's and Eq. 9's reward at d = 0. For Eq. 10 γ·n is also multiplied
    by exp(n·e), with e the reference's error; this is its value for e = 0.
    """
    loss = config.loss
    return loss.beta if loss.name == "diffusion_dpo" else loss.beta * (loss.eta + loss.gamma * loss.n)


def describe(config: Config, num_processes: int, num_pairs: int | None = None) -> str:
    """What follows from a config on so many processes, one line each, for a person to check before a run.

    `num_pairs` is the number of training pairs where it is known.

    Raises:
        ValueError: when the total batch cannot be split over the processes (`accumulation_steps`).
    """
    train, optim, loss = config.train, config.optim, config.loss
    accumulation = accumulation_steps(config, num_processes)
    lines = {
        "total batch": f"{train.total_batch_pairs} pairs = {num_processes} (processes) × {accumulation} (accumulation) "
        f"× {train.micro_batch_pairs} (micro batch)",
        "learning rate": f"{optim.learning_rate:g} configured, {effective_learning_rate(config):g} effective "
        + (f"(× {train.total_batch_pairs} pairs, optim.scale_lr)" if optim.scale_lr else "(not scaled)"),
        "warm-up": f"{optim.warmup_steps} steps, then {optim.schedule}"
        + (": longer than the run" if optim.warmup_steps > train.max_steps else ""),
    }
    if loss.name == "diffusion_dpo":
        lines["effective β"] = f"{loss.beta:g} (diffusion_dpo: β itself)"
    else:
        formula = f"{loss.beta:g} × ({loss.eta:g} + {loss.gamma:g} × {loss.n:g})"
        factor = ", whose γ·n part grows by exp(n·e) with the error e" if loss.reward == "eq10" else ""
        lines["effective β"] = f"{effective_beta(config):g} = β·(η + γ·n) = {formula}{factor}"
    pairs_seen = train.max_steps * train.total_batch_pairs
    lines["steps"] = f"{train.max_steps:,} optimizer steps, {pairs_seen:,} pairs seen"
    lines["epochs"] = _epochs(config, pairs_seen, num_pairs)
    if config.eval.every and config.eval.path is None and config.data.source != "hub":
        lines["evaluation"] = "on the training pairs themselves; set eval.path for held-out ones"
    width = max(map(len, lines))
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines.items())


def _epochs(config: Config, pairs_seen: int, num_pairs: int | None) -> str:
    if num_pairs is not None:
        return f"{pairs_seen / num_pairs:.2f} of {num_pairs:,} pairs"
    if config.data.source != "hub":
        return "known once the data are read"
    about = min(PICKAPIC_V2_PAIRS, config.data.max_pairs or PICKAPIC_V2_PAIRS)
    return f"about {pairs_seen / about:.2f}, if the data are Pick-a-Pic v2 ({about:,} pairs)"


# ---- The command line ------------------------------------------------------------------------------------


def build_parser(description: str) -> argparse.ArgumentParser:
    """`--config FILE [section.key=value …] [--dry-run] [--allow-config-change]`, and a help that lists every key.

    Call its `parse_intermixed_args`, so that overrides may stand before, between and after the options.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=_help_of_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, such as configs/xdpo_sd15.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key; see below")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and what follows from it, then stop"
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
        default = "required" if field.is_required() else _in_yaml(field.default)
        lines.append(f"  {dotted} ({_type_text(field.annotation, field.metadata)}; {default})")
        lines.append(f"      {field.description}")
    return "\n".join(lines)


def _in_yaml(value: Any) -> str:
    """A value on one line, as it could stand in a config file."""
    if isinstance(value, tuple):
        elements = (f'"{each}"' if isinstance(each, str) else _in_yaml(each) for each in value)
        return f"[{', '.join(elements)}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else _shown(value)


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
