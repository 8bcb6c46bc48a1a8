"""Progress in a log file: whole lines, few of them."""

import io
import sys

from xdpo import progress
from xdpo.progress import Progress


def test_a_log_file_has_whole_lines_and_no_carriage_returns(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with Progress(total=3, desc="images", unit="image") as bar:
        for number in range(3):
            bar.update()
            bar.say(f"number {number}")
    said, text = capsys.readouterr()
    assert "\r" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert lines[0].startswith("images:   0% 0/3") and lines[-1].startswith("images: 100% 3/3")
    assert len(lines) == len(set(lines)) and not any(line != line.strip() for line in lines)
    assert said == "number 0\nnumber 1\nnumber 2\n"


def test_what_is_over_within_the_interval_leaves_no_line(capsys):
    assert list(Progress(range(3), desc="quick")) == [0, 1, 2]
    with Progress(total=2, disable=True) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(total=2, file=terminal) as bar:
        bar.update(2)
    assert "\r" in terminal.getvalue()
