"""What a config file may say, what it is told when it says something else, and what follows from it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from xdpo.config import (
    KEYS,
    Config,
    ConfigError,
    LossConfig,
    accumulation_steps,
    build_parser,
    changed_keys,
    describe,
    dump_config,
    effective_beta,
    effective_learning_rate,
    flatten,
    load_config,
)
from xdpo.config.explain import base_yaml
from xdpo.loss import KEYS as LOSS_KEYS
from xdpo.loss import OBJECTIVES

ROOT = Path(__file__).parent.parent
OF_OTHER_KINDS = {
    "accelerate",
    "models",
    "experiments",
}  # launches, and models to generate with: read and tested elsewhere
CONFIGS = sorted(file for file in (ROOT / "configs").rglob("*.yaml") if not OF_OTHER_KINDS & set(file.parts))
TABLE_3 = {  # row: (η, n, γ)
    "eta1_n1": (1.0, 1.0, 1.0),
    "eta1_n3": (1.0, 3.0, 1 / 3),
    "eta1_n6": (1.0, 6.0, 1 / 6),
    "eta0.5_n6": (0.5, 6.0, 1 / 6),
    "eta0.1_n6": (0.1, 6.0, 1 / 6),
    "eta0.05_n6": (0.05, 6.0, 1 / 6),
}


@pytest.fixture
def write(tmp_path):
    """Writes a config file under the test's folder and gives its path."""

    def write_file(text: str, name: str = "run.yaml") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    return write_file


def error_of(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return str(caught.value)


def config_with(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "base.yaml", overrides)


# ---- Values ----


def test_numbers_are_read_as_a_person_means_them(write):
    config = load_config(write("output_dir: out\noptim: {learning_rate: 1e-8, eps: 1E-9}\nloss: {gamma: 1/6, n: 6}\n"))
    assert config.optim.learning_rate == 1e-8
    assert config.optim.eps == 1e-9
    assert config.loss.gamma == 1 / 6
    assert config.loss.n == 6.0 and isinstance(config.loss.n, float)


@pytest.mark.parametrize(
    ("text", "value"), [("1/6", 1 / 6), ("'1/3'", 1 / 3), ("1 / 4", 0.25), ("0.5/2", 0.25), ("1/1", 1.0), ("3", 3.0)]
)
def test_a_fraction_is_the_number_it_says(text, value):
    assert config_with(f"loss.gamma={text}").loss.gamma == value


def test_yes_no_on_and_off_are_text_and_leading_zeros_are_decimal():
    assert config_with("output_dir=no").output_dir == "no"
    assert config_with("output_dir=on").output_dir == "on"
    assert config_with("seed=010").seed == 10


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optim.learning_rate=fast", "optim.learning_rate: must be a number (got 'fast')"),
        ("optim.learning_rate='1e-8'", "optim.learning_rate: must be a number (got '1e-8')"),
        ("optim.learning_rate=true", "optim.learning_rate: must be a number (got true)"),
        ("optim.learning_rate=", "optim.learning_rate: must be a number (got null)"),
        ("optim.learning_rate=0", "optim.learning_rate: must be greater than 0 (got 0)"),
        ("optim.learning_rate=.nan", "optim.learning_rate: must be a finite number (got nan)"),
        ("loss.beta=.inf", "loss.beta: must be a finite number (got inf)"),
        ("loss.beta=1e999", "loss.beta: must be a finite number (got inf)"),
        ("loss.beta=" + "9" * 400, "loss.beta: must be a finite number (got 999"),
        ("loss.beta=-5", "loss.beta: must be greater than 0 (got -5)"),
        ("loss.gamma=1/0", "loss.gamma: must be a number, and a fraction cannot divide by zero (got '1/0')"),
        ("loss.gamma=one/six", "loss.gamma: must be a number (got 'one/six')"),
        ("loss.eta=-0.1", "loss.eta: must be at least 0 (got -0.1)"),
        ("loss.name=[xdpo]", "loss.name: must be 'xdpo', 'diffusion_dpo', "),
        ("loss.reward=eq11", "loss.reward: must be 'appendix_c', 'eq9' or 'eq10' (got 'eq11')"),
        ("seed=-1", "seed: must be at least 0 (got -1)"),
        ("seed=4294967296", "seed: must be at most 4294967295 (got 4294967296)"),
        ("seed=1.0", "seed: must be a whole number (got 1.0)"),
        ("seed='1'", "seed: must be a whole number (got '1')"),
        ("seed=true", "seed: must be a whole number (got true)"),
        ("seed=1_000", "seed: must be a whole number (got '1_000')"),
        ("compute.tf32=1", "compute.tf32: must be true or false (got 1)"),
        ("compute.tf32=yes", "compute.tf32: must be true or false (got 'yes')"),
        ("data.resolution=500", "data.resolution: must be a multiple of 8 (got 500)"),
        ("data.resolution=0", "data.resolution: must be greater than 0 (got 0)"),
        ("data.caption_dropout=1.5", "data.caption_dropout: must be at most 1 (got 1.5)"),
        ("data.path=3", "data.path: must be a path or a list of paths, none of them empty (got 3)"),
        ("data.path=[]", "data.path: must be a path or a list of paths, none of them empty (got [])"),
        ("eval.path=[a, '']", "eval.path: must be a path or a list of paths, none of them empty (got ['a', ''])"),
        ("model.ema_decay=1", "model.ema_decay: must be less than 1 (got 1)"),
        ("model.ema_decay=0", "model.ema_decay: must be greater than 0 (got 0)"),
        ("model.revision=2024", "model.revision: must be text (got 2024)"),
        ("output_dir=''", "output_dir: must not be empty (got '')"),
        ("optim.betas=[0.9]", "optim.betas[1]: is missing (got [0.9])"),
        ("optim.betas=[0.9, 1]", "optim.betas[1]: must be less than 1 (got 1)"),
        ("optim.betas=[0.9, 0.99, 0.999]", "optim.betas: must have 2 values (got [0.9, 0.99, 0.999])"),
        ("optim.betas=0.9", "optim.betas: must be a list (got 0.9)"),
        ("log.trackers=[tensorbord]", "log.trackers[0]: must be 'tensorboard' or 'wandb' (got 'tensorbord')"),
        ("samples.prompts=a fox", "samples.prompts: must be a list (got 'a fox')"),
        ("train.micro_batch_pairs=0", "train.micro_batch_pairs: must be greater than 0 (got 0)"),
        ("loss.bta=1000", "loss.bta: unknown key (got 1000); did you mean loss.beta?"),
        ("los.beta=1000", "los.beta: unknown key (got 1000); did you mean loss.beta?"),
        ("learning_rate=1e-6", "learning_rate: unknown key (got 1e-06); did you mean optim.learning_rate?"),
        ("train.learning_rate=1", "train.learning_rate: unknown key (got 1); did you mean optim.learning_rate?"),
        ("optim.lr=1", "optim.lr: unknown key (got 1); optim has name, learning_rate, scale_lr,"),
        ("optimizer=1", "optimizer: unknown key (got 1); did you mean the section optim?"),
        ("zzz=1", "zzz: unknown key (got 1); the sections are model, compute,"),
        ("inherits=x.yaml", "inherits: unknown key (got 'x.yaml')"),
        ("seed.x=1", "seed.x: unknown key (got 1)"),
        ("loss.beta.x=1", "loss.beta.x: unknown key (got 1)"),
        ("loss=1", "loss: is a section (got 1); set one of its keys, as in loss.name=…"),
        ("loss.beta", "loss.beta: an override is written section.key=value, as in loss.beta=2000"),
        ("=3", "=3: an override is written section.key=value, as in loss.beta=2000"),
        ("data.path=*.parquet", """if it is text, quote it twice: data.path='"…"'"""),
        ("samples.prompts=[a", "samples.prompts: not valid YAML: line 1"),
    ],
)
def test_a_bad_override_is_told_what_it_must_be_and_what_it_was(override, problem):
    message = error_of(ROOT / "configs" / "base.yaml", override)
    assert problem in message
    assert message.endswith("[on the command line]")
    assert "1 problem\n" in message


@pytest.mark.parametrize("key", ["betas=[0.5, 0.75]", "eps=1e-6"])
def test_numbers_of_adamw_are_refused_beside_adafactor(key):
    message = error_of(ROOT / "configs" / "base.yaml", "optim.name=adafactor", f"optim.{key}")
    assert f"{key.partition('=')[0]} is AdamW's, and optim.name is adafactor" in message


def test_all_problems_are_reported_at_once_with_the_file_they_are_in(write):
    write("output_dir: out\nseed: -1\noptim: {lerning_rate: 1}\n", "parent.yaml")
    file = write("inherits: parent.yaml\nloss: {bta: 1000, n: six}\ncompute: {tf32: 1}\ntrain: 5\n")
    lines = error_of(file, "eval.pairs=0").splitlines()
    assert lines[0] == f"{file}: 7 problems"
    parent = file.parent / "parent.yaml"
    assert {line.strip() for line in lines[1:]} == {
        f"optim.lerning_rate: unknown key (got 1); did you mean optim.learning_rate? [in {parent}]",
        "loss.bta: unknown key (got 1000); did you mean loss.beta?",
        "train: must be a section of `key: value` lines (got 5)",
        f"seed: must be at least 0 (got -1) [in {parent}]",
        "compute.tf32: must be true or false (got 1)",
        "loss.n: must be a number (got 'six')",
        "eval.pairs: must be greater than 0 (got 0) [on the command line]",
    }


def test_xdpo_without_any_reward_is_refused_beside_other_problems(write):
    message = error_of(write("output_dir: out\nseed: -1\nloss: {eta: 0, gamma: 0}\n"))
    assert "2 problems" in message
    assert "seed: must be at least 0 (got -1)" in message
    assert "loss: eta and gamma are both 0, so that the loss has no gradient; raise one of them" in message


def test_a_number_of_another_objective_is_refused_naming_its_owners():
    assert config_with("loss.name=diffusion_dpo", "loss.eta=0.05").loss.name == "diffusion_dpo"  # the default
    message = error_of(ROOT / "configs" / "base.yaml", "loss.name=diffusion_dpo", "loss.eta=0")
    assert "eta (got 0.0) does not act in diffusion_dpo; it belongs to xdpo, f_dpo" in message
    message = error_of(ROOT / "configs" / "base.yaml", "loss.name=dspo", "loss.margin_weight=10")
    assert "margin_weight (got 10.0) does not act in dspo; it belongs to xdpo, diffusion_dpo" in message
    message = error_of(ROOT / "configs" / "base.yaml", "loss.alpha=0.5")
    assert "alpha (got 0.5) does not act in xdpo; it belongs to f_dpo, dmpo, alpha_dpo" in message


def test_the_loss_section_is_what_the_registry_declares():
    assert list(LossConfig.model_fields) == ["name", *LOSS_KEYS]
    assert set(LOSS_KEYS) == {key for objective in OBJECTIVES.values() for key in objective.keys}
    assert LossConfig().name == next(iter(OBJECTIVES))
    for name, objective in OBJECTIVES.items():
        loss = config_with(f"loss.name={name}").loss
        assert (
            loss.objective is objective
            and loss.values == objective.keys
            and loss.hyperparameters == objective.hyperparameters
        )
        assert loss.beta == objective.keys.get("beta")
        given = LossConfig(name=name, **objective.keys)  # every default is in its own range
        assert given.values == objective.keys
    assert config_with("loss.name=mapo").loss.beta == 0.1


def test_a_number_that_is_given_takes_the_place_of_the_published_one():
    loss = config_with("loss.name=dmpo", "loss.alpha=0.5", "loss.safeguard=0.9").loss
    assert loss.hyperparameters == {"beta": 2000.0, "alpha": 0.5}
    assert loss.values == {"beta": 2000.0, "alpha": 0.5, "safeguard": 0.9, "margin_weight": None}


def test_numbers_that_do_not_go_together_are_refused():
    base = ROOT / "configs" / "base.yaml"
    alpha = "alpha (got 1.5) must lie between 0 and 1 (loss.name: {})"
    for name in ("dmpo", "alpha_dpo"):
        assert alpha.format(name) in error_of(base, f"loss.name={name}", "loss.alpha=1.5")
    assert config_with("loss.name=f_dpo", "loss.alpha=1.5").loss.hyperparameters["alpha"] == 1.5
    flat = ("loss.name=f_dpo", "loss.eta=0", "loss.gamma=0")
    assert "the loss has no gradient" in error_of(base, *flat, "loss.divergence=xdpo")
    assert config_with(*flat).loss.divergence is None


def test_what_is_said_of_a_key_names_where_it_acts_and_what_is_published():
    said = {key: field.description for key, field in LossConfig.model_fields.items()}
    assert said["max_reward"] == "chipo: bound R of the reward; null: 10"
    assert said["kappa"].startswith("chipo, f_dpo: ") and said["kappa"].endswith("; null: 1")
    assert said["alpha"].endswith("; null: f_dpo 0.5, dmpo 0.01, alpha_dpo 0.9999")
    assert said["safeguard"].startswith("all but sft, diffusion_kto, diffusion_nft: ")
    assert said["name"].endswith(
        "; without a reference: mapo, sft; self-play: seppo; on single images: diffusion_kto, diffusion_nft"
    )


def test_the_page_of_objectives_has_the_numbers_that_are_published():
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    for name, objective in OBJECTIVES.items():
        row = re.search(rf"^\| `{name}` \|.*|^`{name}`: (?:.+\n)+", page, re.MULTILINE)
        assert row, f"docs/objectives.md has no row of {name}"
        for key, value in objective.published.items():
            told = value if isinstance(value, str) else f"{value:g}"
            assert re.search(rf"`{key}` (?:. = )?{told}\b", row[0]), f"docs/objectives.md: {name} has {key} {told}"


def test_effective_beta_is_a_number_or_none_for_every_objective():
    for name, expected in {"seppo": 2000, "chipo": 2000, "f_dpo": 2000, "ipo": None, "sft": None}.items():
        assert effective_beta(config_with(f"loss.name={name}")) == expected
    assert effective_beta(config_with("loss.name=f_dpo", "loss.divergence=jensen_shannon")) == 1000
    assert effective_beta(config_with("loss.name=f_dpo", "loss.divergence=xdpo")) == pytest.approx(2100, rel=1e-12)
    assert "2000 = 2·β = 2 × 1000" in describe(config_with("loss.name=chipo"), 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.name=seppo", "model.trainable=lora"], "loss.name: seppo moves the reference"),
        (["loss.name=seppo", "cache.reference=x"], "its errors can't be kept; set cache.reference=null"),
        (["model.reference_decay=0.9", "cache.reference=x"], "model.reference_decay moves the reference"),
        (["loss.name=seppo", "model.reference_decay=0.9"], "both decide what the reference is"),
        (["loss.name=dspo", "cache.reference=x"], "dspo needs the reference's predictions"),
    ],
)
def test_a_reference_that_moves_or_is_needed_whole_is_not_kept(overrides, message):
    assert message in error_of(ROOT / "configs" / "base.yaml", *overrides)


def test_sections_are_frozen_and_refuse_unknown_keys():
    config = config_with()
    with pytest.raises(ValidationError):
        config.loss.beta = 5.0
    with pytest.raises(ValidationError):
        LossConfig(bta=1000)
    assert hash(config) == hash(config_with())


# ---- Files ----


def test_a_missing_output_dir_says_what_it_is(write):
    assert "output_dir: is missing; run folder" in error_of(write("seed: 1\n"))


def test_a_missing_file_names_the_ones_like_it(write):
    near = write("seed: 1\n", "xdpo_sd15.yaml")
    write("seed: 1\n", "zebra.yaml")
    missing = near.with_name("xdpo_sd51.yaml")
    message = error_of(missing)
    assert message == f"{missing}: no such config file; there are {near}"


def test_a_missing_folder_is_named(tmp_path):
    assert f"its folder {tmp_path / 'no'} does not exist either" in error_of(tmp_path / "no" / "x.yaml")


def test_a_folder_is_not_a_config_file(tmp_path):
    assert "is a folder, not a config file" in error_of(tmp_path)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "null\n"])
def test_an_empty_file_is_an_error(write, text):
    assert "the file is empty" in error_of(write(text))


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just words\n", "3\n"])
def test_a_file_must_be_a_mapping(write, text):
    assert "must be a mapping of sections" in error_of(write(text))


def test_a_syntax_error_has_its_line(write):
    assert "not valid YAML: line 3, column 11" in error_of(write("seed: 1\nloss: {beta: 1000\noutput_dir: out\n"))
    assert "not valid YAML: line 2, column 1" in error_of(write("loss:\n\tbeta: 1\n"))


def test_bytes_that_are_no_text_are_an_error(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"seed: \xff\xfe\n")
    assert "is not UTF-8 text" in error_of(file)


def test_tags_that_would_run_code_are_an_error(write):
    assert "not valid YAML" in error_of(write("seed: !!python/object/apply:os.getcwd []\n"))


def test_a_key_given_twice_is_an_error_with_both_lines(write):
    message = error_of(write("output_dir: out\nloss:\n  beta: 1\n  eta: 1\n  beta: 2\nloss: {n: 3}\n"))
    assert "2 problems" in message
    assert "line 5: key 'beta' is given twice (first on line 3)" in message
    assert "line 6: key 'loss' is given twice (first on line 2)" in message
    assert "line 1: key 'eta' is given twice (first on line 1)" in error_of(write("loss: {eta: 1, eta: 2}\n"))


def test_keys_that_are_no_text_are_unknown(write):
    assert "1: unknown key (got 2)" in error_of(write("output_dir: out\n1: 2\n"))


def test_a_section_whose_keys_are_all_commented_out_is_empty(write):
    assert load_config(write("output_dir: out\nloss:\n  # beta: 5\n")).loss == LossConfig()


# ---- Inheritance and overrides ----


def test_a_child_changes_keys_and_keeps_the_rest_of_a_section(write):
    write("output_dir: a\nloss: {beta: 5, eta: 1}\nsamples: {prompts: [a, b]}\n", "base.yaml")
    write("inherits: ../base.yaml\nloss: {eta: 0.5}\n", "sub/parent.yaml")
    file = write("inherits: parent.yaml\nseed: 3\nsamples: {prompts: [c]}\n", "sub/child.yaml")
    config = load_config(file, ["loss.n=2"])
    assert (config.seed, config.output_dir) == (3, "a")
    assert (config.loss.beta, config.loss.eta, config.loss.n) == (5.0, 0.5, 2.0)
    assert config.samples.prompts == ("c",)


def test_a_circle_of_parents_is_named(write):
    write("inherits: run.yaml\n", "other.yaml")
    file = write("inherits: other.yaml\n")
    other = file.with_name("other.yaml")
    assert error_of(file) == f"{file}: `inherits:` goes in a circle: {file} → {other} → {file}"


def test_a_missing_parent_is_named_with_the_file_that_asked_for_it(write):
    file = write("inherits: bse.yaml\n")
    message = error_of(file)
    assert message.startswith(f"{file.with_name('bse.yaml')}: no such config file (inherited by {file})")


def test_only_one_parent_is_allowed(write):
    assert "inherits: must be one path, relative to this file (got ['a', 'b'])" in error_of(write("inherits: [a, b]\n"))


def test_the_last_override_of_a_key_wins_and_an_empty_one_is_null():
    config = config_with("loss.beta=1", "loss.beta=2", "optim.max_grad_norm=", "data.path=[a.parquet, b.parquet]")
    assert config.loss.beta == 2.0
    assert config.optim.max_grad_norm is None
    assert config.data.path == ("a.parquet", "b.parquet")


def test_a_good_override_replaces_a_bad_value(write):
    assert load_config(write("output_dir: out\nseed: -1\n"), ["seed=4"]).seed == 4


# ---- Saving ----


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_every_config_loads_and_survives_saving(file, write):
    config = load_config(file)
    assert load_config(write(dump_config(config), "saved.yaml")) == config


def test_saving_keeps_awkward_values(write):
    config = config_with("loss.gamma=1/6", "optim.eps=1.1e-300", 'output_dir="1e-8"', 'log.project="null"')
    prompts = ("yes", "1", "a: b # c", "…\n\t'\"", "w " * 90)
    config = config.model_copy(update={"samples": config.samples.model_copy(update={"prompts": prompts})})
    assert load_config(write(dump_config(config))) == config
    assert "gamma: 0.16666666666666666\n" in dump_config(config)


def test_flattened_values_are_what_trackers_take():
    flat = flatten(config_with("optim.betas=[0.5, 0.75]"))
    assert list(flat) == list(KEYS)
    assert flat["loss.beta"] == 1000.0
    assert flat["optim.betas"] == "[0.5, 0.75]"
    assert flat["model.revision"] == "null"
    assert {type(value) for value in flat.values()} <= {bool, int, float, str}


# ---- Comparing ----


def test_changed_keys_are_listed_with_both_values():
    assert changed_keys(config_with(), config_with("loss.beta=2000", "model.revision=v2")) == [
        "model.revision: null → 'v2'",
        "loss.beta: 1000 → 2000",
    ]


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=elsewhere",
        "train.micro_batch_pairs=4",
        "train.max_steps=9000",
        "data.num_workers=0",
        "data.max_unreadable_share=0.5",
        "checkpoint.keep=5",
        "log.trackers=[]",
        "eval.every=7",
        "samples.prompts=[x]",
    ],
)
def test_keys_without_effect_on_the_result_may_change(override):
    assert config_with(override) != config_with()
    assert changed_keys(config_with(), config_with(override)) == []


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_number_of_steps_matters_to_a_decaying_learning_rate(schedule):
    old = config_with(f"optim.schedule={schedule}")
    new = config_with(f"optim.schedule={schedule}", "train.max_steps=9000")
    assert changed_keys(old, new) == ["train.max_steps: 6000 → 9000"]


@pytest.mark.parametrize(
    "override",
    ["seed=1", "train.total_batch_pairs=128", "compute.compile=true", "optim.eps=1", "loss.margin_weight=10"],
)
def test_keys_with_an_effect_are_reported(override):
    key, _, _ = override.partition("=")
    (line,) = changed_keys(config_with(), config_with(override))
    assert line.startswith(f"{key}: ")


# ---- What follows ----


def test_accumulation_makes_up_the_total_batch():
    assert accumulation_steps(config_with(), 1) == 256
    assert accumulation_steps(config_with(), 2) == 128
    assert accumulation_steps(config_with("train.micro_batch_pairs=8"), 16) == 2


def test_a_total_batch_that_does_not_split_names_sizes_that_do():
    with pytest.raises(ValueError, match="256 pairs cannot be split into 3 processes with micro") as caught:
        accumulation_steps(config_with(), 3)
    assert str(caught.value).endswith("batches of 1; choose train.total_batch_pairs 255 or 258")
    with pytest.raises(ValueError) as caught:
        accumulation_steps(config_with("train.micro_batch_pairs=64"), 8)
    message = str(caught.value)
    assert message.endswith("choose train.total_batch_pairs 512, or train.micro_batch_pairs 8 or 16 or 32")


def test_a_micro_batch_that_can_never_fit_is_refused_at_once():
    message = error_of(ROOT / "configs" / "base.yaml", "train.micro_batch_pairs=3")
    assert "train: a total batch of 256 pairs cannot be split into micro batches of 3" in message
    assert "train.total_batch_pairs 255 or 258, or train.micro_batch_pairs 1 or 2 or 4" in message


def test_the_sizes_an_error_names_do_work():
    for processes in range(1, 9):
        for micro in (1, 2, 4, 8, 16):
            config = config_with("train.total_batch_pairs=48", f"train.micro_batch_pairs={micro}")
            try:
                assert accumulation_steps(config, processes) * processes * micro == 48
            except ValueError as error:
                totals = re.search(r"total_batch_pairs ([0-9 or]+)", str(error)).group(1).split(" or ")
                assert all(int(total) % (processes * micro) == 0 for total in totals)
                micros = re.search(r"micro_batch_pairs ([0-9 or]+)", str(error))
                for size in micros.group(1).split(" or ") if micros else []:
                    assert 48 % (processes * int(size)) == 0


def test_the_learning_rate_is_scaled_by_the_pairs_of_a_step():
    assert effective_learning_rate(config_with()) == pytest.approx(2.56e-6, rel=1e-12)
    assert effective_learning_rate(config_with("train.micro_batch_pairs=16")) == pytest.approx(2.56e-6, rel=1e-12)
    assert effective_learning_rate(config_with("optim.scale_lr=false")) == 1e-8


def test_the_effective_beta_is_the_slope_near_the_reference():
    assert effective_beta(config_with()) == pytest.approx(1050, rel=1e-12)
    assert effective_beta(config_with("loss.eta=1", "loss.n=1", "loss.gamma=1")) == 2000
    assert effective_beta(config_with("loss.name=diffusion_dpo", "loss.beta=1234")) == 1234


def test_the_description_of_the_papers_run_can_be_checked_on_paper():
    text = describe(load_config(ROOT / "configs" / "xdpo_sd15.yaml"), num_processes=2)
    assert "256 pairs = 2 (processes) × 128 (accumulation) × 1 (micro batch)" in text
    assert "1e-8 configured, 2.56e-6 effective (× 256 pairs, optim.scale_lr)" in text
    assert "1050 = β·(η + γ·n) = 1000 × (0.05 + 0.166667 × 6)" in text
    assert "6,000 optimizer steps, 1,536,000 pairs seen" in text
    assert "about 1.80, if the data are Pick-a-Pic v2 (851,293 pairs)" in text
    assert "500 steps, then constant" in text


def test_the_description_says_what_a_reader_might_miss():
    assert "0.50 of 3,072,000 pairs" in describe(config_with(), 1, num_pairs=3_072_000)
    assert "grows by exp(n·e)" in describe(config_with("loss.reward=eq10"), 1)
    assert "β itself" in describe(config_with("loss.name=diffusion_dpo"), 1)
    assert "8·(2p − 1) times each pair's β" in describe(config_with("loss.margin_weight=8"), 1)
    assert "margin weights" not in describe(config_with(), 1)
    assert "longer than the run" in describe(config_with("train.max_steps=499"), 1)
    assert "longer than the run" not in describe(config_with("train.max_steps=500"), 1)
    with pytest.raises(ValueError, match="cannot be split"):
        describe(config_with(), 3)


# ---- The command line ----


def test_overrides_may_stand_anywhere_among_the_options():
    parser = build_parser("Train.")
    words = ["seed=1", "--config", "a.yaml", "loss.beta=2", "--dry-run", "loss.eta=-3"]
    arguments = parser.parse_intermixed_args(words)
    assert arguments.config == "a.yaml"
    assert arguments.overrides == ["seed=1", "loss.beta=2", "loss.eta=-3"]
    assert arguments.dry_run and not arguments.allow_config_change
    assert parser.parse_intermixed_args(["--config", "a.yaml"]).overrides == []


def test_help_lists_every_key_with_type_default_and_meaning():
    text = build_parser("Train.").format_help()
    for key, field in KEYS.items():
        assert f"  {key} (" in text
        assert field.description and field.description in text
    assert "optim.learning_rate (number > 0; 1e-8)" in text
    assert "output_dir (text; required)" in text
    assert "eval.path (text or list of text or null; null)" in text
    assert "loss.reward (appendix_c | eq9 | eq10; appendix_c)" in text


def test_reading_a_config_needs_neither_torch_nor_numpy():
    code = """if True:
        import sys
        import xdpo.files, xdpo.paths, xdpo.tables
        from xdpo import config
        from xdpo.loss import OBJECTIVES
        settings = config.load_config("configs/xdpo_sd15.yaml")
        config.describe(settings, 2), config.dump_config(settings), config.build_parser("Train.").format_help()
        assert settings.loss.objective is OBJECTIVES["xdpo"]
        sys.exit(", ".join({"torch", "numpy"} & sys.modules.keys()) or 0)"""
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr


# ---- The files of this repository ----


def test_base_yaml_has_every_key_at_its_default():
    assert config_with() == Config(output_dir="runs/xdpo")
    text = (ROOT / "configs" / "base.yaml").read_text(encoding="utf-8")
    assert text == base_yaml(), "configs/base.yaml is behind the code: python scripts/write_base_config.py"
    for key in KEYS:
        section, _, name = key.rpartition(".")
        block = re.search(rf"^{section}:.*\n((?: .*\n|\n)*)", text, re.MULTILINE).group(1) if section else text
        line = re.search(rf"^{'  ' if section else ''}{name}:.*$", block, re.MULTILINE)
        assert line and "#" in line.group(0), f"base.yaml does not explain {key}"


@pytest.mark.parametrize("folder", ["ablations", "tiny/ablations"])
@pytest.mark.parametrize("row", TABLE_3)
def test_the_ablations_are_the_rows_of_table_3(folder, row):
    file = ROOT / "configs" / folder / f"{row}.yaml"
    config = load_config(file)
    assert (config.loss.eta, config.loss.n, config.loss.gamma) == TABLE_3[row]
    assert (config.loss.name, config.loss.beta, config.loss.reward) == ("xdpo", 1000.0, "appendix_c")
    assert config.output_dir.endswith(row)
    assert 3 <= len(file.read_text(encoding="utf-8").splitlines()) <= 6


@pytest.mark.parametrize("folder", ["ablations", "tiny/ablations"])
def test_there_are_no_other_ablations_and_all_have_their_own_folder(folder):
    files = sorted((ROOT / "configs" / folder).glob("*.yaml"))
    assert {file.stem for file in files} == set(TABLE_3)
    assert len({load_config(file).output_dir for file in files}) == 6


@pytest.mark.parametrize(("folder", "ending"), [("", "_sd15"), ("tiny", "")])
def test_the_baselines_differ_from_xdpo_in_the_loss_alone(folder, ending):
    def load(name: str) -> Config:
        return load_config(ROOT / "configs" / folder / f"{name}{ending}.yaml")

    for name, beta in (("diffusion_dpo", 2000), ("diffusion_dpo_beta1050", 1050)):
        changes = changed_keys(load("xdpo"), load(name))
        assert {change.partition(":")[0] for change in changes} == {"loss.name", "loss.beta"}
        assert effective_beta(load(name)) == beta
    assert effective_beta(load("xdpo")) == pytest.approx(effective_beta(load("diffusion_dpo_beta1050")), rel=1e-12)


def test_the_papers_run_has_the_papers_numbers():
    config = load_config(ROOT / "configs" / "xdpo_sd15.yaml")
    assert (config.loss.beta, config.loss.eta, config.loss.n, config.loss.gamma) == (1000, 0.05, 6, 1 / 6)
    assert accumulation_steps(config, num_processes=2) == 128
    assert config.optim.learning_rate == 1e-8


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_configs_and_leaves_precision_to_ours(file):
    from accelerate.commands.config.config_args import load_config_from_file

    launch = load_config_from_file(str(file))
    machines_and_processes = {
        "one_gpu": (1, 1),
        "two_gpus": (1, 2),
        "multi_node": (2, 16),
        "cpu": (1, 1),
    }
    assert (launch.num_machines, launch.num_processes) == machines_and_processes[file.stem]
    assert launch.mixed_precision == "no"
    assert launch.use_cpu == (file.stem == "cpu")


# ---- Launchers ----


@pytest.fixture
def launch(tmp_path):
    """Runs a script of ours with a Python that only writes down how it was called, and fails for `failing`."""

    def run(script: str, *arguments: str, failing: str = "nothing", **environment: str):
        calls = tmp_path / "calls"
        calls.write_text("")
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\ncase "$*" in *{failing}*) exit 7;; esac\n')
        python.chmod(0o755)
        clean = {key: value for key, value in os.environ.items() if key not in ("NUM_PROCESSES", "ACCELERATE_CONFIG")}
        result = subprocess.run(
            ["bash", str(ROOT / "scripts" / script), *arguments],
            env={**clean, "PYTHON": str(python), **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return result, calls.read_text().splitlines()

    return run


@pytest.mark.parametrize("script", ["train_sd15.sh", "ablations.sh"])
def test_the_launchers_are_valid_bash(script):
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / script)]).returncode == 0


def test_train_sd15_launches_the_papers_run_on_two_gpus(launch):
    result, calls = launch("train_sd15.sh")
    assert result.returncode == 0, result.stderr
    assert calls == [
        "-m accelerate.commands.launch --config_file configs/accelerate/two_gpus.yaml "
        "train_xdpo.py --config configs/xdpo_sd15.yaml"
    ]


def test_train_sd15_takes_a_config_overrides_and_another_launch(launch):
    _, calls = launch("train_sd15.sh", "configs/xdpo_sd15_lora.yaml", "seed=1", "--dry-run", NUM_PROCESSES="1")
    assert calls == ["train_xdpo.py --config configs/xdpo_sd15_lora.yaml seed=1 --dry-run"]
    _, calls = launch("train_sd15.sh", "seed=1", NUM_PROCESSES="4")
    assert calls == [
        "-m accelerate.commands.launch --config_file configs/accelerate/two_gpus.yaml --num_processes 4 "
        "train_xdpo.py --config configs/xdpo_sd15.yaml seed=1"
    ]
    _, calls = launch("train_sd15.sh", "seed=1", ACCELERATE_CONFIG="mine.yaml")
    assert calls == [
        "-m accelerate.commands.launch --config_file mine.yaml train_xdpo.py --config configs/xdpo_sd15.yaml seed=1"
    ]


def test_ablations_run_all_rows_with_the_given_overrides(launch):
    result, calls = launch("ablations.sh", "seed=1", "--tiny", "samples.prompts=[a fox]")
    assert result.returncode == 0, result.stderr
    assert calls == [
        f"train_xdpo.py --config configs/tiny/ablations/{row}.yaml seed=1 samples.prompts=[a fox]" for row in TABLE_3
    ]
    _, calls = launch("ablations.sh")
    assert [call.split()[-1] for call in calls] == [f"configs/ablations/{row}.yaml" for row in TABLE_3]


def test_ablations_stop_at_the_row_that_fails_and_name_it(launch):
    result, calls = launch("ablations.sh", "--tiny", failing="eta1_n6")
    assert result.returncode == 7
    assert len(calls) == 3
    assert "row eta1_n6 failed (exit status 7)" in result.stderr


def test_ablations_refuse_one_folder_for_all_rows(launch):
    result, calls = launch("ablations.sh", "output_dir=runs/mine")
    assert result.returncode == 2 and calls == []
    assert "output_dir cannot be overridden" in result.stderr
