"""Which of a run's two sets of pairs: those it trains on, or those that it is watched on."""

from enum import Enum

from xdpo.config import Config
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

    def seed(self, config: Config) -> int:
        """The seed of its draws; held-out pairs meet the same (t, ε) in every run."""
        return HELD_OUT_SEED if self.is_held_out else config.seed

    @classmethod
    def of(cls, config: Config) -> tuple["Split", ...]:
        """Those that a run reads."""
        return (cls.TRAIN, cls.HELD_OUT) if config.eval.every else (cls.TRAIN,)
