"""What does not change while training, computed once: encoded examples, and the reference's errors."""

from xdpo.cache.examples import CachedPairDataset, ExampleCache, ExamplePlan
from xdpo.cache.reference import ReferenceCache
from xdpo.cache.shards import CacheError, Shards

__all__ = [
    "CacheError",
    "CachedPairDataset",
    "ExampleCache",
    "ExamplePlan",
    "ReferenceCache",
    "Shards",
]
