"""How a run ends early: by a signal, because its launcher is gone, or because one of its processes failed.

A signal asks the run to save and exit. Losing the launcher counts as SIGTERM, because `accelerate launch` does not pass
SIGTERM on to its one process. When one process fails, all of them end within seconds, with its message, instead of
waiting for it in a collective: each checks twice a second whether another has failed or is gone.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from xdpo import processes

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST_SECONDS = 2.0
LOOK_SECONDS = 0.5
SILENT_SECONDS = 120.0  # a process that was silent for this long is gone: it was killed, or its machine was
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # variables that torchrun and accelerate launch set
GRACE_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds that torchrun's agent leaves between SIGTERM and SIGKILL
DEFAULT_GRACE_SECONDS = 30


class StopRequest:
    """SIGTERM, SIGINT or SIGHUP asks the run to save and exit after this optimizer step; a second one ends it at once.

    Losing the launcher counts as SIGTERM. A signal right after the first one is the same request: Ctrl-C reaches
    launcher, script and run together, and some of them pass it on.
    """

    def __init__(self) -> None:
        self.received, self._when = 0, 0.0
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:  # under nohup
                continue
            signal.signal(number, self._receive)
        _Watch.current_stop = self

    def _receive(self, number: int, frame: object) -> None:
        if not self.received:
            self.received, self._when = number, time.monotonic()
        elif time.monotonic() - self._when > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def launcher_left(self) -> None:
        self.received = self.received or signal.SIGTERM


def ignore_signals(worker: int = 0) -> None:
    """For data workers: the trainer answers a signal to the process group, and still needs their batches."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def launcher_grace_seconds() -> int | None:
    """Seconds that torchrun leaves its processes between a signal and SIGKILL; None under other launchers."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return int(os.environ.get(GRACE_VARIABLE, DEFAULT_GRACE_SECONDS))


@contextmanager
def together() -> Iterator[None]:
    """Run a block that ends on all processes when it fails on one. Every process enters it, once they are connected.

    The block ends when all processes have reached its end, and closes their connection. An exception passes through;
    the other processes print it and exit with status 1, wherever they are.
    """
    watch = _Watch()
    watch.start()
    try:
        yield
        processes.disconnect()
    except BaseException as error:
        first = watch.announce(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        if first is not None and _lost_another(error):
            raise SystemExit(f"error: {first}") from None
        raise
    finally:
        watch.end()
        processes.let_go()


class _Watch(threading.Thread):
    """Watches the launcher and the other processes, every LOOK_SECONDS."""

    current_stop: StopRequest | None = None

    def __init__(self, leave: Callable[[int], None] = os._exit) -> None:
        super().__init__(name="watch", daemon=True)
        self._leave, self._ended = leave, threading.Event()
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHERS) else None
        self._rank, self._count = processes.rank(), processes.count()
        # A separate connection: another thread may hold the shared one for as long as a collective takes.
        self._store = processes.run_store(own_connection=True) if self._count > 1 else None
        self._heard = {other: (0, time.monotonic()) for other in range(self._count) if other != self._rank}

    def run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self._look_after_the_launcher()
            if self._store is not None:
                self._look_after_the_others(self._store)

    def announce(self, message: str) -> str | None:
        """Tell the other processes that this one failed, and give them time to read it.

        Returns the reason if another process failed first: this one's error may only be a consequence.
        """
        self._ended.set()  # this process prints its own error
        if self._store is None:
            return None
        with suppress(RuntimeError):
            first = self._store.compare_set("failed", "", f"{self._rank} {message}").decode()
            if not first.startswith(f"{self._rank} "):
                return self._failure_of(first)
            time.sleep(2 * LOOK_SECONDS)  # if this process hosts the store, the store ends with it
        return None

    def end(self) -> None:
        self._ended.set()
        self.join(5)  # a thread inside a call on the store would abort the process at its end
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set(f"left/{self._rank}", "1")

    def _look_after_the_launcher(self) -> None:
        if self._launcher is None or os.getppid() == self._launcher:
            return
        self._launcher = None
        if self.current_stop is not None:
            self.current_stop.launcher_left()
        else:  # nothing to save yet
            os.kill(os.getpid(), signal.SIGTERM)

    def _look_after_the_others(self, store: dist.Store) -> None:
        try:
            store.add(f"beats/{self._rank}", 1)
            if store.check(["failed"]):
                self._end_here(self._failure_of(store.get("failed").decode()))
            now = time.monotonic()
            for other, (beats, when) in self._heard.items():
                beats_now = store.add(f"beats/{other}", 0)
                if beats_now != beats or store.check([f"left/{other}"]):
                    self._heard[other] = beats_now, now
                elif now - when > SILENT_SECONDS:
                    silence = f"process {other} has not been heard of for {SILENT_SECONDS:.0f} seconds"
                    self._end_here(f"process {self._rank} ends: {silence}")
        except RuntimeError as error:  # dist.DistError: the store went with the launcher, or with the first process
            time.sleep(LOOK_SECONDS)
            self._look_after_the_launcher()
            if self.current_stop is not None and self.current_stop.received:
                self._store = None  # the run saves and exits; what it exchanges until then needs no store
            elif not self._ended.is_set():
                self._end_here(f"process {self._rank} ends: lost the launcher or the first process ({error})")

    def _failure_of(self, report: str) -> str:
        number, _, message = report.partition(" ")
        return f"process {self._rank} ends: process {number} failed: {message}"

    def _end_here(self, reason: str) -> None:
        print(f"error: {reason}", file=sys.stderr, flush=True)
        self._leave(1)


def describe_stop(step_seconds: float, saving_seconds: float, looking_seconds: float) -> str:
    """A line on how long a stop takes, and what to do if the launcher would not wait for it."""
    needed = step_seconds + saving_seconds + looking_seconds
    text = f"a stop takes up to {needed:.0f} s: a step {step_seconds:.0f} s, saving {saving_seconds:.0f} s"
    text += f", after an evaluation or samples that are in work, {looking_seconds:.0f} s"
    grace = launcher_grace_seconds()
    if grace is not None and grace < 2 * needed:
        text += f"; the launcher leaves {grace} s: start it with {GRACE_VARIABLE}={60 + 4 * round(needed)}"
    return text


def _lost_another(error: BaseException) -> bool:
    """Whether an error comes from a collective that another process left."""
    return type(error) is RuntimeError or isinstance(error, dist.DistError)
