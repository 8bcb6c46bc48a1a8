"""What a run says of its held-out pairs while it trains."""

from types import SimpleNamespace

import pytest
from training_runs import rows_of

from xdpo.watch import WARNED, Watch, warn_of_both_errors


def evaluations(*differences):
    """Rows of evaluations with these d of chosen and rejected images, at a reference's error of 0.5."""
    return [
        {"eval/d_chosen": chosen, "eval/d_rejected": rejected, "eval/reference_error": 0.5}
        for chosen, rejected in differences
    ]


QUIET = {
    "both below": [(-0.01, -0.01)] * 5,
    "only the rejected one's above": [(-0.01, 0.1)] * 5,
    "only the chosen one's above": [(0.01, -0.1)] * 5,
    "two in a row, then one that is not": [(0.01, 0.1), (0.01, 0.1), (-0.01, 0.1), (0.01, 0.1), (0.01, 0.1)],
    "above by less than a thousandth": [(0.0004, 0.1)] * 5,
    "not finite": [(float("nan"), 0.1)] * 5,
    "not yet three": [(0.01, 0.1)] * 2,
}


@pytest.mark.parametrize("differences", QUIET.values(), ids=QUIET)
def test_nothing_is_said_while_one_image_gets_no_worse(differences):
    rows = evaluations(*differences)
    assert [warn_of_both_errors(rows[: count + 1]) for count in range(len(rows))] == [None] * len(rows)


def test_three_evaluations_in_a_row_with_both_errors_above_are_warned_of_once():
    rows = [{"step": 1, "loss": 0.7}, *evaluations((0, 0), (0.01, 0.02), (0.01, 0.1), (0.02, 0.25))]
    assert warn_of_both_errors(rows[:-1]) is None
    warning = warn_of_both_errors(rows)
    assert "4.0% above on the chosen and 50.0% on the rejected" in warning and "loss.safeguard=0.9" in warning
    rows[-1][WARNED] = 1.0
    assert warn_of_both_errors([*rows, *evaluations((0.02, 0.3))]) is None


def test_an_objective_without_a_reference_has_nothing_to_compare_with():
    assert warn_of_both_errors([{"eval/policy_error": 1.0}] * 5) is None


def test_the_log_is_read_once_and_then_remembered(tmp_path, monkeypatch):
    first, *others = evaluations((0.01, 0.02), (0.01, 0.1), (0.02, 0.25), (0.02, 0.3))
    reads = []
    monkeypatch.setattr("xdpo.watch.read_rows", lambda path: reads.append(path) or [{"step": 1, "loss": 0.7}, first])
    watching = Watch(None, None, tmp_path, SimpleNamespace(path=tmp_path / "metrics.jsonl"))
    warnings = [watching._warn(metrics) for metrics in others]
    assert len(reads) == 1 and [bool(warning) for warning in warnings] == [False, True, False]


def test_a_run_that_unlearns_warns_once_in_its_log_and_on_the_console_also_if_resumed(run, small_pairs, capsys):
    unlearning = ("loss.name=diffusion_dpo", "optim.learning_rate=1e-2", "eval.every=1", f"eval.path={small_pairs}")
    run("run", *unlearning, "train.max_steps=3")
    _, folder = run("run", *unlearning, "train.max_steps=4")

    assert [row["step"] for row in rows_of(folder) if WARNED in row] == [3]
    said = capsys.readouterr().out
    assert said.count("warning: step") == said.count("warning: step 3: ") == 1
