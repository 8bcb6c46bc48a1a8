"""The settings of a run: typed sections, YAML files with one parent each, overrides, and values derived from them.

`load_config` reads a file, follows `inherits:`, applies `section.key=value` overrides and reports every mistake
at once. The rest of the package gets sections, tensors and numbers, never a file. `configs/base.yaml` explains
the keys at length; `KEYS` has them all by dotted name.
"""

from xdpo.config.command_line import build_parser, config_parser
from xdpo.config.derived import (
    KEYS_WITHOUT_EFFECT,
    PICKAPIC_V2_PAIRS,
    accumulation_steps,
    changed_keys,
    describe,
    effective_beta,
    effective_learning_rate,
)
from xdpo.config.files import ConfigError, dump_config, flatten, load_config, parse_yaml
from xdpo.config.loss import LossConfig
from xdpo.config.sections import (
    KEYS,
    SECTIONS,
    CacheConfig,
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvalConfig,
    ExportConfig,
    FilterConfig,
    LogConfig,
    ModelConfig,
    NoiseConfig,
    OptimConfig,
    SamplesConfig,
    SelfPlayConfig,
    TrainConfig,
)
from xdpo.config.types import FilePath, Section, Text

__all__ = [
    "KEYS",
    "KEYS_WITHOUT_EFFECT",
    "PICKAPIC_V2_PAIRS",
    "SECTIONS",
    "CacheConfig",
    "CheckpointConfig",
    "ComputeConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "ExportConfig",
    "FilePath",
    "FilterConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "NoiseConfig",
    "OptimConfig",
    "SamplesConfig",
    "Section",
    "SelfPlayConfig",
    "Text",
    "TrainConfig",
    "accumulation_steps",
    "build_parser",
    "changed_keys",
    "config_parser",
    "describe",
    "dump_config",
    "effective_beta",
    "effective_learning_rate",
    "flatten",
    "load_config",
    "parse_yaml",
]
