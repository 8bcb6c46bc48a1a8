"""The processes of a run: how they wait for one another, agree, and share out work of unknown length.

Collectives on the device time out after half an hour; no step and no evaluation takes that long. For work that may take
hours (downloads, conversions, copies, encoding, sampling) processes wait here instead: on the CPU, over gloo, up to a
day. With one process every call returns at once.
"""

import functools
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

Item = TypeVar("Item")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longest wait in a collective on the device: between two processes in the same step."""

LONG_WAIT = timedelta(days=1)
"""Longest wait for a process that downloads, converts, copies, encodes, samples or saves."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def connect() -> None:
    """Make the group for long waits. Every process calls it before any of them starts long work."""
    if count() > 1:
        _patient_group(dist.group.WORLD)


def disconnect() -> None:
    """Disconnect together: a process that simply ends would break the others' connections."""
    if dist.is_initialized():
        wait()
        let_go()
        dist.destroy_process_group()


def let_go() -> None:
    """Drop the group for long waits: if it were kept, its threads would abort the process at its end."""
    _patient_group.cache_clear()


def wait() -> None:
    """Wait until every process is here."""
    if count() > 1:
        dist.barrier(group=_patient_group(dist.group.WORLD))


@contextmanager
def one_first(is_first: bool) -> Iterator[None]:
    """Run a block on the processes with `is_first`, then on all others: the first do the work, the others find it done.

    Every process calls it and leaves it when all have finished: on another machine a process may find nothing, and do
    the work too. If a first process fails, the others learn of it through `xdpo.ending`.
    """
    if not is_first:
        wait()
    yield
    if is_first:
        wait()
    wait()


def agree(value: Any) -> Any:  # the others pass what they have, often None
    """The first process's value, on every process."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_patient_group(dist.group.WORLD))
    return box[0]


def gather(value: Item) -> list[Item]:
    """Every process's value, by rank."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=_patient_group(dist.group.WORLD))
    return values


def refuse_differences(facts: Mapping[str, Any], remedy: str) -> None:
    """Raise ValueError on every process if a fact's value differs between processes, naming machines and values."""
    everyone = gather((socket.gethostname(), dict(facts)))
    lines = []
    for name, value in everyone[0][1].items():
        lines += [
            f"{name}: {value} in process 0 on {everyone[0][0]}, {others.get(name)} in process {number} on {host}"
            for number, (host, others) in enumerate(everyone)
            if others.get(name) != value
        ]
    if lines:
        raise ValueError("the processes of this run do not agree:\n  " + "\n  ".join(lines[:8]) + f"\n{remedy}")


def deal(name: str, items: Sequence[Item], is_asked_to_stop: Callable[[], bool] = lambda: False) -> Iterator[Item]:
    """Share out items one by one to free processes: all processes together get each item once.

    name: the work's name, unique in a run. Fast processes get more items, so that all end within one item's time. Every
    process passes the same items. Once one of them is asked to stop, no process gets another item.
    """
    if count() == 1:
        for item in items:
            if is_asked_to_stop():
                return
            yield item
        return
    store, key = run_store(), f"dealt/{name}"
    while not is_asked_to_stop() and (number := store.add(key, 1) - 1) < len(items):
        yield items[number]
    store.add(key, len(items))


def run_store(own_connection: bool = False) -> dist.Store:
    """The key-value store that the processes of this run share. It exists only where there are several.

    own_connection: for a thread, because a call on the shared connection may block as long as a collective does.
    """
    store = dist.distributed_c10d._get_default_store()
    # torch has Store.clone, its type stub has not.
    return dist.PrefixStore("xdpo", store.clone() if own_connection else store)  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1)
def _patient_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """The gloo group of all processes, with a timeout of a day; made once for a world."""
    return dist.new_group(backend="gloo", timeout=LONG_WAIT)
