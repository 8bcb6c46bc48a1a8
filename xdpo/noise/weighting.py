"""ω: the weight of a time in the loss."""

from dataclasses import dataclass

CHOICES = ("constant", "min_snr", "temporal_discount")


@dataclass(frozen=True)
class Weighting:
    """Which weight a process gives its times: a name of CHOICES, and the numbers of those that have one."""

    name: str = "constant"
    min_snr_gamma: float = 5.0  # min_snr: the signal-to-noise ratio at which the weight is cut off
    discount: float = 0.9  # temporal_discount: factor per fiftieth of the schedule

    def __post_init__(self) -> None:
        if self.name not in CHOICES:
            raise ValueError(f"unknown timestep weighting {self.name!r}; choose from {', '.join(CHOICES)}")


CONSTANT = Weighting()
