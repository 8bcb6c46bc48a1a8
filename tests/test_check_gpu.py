"""scripts/check_gpu.py: verdicts that can fail, rows that go on after an error, and the same code on a CPU."""

import json
import math
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import check_gpu
import flow_pipelines
import pytest
import torch
from benchmarks import steps, true_models
from gpu_checks import children, losses, memory, rows, speed
from gpu_checks.children import Launch
from gpu_checks.context import SIZES, Context
from gpu_checks.rows import Finding, NotPossible, Row, Verdict

from xdpo.config import ModelConfig, NoiseConfig
from xdpo.families import load_parts

ROOT = Path(__file__).resolve().parent.parent


def refusing(error):
    def check(context):
        raise error

    return check


HOLDING = Row("one is at most two", lambda context: rows.at_most(1, 2, "less"))
FAILING = Row("three is at most two", lambda context: rows.at_most(3, 2, "two or fewer"))
BROKEN = Row("a check that breaks", refusing(RuntimeError("no\nkernel")))
TOO_LARGE = Row("a check that needs a larger card", refusing(torch.OutOfMemoryError("CUDA out of memory.\nSee …")))
IMPOSSIBLE = Row("a check that needs more", refusing(NotPossible("there is one card")))


@pytest.fixture
def check(monkeypatch, tmp_path):
    """check(rows, "--option", …): run the command with these rows → (exit status, report as JSON, page)."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "PYTHONPATH", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # restored afterwards

    def call(every, *options):
        monkeypatch.setattr(check_gpu, "rows_of", lambda parts: every)
        status = check_gpu.main([*options, "--output", str(tmp_path)])
        record = json.loads((tmp_path / "gpu_report.json").read_text(encoding="utf-8"))
        return status, record, (tmp_path / "gpu_report.md").read_text(encoding="utf-8")

    return call


def test_a_failing_row_shows_both_numbers_and_what_to_try(check, capsys):
    status, record, page = check((FAILING,), "--device", "cpu", "--tiny")
    assert status == 1
    expected = {"verdict": "DOES NOT HOLD", "measured": "3", "expected": "at most 2", "remedy": "two or fewer"}
    assert record["rows"] == [{"claim": FAILING.claim, **expected}]
    assert "| DOES NOT HOLD | three is at most two | 3 | at most 2 | two or fewer |" in page
    said = capsys.readouterr().out
    assert "DOES NOT HOLD     three is at most two: 3, expected at most 2\n" in said and "try: two or fewer" in said


def test_an_error_in_a_row_is_a_finding_and_the_others_go_on(check):
    status, record, _ = check((BROKEN, IMPOSSIBLE, TOO_LARGE, HOLDING), "--device", "cpu", "--tiny")
    broken, impossible, too_large, holding = record["rows"]
    assert status == 1 and broken["verdict"] == "DOES NOT HOLD" and broken["measured"] == "RuntimeError: no kernel"
    assert "test_check_gpu.py, line" in broken["remedy"]
    assert (impossible["verdict"], impossible["remedy"]) == ("not possible here", "there is one card")
    assert (too_large["verdict"], too_large["remedy"]) == (
        "not possible here",
        "the card is too small: CUDA out of memory.",
    )
    assert holding["verdict"] == "holds"


def test_a_check_that_is_stopped_leaves_what_it_found(check, tmp_path):
    def stop(context):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check((HOLDING, Row("a check that takes too long", stop)), "--device", "cpu", "--tiny")
    record = json.loads((tmp_path / "gpu_report.json").read_text(encoding="utf-8"))
    assert [row["claim"] for row in record["rows"]] == [HOLDING.claim]


def test_one_part_has_the_rows_of_its_own():
    assert check_gpu.rows_of(["speed"]) == speed.ROWS
    assert check_gpu.rows_of(["speed", "memory"]) == (*memory.ROWS, *speed.ROWS)


def test_words_choose_the_claims_that_contain_them_and_a_word_in_none_is_refused(capsys):
    claims = [row.claim for row in check_gpu.rows_of(["fp16: ", "data_wait_share"])]
    assert claims[-1] == "data_wait_share of xdpo_sd15" and len(claims) == 5
    assert all(claim.startswith("fp16: ") for claim in claims[:4])
    assert check_gpu.rows_of(["losses", "fp16: "]) == losses.ROWS
    assert check_gpu.main(["--only", "xdlp_sd15"]) == 1
    assert "--only: 'xdlp_sd15' is none of losses, memory, speed" in capsys.readouterr().err


def test_a_switch_alone_is_timed_on_caches_that_are_filled_for_it(context, monkeypatch):
    order = []
    monkeypatch.setattr(speed, "times", lambda _: order.append("all") or {(speed.TRAINED, 1): [2.0]})
    monkeypatch.setattr(speed, "times_with", lambda *_: order.append("switched") or [1.0])
    found = speed.check_switch(context, "compute.channels_last", nullcontext)
    assert order == ["all", "switched"]
    assert (found.verdict, found.measured, found.expected) == (Verdict.HOLDS, "4", "at least 2")  # pairs/s


@pytest.mark.slow
def test_a_large_model_is_written_as_a_pipeline_that_loads(monkeypatch, tmp_path):
    small = {"intermediate_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    for sizes in (true_models.CLIP_L, true_models.CLIP_G):
        for name, value in small.items():
            monkeypatch.setitem(sizes, name, value)
    for name, value in {"d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 200}.items():
        monkeypatch.setitem(true_models.T5_XXL, name, value)
    monkeypatch.setattr(true_models, "_vae", lambda latent_channels, **_: flow_pipelines.autoencoder(latent_channels))
    build = partial(
        true_models.stable_diffusion_35,
        num_layers=1,
        num_attention_heads=2,
        caption_projection_dim=128,
        pos_embed_max_size=8,
    )
    model = replace(true_models.TRUE_MODELS["sd35_medium"], build=build)
    true_models.save_model(model, tmp_path / "model", "cpu")
    parts = load_parts(ModelConfig(pipeline=str(tmp_path / "model")))
    tokens, _ = parts.tokenize("a word")
    assert {name: len(ids) for name, ids in tokens.items()} == model.tokens
    assert parts.denoiser.dtype == torch.float32 == torch.get_default_dtype()
    assert parts.process(NoiseConfig()).shift == 3


def test_what_is_not_possible_here_fails_nothing(check):
    assert check((IMPOSSIBLE, TOO_LARGE, HOLDING), "--device", "cpu", "--tiny")[0] == 0


def test_without_a_gpu_one_line_says_so_and_no_row_is_checked(check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, record, page = check((BROKEN, FAILING, HOLDING))
    assert status == 0 and [row["verdict"] for row in record["rows"]] == ["not possible here"] * 3
    assert capsys.readouterr().out.count("there is no CUDA GPU here") == 1
    assert (
        record["run_on"] is None and record["versions"]["torch"] == torch.__version__ and record["git_commit"] in page
    )


@pytest.mark.parametrize("compare", [rows.at_most, rows.at_least])
def test_a_number_that_is_none_satisfies_no_bound(compare):
    for judged in (True, False):
        assert compare(math.nan, 1.0, "", judged=judged).verdict is Verdict.FAILS
    assert compare(-1.0, -1.0, "").verdict is Verdict.HOLDS
    assert compare(-1.0, -1.0, "", judged=False).verdict is Verdict.FAILS


def test_comparisons_fail_beyond_their_bounds():
    assert rows.at_most(1.06, 1.05, "").verdict is rows.at_least(1.79, 1.8, "").verdict is Verdict.FAILS
    assert rows.near(1.11, 1.0, 0.1, "").verdict is rows.near(math.nan, 1.0, 0.1, "").verdict is Verdict.FAILS
    assert rows.near(1.09, 1.0, 0.1, "").verdict is rows.equal(0, 0, "").verdict is Verdict.HOLDS
    assert rows.equal(1, 0, "less") == Finding(Verdict.FAILS, "1", "0", "less")


@pytest.fixture
def context(tmp_path):
    """At the true size on a GPU, of which a test asks nothing."""
    return Context(SIZES["true"], tmp_path, on_gpu=True)


def test_what_rows_share_is_made_once_and_fails_every_one_of_them(context):
    calls = []

    def make():
        calls.append(1)
        raise ValueError("out of it")

    for _ in range(2):
        with pytest.raises(ValueError, match="out of it"):
            context.share("times", make)
    assert calls == [1]


def test_speed_is_judged_against_what_the_flops_promise(context):
    seconds = {"full": 1.9, "full-cached": 1.0, **dict.fromkeys(steps.BARE_PARTS, 0.4)}
    context.share("times", lambda: {(name, 1): [value] * 3 for name, value in seconds.items()})
    gain = speed.check_gain(context, "full-cached", 1, speed.GAIN)
    assert (gain.verdict, gain.measured, gain.expected) == (Verdict.HOLDS, "4", "at least 3.78947")  # pairs/s
    assert speed.check_gain(context, "full-cached", 1, 2.0).verdict is Verdict.FAILS
    overhead = speed.check_overhead(context, "full", steps.BARE_PARTS, 1)
    assert (overhead.verdict, overhead.measured, overhead.expected) == (Verdict.FAILS, "1.9", "at most 1.68")


def test_memory_that_runs_out_is_an_infinite_peak_beside_the_limit(context, monkeypatch):
    card = SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(children, "train", refusing(ValueError("status 1:\ntorch.OutOfMemoryError: 2 GB")))
    monkeypatch.setattr(memory, "overrides", lambda *_: [])
    found = memory.check_fits(context, memory.LIMITED[0])
    assert (found.verdict, found.measured, found.expected) == (Verdict.FAILS, "inf", "at most 24.6961")
    assert "gradient_checkpointing" in found.remedy
    card.total_memory = 16e9
    with pytest.raises(NotPossible, match="less than 24 GB"):
        memory.check_fits(context, memory.LIMITED[0])


def test_large_models_are_for_the_true_size_alone(tmp_path):
    large = next(limited for limited in memory.LIMITED if limited.model)
    with pytest.raises(NotPossible, match="true size"):
        memory.take(Context(SIZES["tiny"], tmp_path, on_gpu=False), large)


def test_a_training_that_fails_is_told_with_what_it_said(monkeypatch, tmp_path):
    ended = SimpleNamespace(join=lambda *_: None, kill=lambda: None, exitcode=1)
    monkeypatch.setattr(Launch, "start", lambda launch: ended)
    (tmp_path / "log").write_text("error: no such pipeline\n")
    with pytest.raises(ValueError, match="status 1:\nerror: no such pipeline"):
        children.train(Launch([], tmp_path / "log"))
    ended.exitcode = -9
    children.train(Launch([], tmp_path / "log", killed_after=3))


@pytest.mark.slow
def test_every_row_runs_on_a_cpu_and_none_fails(tmp_path):
    options = ["--device", "cpu", "--tiny", "--output", str(tmp_path)]
    command = [sys.executable, "scripts/check_gpu.py", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]

    record = json.loads((tmp_path / "gpu_report.json").read_text(encoding="utf-8"))
    found = {row["claim"]: row for row in record["rows"]}
    assert list(found) == [row.claim for row in check_gpu.rows_of()]
    assert {row["verdict"] for row in record["rows"]} == {"holds", "not possible here"}
    assert all(row["measured"] and row["expected"] for row in record["rows"] if row["verdict"] == "holds")
    impossible = [claim for claim, row in found.items() if row["verdict"] == "not possible here"]
    large = [f"({name})" for name in true_models.TRUE_MODELS]
    assert all(any(word in claim for word in ("fp16", "8bit", "NCCL", *large)) for claim in impossible)
    assert (record["run_on"], record["size"], record["cards"]) == ("cpu", "tiny", [])
