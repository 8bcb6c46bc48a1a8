"""The figure and table of docs/healthy_curves.md, from logs; the trainings themselves are other tests'."""

from types import SimpleNamespace

import healthy_curves
import numpy as np
import pytest
from healthy_curves import BEGIN, END, RUNS, SCORERS, Column

from xdpo.config import load_config
from xdpo.experiments.tasks import StageError
from xdpo.report.grids import to_markdown


def column(title, ends):
    """A run for each of `ends`, its last step; each logs its accuracy as 0.5, and evaluates every second step."""
    runs = []
    for seed, last in enumerate(ends):
        rows = [{"step": step, "loss": 0.5 + seed, "implicit_accuracy": 0.5} for step in range(1, last + 1)]
        rows += [
            {"step": step, "eval/loss": 0.7, "eval/implicit_accuracy": 0.6, "eval/margin": -1.0}
            | {"eval/d_chosen": 0.01, "eval/d_rejected": 0.03, "eval/reference_error": 0.02}
            for step in range(0, last + 1, 2)
        ]
        settings = load_config(RUNS[title], [f"seed={seed}", "train.max_steps=8"])
        runs.append(SimpleNamespace(rows=lambda rows=rows: rows, settings=settings))
    scores = {scorer: ([0, 4, 8], np.array([[5.0, 6.0, 4.0]] * len(ends))) for scorer in SCORERS}
    return Column(title, runs, scores)


@pytest.fixture(scope="module")
def columns():
    return [column("works", [8, 8]), column("over-optimises", [8, 8]), column("diverges", [8, 5])]


def test_the_table_has_means_with_their_range_and_the_best_step(columns):
    text = to_markdown(healthy_curves.table(columns))
    assert "| training loss, last tenth | 1 [0.5, 1.5] | 1 [0.5, 1.5] |" in text
    assert "| held-out margin | −1 [−1, −1] |" in text
    assert "| d of rejected images / reference's error | 1.5 [1.5, 1.5] |" in text
    assert text.count("5 → 6 (step 4) → 4") == len(SCORERS) * len(columns)
    assert "seeds: 0, 1" in text and "| configs/tiny/curves/diverges.yaml |" in text


def test_the_table_says_where_a_shorter_run_ended(columns):
    text = to_markdown(healthy_curves.table(columns))
    assert "“diverges” with seed 1 ended after 5, its numbers" in text and text.count("ended after") == 1


def test_a_run_without_steps_or_evaluations_is_not_measured():
    of_two = [SimpleNamespace(rows=lambda: [], settings=load_config(RUNS["diverges"])) for _ in range(2)]
    empty = Column("diverges", of_two, {scorer: ([0], np.array([[5.0]] * 2)) for scorer in SCORERS})
    text = to_markdown(healthy_curves.table([empty]))
    assert text.count("| not measured |") == 7 and "5 → 5 (step 0) → 5" in text
    assert len(healthy_curves.draw([empty]).axes) == 6


def test_only_what_may_diverge_may_fail_and_only_by_that():
    runs = {title: [SimpleNamespace(name=title)] for title in RUNS}
    healthy_curves.refuse_failures(runs, {"diverges": "error: loss not finite in optimizer step 3"})
    for failed in ({"works": "error: loss not finite in optimizer step 3"}, {"diverges": "no space left on device"}):
        with pytest.raises(StageError, match=f"{min(failed)} failed:\n{min(failed.values())}"):
            healthy_curves.refuse_failures(runs, failed)


def test_a_page_without_marks_is_told_before_anything_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text("no marks")
    monkeypatch.setattr(healthy_curves, "measure", lambda options: pytest.fail("it trains"))
    assert healthy_curves.main(["--page", "page.md", "--output", "out"]) == 1
    assert "lacks the lines" in capsys.readouterr().err


def test_a_run_that_ended_early_is_drawn_as_far_as_all_seeds_came(columns):
    steps, losses = columns[-1].logged("loss")
    assert steps == [1, 2, 3, 4, 5] and losses.shape == (2, 5)
    figure = healthy_curves.draw(columns)
    assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == list(RUNS)
    long = [[line for line in axes.lines if len(line.get_xdata()) > 2] for axes in figure.axes[:3]]
    assert [max(line.get_xdata()[-1] for line in lines) for lines in long] == [8, 8, 4]


def test_only_what_stands_between_the_marks_is_written_anew(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for table in ("| first |", "| second |"):
        healthy_curves.fill(page, "page/curves", table, "python x.py")
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\n![") and text.endswith(f"{END}\nafter\n")
    assert "| second |" in text and "first" not in text and "old" not in text and "(page/curves.png)" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the lines"):
        healthy_curves.fill(page, "page/curves", "", "")
