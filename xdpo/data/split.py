"""A run's two sets of pairs: those that it trains on, and those that it is evaluated on."""

from enum import Enum

from xdpo.config import Config, DataConfig
from xdpo.noise import HELD_OUT_SEED


class Split(Enum):
    """The value is the name of its folder in a cache."""

    TRAIN = "train"
    HELD_OUT = "held_out"

    @property
    def is_held_out(self) -> bool:
        return self is Split.HELD_OUT

    @property
    def title(self) -> str:
        return "held-out pairs" if self.is_held_out else "training pairs"

    def seed(self, settings: Config) -> int:
        """The seed of its draws; held-out pairs have the same (t, ε) in every run."""
        return HELD_OUT_SEED if self.is_held_out else settings.seed

    def source(self, settings: Config) -> DataConfig:
        """The `data` section for its pairs. The `eval` section replaces held-out ones' path, split, columns, number."""
        if not self.is_held_out:
            return settings.data
        given = {name: getattr(settings.eval, name) for name in ("path", "split", "columns")}
        replaced = {name: value for name, value in given.items() if value is not None}
        return settings.data.model_copy(update={**replaced, "max_pairs": settings.eval.pairs})

    @classmethod
    def of(cls, settings: Config) -> tuple["Split", ...]:
        """Those that a run reads."""
        return (cls.TRAIN, cls.HELD_OUT) if settings.eval.every else (cls.TRAIN,)
