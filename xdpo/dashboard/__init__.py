"""A run's index.html: its curves, its samples and what they mean, while it trains. It needs no server."""

from xdpo.dashboard.page import RunPage
from xdpo.dashboard.verdict import WORSE

__all__ = ["WORSE", "RunPage"]
