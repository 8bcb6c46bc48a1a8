"""Progress on a terminal as a bar, anywhere else as whole lines at intervals, so that a log file can be read."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


class Progress(tqdm):
    """tqdm's bar where standard error is a terminal; elsewhere a line when it ends, and every half minute before."""

    def __init__(self, iterable: Iterable | None = None, **options: Any):
        self._in_lines = not sys.stderr.isatty()
        if self._in_lines:
            sys.stdout.flush()  # what was said before stands before the lines in a log of both
            options |= {"file": _Lines(sys.stderr), "mininterval": SECONDS_BETWEEN_LINES, "miniters": 1}
            options |= {"maxinterval": SECONDS_BETWEEN_LINES, "delay": SECONDS_BETWEEN_LINES, "ncols": 0}
            options |= {"dynamic_ncols": False, "leave": True}
        super().__init__(iterable, **options)

    def say(self, text: str) -> None:
        """Print one line on standard output, above the bar."""
        if self._in_lines:
            print(text, flush=True)
        else:
            self.write(text, file=sys.stdout)
            sys.stdout.flush()


class _Lines:
    """What a bar writes, as lines: tqdm begins with a carriage return and ends without a newline."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        count = line.partition(" [")[0]  # without times, which differ when a bar that is full closes
        if count and count != self._last:
            self.stream.write(line + "\n")
            self._last = count

    def flush(self) -> None:
        self.stream.flush()
