"""Every objective in training: it trains, resumes, does not depend on the processes, and refuses what it can't use."""

import itertools
import json
import math
import shutil
import signal

import pytest
import torch
from conftest import encoded_image, pick_a_pic_row, write_pick_a_pic
from forks import launch
from safetensors.torch import load_file
from tolerances import ERROR, assert_same_but_for_rounding, drift, drift_tolerance
from training_runs import assert_same_run, command, policy_of, rows_of, slow_but

from xdpo import families, precompute
from xdpo.feeds import SelfPlay
from xdpo.loss import OBJECTIVES

SELF_PLAY = (
    "loss.name=seppo",
    "loss.beta=100",
    "self_play.every=2",
    "self_play.num_inference_steps=2",
    "self_play.batch_size=3",
)
KTO = ("loss.name=diffusion_kto", "loss.beta=100", "optim.learning_rate=1e-3")


def options_of(name):
    return SELF_PLAY if name == "seppo" else (f"loss.name={name}",)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_and_logs_what_it_knows(run, small_pairs, name):
    status, folder = run(
        name, *options_of(name), "train.max_steps=2", "checkpoint.every=2", "eval.every=2", f"eval.path={small_pairs}"
    )
    assert status == 0
    rows = [row for row in rows_of(folder) if "loss" in row]
    assert len(rows) == 2 and all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    assert rows[1]["gradient_norm"] > 0
    assert ("d_chosen" in rows[0]) == OBJECTIVES[name].needs_reference == ("reference_error" in rows[0])
    held_out = [row for row in rows_of(folder) if "eval/implicit_accuracy" in row]
    assert len(held_out) == 2 and 0 <= held_out[1]["eval/implicit_accuracy"] <= 1


@pytest.mark.parametrize("name", ["diffusion_dpo", "hinge"])
def test_the_safeguard_lets_the_chosen_images_error_fall_further(run, name):
    """With a learning rate that raises both errors, the guarded run ends with the lower one on the chosen images."""
    d_chosen = {}
    for mu in ("null", "1"):
        _, folder = run(f"mu_{mu}", f"loss.name={name}", f"loss.safeguard={mu}", "optim.learning_rate=1e-3")
        d_chosen[mu] = rows_of(folder)[-1]["d_chosen"]
    assert d_chosen["1"] < d_chosen["null"]


def test_weights_that_are_all_equal_are_a_factor_of_beta(run, scored):
    _, weighted = run("weighted", *scored((1, 0)))  # a range of 1: p = σ(1), 10·(2p − 1) = 10·tanh(½)
    _, plain = run("plain", f"loss.beta={1000 * 10 * math.tanh(0.5)}")

    assert_same_but_for_rounding(plain, weighted)
    assert json.loads((weighted / "run.json").read_text())["score_range"] == [0, 1]


@pytest.mark.slow
def test_weighted_training_is_the_same_from_the_source_and_from_caches_that_another_run_made(
    run, scored, tmp_path, capsys
):
    weighted = (*scored((3, 1), (2, 1.5), (1, 1.2)), "train.max_steps=3", "eval.every=3", "eval.draws=1")
    caches = [f"cache.{name}={tmp_path / name}" for name in ("examples", "reference")] + ["cache.dtype=fp32"]
    _, unweighted = run("unweighted", *weighted, *caches, "loss.margin_weight=null")
    _, source = run("source", *weighted)
    capsys.readouterr()
    _, cached = run("cached", *weighted, *caches)
    assert "so the reference is not loaded" in capsys.readouterr().out
    assert_same_run(source, cached)
    _, single = run("single", *weighted, "train.micro_batch_pairs=1")  # a pair's weight is its own, whatever the batch
    assert_same_but_for_rounding(source, single)
    assert drift(source, unweighted) > 10 * drift_tolerance(source)


def test_held_out_pairs_are_weighted_with_the_training_pairs_range(run, scored):
    """At the same weights of the network, a tenth of the gap is a tenth of the margin but for the curve of p."""
    margins = {}
    for name, gap in {"wide": 0.1, "narrow": 0.01}.items():
        held_out = scored((gap, 0), name=name)[1].replace("data.path", "eval.path")
        _, folder = run(f"run {name}", *scored((1, 0)), held_out, "train.max_steps=1", "eval.every=1")
        margins[name] = rows_of(folder)[-1]["eval/margin"]
    # The errors are the same to the bit. The products' signs differ, so that their mean loses some digits, not all.
    assert margins["wide"] / margins["narrow"] == pytest.approx(math.tanh(0.05) / math.tanh(0.005), rel=100 * ERROR)


@pytest.mark.parametrize("cached", [False, True], ids=["from the source", "with a cache to build"])
def test_weights_without_scores_are_refused_before_weights_are_loaded(
    run, scored, small_pairs, tmp_path, monkeypatch, capsys, cached
):
    cache = [f"cache.examples={tmp_path / 'examples'}"] if cached else []
    for owner in (families, precompute.build):
        monkeypatch.setattr(owner, "load_parts", lambda *_, **__: pytest.fail("weights were loaded"))
    for options, message in (
        (["loss.margin_weight=10"], "the training pairs have none (columns score_0 and score_1)"),
        ([*scored((1, 0)), "eval.every=1", f"eval.path={small_pairs}"], "the held-out pairs have none"),
        (scored((1, 0), (math.nan, 0), name="broken"), "6 of 12 training pairs lack one (row 1: nan/0, row 3: nan/0"),
    ):
        status, folder = run("run", *options, *cache)
        error = capsys.readouterr().err
        assert status == 1 and message in error and "loss.margin_weight=null" in error, error
        assert not folder.exists() and not (tmp_path / "examples").exists()


def test_find_batch_weighs_its_pairs_too(run, scored, capsys):
    assert run("x", *scored((2, 1), (1, 0.5)), "--find-batch")[0] == 0
    assert "fastest here" in capsys.readouterr().out


@pytest.mark.parametrize("options", slow_but(("diffusion_kto",), {"diffusion_kto": KTO, "seppo": SELF_PLAY}))
def test_an_objective_with_a_memory_resumes_bit_for_bit(run, options):
    _, whole = run("whole", *options)
    run("parts", *options, "train.max_steps=3")
    status, parts = run("parts", *options)

    assert status == 0
    assert_same_run(whole, parts)


@pytest.mark.parametrize("options", slow_but((), {"diffusion_kto": KTO, "seppo": SELF_PLAY}))
def test_one_process_and_two_log_the_same_figures(run, small_pipeline, small_pairs, tmp_path, options):
    options = (*options, "train.micro_batch_pairs=1")
    _, one = run("one", *options)
    ended = launch("train_xdpo.py", command(small_pipeline, small_pairs, tmp_path / "two", *options), processes=2)
    assert ended.returncode == 0, ended.stderr[-3000:]

    assert_same_but_for_rounding(one, tmp_path / "two")


def test_z0_is_the_mean_gain_of_the_step_before_and_never_negative(run):
    _, folder = run("kto", *KTO, "train.max_steps=5")
    rows = rows_of(folder)

    assert rows[0]["z0"] == 0
    for before, row in itertools.pairwise(rows):
        assert row["z0"] == pytest.approx(max(before["gain"], 0), rel=ERROR)
    assert any(row["z0"] > 0 for row in rows)


@pytest.mark.slow
def test_unpaired_training_does_not_depend_on_the_micro_batch_and_records_its_reference(run, tmp_path, capsys):
    """z0 is of the whole batch: a micro-batch of one would otherwise have a z0 of one pair."""
    cached = (*KTO, f"cache.reference={tmp_path / 'reference'}", "train.micro_batch_pairs=4")
    _, whole = run("whole", *cached)
    _, single = run("single", *KTO, "train.micro_batch_pairs=1")
    assert_same_but_for_rounding(whole, single)

    _, again = run("again", *cached)
    assert "all that this run needs, so the reference is not loaded" in capsys.readouterr().out
    assert_same_run(whole, again)
    run("pairs", "loss.name=diffusion_dpo", f"cache.reference={tmp_path / 'reference'}")
    assert "0 samples known" in capsys.readouterr().out  # single images are other samples than pairs


def test_self_play_draws_its_references_from_the_runs_own_past(run):
    _, folder = run("run", *SELF_PLAY, "self_play.reference=latest", "optim.learning_rate=1e-2", "train.max_steps=6")
    snapshots = sorted((folder / "snapshots").glob("*/unet.safetensors"))
    assert [path.parent.name for path in snapshots] == ["00000", "00001", "00002"]
    weights = [load_file(path) for path in snapshots]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # Where a round begins, policy and latest snapshot are equal: no margin, whatever was learnt before.
    rows = rows_of(folder)
    assert all(rows[step]["margin"] == 0 and rows[step]["d_chosen"] == 0 for step in (0, 2, 4))
    assert all(rows[step]["margin"] != 0 for step in (1, 3, 5))


@pytest.mark.slow
def test_opponents_of_self_play_are_sampled_from_the_cached_captions_too(run, tmp_path):
    _, plain = run("plain", *SELF_PLAY, "data.caption_dropout=0")
    cache = (f"cache.examples={tmp_path / 'examples'}", "cache.dtype=fp32")
    status, cached = run("cached", *SELF_PLAY, *cache, "data.caption_dropout=0")

    assert status == 0
    assert_same_but_for_rounding(plain, cached)


def test_a_buffer_smaller_than_a_round_is_used_again(run, monkeypatch):
    sampled = []
    original = SelfPlay._sample
    monkeypatch.setattr(SelfPlay, "_sample", lambda self, chunk: sampled.append(chunk) or original(self, chunk))
    status, _ = run("run", *SELF_PLAY, "self_play.buffer_pairs=3", "train.max_steps=4")

    assert status == 0
    assert sampled == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("number", slow_but(("killed",), {"asked": signal.SIGTERM, "killed": signal.SIGINT}))
def test_a_run_that_ends_while_it_samples_goes_on_with_what_it_has(run, monkeypatch, number):
    """In its second round, of two batches; an exception stands for the kill, which no code answers either."""
    sampled, original = [], SelfPlay._sample
    ends = {signal.SIGTERM: 2, signal.SIGINT: 3}  # the request comes while a batch is sampled, which is still kept

    def ending(self, positions):
        if len(sampled) == ends[number]:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.raise_signal(number)
        return seen(self, positions)

    def seen(self, positions):
        sampled.append(positions)
        return original(self, positions)

    options = (*SELF_PLAY, "self_play.buffer_pairs=6")
    _, whole = run("whole", *options)
    monkeypatch.setattr(SelfPlay, "_sample", ending)
    assert run("parts", *options)[0] == 128 + number
    assert len(sampled) == 3
    monkeypatch.setattr(SelfPlay, "_sample", seen)
    status, parts = run("parts", *options)

    assert status == 0
    assert sampled == [[r * 6 + b * 3 + place for place in range(3)] for r in range(3) for b in range(2)]
    assert_same_run(whole, parts)
    assert not (parts / "self_play").exists()


def test_self_play_without_its_earlier_checkpoints_is_refused_before_weights_are_loaded(run, monkeypatch, capsys):
    _, folder = run("run", *SELF_PLAY, "train.max_steps=3")
    shutil.rmtree(folder / "snapshots" / "00001")
    monkeypatch.setattr(families, "load_parts", lambda *_, **__: pytest.fail("weights were loaded"))
    status, _ = run("run", *SELF_PLAY)

    assert status == 1
    message = capsys.readouterr().err
    assert "goes on from step 3" in message and "snapshots/00001" in message and "Traceback" not in message


def test_unpaired_training_on_one_label_alone_is_refused_before_weights_are_loaded(run, tmp_path, monkeypatch, capsys):
    one = pick_a_pic_row(0, image_0_uid="a", image_1_uid="b", jpg_1=encoded_image("red"))
    other = pick_a_pic_row(1, image_0_uid="b", image_1_uid="a", jpg_0=encoded_image("red"))
    path = write_pick_a_pic(tmp_path / "circle.parquet", [one, other])
    monkeypatch.setattr(families, "load_parts", lambda *_, **__: pytest.fail("weights were loaded"))
    status, folder = run("run", *KTO, f"data.path={path}")

    assert status == 1
    assert "none is undesirable" in capsys.readouterr().err
    assert not folder.exists()


ADDED = """if True:
    import re, sys
    from xdpo.loss import pairwise, registry
    page = open("docs/adding_an_objective.md").read()
    function, key, objective = re.findall(r"```python\\n(.*?)```", page, re.DOTALL)[:3]
    exec(function, vars(pairwise))
    registry.KEYS |= eval("{" + key + "}", vars(registry))
    registry.OBJECTIVES |= eval("{" + objective + "}", vars(registry))
    import train_xdpo
    sys.exit(train_xdpo.main(sys.argv[1:]))
"""


def test_the_objective_of_the_page_about_adding_one_trains_by_its_two_declarations(
    small_pipeline, small_pairs, tmp_path
):
    options = ("loss.name=robust_dpo", "loss.flip_rate=0.2", "loss.safeguard=0.9", "train.max_steps=1")
    ended = launch(ADDED, command(small_pipeline, small_pairs, tmp_path / "run", *options))
    assert ended.returncode == 0, ended.stderr
    assert "objective      robust_dpo, beta 2000, flip_rate 0.2" in ended.stdout
    assert rows_of(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2))  # as Diffusion-DPO's, whatever the rate


def test_the_objective_stands_in_the_run_folder(run):
    _, folder = run("run", "loss.name=dmpo", "loss.alpha=0.1", "train.max_steps=1", "checkpoint.every=1")

    assert "alpha: 0.1" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "run.json").read_text())
    assert policy_of(folder)
