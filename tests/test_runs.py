"""Checkpoints that are whole or absent, and a run folder that knows whose it is."""

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from xdpo.config import load_config
from xdpo.families import load_parts
from xdpo.families.stable_diffusion import STABLE_DIFFUSION
from xdpo.models import make_policy
from xdpo.runs import (
    CheckpointError,
    check_optimizer,
    check_pairs,
    check_run_folder,
    describe_run,
    export_model,
    finished_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from xdpo.runs.card import _LICENCES, model_card

CONFIG = load_config("configs/xdpo_sd15.yaml")


def trained(steps, seed=0):
    """A small model and its optimizer after some steps."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder, step, keep=2):
    model, optimizer = trained(step)
    return save_checkpoint(folder, step, model, optimizer, is_main=True, keep=keep, extra={"scaler": {"scale": 2.0}})


def test_a_checkpoint_restores_weights_moments_and_progress_to_the_bit(tmp_path):
    path = save(tmp_path, 3)
    model, optimizer = trained(0, seed=1)
    progress = load_checkpoint(path, model, optimizer)

    expected_model, expected_optimizer = trained(3)
    assert progress["step"] == 3 and progress["extra"]["scaler"] == {"scale": 2.0}
    for one, other in zip(model.parameters(), expected_model.parameters(), strict=True):
        assert torch.equal(one, other)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[one][key], expected_optimizer.state[other][key])


def test_the_oldest_go_first_and_only_after_the_new_one_is_there(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, keep=2)
    replace, present = os.replace, []

    def watched(source, target):
        present.append([path.name for path in finished_checkpoints(tmp_path)])
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    save(tmp_path, 3, keep=2)

    assert present == [["step_00000001", "step_00000002"]]
    assert [path.name for path in finished_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]


def test_a_half_written_checkpoint_is_not_one(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step_00000002.part").mkdir()

    assert [path.name for path in finished_checkpoints(tmp_path)] == ["step_00000001"]


def test_a_damaged_checkpoint_names_what_else_there_is_to_resume_from(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    weights = path / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])

    with pytest.raises(CheckpointError, match="left to resume from: step_00000001"):
        load_checkpoint(path, *trained(0))


@pytest.mark.parametrize("content", [b"{", b"[]", b"[1]", b"3", b"\xff", b"{}", b'{"step": 2}'])
def test_damaged_progress_is_a_damaged_checkpoint(tmp_path, content):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / "progress.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_00000002: .*left to resume from: step_00000001"):
        load_checkpoint(path, *trained(0))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b""])
def test_a_damaged_record_of_a_run_is_named_and_may_be_removed(tmp_path, content):
    config = load_config("configs/base.yaml", ["output_dir=x"])
    describe_run(tmp_path, config, pairs_fingerprint="of these pairs")
    (tmp_path / "run.json").write_bytes(content)
    for use in (lambda: check_pairs(tmp_path, "of others", False, print), lambda: describe_run(tmp_path, config)):
        with pytest.raises(ValueError, match=r"run\.json is damaged .*or remove it"):
            use()
    (tmp_path / "run.json").unlink()
    check_pairs(tmp_path, "of others", False, print)
    describe_run(tmp_path, config)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = save(tmp_path, 1)
    other = torch.nn.Linear(3, 1)
    with pytest.raises(CheckpointError, match="holds another model"):
        load_checkpoint(path, other, torch.optim.AdamW(other.parameters()))


# --- optimizers ------------------------------------------------------------------------------------------


class Unusual(torch.optim.SGD):
    """An optimizer whose state has numbers, nested tensors and one tensor that all parameters share."""

    shared = torch.arange(4.0)

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state.setdefault("codes", {"of": self.shared, "none": None, "scale": 0.5, "on": True})
                state["average"] = torch.full_like(parameter, state["count"])


def test_any_state_of_tensors_and_numbers_comes_back_as_it_was(tmp_path):
    model = torch.nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    optimizer = Unusual(model.parameters())
    for _ in range(2):
        optimizer.step()
    path = save_checkpoint(tmp_path, 2, model, optimizer, is_main=True, keep=1)
    again = torch.nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    restored = Unusual(again.parameters())
    load_checkpoint(path, again, restored)

    for old, new in zip(model.parameters(), again.parameters(), strict=True):
        expected, found = optimizer.state[old], restored.state[new]
        assert found["count"] == 2 and type(found["count"]) is int
        assert {key: found["codes"][key] for key in ("none", "scale", "on")} == {"none": None, "scale": 0.5, "on": True}
        assert torch.equal(found["codes"]["of"], Unusual.shared)
        assert torch.equal(found["average"], expected["average"])
        assert found["average"].stride() == new.stride()  # fused kernels go by the place in memory
    assert all(
        weight.stride() == old.stride() for weight, old in zip(again.parameters(), model.parameters(), strict=True)
    )


def test_state_is_copied_into_the_weights_that_are_there(tmp_path):
    path = save(tmp_path, 1)
    model, optimizer = trained(0, seed=1)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    load_checkpoint(path, model, optimizer)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


def keeps_a_list(optimizer, parameter, group):
    optimizer.state[parameter]["history"] = [1, 2]


def keeps_numbered_states(optimizer, parameter, group):
    optimizer.state[parameter][0] = torch.zeros(1)


def keeps_something_in_its_group(optimizer, parameter, group):
    group["d"] = 2.0


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (keeps_a_list, "::history is of type list"),
        (keeps_numbered_states, "has the key 0"),
        (keeps_something_in_its_group, "keeps d beside its parameters"),
    ],
)
def test_an_optimizer_that_a_checkpoint_cannot_hold_is_refused_by_name(keep, message):
    class Keeper(torch.optim.SGD):
        def step(self, closure=None):
            group = self.param_groups[0]
            keep(self, group["params"][0], group)

    with pytest.raises(ValueError, match=message):
        check_optimizer(lambda parameters: Keeper(parameters, lr=0.1), torch.device("cpu"))
    check_optimizer(lambda parameters: torch.optim.AdamW(parameters, fused=True), torch.device("cpu"))


# --- the run folder ------------------------------------------------------------------------------------------


def test_a_run_folder_records_each_start(tmp_path):
    for _ in range(2):
        describe_run(tmp_path / "run", CONFIG, training_pairs=12)

    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["starts"]) == 2 and record["training_pairs"] == 12
    assert load_config(tmp_path / "run" / "config.yaml") == CONFIG


def test_a_run_has_one_name_at_every_start(tmp_path):
    """W&B goes on with the run of that name."""
    names = {describe_run(tmp_path / "run", CONFIG) for _ in range(2)}
    assert len(names) == 1 and names != {describe_run(tmp_path / "another", CONFIG)}


def test_what_a_start_on_a_full_disk_left_aside_is_no_other_content(tmp_path):
    for name in ("config.yaml.0123456789ab.part", "lock"):
        (tmp_path / name).write_text("half")
    check_run_folder(tmp_path, CONFIG, allow_config_change=False)


def test_another_config_is_refused_by_key_and_value(tmp_path):
    describe_run(tmp_path / "run", CONFIG)
    check_run_folder(tmp_path / "run", CONFIG, allow_config_change=False)
    other = load_config("configs/xdpo_sd15.yaml", ["loss.eta=1", "checkpoint.keep=5"])

    with pytest.raises(ValueError, match=r"loss\.eta: 0\.05 → 1") as refusal:
        check_run_folder(tmp_path / "run", other, allow_config_change=False)
    assert "checkpoint.keep" not in str(refusal.value)
    check_run_folder(tmp_path / "run", other, allow_config_change=True)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        check_run_folder(tmp_path / "run", CONFIG, allow_config_change=False)


def test_checking_a_folder_writes_nothing(tmp_path):
    check_run_folder(tmp_path / "a" / "b", CONFIG, allow_config_change=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("trainable", "words"), [("full", "UNet2DConditionModel"), ("lora", "load_lora_weights")])
def test_the_model_card_says_how_to_load_the_model_and_what_made_it(trainable, words, tmp_path):
    config = load_config("configs/xdpo_sd15.yaml", [f"model.trainable={trainable}"])
    card = model_card(config, STABLE_DIFFUSION, tmp_path)
    facts = ModelCard(card).data.to_dict()

    assert words in card and facts["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert facts["license"] == "creativeml-openrail-m" and facts["datasets"] == [config.data.path]
    assert facts["base_model_relation"] == {"full": "finetune", "lora": "adapter"}[trainable]
    assert facts["pipeline_tag"] in facts["tags"] and ("lora" in facts["tags"]) == (trainable == "lora")
    assert "η = 0.05" in card and "warmup_steps: 500" in card
    assert "held-out" not in card and "command" not in card and "![" not in card


def test_the_model_card_names_no_base_or_data_that_the_hub_does_not_have(small_pipeline, tmp_path):
    overrides = [f"model.pipeline={small_pipeline}", "data.source=parquet", "data.path=pairs.parquet"]
    facts = ModelCard(model_card(load_config("configs/base.yaml", overrides), STABLE_DIFFUSION, tmp_path)).data
    assert facts.base_model is None and facts.datasets is None and facts.license == "other" and facts.license_name


def test_the_licences_are_those_of_the_shipped_configs_base_models():
    shipped = {load_config(path).model.pipeline for path in Path("configs").glob("*.yaml")}
    assert shipped <= _LICENCES.keys()


# --- the result ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_equal_models_are_exported_as_equal_files_that_others_may_read(small_pipeline, tmp_path, trainable):
    """safetensors writes metadata in an order of its own each time, and files that only their owner may read."""
    config = load_config("configs/base.yaml", [f"model.pipeline={small_pipeline}", f"model.trainable={trainable}"])
    torch.manual_seed(0)
    parts = load_parts(config.model)
    policy = make_policy(parts, config.model, config.compute)
    umask = os.umask(0o027)
    try:
        for number in range(8):
            folder = tmp_path / str(number)
            export_model(folder, policy, parts, config, is_main=True, unwrap=lambda module: module)
    finally:
        os.umask(umask)
    exports = [sorted(path for path in (tmp_path / str(n)).rglob("*") if path.is_file()) for n in range(8)]
    assert len({tuple(path.read_bytes() for path in files) for files in exports}) == 1
    assert {path.stat().st_mode & 0o777 for files in exports for path in files} == {0o640}
    weights = next(path for path in exports[0] if path.suffix == ".safetensors")
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
        assert metadata["format"] == "pt" and set(file.keys())
    if trainable == "lora":
        targets = json.loads(metadata["lora_adapter_metadata"])["unet.target_modules"]
        assert targets == sorted(targets), "a set's order changes from process to process"
