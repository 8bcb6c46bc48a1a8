"""Sweeps and reproductions: runs, processes, tuning, statistics; a small plan, stopped halfway, that goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reproduce
import sweep
from matplotlib.figure import Figure
from training_runs import ROOT, SMALL_RUN

from xdpo.config import ConfigError, load_config
from xdpo.experiments import drawing, measures, page
from xdpo.experiments.findings import Findings
from xdpo.experiments.plan import load_plan
from xdpo.experiments.runs import enter_root, make_runs, progress, train_all
from xdpo.experiments.stages import Reproduction, base_model, choose
from xdpo.experiments.tasks import Interrupted, Task, launcher, once, run_all

XDPO, SFT = ROOT / "configs/tiny/xdpo.yaml", ROOT / "configs/tiny/sft.yaml"


# --- runs --------------------------------------------------------------------------------------------------


def test_runs_are_configs_by_values_by_seeds(tmp_path):
    runs = make_runs([XDPO, SFT], tmp_path, seeds=[0, 1], grid={"optim.weight_decay": ["0", "0.1"]})
    assert [run.name for run in runs[:3]] == [
        "xdpo-weight_decay=0-seed=0", "xdpo-weight_decay=0-seed=1", "xdpo-weight_decay=0.1-seed=0"
    ]  # fmt: skip
    assert len(runs) == 8 and len({run.folder for run in runs}) == 8
    assert runs[3].settings.optim.weight_decay == 0.1 and runs[3].settings.seed == 1


def test_runs_share_the_caches_that_they_can_share(tmp_path):
    def caches(config, *common):
        (run,) = make_runs([config], tmp_path, common=common)
        return run.settings.cache.examples, run.settings.cache.reference

    examples, reference = caches(XDPO)
    assert examples.startswith(str(tmp_path)) and reference == str(tmp_path / "cache/reference")
    assert caches(ROOT / "configs/tiny/diffusion_dpo.yaml") == (examples, reference)
    assert caches(SFT) == (examples, None)
    assert caches(ROOT / "configs/tiny/seppo.yaml") == (examples, None)
    assert caches(XDPO, "model.reference_decay=0.9") == (examples, None)
    assert caches(ROOT / "configs/tiny/online/xdpo.yaml") == (examples, None)
    others = [caches(XDPO, "data.resolution=32")[0], caches(XDPO, "filter.min_side=10")[0]]
    others += [caches(XDPO, "eval.columns={caption: text}")[0], caches(XDPO, "model.t5_tokens=16")[0]]
    assert len({examples, None, *others}) == 6
    assert caches(XDPO, "data.crop=random") == (None, reference)
    assert caches(XDPO, "cache.examples=mine") == ("mine", reference)


def test_every_problem_of_every_run_is_told_before_any_starts(tmp_path):
    with pytest.raises(ConfigError) as error:
        make_runs([XDPO, SFT], tmp_path, grid={"loss.eta": ["0.1", "much"]})
    assert "xdpo-eta=much-seed=0" in str(error.value) and "sft-eta=0.1-seed=0" in str(error.value)
    for grid, seeds, message in (
        ({"loss.etta": ["1"]}, [0], "--grid loss.etta: unknown key"),
        ({"loss.eta": ["1", "1"]}, [0], "1 is there twice"),
        ({}, [0, 0], "two runs are called xdpo-seed=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_runs([XDPO], tmp_path, grid=grid, seeds=seeds)


@pytest.fixture
def small_config(tmp_path, small_pipeline, small_pairs):
    """A config file of a training of seconds."""
    settings = dict(word.split("=", 1) for word in SMALL_RUN)
    settings |= {"model.pipeline": small_pipeline, "data.path": small_pairs, "train.max_steps": "2"}
    settings |= {"checkpoint.every": "1"}
    sections = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"  {name}: {value}")
    lines = [f"inherits: {ROOT / 'configs/base.yaml'}", f"output_dir: {tmp_path / 'unused'}"]
    for section, keys in sections.items():
        lines += [f"{section}:", *keys]
    path = tmp_path / "small.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
def test_a_sweep_shares_its_caches_skips_what_is_done_and_names_what_failed(small_config, tmp_path, capsys):
    arguments = ["--configs", str(small_config), "--grid", "loss.beta=500,1000", "--output", str(tmp_path / "sweep")]
    assert sweep.main([*arguments, "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("finished") == 2
    runs = make_runs([small_config], tmp_path / "sweep", grid={"loss.beta": ["500", "1000"]})
    logs = [run.log.read_text() for run in runs]
    assert sum("latents" in log and "finished; 0 unreadable" in log for log in logs) == 1  # one of them encoded

    assert sweep.main(arguments) == 0
    assert [run.log.read_text() for run in runs] == logs

    (runs[0].folder / "config.yaml").write_text("not a config: [")
    assert sweep.main([*arguments, "--array", "1"]) == 0
    assert sweep.main([*arguments, "--array", "2"]) == 1
    assert "the runs are 0 to 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_error_and_the_others_go_on(small_config, tmp_path):
    runs = make_runs([small_config], tmp_path, grid={"model.pipeline": ["nowhere/at/all", "PIPELINE"]})
    good = make_runs([small_config], tmp_path / "good")
    said = []
    failed = train_all([runs[0], *good], report=said.append)
    assert list(failed) == [runs[0].name] and "nowhere/at/all" in failed[runs[0].name]
    assert good[0].is_finished
    states = [row[1].text for row in progress([runs[0], *good], failed).rows]
    assert states == ["failed", "finished"]


# --- processes ---------------------------------------------------------------------------------------------


def python(name, folder, code, done=lambda: False):
    return Task(name, (sys.executable, "-c", code), folder / f"{name}.log", done)


def test_tasks_run_some_at_a_time_and_what_is_done_is_skipped(tmp_path):
    """Each of two waits until the other has begun: only together can they end."""
    code = (
        "import pathlib, sys, time\n"
        "own, other = map(pathlib.Path, {!r})\n"
        "own.touch()\n"
        "end = time.monotonic() + 60\n"
        "while not other.exists():\n"
        "    time.sleep(0.01)\n"
        "    assert time.monotonic() < end\n"
    )
    files = [str(tmp_path / "a"), str(tmp_path / "b")]
    tasks = [
        python("a", tmp_path, code.format(files), Path(files[0]).exists),
        python("b", tmp_path, code.format(files[::-1]), Path(files[1]).exists),
        python("c", tmp_path, "raise SystemExit(1)", lambda: True),
    ]
    assert run_all(tasks, jobs=2, report=lambda text: None) == {}
    assert not tasks[2].log.exists()


def test_a_task_that_fails_or_leaves_its_work_undone_is_reported_with_the_end_of_its_log(tmp_path):
    said = []
    tasks = [
        python("raises", tmp_path, "print('\\n'.join(map(str, range(99)))); print('bar\\rthe cause'); exit(3)"),
        python("idle", tmp_path, "print('nothing to see')"),
    ]
    failed = run_all(tasks, report=said.append)
    assert failed["raises"].splitlines()[-1] == "the cause" and "50" not in failed["raises"].splitlines()
    assert failed["idle"] == "nothing to see"
    assert "exit status 3" in said[0] and "[2/2] idle" in said[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_reaches_what_is_in_work_and_nothing_new_starts(tmp_path, number):
    code = (
        "import pathlib, signal, sys, time\n"
        "def leave(*_):\n"
        "    pathlib.Path(sys.argv[1]).write_text('saved')\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "pathlib.Path(sys.argv[2]).touch()\n"
        "time.sleep(60)\n"
    )
    saved, begun = tmp_path / "saved", tmp_path / "begun"
    first = Task("a", (sys.executable, "-c", code, str(saved), str(begun)), tmp_path / "a.log", lambda: False)
    second = python("b", tmp_path, "")

    def stop():
        while not begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=stop).start()
    with pytest.raises(Interrupted):
        run_all([first, second], report=lambda text: None)
    assert saved.read_text() == "saved" and not second.log.exists()
    assert signal.getsignal(number) == before


def test_what_an_earlier_start_left_at_work_is_waited_for(tmp_path):
    """A runner is killed without warning; its task goes on for a while, and the next start doesn't begin beside it."""
    begun, ended, log = tmp_path / "begun", tmp_path / "ended", tmp_path / "a.log"
    task = f"import time; open({str(begun)!r}, 'w'); time.sleep(2); open({str(ended)!r}, 'w')"
    runner = (
        "import sys; from pathlib import Path; from xdpo.experiments.tasks import Task, run_all\n"
        f"run_all([Task('a', (sys.executable, '-c', {task!r}), Path({str(log)!r}), lambda: False)])"
    )
    with subprocess.Popen([sys.executable, "-c", runner], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not begun.exists():
            time.sleep(0.01)
        process.kill()
    assert not ended.exists()
    said = []
    assert run_all([python("a", tmp_path, "raise SystemExit(1)", ended.exists)], report=said.append) == {}
    assert len(said) == 1 and "still at work" in said[0] and ended.exists()


def test_no_jobs_at_all_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 1"):
        run_all([python("a", tmp_path, "")], jobs=0)


def test_once_means_until_the_command_its_inputs_or_its_result_change(tmp_path):
    ran, source = tmp_path / "ran", tmp_path / "input"
    source.write_text("1")
    command = [sys.executable, "-c", f"open({str(ran)!r}, 'a').write('x')"]

    def times(*words):
        assert run_all([once("a", [*command, *words], ran, [source])], report=lambda text: None) == {}
        return len(ran.read_text())

    assert [times(), times()] == [1, 1]
    assert times("another word") == 2
    task = once("a", [*command, "another word"], ran, [source])
    assert task.is_done()
    ran.unlink()
    assert not task.is_done()
    ran.touch()
    assert task.is_done()
    os.utime(source, ns=(time.time_ns() + 10**9,) * 2)
    assert not task.is_done()
    source.unlink()
    assert not task.is_done()


def test_jobs_share_the_cores_out(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    tasks = [python(name, tmp_path, code) for name in "ab"]
    run_all(tasks, jobs=2, num_processes=2, report=lambda text: None)
    assert tasks[0].log.read_text() == "2\n"


def test_several_processes_on_a_cpu_go_through_torchrun():
    assert launcher(1) == (sys.executable,)
    assert launcher(2)[1:3] == ("-m", "torch.distributed.run")


# --- plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["tiny", "tiny_flow", "tiny_online", "sd15"])
def test_the_shipped_plans_make_runs_that_their_configs_allow(scale, tmp_path):
    plan = load_plan(reproduce.PLANS / f"{scale}.yaml")
    assert all(len(plan.seeds_of(method)) >= 3 for method in plan.methods)
    plan = plan.model_copy(update={"seeds": plan.seeds[:1]})  # the other seeds' runs are alike
    reproduction = Reproduction(plan, tmp_path)
    tuned, methods = plan.parts()
    tuning = reproduction.tuning_runs(tuned)
    runs = reproduction.runs(methods, reproduce.any_values(reproduction))
    assert len(tuning) == len(plan.tuned) * len(plan.tuning.values)
    assert {method for method, _ in runs} == set(plan.methods)
    assert all(run.settings.train.max_steps == plan.last_step(method) for (method, _), run in runs.items())
    settings = [run.settings for run in [*tuning.values(), *runs.values()]]
    assert len({(each.train.total_batch_pairs, each.cache.examples, each.model.pipeline) for each in settings}) == 1
    if scale not in ("tiny", "sd15"):
        return
    rows = {(c.settings.loss.eta, c.settings.loss.n) for (m, _), c in runs.items() if m.startswith("eta")}
    assert rows | {(0.05, 6.0)} == {(1, 1), (1, 3), (1, 6), (0.5, 6), (0.1, 6), (0.05, 6)}  # Table 3


def test_saying_what_would_run_starts_nothing(tmp_path, capsys):
    assert reproduce.main(["--scale", "sd15", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "--go runs it" in printed and printed.count("train_xdpo.py") == 108
    assert not (tmp_path / "out").exists()


def test_started_elsewhere_it_works_in_the_repository_on_the_callers_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert enter_root(Path("runs/out")) == [Path("runs/out")]
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["--scale", "tiny", "--only", "sft", "--dry-run", "--output", "out"]) == 0
    assert Path.cwd() == ROOT
    assert f"output_dir={tmp_path / 'out/runs/sft-seed0'}" in capsys.readouterr().out


def test_scores_are_made_on_all_processes_and_preparations_on_one(tmp_path):
    plan = load_plan(reproduce.PLANS / "tiny_online.yaml")
    reproduction = Reproduction(plan, tmp_path, num_processes=2)
    assert reproduction.evaluation("tuning", []).command[: len(launcher(2))] == launcher(2)
    (reward,) = reproduction.preparations(plan.parts(["learnt_reward"]))
    assert reward.command[:2] == (*launcher(1), str(ROOT / "scripts/train_reward_model.py"))


def test_a_checkpoint_without_held_out_metrics_is_refused_before_anything_trains(tmp_path):
    plan = load_plan(reproduce.PLANS / "tiny_flow.yaml")

    def refusal(*overrides):
        reproduction = Reproduction(plan.model_copy(update={"common": (*plan.common, *overrides)}), tmp_path)
        with pytest.raises(ConfigError) as error:
            reproduction.runs(["xdpo"], reproduce.any_values(reproduction))
        return str(error.value)

    assert "eval.every=80 leaves out step 100, where the plan measures xdpo" in refusal("eval.every=80")
    assert "eval.every=0, and " in refusal("eval.every=0")


QUESTION = {"ask": "?", "method": "xdpo", "than": "dpo"}


def write_plan(path, **changes):
    import yaml

    plan = {
        "title": "A small field",
        "steps": 4,
        "checkpoints": [2, 4],
        "seeds": [0, 1],
        "prompts": [str(path.parent / "prompts.txt")],
        "guidances": [1, 2],
        "generate": ["--steps", 1, "--batch-size", 4, "--images-per-prompt", 2],
        "scorers": ["tiny_reward", "tiny_alignment"],
        "score": "tiny_reward",
        "alignment": "tiny_alignment",
        "baseline": "dpo",
        "tuning": {"key": "optim.learning_rate", "values": ["1e-4", "1e30"], "seed": 9,
                   "prompts": [str(path.parent / "tuning.txt")]},
        "common": ["log.trackers=[]", "eval.every=2", "eval.pairs=4", "eval.draws=1"],
        "methods": {
            "dpo": {"config": "small.yaml", "group": "Pairs", "curves": True, "set": ["loss.name=diffusion_dpo"]},
            "xdpo": {"config": "small.yaml", "group": "Pairs", "curves": True, "tuned_as": "dpo"},
        },
        "questions": [
            {"ask": "Better?", "method": "xdpo", "than": "dpo"},
            {"ask": "Does it hold?", "kind": "holds", "quantity": "tiny_alignment", "method": "xdpo", "than": "base"},
            {"ask": "Higher?", "kind": "differs", "quantity": "eval/d_chosen", "method": "xdpo", "than": "base"},
        ],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(plan | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "sft"}, "'sft' is no method of the plan"),
        ({"steps": 5}, "checkpoints must rise and have steps = 5"),
        ({"score": "pickscore"}, "pickscore is asked for and not among the scorers"),
        ({"seeds": [9]}, "the tuning's seed 9 is one of those reported"),
        ({"questions": [{"ask": "?", "method": "xdpo", "than": "kto"}]}, "a question is about 'kto'"),
        ({"methods": {"dpo": {"config": "a", "group": "b", "tuned_as": "xdpo"},
                      "xdpo": {"config": "a", "group": "b", "tuned_as": "dpo"}}}, "tuned as a method that is not"),
        ({"sedes": [1]}, "sedes: Extra inputs"),
        ({"questions": [QUESTION | {"guidance": 3}]}, "guidance 3 is none of the plan's"),
        ({"questions": [QUESTION | {"than": "base", "at_equal": "pairs"}]}, "two methods with curves"),
        ({"questions": [QUESTION | {"step": 3}]}, "xdpo is not measured at step 3"),
        ({"questions": [QUESTION | {"quantity": "distance"}]}, "ask whether distance"),
        ({"questions": [QUESTION | {"kind": "differs", "quantity": "spread"}], "generate": ["--images-per-prompt", 1]},
         "spread is between images of one prompt"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_together_is_refused_in_words(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_plan(write_plan(tmp_path / "plan.yaml", **changes))


def test_the_best_value_is_chosen_and_the_first_of_equals():
    scores = {("a", "1"): 0.5, ("a", "2"): 0.7, ("a", "3"): 0.7, ("b", "1"): -1.0}
    assert choose(scores) == {"a": "2", "b": "1"}


@pytest.mark.slow
def test_a_whole_plan_is_stopped_goes_on_and_is_written_up(small_config, tmp_path):
    captions = (reproduce.PLANS / "tiny_tuning.txt").read_text().splitlines()
    (tmp_path / "prompts.txt").write_text("\n".join(captions[:3]))
    (tmp_path / "tuning.txt").write_text("\n".join(captions[3:5]))
    plan, output = write_plan(tmp_path / "plan.yaml", guidances=[1]), tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts/reproduce.py"), "--scale", str(plan), "--go", "--jobs", "2"]
    command += ["--output", str(output), "--page", str(tmp_path / "docs/small.md")]

    # Stopped while the methods train.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not list(output.glob("runs/*-seed0/metrics.jsonl")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert "stopped" in process.stdout.read() and process.wait() == 130
    tuned = json.loads((output / "runs/tuning-dpo-1e-4/run.json").read_text())

    # The same command goes on; what was done is not done again.
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr + again.stdout
    assert json.loads((output / "runs/tuning-dpo-1e-4/run.json").read_text()) == tuned
    written = {path: path.stat().st_mtime_ns for path in (output / "images").rglob("*.png")}
    third = subprocess.run(command, capture_output=True, text=True, check=True)
    assert third.stdout.count("[1/") == 1 and "[1/1] tuning-dpo-1e30: failed" in third.stdout  # it is tried anew
    assert {path: path.stat().st_mtime_ns for path in (output / "images").rglob("*.png")} == written

    # The value that diverged was not taken, and the page says so.
    text = (tmp_path / "docs/small.md").read_text()
    assert "| dpo | **" in text and "| failed |" in text
    assert "`tuning-dpo-1e30`" in text and "not finite" in text
    assert all(word in text for word in ("# A small field", "Better?", "## Pairs", "seeds are 0, 1", "3 prompts"))
    assert f"reproduce.py --scale {plan} --go" in text
    for name in ("quality", "errors", "slopes"):
        assert f"](small/{name}.png)" in text and (tmp_path / f"docs/small/{name}.png").stat().st_size > 5000


# --- numbers -----------------------------------------------------------------------------------------------


def test_intervals_cover_seeds_and_prompts():
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(3, 1)) * 0.5  # seeds differ much, prompts not at all
    scores = 1 + effects + 0.001 * rng.normal(size=(3, 200))
    found = measures.mean(scores)
    assert found.value == pytest.approx(scores.mean())
    assert found.low <= scores.mean(axis=1).min() + 0.01 and found.high >= scores.mean(axis=1).max() - 0.01

    same = np.ones((3, 50))
    assert measures.mean(same) == measures.Estimate(1.0, 1.0, 1.0)
    assert [measures.difference(same + shift, same).sign for shift in (0.1, 0.0, -0.1)] == [1, 0, -1]


def test_a_win_rate_counts_ties_half_and_takes_one_base_for_all_seeds():
    scores = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 0.0, 0.0]])
    assert measures.win_rate(scores, np.array([1.0, 1.0, 1.0, 1.0])).value == pytest.approx((3 + 0.5 + 1 + 0.5) / 8)


def test_the_speed_up_is_the_ratio_of_pairs_to_the_baselines_final_score():
    pairs = [0, 10, 20]

    def curve(*means):
        return np.array(means)[:, None, None] * np.ones((len(means), 2, 5))

    baseline = curve(0, 1, 2)
    assert measures.speed_up(pairs, baseline, pairs, baseline).value == 1
    assert measures.speed_up(pairs, curve(0, 2, 3), pairs, baseline).value == 2  # reached at 10 pairs instead of 20
    assert measures.speed_up(pairs, curve(0, 0.5, 1), pairs, baseline).value == 0  # never
    assert np.isnan(measures.speed_up(pairs, curve(0, 1, 2), pairs, curve(0, -1, 0)).value)  # nothing to reach


def test_slopes_are_those_of_the_formulas():
    """Appendix C: η + γn·exp(n·d); Eq. 9: η + γn·exp(−n·d); Eq. 10: η + γn·exp(n·e). Times β/2."""
    settings = {"beta": 1000.0, "eta": 0.05, "n": 6.0, "gamma": 1 / 6}
    d = np.array([-0.05, 0.0, 0.2])
    for form, exponent in (("appendix_c", d), ("eq9", -d), ("eq10", 0.1 + d)):
        expected = 500 * (0.05 + np.exp(6 * exponent))
        np.testing.assert_allclose(drawing.reward_slope(d, settings, 0.1, form), expected, rtol=1e-12)


def test_how_a_form_bends_is_said_at_the_errors_that_trainings_with_it_reached():
    reached = {(100.0, "eq9"): (0.0, 0.02), (6.0, "appendix_c"): (-0.1, 0.0)}
    grid = page.bend(({"beta": 1000.0, "eta": 0.05}, 0.1, reached))
    assert [[cell.text for cell in row] for row in grid.rows] == [
        ["6", "appendix_c", "-0.1 to 0", f"−{100 * (1 - (0.05 + np.exp(-0.6)) / 1.05):.1f} % to +0.0 %"],
        ["100", "eq9", "0 to 0.02", f"+0.0 % to −{100 * (1 - (0.05 + np.exp(-2)) / 1.05):.1f} %"],
    ]


class FakeRun:
    """What findings ask of a run."""

    def __init__(self, name, rows, reference_moves=False):
        self.name, self.rows, self.reference_moves = name, lambda: rows, reference_moves


@pytest.fixture
def findings(tmp_path):
    plan = load_plan(write_plan(tmp_path / "plan.yaml"))
    logged = [{"step": 0, "eval/policy_error": 3.0}]
    logged += [
        {
            "step": step,
            "pairs_seen": 2 * step,
            "pairs_per_second": 1.0,
            "eval/d_chosen": d,
            "eval/d_rejected": 3 * d,
            "eval/policy_error": 3 + 2 * d,
        }
        for step, d in ((2, 0.5), (4, -0.002))
    ]
    runs = {(method, seed): FakeRun(f"{method}-seed{seed}", logged) for method in plan.methods for seed in plan.seeds}
    scores = {
        guidance: {
            (model, scorer): np.full(4, value + guidance - 1)
            for scorer in plan.scorers
            for model, value in [("base", 0.0)]
            + [(f"{m}-seed{s}-step{step}", float(step + (m == "xdpo"))) for m, s in runs for step in (2, 4)]
        }
        for guidance in plan.guidances
    }
    return Findings(plan, {}, {}, {"dpo": "1"}, runs, scores, {}, {})


def test_questions_are_answered_by_the_sign_of_an_interval(findings):
    better, holds, differs = findings.plan.questions
    assert findings.answer(better) == ("yes", measures.Estimate(1.0, 1.0, 1.0))
    assert findings.answer(better.model_copy(update={"method": "dpo", "than": "xdpo"}))[0] == "no, it is worse"
    assert findings.answer(better.model_copy(update={"than": "xdpo"}))[0] == "not resolved"
    assert findings.answer(holds)[0] == "yes, it rises"
    answer, found = findings.answer(differs)
    assert (answer, found.value) == ("yes, lower", -0.002)  # as logged after the plan's steps
    assert findings.answer(differs.model_copy(update={"step": 2}))[1].value == 0.5
    assert findings.answer(differs.model_copy(update={"quantity": "eval/d", "step": 2}))[1].value == 1.0
    assert findings.answer(differs.model_copy(update={"quantity": "eval/other"}))[0].startswith("cannot be told")
    later = better.model_copy(update={"than": "xdpo", "step": 4, "than_step": 2})
    assert findings.answer(later) == ("yes", measures.Estimate(2.0, 2.0, 2.0))
    row = page.questions(asking(findings, later)).rows[0]
    assert row[2].text == "Reward (tiny) after 4 steps: xdpo − xdpo after 2"
    assert findings.of("dpo", "tiny_reward", guidance=2).tolist() == [[5.0] * 4] * 2
    assert findings.curve("xdpo", "tiny_reward")[:, 0, 0].tolist() == [0, 3, 5]


def test_a_method_has_one_colour_in_all_figures_and_its_name_beside_its_line(findings):
    for figure, panels in ((drawing.quality(findings), 2), (drawing.trade_offs(findings), 2)):
        assert len(figure.axes) == panels
        for axes in figure.axes:
            names = {text.get_text(): text.get_color() for text in axes.texts if text.get_text() in ("dpo", "xdpo")}
            assert names == {name: style["color"] for name, style in drawing.styles_of(findings).items()}


def test_a_page_on_objectives_without_d_has_no_figure_of_it(findings, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_made_by", lambda findings, command: "")
    monkeypatch.setattr(page, "_slope_settings", lambda findings: None)
    assert findings.with_errors == ["dpo", "xdpo"]
    rows = [{"step": step, "pairs_seen": 2 * step, "pairs_per_second": 1.0} for step in (1, 2, 3, 4)]
    runs = {(method, seed): FakeRun(f"{method}-seed{seed}", rows) for method, seed in findings.runs}
    methods = {name: method.model_copy(update={"curves": False}) for name, method in findings.plan.methods.items()}
    plan = findings.plan.model_copy(update={"methods": methods, "questions": (), "guidances": (1,)})
    without = replace(findings, plan=plan, runs=runs)
    (written,) = page.write(without, tmp_path / "page.md", "command")
    assert "## Pairs" in written.read_text() and "errors over training" not in written.read_text()


def test_names_of_lines_that_end_together_stand_above_each_other_beside_the_panel():
    axes = Figure().subplots()
    for name, end in (("a", 1.0), ("b", 1.01), ("c", 3.0), ("d", 3.01)):
        axes.plot([0, 1], [0, end], label=name)
    drawing.label_lines(axes)
    names = {text.get_text(): text for text in axes.texts}
    assert {name: text.xy for name, text in names.items()} == {"a": (1, 1), "b": (1, 1.01), "c": (1, 3), "d": (1, 3.01)}
    low, high = axes.get_ylim()
    heights = {name: text.xyann[1] for name, text in names.items()}
    assert heights["a"] == 1 and heights["d"] == high and all(text.xyann[0] > 1 for text in names.values())
    assert heights["b"] - heights["a"] == heights["d"] - heights["c"] == pytest.approx((high - low) / 15)


def test_further_guidances_have_a_table_of_their_own(findings):
    grid = page.at_guidance(findings, 2)
    assert [(row[0].text, row[1].value) for row in grid.rows] == [("base", 1), ("dpo", 5), ("xdpo", 6)]
    assert [cell.text for cell in grid.rows[2][3:]] == ["100.0 %", "100.0 %"]


def asking(findings, *questions):
    return replace(findings, plan=findings.plan.model_copy(update={"questions": questions}))


def test_questions_compare_at_equal_progress(findings):
    """Curves are straight: dpo has 4 after 8 pairs, xdpo 5; so 4 is xdpo's after 6 pairs, on the way from 3 to 5."""
    better = findings.plan.questions[0]
    assert findings.answer(better.model_copy(update={"at_equal": "pairs"}))[1].value == 1
    at_equal_reward = {"kind": "differs", "quantity": "pairs", "at_equal": "tiny_reward"}
    answer, found = findings.answer(better.model_copy(update=at_equal_reward))
    assert (answer, found.value) == ("yes, lower", -2)
    answer, found = findings.answer(better.model_copy(update={"at_equal": "eval/d_chosen"}))
    assert found.value == 1  # where d is first 0.5
    row = page.questions(asking(findings, better.model_copy(update=at_equal_reward))).rows[0]
    assert row[2].text == "pairs at equal Reward (tiny): xdpo − dpo"


def test_seconds_are_those_of_a_run_that_had_the_machine_to_itself(findings):
    """The measured runs record the reference's errors for others, resume, or share the machine."""
    at_equal = findings.plan.questions[0].model_copy(update={"at_equal": "seconds"})
    assert findings.answer(at_equal)[0].startswith("cannot be told")
    alone = [{"step": step, "pairs_per_second": speed} for step, speed in enumerate((0.1, 0.1, 0.5, 1.0, 0.5, 1.0))]
    timed = {"dpo": FakeRun("timed-dpo", alone), "xdpo": FakeRun("timed-xdpo", [{"pairs_per_second": 1.0}] * 6)}
    findings = replace(findings, timed=timed)
    assert findings.curve("dpo", "seconds")[..., 0].tolist() == [[0, 0], [6, 6], [12, 12]]
    # xdpo has 5 after 8 s, dpo 2 + 2·(8 − 6)/6.
    assert findings.answer(at_equal)[1].value == pytest.approx(5 - (2 + 2 / 3))


def test_errors_are_differences_from_the_base_also_where_the_reference_moves(findings):
    rows = findings.runs["dpo", 0].rows()
    runs = {(method, seed): FakeRun(f"{method}-seed{seed}", rows, method == "dpo") for method, seed in findings.runs}
    moving = replace(findings, runs=runs)
    assert moving.with_errors == ["xdpo"]
    assert np.isnan(moving.of("dpo", "eval/d_chosen", 2)).all() and (moving.of("xdpo", "eval/d_chosen", 2) == 0.5).all()
    assert (moving.of("dpo", "eval/d", 2) == 1).all()  # 4 − 3 of the policy's own errors


def test_a_metric_of_three_runs_has_students_interval():
    runs = np.array([1.0, 2.0, 3.0])[:, None] * np.ones((3, 7))
    found = measures.difference(runs, np.zeros((3, 7)))
    half = 4.302653 * 1 / np.sqrt(3)  # Student's t with two degrees of freedom
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half), rel=1e-6)
    assert np.isnan(measures.difference(runs[:1], np.zeros((1, 7))).low)
    assert measures.difference(runs[:2] * 0 + 5, np.zeros((2, 7))) == measures.Estimate(5.0, 5.0, 5.0)


def test_a_statistic_that_is_often_undefined_has_no_interval():
    scores = np.arange(3.0)[:, None] * np.ones((3, 4))

    def undefined_above_one(values):
        return values.mean() if values.mean() <= 1 else np.nan

    found = measures.estimate(undefined_above_one, scores)
    assert found.value == 1 and np.isnan([found.low, found.high]).all()


def test_what_was_not_measured_cannot_be_told(findings):
    differs = findings.plan.questions[2]
    for quantity, at_equal in (("spread", None), ("spread", "tiny_reward"), ("tiny_reward", "spread"),
                               ("distance", None), ("eval/loss", None)):  # fmt: skip
        than = "dpo" if at_equal else "base"
        asked = differs.model_copy(update={"quantity": quantity, "at_equal": at_equal, "than": than})
        assert findings.answer(asked)[0].startswith("cannot be told")
    assert (findings.of("base", "distance") == 0).all() and (findings.of("base", "eval/d") == 0).all()
    assert np.isnan(findings.of("base", "spread")).all()


def test_a_method_that_lacks_a_seed_is_left_out_and_its_questions_stay_open(findings):
    del findings.scores[1]["xdpo-seed1-step4", "tiny_reward"]
    assert findings.methods == ["dpo"]
    rows = page.questions(findings).rows
    assert [row[1].text for row in rows] == ["not answered: a method failed"] * 3


def test_questions_about_what_was_not_run_are_left_out_unless_others_go_on_from_them(findings):
    for name, seed in list(findings.runs):
        if name == "xdpo":
            del findings.runs[name, seed]
    of_dpo = findings.plan.questions[0].model_copy(update={"method": "dpo", "than": "base"})
    of_xdpo = of_dpo.model_copy(update={"method": "xdpo"})

    def asked(*questions):
        named = [question.model_copy(update={"ask": ask}) for ask, question in questions]
        return [(row[0].text, row[1].text) for row in page.questions(asking(findings, *named)).rows]

    found = asked(("A?", of_xdpo), ("… B?", of_xdpo), ("C?", of_xdpo), ("… D?", of_dpo), ("E?", of_dpo))
    assert found == [("C?", "not answered: not run"), ("… D?", "yes"), ("E?", "yes")]


def test_seeds_that_only_one_of_two_methods_has_are_left_out():
    scores = np.array([[1.0, 2.0], [3.0, 4.0], [50.0, 60.0]])
    assert measures.difference(scores, scores[:2] - 1).value == 1
    assert measures.win_rate(scores[:1], scores).value == 0.5


def test_a_progress_that_never_rises_is_never_equal():
    up, flat = np.arange(3.0)[:, None, None] * np.ones((3, 2, 4)), np.zeros((3, 2, 4))
    assert np.isnan(measures.difference_at_equal(up, flat, up, up).value)
    assert measures.difference_at_equal(2 * up, up, up, up).value == 2
    gap = np.where(np.arange(3)[:, None, None] == 1, np.nan, up)
    for ours, others in ((up, gap), (gap, up)):
        assert np.isnan(measures.difference_at_equal(up, ours, up, others).value)


def test_parts_bring_the_baseline_and_the_tuning_that_they_need(tmp_path):
    plan = load_plan(reproduce.PLANS / "tiny.yaml")
    assert plan.parts() == (plan.tuned, list(plan.methods))
    assert plan.parts(["tuning"]) == (plan.tuned, [])
    assert plan.parts(["xdpo_n100"]) == (["diffusion_dpo", "xdpo"], ["diffusion_dpo", "xdpo_n100"])
    assert set(plan.parts(["Safeguard", "sft"]).methods) == {"diffusion_dpo", "xdpo", "xdpo_safeguard", "sft"}
    with pytest.raises(ValueError, match="--only all: no group or method of the plan; choose from tuning, Table 2"):
        plan.parts(["all"])

    reproduction = Reproduction(plan, tmp_path)
    reproduction.record_finished(plan.parts(["sft"]))
    assert reproduction.with_finished(plan.parts(["ipo"])).methods == ["diffusion_dpo", "sft", "ipo"]


def test_a_value_is_that_of_the_method_it_is_tuned_as_or_a_multiple():
    plan = load_plan(reproduce.PLANS / "tiny.yaml")
    values = {name: plan.value_of(name, {"diffusion_dpo": "3e-5"}) for name in ("f_dpo", "dpo_rate_1000th", "sft")}
    assert values == {"f_dpo": "3e-5", "dpo_rate_1000th": "3e-08", "sft": None}


def test_what_a_method_needs_is_prepared_before_it_trains(tmp_path):
    reproduction = Reproduction(load_plan(reproduce.PLANS / "tiny_online.yaml"), tmp_path)
    assert reproduction.preparations(reproduction.plan.parts(["appeal"])) == []
    parts = reproduction.plan.parts(["learnt_reward"])
    (reward,) = reproduction.preparations(parts)
    assert str(tmp_path / "reward") in reward.command and "assets/tiny/clip" in reward.command
    run = reproduction.runs(parts.methods, reproduce.any_values(reproduction))["learnt_reward", 0]
    assert run.settings.online.rewards == (str(tmp_path / "reward/reward_model"),)


def test_speeds_are_measured_on_runs_that_nothing_was_recorded_for(tmp_path):
    reproduction = Reproduction(load_plan(reproduce.PLANS / "tiny_online.yaml"), tmp_path)
    timed = reproduction.timed_runs(["xdpo", "online_xdpo", "appeal"], reproduce.any_values(reproduction))
    assert list(timed) == ["xdpo", "online_xdpo"]  # which a question compares at equal seconds
    assert timed["xdpo"].settings.cache.reference == str(tmp_path / "timed/xdpo")
    assert timed["online_xdpo"].settings.cache.reference is None
    assert timed["online_xdpo"].settings.train.max_steps == 3 * timed["online_xdpo"].settings.online.every
    assert timed["xdpo"].settings.train.max_steps == 60 and timed["xdpo"].settings.eval.every == 0


def test_methods_that_start_from_different_models_have_no_base_to_be_compared_with(tmp_path):
    plan = load_plan(reproduce.PLANS / "tiny_flow.yaml")
    other = plan.methods["xdpo"].model_copy(update={"set": ("model.t5_tokens=16",)})
    plan = plan.model_copy(update={"methods": plan.methods | {"xdpo": other}})
    reproduction = Reproduction(plan, tmp_path)
    with pytest.raises(
        ConfigError, match=r"xdpo starts from assets/tiny/flow_pipeline --t5-tokens 16, and diffusion_dpo"
    ):
        reproduction.runs(["diffusion_dpo", "xdpo"], reproduce.any_values(reproduction))


def test_the_base_is_sampled_with_what_its_training_reads():
    """With other captions or another autoencoder it would not be what the trained models started from."""
    reproduction = Reproduction(load_plan(reproduce.PLANS / "tiny_flow.yaml"), Path("out"))
    run = reproduction.tuning_runs(["xdpo"])["xdpo", "1e-5"]
    command = " ".join(reproduction.base_images(run, 4).command)
    assert "--model assets/tiny/flow_pipeline --t5-tokens 32 --prompts tinyprompts " in command
    settings = load_config(run.config, ["model.pipeline=a/b", "model.revision=main", "model.vae=c/d"])
    assert base_model(settings) == ["a/b", "--base-revision", "main", "--vae", "c/d", "--t5-tokens", "32"]
