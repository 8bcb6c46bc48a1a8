"""train_xdpo.py as its users run it: what it trains, how it resumes, how it stops, what it refuses."""

import hashlib
import importlib.util
import itertools
import json
import math
import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import held_elsewhere
from forks import launch
from safetensors.torch import load_file
from tolerances import ERROR, assert_same_but_for_rounding, assert_same_figures, drift, drift_tolerance
from training_runs import BITSANDBYTES, ROOT, assert_same_run, command, policy_of, rows_of, slow_but

import train_xdpo
from xdpo import families, files, find_batch, learner, models, precompute, reference, runs, step, training
from xdpo.cache import ReferenceCache
from xdpo.config import dump_config, load_config
from xdpo.data import PairDataset
from xdpo.families import PipelineParts

VARIANTS = {
    "full": [],
    "lora": ["model.trainable=lora", "model.lora_rank=4", "model.lora_alpha=16"],
    "bf16 autocast": ["compute.precision=bf16"],
    "lora in bf16": ["model.trainable=lora", "model.lora_rank=4", "compute.precision=bf16"],
    "gradient checkpointing": ["compute.gradient_checkpointing=true"],
    "channels last, eager attention": ["compute.channels_last=true", "compute.attention=eager"],
    "ema": ["model.ema_decay=0.5"],
    "moving reference": ["model.reference_decay=0.5"],
    "min-SNR": ["noise.weighting=min_snr"],
    "own noise": ["noise.shared_by_pair=false"],
    "diffusion_dpo": ["loss.name=diffusion_dpo"],
    "eq9": ["loss.reward=eq9"],
    "eq10": ["loss.reward=eq10"],
}


def assert_the_export_is_the_trained_model(folder, base_folder):
    """diffusers loads the export, it samples, and its UNet no longer predicts what the base's does."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    settings = {"safety_checker": None, "dtype": torch.float32}
    base = StableDiffusionPipeline.from_pretrained(base_folder, **settings)
    pipeline = StableDiffusionPipeline.from_pretrained(base_folder, **settings)
    if (folder / "export" / "unet").is_dir():
        pipeline.unet = UNet2DConditionModel.from_pretrained(folder / "export", subfolder="unet")
    else:
        pipeline.load_lora_weights(folder / "export")
    inputs = torch.randn(1, 4, 8, 8), 500, torch.randn(1, 8, 16)
    with torch.no_grad():
        assert not torch.allclose(pipeline.unet(*inputs).sample, base.unet(*inputs).sample, atol=1e-7)
    assert pipeline("a", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("overrides", slow_but(("full", "lora in bf16", "own noise", "eq10"), VARIANTS))
def test_each_variant_starts_at_ln_2_trains_and_exports_a_model_that_diffusers_loads(run, small_pipeline, overrides):
    status, folder = run("run", "train.max_steps=2", *overrides)

    assert status == 0
    first, second = rows_of(folder)
    assert first["loss"] == pytest.approx(math.log(2))
    assert first["margin"] == 0  # policy and reference are the same to the bit, hence ties
    assert first["implicit_accuracy"] == 0.5
    assert first["gradient_norm"] > 0
    assert second["loss"] != first["loss"]
    assert (folder / "export" / "unet").is_dir() == ("model.trainable=lora" not in overrides)
    assert_the_export_is_the_trained_model(folder, small_pipeline)


def test_a_v_prediction_model_trains_and_exports(run, v_prediction_pipeline):
    status, folder = run("run", "train.max_steps=2", f"model.pipeline={v_prediction_pipeline}")

    assert status == 0
    assert rows_of(folder)[0]["loss"] == pytest.approx(math.log(2))
    assert_the_export_is_the_trained_model(folder, v_prediction_pipeline)


def test_training_lowers_the_loss_on_its_pairs(run, small_pairs):
    _, folder = run("run", "train.max_steps=40", "eval.every=40", f"eval.path={small_pairs}", "loss.beta=100")

    before, after = (row["eval/loss"] for row in rows_of(folder) if "eval/loss" in row)
    assert before == pytest.approx(math.log(2))
    assert after < 0.9 * math.log(2)


def test_accumulating_equals_a_larger_micro_batch(run):
    _, small = run("small", "train.micro_batch_pairs=1")
    _, large = run("large", "train.micro_batch_pairs=4")

    assert_same_but_for_rounding(small, large)


@pytest.mark.parametrize(
    "fault",
    slow_but(("a micro-batch lost",), ("other noise", "a pair less", "a micro-batch lost")),
)
def test_a_fault_is_told_from_rounding(run, monkeypatch, fault):
    """What every comparison but for rounding stands on: the smallest fault is far outside of the tolerance."""
    _, right = run("right")
    original, calls = step.preference_loss, itertools.count(1)

    def lossy(*arguments):
        output = original(*arguments)
        return output._replace(loss=0 * output.loss) if next(calls) == 4 else output  # half of the second step's pairs

    if fault == "a micro-batch lost":
        monkeypatch.setattr(step, "preference_loss", lossy)
    _, wrong = run("wrong", *{"other noise": ["seed=1"], "a pair less": ["data.max_pairs=11"]}.get(fault, []))

    assert drift(right, wrong) > 10 * drift_tolerance(right)
    with pytest.raises(AssertionError):
        assert_same_figures(right, wrong)


# --- caches ----------------------------------------------------------------------------------------------


def checksum_of(folder):
    """SHA-256 of a run's final weights."""
    return hashlib.sha256((runs.finished_checkpoints(folder)[-1] / "policy.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_one_table_of_final_weights_equal_wherever_nothing_but_the_way_there_differs(
    run, small_pipeline, small_pairs, tmp_path
):
    """Micro-batches of 2 pairs throughout, one process' and two's, so that no batch's shape differs."""
    held_out = ("eval.every=3", f"eval.path={small_pairs}", "eval.draws=2", "data.max_pairs=10", "eval.pairs=12")
    examples, reference = f"cache.examples={tmp_path / 'examples'}", f"cache.reference={tmp_path / 'reference'}"
    exact = (examples, "cache.dtype=fp32")
    runs = {
        "plain": (),
        "two workers": ("data.num_workers=2",),
        "recording the reference": (reference,),
        "with the recorded reference": (reference,),
        "building exact examples": exact,
        "with exact examples and two workers": (*exact, "data.num_workers=2"),
        "with exact examples, recording": (*exact, reference),
        "with both": (*exact, reference),
    }
    checksums, evaluations = {}, {}
    for name, overrides in runs.items():
        _, folder = run(name, *held_out, *overrides)
        checksums[name], evaluations[name] = checksum_of(folder), [r for r in rows_of(folder) if "eval/loss" in r]
    run("both, in two parts", *held_out, *runs["with both"], "train.max_steps=3")
    checksums["both, in two parts"] = checksum_of(run("both, in two parts", *held_out, *runs["with both"])[1])
    for name, overrides in {"two processes": (), "two processes with both": runs["with both"]}.items():
        folder = tmp_path / name
        ended = launch(
            "train_xdpo.py", command(small_pipeline, small_pairs, folder, *held_out, *overrides), processes=2
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        checksums[name] = checksum_of(folder)

    alone = {name: checksum for name, checksum in checksums.items() if "processes" not in name}
    assert len(set(alone.values())) == 1, alone
    assert all(rows == evaluations["plain"] for rows in evaluations.values())
    assert checksums["two processes"] == checksums["two processes with both"]
    assert_same_but_for_rounding(tmp_path / "plain", tmp_path / "two processes")


def test_half_precision_examples_change_the_result_by_their_rounding(run, tmp_path):
    half = torch.finfo(torch.float16).eps
    _, plain = run("plain")
    _, cached = run("cached", f"cache.examples={tmp_path / 'examples'}")
    for row, other in zip(rows_of(plain), rows_of(cached), strict=True):
        assert row["policy_error"] == pytest.approx(other["policy_error"], rel=half)
    assert 0 < drift(plain, cached) < 2 * half**0.5


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_a_run_from_caches_loads_neither_encoders_nor_data_nor_the_reference(run, tmp_path, monkeypatch, trainable):
    from diffusers import AutoencoderKL

    caches = (f"cache.examples={tmp_path / 'examples'}", f"cache.reference={tmp_path / 'reference'}")
    caches += (f"model.trainable={trainable}",)
    _, first = run("first", *caches)
    for owner, name in (
        (AutoencoderKL, "from_pretrained"),
        (precompute.opening, "load_pairs"),
        (models, "make_reference"),
        (reference.Frozen, "measure"),
        (reference.AdapterOff, "measure"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    status, second = run("second", *caches)
    assert status == 0
    assert checksum_of(first) == checksum_of(second)


def test_other_objectives_and_longer_runs_share_the_reference(run, tmp_path, capsys):
    reference = f"cache.reference={tmp_path / 'reference'}"
    run("xdpo", reference)
    capsys.readouterr()
    run("dpo", reference, "loss.name=diffusion_dpo", "optim.learning_rate=1e-5", "train.max_steps=7")
    assert "24 samples known\n" in capsys.readouterr().out  # six steps of four pairs: the seventh is computed
    run("longer", reference, "train.max_steps=7")
    assert "28 samples known; all that this run needs" in capsys.readouterr().out
    run("another seed", reference, "seed=1")
    assert "0 samples known\n" in capsys.readouterr().out


@pytest.mark.slow
def test_the_reference_computed_ahead_is_the_one_that_training_computes(run, small_pipeline, small_pairs, tmp_path):
    held_out = ("eval.every=3", f"eval.path={small_pairs}")
    _, plain = run("plain", *held_out)
    ahead = (*held_out, f"cache.reference={tmp_path / 'reference'}")
    for _ in range(2):
        ended = launch("scripts/cache_reference.py", command(small_pipeline, small_pairs, tmp_path / "x", *ahead))
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert "12 batches, 0 of them computed now" in ended.stdout
    _, cached = run("cached", *ahead)
    assert checksum_of(plain) == checksum_of(cached)


@pytest.mark.parametrize(
    ("overrides", "of_main", "of_others"),
    [
        ([], True, True),
        (["cache.examples=c"], True, False),
        (["cache.examples=c", "samples.every=0"], False, False),
        (["cache.examples=c", "samples.every=0", "export.formats=[diffusers, single_file]"], True, False),
    ],
)
def test_encoders_are_loaded_by_the_processes_that_use_them(overrides, of_main, of_others):
    settings = load_config(ROOT / "configs" / "xdpo_sdxl.yaml", overrides)
    assert [training.needs_encoders(settings, is_main) for is_main in (True, False)] == [of_main, of_others]


def test_samples_are_drawn_from_caches_too(run, tmp_path):
    caches = (f"cache.examples={tmp_path / 'examples'}", f"cache.reference={tmp_path / 'reference'}", "samples.every=6")
    for name in ("first", "second"):
        status, folder = run(name, *caches)
        assert status == 0 and (folder / "samples" / "step_00000006.png").is_file()


def test_a_cache_of_something_else_is_refused_before_weights_are_loaded(run, tmp_path, monkeypatch, capsys):
    examples = f"cache.examples={tmp_path / 'examples'}"
    run("first", examples)
    monkeypatch.setattr(families, "load_parts", lambda *_, **__: pytest.fail("weights were loaded"))
    status, _ = run("second", examples, "data.resolution=8")
    assert status == 1 and "data.resolution: 16 in the cache, 8 in this run" in capsys.readouterr().err
    status, _ = run("third", f"cache.examples={tmp_path / 'nothing'}", "cache.build=false")
    assert status == 1 and "holds no finished cache; run scripts/cache_examples.py" in capsys.readouterr().err


def test_find_batch_tries_the_sizes_that_keep_the_total_batch_and_leaves_no_run(run, capsys, monkeypatch):
    clock = itertools.count()  # a second passes between any two looks at it: pairs/s double with the size
    monkeypatch.setattr(find_batch.time, "perf_counter", lambda: next(clock))
    status, folder = run("x", "--find-batch")
    printed = capsys.readouterr().out
    assert status == 0 and not folder.exists()
    rows = [line.split()[:3] for line in printed.splitlines() if line.endswith("GB")]
    assert rows == [["1", "4", "4"], ["2", "2", "8"], ["4", "1", "16"]]
    assert "fastest here: train.micro_batch_pairs=4; the total batch stays 4" in printed


def test_find_batch_stops_where_memory_ends(run, capsys, monkeypatch):
    original = step.preference_loss

    def out_of_memory(errors, *others):
        if len(errors.policy_chosen) > 2:
            raise torch.OutOfMemoryError("no more")
        return original(errors, *others)

    monkeypatch.setattr(step, "preference_loss", out_of_memory)
    status, _ = run("x", "--find-batch")
    assert status == 0
    assert "4  does not fit" in capsys.readouterr().out


def test_the_reference_follows_the_policy_as_a_moving_average(run):
    _, still = run("still")
    _, moving = run("moving", "model.reference_decay=0.5", "train.max_steps=1", "checkpoint.every=1")
    base = load_file(
        Path(load_config(still / "config.yaml").model.pipeline) / "unet/diffusion_pytorch_model.safetensors"
    )
    policy = policy_of(moving)
    reference = load_file(runs.finished_checkpoints(moving)[-1] / "reference.safetensors")

    assert any(not torch.equal(policy[name], base[name]) for name in base)
    for name in base:
        torch.testing.assert_close(reference[name], 0.5 * base[name] + 0.5 * policy[name])
    assert not (runs.finished_checkpoints(still)[-1] / "reference.safetensors").exists()


# --- resume ----------------------------------------------------------------------------------------------


RESUMED = {  # pairs in an epoch, and processes that load
    f"{where}, {workers} workers": (pairs, workers)
    for where, pairs in {"in the middle of an epoch": 10, "at the end of an epoch": 12, "after several": 4}.items()
    for workers in (0, 2)
}


@pytest.mark.parametrize(
    "epoch", slow_but(("in the middle of an epoch, 2 workers", "at the end of an epoch, 0 workers"), RESUMED)
)
def test_resumed_equals_uninterrupted(run, epoch):
    pairs, workers = epoch
    moving = ("model.ema_decay=0.9", "model.reference_decay=0.9")
    common = (f"data.max_pairs={pairs}", f"data.num_workers={workers}", *moving)
    _, whole = run("whole", *common)
    run("parts", *common, "train.max_steps=3")
    status, parts = run("parts", *common)

    assert status == 0
    assert_same_run(whole, parts)


OPTIMIZERS = {
    "channels last": ["compute.channels_last=true"],
    "lora": ["model.trainable=lora", "model.lora_rank=4"],
    "checkpointed, in bf16": ["compute.gradient_checkpointing=true", "compute.precision=bf16"],
    "adafactor": ["optim.name=adafactor"],
}


@pytest.mark.parametrize("options", slow_but(("lora",), OPTIMIZERS))
def test_every_layout_of_weights_and_moments_resumes_bit_for_bit(run, options):
    _, whole = run("whole", *options)
    run("parts", *options, "train.max_steps=3")
    assert run("parts", *options)[0] == 0
    assert_same_run(whole, run("parts", *options)[1])


@pytest.mark.skipif(not (BITSANDBYTES / "bitsandbytes").is_dir(), reason="scripts/test.sh installs bitsandbytes")
@pytest.mark.slow
def test_8_bit_adamw_saves_and_resumes_bit_for_bit(small_pipeline, small_pairs, tmp_path):
    for name, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        options = ("optim.name=adamw8bit", f"train.max_steps={steps}")
        arguments = command(small_pipeline, small_pairs, tmp_path / name, *options)
        ended = launch("train_xdpo.py", arguments, PYTHONPATH=str(BITSANDBYTES))
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    state = load_file(runs.finished_checkpoints(tmp_path / "parts")[-1] / "optimizer.safetensors")
    assert {tensor.dtype for name, tensor in state.items() if name.endswith("state1")} == {torch.uint8, torch.float32}


def test_a_second_training_in_a_folder_is_refused_by_the_name_of_the_first(run, tmp_path, capsys):
    with held_elsewhere(tmp_path / "run", "a training") as holder:
        (tmp_path / "run" / "config.yaml").write_text(dump_config(load_config("configs/base.yaml")))
        assert run("run", "--allow-config-change")[0] == 1
    assert f"is in use: a training, process {holder.pid} on " in capsys.readouterr().err
    assert run("run", "--allow-config-change")[0] == 0  # the lock went with its holder


def test_a_start_that_failed_binds_the_run_folder_to_nothing(run, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(families, "load_parts", lambda *_, **__: (_ for _ in ()).throw(ValueError("no weights")))
        status, folder = run("run", "seed=1")
    assert status == 1 and files.is_untouched(folder)
    assert run("run", "data.path=nowhere")[0] == 1
    assert run("run", "seed=2", "train.max_steps=1")[0] == 0


def test_folders_of_other_things_are_no_run_folder(run, small_pipeline, small_pairs, tmp_path, capsys):
    (tmp_path / "images" / "mine").mkdir(parents=True)
    refused = {
        small_pipeline: "holds something that is not a run (model_index.json",
        small_pairs: "is a file; choose another folder",
        str(tmp_path / "images"): "holds something that is not a run (mine)",
    }
    for folder, message in refused.items():
        assert run("run", f"output_dir={folder}")[0] == 1
        assert message in capsys.readouterr().err


def test_a_run_is_no_source_of_pairs_and_no_pipeline(run, capsys):
    _, folder = run("run", "train.max_steps=1")
    refused = {
        "no .parquet file matches": [f"data.path={folder}"],
        "holds no pairs.csv or pairs.jsonl": ["data.source=folder", f"data.path={folder}"],
        "no .tar file matches": ["data.source=webdataset", f"data.path={folder}"],
        "it is not the folder of a whole pipeline; it lacks model_index.json": [f"model.pipeline={folder / 'export'}"],
    }
    for message, keys in refused.items():
        assert run("next", *keys)[0] == 1
        assert message in capsys.readouterr().err


def test_a_launch_that_shares_out_the_weights_is_refused(run, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert run("run")[0] == 1
    assert "configured for FSDP" in capsys.readouterr().err


def test_autocast_keeps_no_copies_of_the_weights(run, monkeypatch):
    """1.7 GB of Stable Diffusion 1.5's until the end of every forward, and while images are sampled."""
    seen = []
    original = step.residuals

    def residuals(*given):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        return original(*given)

    for user in (step, reference):
        monkeypatch.setattr(user, "residuals", residuals)
    assert run("run", "compute.precision=bf16", "train.max_steps=1")[0] == 0
    assert set(seen) == {(True, False)}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "4 pairs = 1 (processes) × 2 (accumulation)"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "4 pairs = 2 (processes) × 1 (accumulation)"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "4 pairs = 2 (processes) × 1 (accumulation)"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ""),
        ({"WORLD_SIZE": "3"}, "4 pairs = 1 (processes) × 2 (accumulation)"),  # left in a shell: nobody launched this
        ({"RANK": "0", "WORLD_SIZE": "3"}, "cannot be split into 3 processes"),
    ],
)
def test_a_dry_run_says_once_what_the_launched_processes_would_do(run, capsys, monkeypatch, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, folder = run("run", "--dry-run")
    printed = capsys.readouterr()
    assert said in (printed.err if status else printed.out) and (said or not printed.out)
    assert status == int("cannot" in said) and not folder.exists()


def test_a_finished_run_is_left_as_it_is(run):
    _, folder = run("run", "train.max_steps=3")
    before = policy_of(folder)
    status, _ = run("run", "train.max_steps=3")

    assert status == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in policy_of(folder).items())
    assert [row["step"] for row in rows_of(folder)] == [1, 2, 3]


def test_sigterm_finishes_the_step_saves_and_resumes_to_the_same_end(run, monkeypatch, capsys):
    _, whole = run("whole")
    rate = learner.learning_rate_at

    def interrupted(settings, step_number):
        if step_number == 1:
            signal.raise_signal(signal.SIGTERM)
        return rate(settings, step_number)

    monkeypatch.setattr(learner, "learning_rate_at", interrupted)
    status, folder = run("parts")
    assert status == 128 + signal.SIGTERM
    stopped_after = rows_of(folder)[-1]["step"]
    assert stopped_after in (2, 3)
    assert runs.finished_checkpoints(folder)[-1].name == f"step_{stopped_after:08d}"
    assert "the same command resumes" in capsys.readouterr().out

    monkeypatch.setattr(learner, "learning_rate_at", rate)
    assert run("parts")[0] == 0
    assert_same_run(whole, folder)


def test_a_changed_config_is_refused_by_name_unless_allowed(run, capsys):
    _, folder = run("run", "train.max_steps=3")
    status, _ = run("run", "loss.beta=2000")

    assert status == 1
    assert "loss.beta: 1000" in capsys.readouterr().err
    assert run("run", "loss.beta=2000", "--allow-config-change")[0] == 0
    assert rows_of(folder)[-1]["step"] == 6


def test_other_pairs_under_the_same_path_are_refused_unless_allowed(run, small_pairs, tmp_path, capsys):
    rows = pq.read_table(small_pairs)
    mine = tmp_path / "mine.parquet"
    pq.write_table(rows, mine)
    run("run", f"data.path={mine}", "train.max_steps=3")
    pq.write_table(rows.slice(0, 8), mine)
    status, folder = run("run", f"data.path={mine}")

    assert status == 1
    assert "the data have changed: the training pairs are not those that the run in" in capsys.readouterr().err
    assert run("run", f"data.path={mine}", "--allow-config-change")[0] == 0
    assert "going on in the order of the new ones" in capsys.readouterr().out
    assert rows_of(folder)[-1]["step"] == 6


OTHERS = {"full": [], "bf16": ["compute.precision=bf16"], "lora": ["model.trainable=lora"]}


@pytest.mark.parametrize("options", slow_but(("bf16",), OTHERS))
@pytest.mark.slow
def test_recorded_errors_that_are_not_the_references_are_refused(run, tmp_path, monkeypatch, capsys, options):
    original = ReferenceCache.get
    reference = (f"cache.reference={tmp_path / 'reference'}", *options)
    run("recorded", *reference)
    assert run("again", *reference)[0] == 0
    capsys.readouterr()

    monkeypatch.setattr(ReferenceCache, "get", lambda self, *given: 1.1 * original(self, *given))
    status, _ = run("of another", *reference)
    message = capsys.readouterr().err
    assert status == 1
    assert "says that the reference's errors on the first pairs are" in message and "remove that folder" in message


def test_keys_without_effect_may_change_between_two_parts_of_a_run(run):
    run("run", "train.max_steps=3")
    status, folder = run("run", "train.micro_batch_pairs=4", "data.num_workers=1", "checkpoint.every=1")

    assert status == 0
    assert rows_of(folder)[-1]["step"] == 6


def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_what_to_do(run, monkeypatch, capsys):
    save, calls = runs.checkpoints.save_file, []

    def filling_up(tensors, path):
        calls.append(path)
        if len(calls) > 1:  # the second checkpoint's first file
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(runs.checkpoints, "save_file", filling_up)
    status, folder = run("run")
    message = capsys.readouterr().err
    assert status == 1
    assert "disk is full" in message and "run the same command again" in message
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000003"]

    monkeypatch.setattr(runs.checkpoints, "save_file", save)
    _, whole = run("whole")
    assert run("run")[0] == 0
    assert_same_run(whole, folder)


# --- looking while training --------------------------------------------------------------------------------


def test_held_out_pairs_and_samples_appear_at_their_intervals(run, small_pairs):
    from PIL import Image

    _, folder = run("run", "eval.every=3", f"eval.path={small_pairs}", "eval.pairs=5", "samples.every=6")

    evaluations = [row for row in rows_of(folder) if "eval/margin" in row]
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    assert evaluations[0]["eval/implicit_accuracy"] == 0.5
    assert evaluations[2]["eval/margin"] != 0
    sheets = sorted(path.name for path in (folder / "samples").iterdir())
    assert sheets == ["step_00000000.png", "step_00000006.png"]
    assert Image.open(folder / "samples" / sheets[0]).width > 2 * 16


def test_a_held_out_pair_is_read_and_encoded_once_for_all_its_draws(run, small_pairs, monkeypatch):
    read, encoded = [], []
    original, encode = PairDataset.batch, PipelineParts.encode_images

    def batch(self, positions):
        read.append((self.augment, positions))
        return original(self, positions)

    monkeypatch.setattr(PairDataset, "batch", batch)
    monkeypatch.setattr(PipelineParts, "encode_images", lambda *given: encoded.append(1) or encode(*given))
    common = (f"eval.path={small_pairs}", "eval.draws=3", "eval.pairs=5", "train.max_steps=1")
    assert run("run", "eval.every=1", *common)[0] == 0
    assert [given for augment, given in read if not augment] == [[0, 1], [2, 3], [4]] * 2  # before and after the step
    assert len(encoded) == 2 * 3 + 2


@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_micro_batch_or_the_training_seed(run, small_pairs):
    common = ("eval.every=1", f"eval.path={small_pairs}", "train.max_steps=1")
    _, one = run("one", *common, "train.micro_batch_pairs=1")
    _, other = run("other", *common, "train.micro_batch_pairs=4", "seed=7")

    first, second = (rows_of(folder)[0]["eval/reference_error"] for folder in (one, other))
    assert first == pytest.approx(second, rel=ERROR)


def test_the_run_folder_explains_itself(run):
    _, folder = run("run", "train.max_steps=1", "log.trackers=[tensorboard]")

    record = json.loads((folder / "run.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert record["training_pairs"]["kept"] == 12
    assert record["starts"][0]["command"]
    assert load_config(folder / "config.yaml").train.max_steps == 1
    assert list((folder / "tensorboard").rglob("events.out.tfevents.*"))


# --- what it refuses ---------------------------------------------------------------------------------------


def test_dry_run_prints_the_config_and_what_follows_and_writes_nothing(run, capsys):
    status, folder = run("run", "--dry-run")

    shown = capsys.readouterr().out
    assert status == 0
    assert "total_batch_pairs: 4" in shown and "effective β" in shown
    assert not folder.exists()


BAD_INPUT = {
    "a number of another objective": (["loss.name=hinge", "loss.alpha=0.5"], "alpha (got 0.5) does not act in hinge"),
    "unknown key": (["loss.bta=1"], "did you mean loss.beta"),
    "wrong type": (["train.max_steps=many"], "train.max_steps"),
    "out of range": (["loss.beta=-5"], "loss.beta"),
    "missing data file": (["data.path=nowhere/*.parquet"], "nowhere/*.parquet"),
    "missing pipeline folder": (["model.pipeline=./nowhere"], "model.pipeline"),
    "batch that does not split": (["train.total_batch_pairs=5"], "total batch of 5 pairs"),
    "a tracker that is not installed": (["log.trackers=[wandb]"], "log.trackers: wandb needs wandb"),
    "8-bit AdamW without bitsandbytes": (["optim.name=adamw8bit"], "optim.name: adamw8bit needs bitsandbytes"),
    "fp16 without a GPU": (["compute.precision=fp16"], "compute.precision"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_in_one_screen_before_weights_are_loaded(run, monkeypatch, capsys, overrides, message):
    if "compute.precision=fp16" in overrides and torch.accelerator.is_available():
        pytest.skip("this machine has a GPU")
    absent = {"wandb", "bitsandbytes"}  # on this machine they may be there
    find = importlib.util.find_spec
    monkeypatch.setattr(train_xdpo.importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    monkeypatch.setattr(families, "load_parts", lambda *_, **__: pytest.fail("weights were loaded"))
    status, folder = run("run", *overrides)

    error = capsys.readouterr().err
    assert status == 1
    assert message in error
    assert len(error.splitlines()) < 20 and "Traceback" not in error
    assert not folder.exists()


def test_a_model_folder_without_a_unet_is_refused(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "half" / "vae").mkdir(parents=True)
    monkeypatch.setattr(families, "load_parts", lambda *_, **__: pytest.fail("weights were loaded"))

    assert run("run", f"model.pipeline={tmp_path / 'half'}")[0] == 1
    assert "unet" in capsys.readouterr().err


def test_a_folder_that_is_not_a_run_is_refused(run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")

    assert run("run")[0] == 1
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(run, tmp_path, capsys):
    tmp_path.chmod(0o500)
    try:
        assert run("run")[0] == 1
    finally:
        tmp_path.chmod(0o700)
    assert "no permission" in capsys.readouterr().err


def test_a_diverged_run_stops_naming_pairs_and_values_and_keeps_its_weights_finite(run, capsys):
    status, folder = run("run", "optim.learning_rate=1e20", "optim.max_grad_norm=null", "checkpoint.every=1")

    message = capsys.readouterr().err
    assert status == 1
    assert "not finite in optimizer step" in message and "pair 10" in message and "e policy" in message
    assert rows_of(folder)[-1]["step"] < 6


# --- several processes, real kills -------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_accumulation_and_resume_bit_for_bit(
    run, scored, small_pipeline, small_pairs, tmp_path
):
    """With margin weights, which belong to a pair and not to a place in a batch."""
    common = ("train.micro_batch_pairs=1", "data.max_pairs=10", "eval.every=6", *scored((3, 1), (2, 1.5), (1, 1.2)))
    _, one = run("one", *common)
    for folder, overrides in (("two", common), ("parts", (*common, "train.max_steps=3")), ("parts", common)):
        ended = launch(
            "train_xdpo.py", command(small_pipeline, small_pairs, tmp_path / folder, *overrides), processes=2
        )
        assert ended.returncode == 0, ended.stderr[-3000:]

    assert_same_but_for_rounding(one, tmp_path / "two")
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["processes"] == 2
    whole, parts = policy_of(tmp_path / "two"), policy_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


KILLED = """
import os, signal, sys
import train_xdpo
from xdpo import files, runs, step
target, name, count = {target}, {name!r}, {count}
original, calls = getattr(target, name), []
def deadly(*args, **kwargs):
    calls.append(1)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(target, name, deadly)
sys.exit(train_xdpo.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("moment", "target", "name", "count"),
    [
        pytest.param("in a step, between two checkpoints", "step", "preference_loss", 9, marks=pytest.mark.slow),
        pytest.param(
            "in the second checkpoint, one file written",
            "runs.optimizer_state",
            "save",
            2,
            marks=pytest.mark.slow,
        ),
        ("before the second checkpoint is renamed", "files", "_flush_all", 2),
    ],
)
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(
    run, small_pipeline, small_pairs, tmp_path, moment, target, name, count
):
    _, whole = run("whole")
    script = KILLED.format(target=target, name=name, count=count)
    arguments = command(small_pipeline, small_pairs, tmp_path / "killed")
    ended = launch(script, arguments)
    assert ended.returncode == -signal.SIGKILL
    assert [path.name for path in runs.finished_checkpoints(tmp_path / "killed")] == ["step_00000003"]

    assert run("killed")[0] == 0
    assert_same_run(whole, tmp_path / "killed")


# --- every shipped config ------------------------------------------------------------------------------------

TINY_CONFIGS = sorted(path for path in (ROOT / "configs" / "tiny").rglob("*.yaml") if path.name != "base.yaml")


USUAL_CONFIGS = [f"configs/tiny/{name}.yaml" for name in ("xdpo", "xdpo_lora", "seppo", "online/xdpo")]


@pytest.mark.parametrize("path", slow_but(USUAL_CONFIGS, {str(path.relative_to(ROOT)): path for path in TINY_CONFIGS}))
def test_every_embedded_config_runs_two_steps(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    small = ["train.max_steps=2", "train.total_batch_pairs=4", "train.micro_batch_pairs=4", "eval.pairs=4"]
    draws = path.stem in ("xdpo", "xdpo_lora")
    samples = ["samples.num_inference_steps=2", "eval.every=2", f"samples.every={2 * draws}", "log.trackers=[]"]
    samples += ["self_play.every=1", "self_play.buffer_pairs=4", "self_play.num_inference_steps=2"]
    if load_config(path).feed.is_online:
        samples += ["online.every=1", "online.prompts_per_round=2", "online.images_per_prompt=2"]
        samples += ["online.num_inference_steps=2", "online.batch_size=4"]
    status = train_xdpo.main(["--config", str(path), f"output_dir={tmp_path / 'run'}", *small, *samples])

    assert status == 0
    loss = next(row["loss"] for row in rows_of(tmp_path / "run") if "loss" in row)
    if load_config(path).loss.name in ("xdpo", "diffusion_dpo", "chipo", "f_dpo", "seppo"):
        assert loss == pytest.approx(math.log(2))
    assert math.isfinite(loss)
