"""Loss scaling in fp16, with a scaler on the CPU: one overflow is skipped, nothing but overflows stops the run."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import policy_of, rows_of

from xdpo import runs, training


@pytest.fixture
def scaled(monkeypatch):
    """scaled(bad): training steps, from 1, for which bad(step) holds get a gradient that is no number."""
    build = training.build_accelerator

    def install(is_bad, fused=True):
        def scaling(settings):
            accelerator = build(settings)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
            prepare, calls = accelerator.prepare, []

            def prepare_and_spoil(policy, optimizer):
                policy, optimizer = prepare(policy, optimizer)
                accelerator.native_amp, accelerator.autocast = True, nullcontext
                accelerator.state._mixed_precision = "fp16"

                def spoil(gradient):
                    calls.append(1)
                    step = -(-len(calls) // accelerator.gradient_accumulation_steps) + start
                    return gradient * float("nan") if is_bad(step) else gradient

                next(policy.parameters()).register_hook(spoil)
                return policy, optimizer

            accelerator.prepare = prepare_and_spoil
            finished = runs.finished_checkpoints(Path(settings.output_dir))
            start = runs.step_of(finished[-1]) if finished else 0
            return accelerator

        monkeypatch.setattr(training, "build_accelerator", scaling)
        if not fused:
            unfused = torch.optim.AdamW
            monkeypatch.setattr(torch.optim, "AdamW", lambda *given, fused, **named: unfused(*given, **named))

    return install


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_overflows_is_skipped_counted_and_changes_nothing(run, scaled, fused, capsys):
    common = ("train.max_steps=3", "checkpoint.every=1", "checkpoint.keep=3", "model.ema_decay=0.5")
    scaled(lambda step: step == 2, fused)
    status, folder = run("run", *common, "model.reference_decay=0.5")

    assert status == 0
    rows = rows_of(folder)
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1]
    assert [row["loss_scale"] for row in rows] == [65536, 32768, 32768]
    assert "step 2: gradients overflowed in fp16; skipped" in capsys.readouterr().out
    first, second, third = runs.finished_checkpoints(folder)
    for name in ("policy", "optimizer", "ema", "reference"):
        one, other, last = (load_file(path / f"{name}.safetensors") for path in (first, second, third))
        assert all(torch.equal(one[key], other[key]) for key in one), f"{name} moved in the skipped step"
        assert any(not torch.equal(other[key], last[key]) for key in one), name


def test_the_reference_point_of_kto_stays_in_a_skipped_step(run, scaled):
    scaled(lambda step: step == 3)
    options = ("loss.name=diffusion_kto", "loss.beta=100", "optim.learning_rate=1e-3", "train.max_steps=5")
    _, folder = run("run", *options)
    rows = rows_of(folder)
    assert rows[3]["z0"] == rows[2]["z0"] != rows[4]["z0"]


def test_a_run_of_nothing_but_overflows_stops_and_keeps_its_checkpoint(run, scaled, capsys):
    scaled(lambda step: step > 2)
    status, folder = run("run", "train.max_steps=60", "checkpoint.every=2", "checkpoint.keep=1000")

    message = capsys.readouterr().err
    assert status == 1
    assert "gradients were not finite in 17 optimizer steps in a row, up to step 19" in message  # 2^16 / 2^17 < 1
    assert "compute.precision=bf16" in message
    assert not (folder / "export").exists()
    weights = [load_file(path / "policy.safetensors") for path in runs.finished_checkpoints(folder)]
    assert all(torch.isfinite(tensor).all() for tensor in weights[-1].values())
    assert all(torch.equal(weights[0][name], weights[-1][name]) for name in weights[0])


@pytest.mark.slow
def test_skipped_steps_are_counted_over_a_resume(run, scaled, capsys):
    scaled(lambda step: step > 2)
    run("run", "train.max_steps=6", "checkpoint.every=6")
    status, folder = run("run", "train.max_steps=60", "checkpoint.every=6")
    assert status == 1
    assert rows_of(folder)[-1]["skipped_steps"] == 17
    assert "in 17 optimizer steps in a row" in capsys.readouterr().err
    assert policy_of(folder)
