"""A metric over any number of steps, in a bounded number of points."""

from dataclasses import dataclass
from math import isfinite, nan

MOST_POINTS = 200  # of a curve: more than its pixels show


@dataclass
class Point:
    """A stretch of a metric: the sums of its steps and values, and its extremes."""

    count: int
    steps: float
    values: float
    low: float
    high: float

    @property
    def step(self) -> float:
        return self.steps / self.count

    @property
    def mean(self) -> float:
        return self.values / self.count

    def add(self, other: "Point") -> None:
        self.count += other.count
        self.steps += other.steps
        self.values += other.values
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


class Series:
    """The values of a metric in the order of their steps, as means of equally many each.

    Where there would be more than MOST_POINTS, neighbours are joined, so that a value costs the same after 100,000
    steps as after ten. Values that are not finite are counted and left out.
    """

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.latest = nan
        self.latest_step = 0
        self.not_finite = 0
        self._width = 1  # values in each point but the last

    def add(self, step: int, value: float) -> None:
        self.latest, self.latest_step = value, step
        if not isfinite(value):
            self.not_finite += 1
            return
        point = Point(1, step, value, value, value)
        if self.points and self.points[-1].count < self._width:
            self.points[-1].add(point)
        else:
            self.points.append(point)
        if len(self.points) > MOST_POINTS:
            for kept, joined in zip(self.points[::2], self.points[1::2], strict=False):
                kept.add(joined)
            self.points = self.points[::2]
            self._width *= 2

    @property
    def is_constant(self) -> bool:
        return len({bound for point in self.points for bound in (point.low, point.high)}) == 1

    def mean_of_last(self, share: float) -> float:
        """The mean of the last points, at least one, which are this share of all."""
        points = self.points[-max(1, round(share * len(self.points))) :]
        return sum(point.values for point in points) / sum(point.count for point in points)
