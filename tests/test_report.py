"""Statistics against SciPy, the account of image folders, the score table's survival, and what tables say."""

import errno
import json
from dataclasses import asdict
from math import isinf, isnan

import numpy as np
import pytest
import yaml
from conftest import failing
from scipy import stats

from xdpo.files import StorageError
from xdpo.report import curves, grids, images, published, results, statistics
from xdpo.report.grids import Cell, Grid
from xdpo.report.images import Problem
from xdpo.report.statistics import bootstrap_interval, compare, sign_test, summarize, wilson_interval
from xdpo.report.table import PARTS, TABLE, Score, ScoreKey, ScoreTable

# --- statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wins, losses", [(0, 0), (1, 0), (5, 5), (7, 3), (3, 7), (120, 80), (1700, 1500), (2500, 700), (3200, 0)]
)
def test_the_sign_test_is_scipys_binomial_test(wins, losses):
    expected = stats.binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scores", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0], [2.0, 8.0, 4.0, 4.5]])
def test_mean_median_and_standard_error_are_scipys(scores):
    summary = summarize(scores)
    assert summary.median == stats.quantile(scores, 0.5)
    assert summary.mean == pytest.approx(stats.tmean(scores))
    if len(scores) > 1:
        assert summary.standard_error == pytest.approx(stats.sem(scores))
    else:
        assert isnan(summary.standard_error)


def test_the_bootstrap_interval_agrees_with_scipys():
    values = np.random.default_rng(1).gamma(2.0, size=300)
    ours = bootstrap_interval(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=2).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.1 * stats.sem(values))


def test_bootstrap_intervals_cover_the_true_mean_as_often_as_they_claim():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        low, high = bootstrap_interval(rng.normal(0.3, 1.0, 80), resamples=1000)
        covered += low <= 0.3 <= high
    assert 0.91 <= covered / 400 <= 0.98  # three standard errors around 95 % less what a bootstrap of 80 falls short


def test_win_rate_intervals_cover_the_true_rate_as_often_as_they_claim():
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(400):
        wins, ties, losses = rng.multinomial(150, [0.5, 0.2, 0.3])
        low, high = statistics.win_rate_bootstrap(wins, ties, losses, resamples=1000)
        covered += low <= 0.6 <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_the_multinomial_bootstrap_is_the_bootstrap_over_prompts():
    points = np.repeat([1.0, 0.5, 0.0], [60, 10, 30])
    assert statistics.win_rate_bootstrap(60, 10, 30) == pytest.approx(bootstrap_interval(points), abs=0.011)


def test_the_wilson_interval_is_scipys():
    expected = stats.binomtest(61, 100).proportion_ci(method="wilson")
    assert wilson_interval(61, 100) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_intervals_are_the_same_every_time():
    values = np.arange(50.0)
    assert bootstrap_interval(values) == bootstrap_interval(values.copy())


def test_a_tie_counts_half_a_win():
    comparison = compare([1, 1, 1, 1], [2, 2, 1, 0])
    assert (comparison.wins, comparison.ties, comparison.losses) == (2, 1, 1)
    assert comparison.win_rate == 2.5 / 4
    assert comparison.mean_shift == 0.25
    assert comparison.relative_change == 0.25


def test_the_relative_change_of_a_negative_mean_keeps_its_direction():
    assert compare([-2.0, -2.0], [-1.0, -1.0]).relative_change == 0.5
    assert isinf(compare([1.0, -1.0], [2.0, 2.0]).relative_change)


@pytest.mark.parametrize("before, after", [([1.0], [1.0, 2.0]), ([], []), ([1.0], [float("nan")])])
def test_scores_that_cannot_be_paired_are_refused(before, after):
    with pytest.raises(ValueError, match="scores"):
        compare(before, after)


# --- image folders -------------------------------------------------------------------------------------------


def write_images(folder, prompts, manifest=True, **changes):
    """Files {folder}/{key}.png with made-up bytes, and a manifest for them; prompts maps "anime/00000" to texts."""
    rows = []
    for name, prompt in prompts.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{folder.parent.name} {name}".encode())
        row = {"file": f"{name}.png", "prompt": prompt, "category": name.split("/")[0], "model": folder.parent.name}
        rows.append(row | {"sha256": images.file_sha256(path)} | changes.get(name, {}))
    if manifest:
        (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


PROMPTS = {"anime/00000": "a cat", "anime/00001": "a dog", "photo/00000": "a tree"}


def read(*folders, known=None):
    """Everything evaluate.py reads of some model folders: pictures, and problems by kind."""
    pictures, problems = [], []
    for folder in folders:
        found, wrong = images.read_model_folder(folder, folder.name)
        pictures, problems = [*pictures, *found], [*problems, *wrong]
    pictures, wrong = images.with_prompts(pictures, lambda prompt_set: known or {})
    pictures, changed = images.with_checksums(pictures)
    problems += [*wrong, *changed, *images.missing_against_others(pictures)]
    return pictures, {(problem.model, problem.kind): problem.names for problem in problems}


def test_a_whole_folder_has_no_problems(tmp_path):
    write_images(tmp_path / "sd15" / "hpsv2", PROMPTS)
    pictures, problems = read(tmp_path / "sd15")
    assert problems == {}
    assert [(p.prompt_set, p.key, p.category, p.prompt) for p in pictures] == [
        ("hpsv2", "anime/0", "anime", "a cat"),
        ("hpsv2", "anime/1", "anime", "a dog"),
        ("hpsv2", "photo/0", "photo", "a tree"),
    ]


def test_the_folder_of_one_set_can_be_named_itself(tmp_path):
    write_images(tmp_path / "sd15" / "hpsv2", PROMPTS)
    found, _ = images.read_model_folder(tmp_path / "sd15" / "hpsv2", "sd15")
    assert {picture.prompt_set for picture in found} == {"hpsv2"}


def test_several_images_of_a_prompt_share_its_key(tmp_path):
    write_images(tmp_path / "sd15" / "hpsv2", {"anime/00003": "a cat", "anime/00003_1": "a cat"})
    pictures, _ = read(tmp_path / "sd15")
    assert [(p.key, p.repeat) for p in pictures] == [("anime/3", 0), ("anime/3", 1)]


def test_missing_unlisted_and_changed_files_are_named(tmp_path):
    folder = tmp_path / "sd15" / "hpsv2"
    write_images(folder, PROMPTS)
    (folder / "anime" / "00001.png").unlink()
    (folder / "anime" / "00009.png").write_bytes(b"unknown")
    (folder / "photo" / "00000.png").write_bytes(b"changed")
    with (folder / "manifest.jsonl").open("a") as file:
        file.write('{"file": "anime/000')
    pictures, problems = read(tmp_path / "sd15")
    assert [picture.name for picture in pictures] == ["anime/00000.png", "photo/00000.png"]
    assert problems == {
        ("sd15", "listed in the manifest but missing"): ("anime/00001.png",),
        ("sd15", "left out: not in the manifest"): ("anime/00009.png",),
        ("sd15", "unreadable lines of the manifest"): ("line 4",),
        ("sd15", "changed since the manifest was written; scored as they are now"): ("photo/00000.png",),
    }


def test_an_image_made_from_another_prompt_is_left_out_and_named(tmp_path):
    write_images(tmp_path / "sd15" / "hpsv2", PROMPTS)
    write_images(tmp_path / "xdpo" / "hpsv2", PROMPTS | {"anime/00001": "a wolf"})
    pictures, problems = read(tmp_path / "sd15", tmp_path / "xdpo")
    assert len(pictures) == 5
    assert problems == {
        ("xdpo", "left out: made from another prompt than the first model's"): ("anime/00001.png",),
        ("xdpo", "prompts without an image that others have"): ("anime/1",),
    }


def test_without_a_manifest_prompts_come_from_the_other_models(tmp_path):
    write_images(tmp_path / "sd15" / "hpsv2", PROMPTS)
    write_images(tmp_path / "kto" / "hpsv2", PROMPTS, manifest=False)
    pictures, problems = read(tmp_path / "kto", tmp_path / "sd15")
    assert {p.key: p.prompt for p in pictures if p.model == "kto"} == {
        "anime/0": "a cat",
        "anime/1": "a dog",
        "photo/0": "a tree",
    }
    assert list(problems) == [("kto", "no manifest; read by layout, prompts taken from elsewhere")]


def test_without_any_manifest_prompts_come_from_the_set_and_gaps_are_named(tmp_path):
    write_images(tmp_path / "kto" / "mine", {"a/00000": "", "a/00002": "", "b/00000": ""}, manifest=False)
    known = {"a/0": ("A", "zero"), "a/2": ("A", "two")}
    pictures, problems = read(tmp_path / "kto", known=known)
    assert [(p.category, p.prompt) for p in pictures] == [("A", "zero"), ("A", "two")]
    assert problems[("kto", "missing in the numbering")] == ("a/00001",)
    assert problems[("kto", "left out: no prompt is known")] == ("b/00000.png",)


@pytest.mark.parametrize("other", ["anime/00001.jpg", "anime/1.png", "anime/00001_0.png", "anime/00001.PNG"])
@pytest.mark.parametrize("manifest", [True, False])
def test_two_files_for_one_image_are_a_clash_and_neither_is_taken(tmp_path, manifest, other):
    folder = tmp_path / "sd15" / "hpsv2"
    write_images(folder, PROMPTS, manifest=manifest)
    (folder / other).write_bytes(b"another image of the same prompt")
    if manifest:
        with (folder / "manifest.jsonl").open("a") as file:
            file.write(json.dumps({"file": other, "prompt": "a dog", "category": "anime"}) + "\n")
    known = {"anime/0": ("anime", "a cat"), "photo/0": ("photo", "a tree")}
    pictures, problems = read(tmp_path / "sd15", known=known)
    assert [picture.name for picture in pictures] == ["anime/00000.png", "photo/00000.png"]
    both = " and ".join(sorted([other, "anime/00001.png"]))
    assert problems["sd15", "clashes, left out: files for one image"] == (both,)


def test_a_folder_of_clashes_alone_says_so(tmp_path):
    write_images(tmp_path / "sd15" / "hpsv2", {"anime/0": "", "anime/00": ""}, manifest=False)
    with pytest.raises(ValueError, match=r"holds no images: .*1 clashes, left out: .*anime/0\.png and anime/00\.png"):
        images.read_model_folder(tmp_path / "sd15", "sd15")


def test_lines_of_a_manifest_that_hold_no_text_are_named_and_texts_of_unicode_are_whole(tmp_path):
    folder = tmp_path / "sd15" / "hpsv2"
    write_images(folder, {f"anime/{number}": "" for number in range(6)}, manifest=False)
    prompts = ["a\u2028b\x85c", 42, ["a"], "half \ud83d", None]
    rows = [json.dumps({"file": f"anime/{place}.png", "prompt": prompt}) for place, prompt in enumerate(prompts)]
    rows[0] = rows[0].replace("\\u2028", "\u2028").replace("\\u0085", "\x85")
    content = "\n".join(rows).encode() + b'\n{"file": "anime/5.png", "prompt": "caf\xe9"}\n'
    (folder / "manifest.jsonl").write_bytes(content)
    pictures, problems = images.read_model_folder(tmp_path / "sd15", "sd15")
    assert [picture.prompt for picture in pictures] == ["a\u2028b\x85c", None]
    [names] = [problem.names for problem in problems if problem.kind == "unreadable lines of the manifest"]
    assert names == ("line 2", "line 3", "line 4", "line 6")


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no image folder"):
        images.read_model_folder(tmp_path / "nothing", "x")
    with pytest.raises(ValueError, match="holds no images"):
        images.read_model_folder(tmp_path, "x")


def test_a_problem_names_some_and_counts_all():
    problem = Problem("sd15", "hpsv2", "broken", tuple("abcdef"))
    assert problem.describe(shown=2) == "sd15, hpsv2: 6 broken (a, b, … 4 more)"


# --- the score table -------------------------------------------------------------------------------------------


def key(number, scorer="clip"):
    return ScoreKey(f"sha{number}", f"prompt {number}", scorer, "1")


def place(number, model="sd15", scorer="clip", score=0.5, category="anime", prompt_set="hpsv2"):
    name = f"{category}/{number}"
    place_of = (prompt_set, model, category, name, 0, f"{name}.png")
    return Score(*place_of, f"prompt {number}", f"sha{number}", scorer, "1", score)


def test_scores_come_back_as_they_were(tmp_path):
    table = ScoreTable(tmp_path)
    table.add({key(1): 0.1 + 0.2, key(2): float("-inf")})
    table.close([place(1, score=0.1 + 0.2)], replaced=[])
    again = ScoreTable(tmp_path)
    assert again.known == {key(1): 0.1 + 0.2, key(2): float("-inf")}
    assert [asdict(row) for row in again.placed] == [asdict(place(1, score=0.1 + 0.2))]


def test_a_kill_loses_only_what_came_after_the_last_part(tmp_path):
    table = ScoreTable(tmp_path)
    table.add({key(1): 1.0})
    table.save_part()
    table.add({key(2): 2.0})
    assert ScoreTable(tmp_path).known == {key(1): 1.0}


def test_closing_merges_the_parts_and_removes_them(tmp_path):
    table = ScoreTable(tmp_path)
    table.add({key(1): 1.0})
    table.save_part()
    table.close([], replaced=[])
    assert not (tmp_path / PARTS).exists()
    assert ScoreTable(tmp_path).known == {key(1): 1.0}


def test_new_images_take_their_places_and_old_scores_stay_known(tmp_path):
    table = ScoreTable(tmp_path)
    table.add({key(1): 1.0, key(2): 2.0})
    table.close([place(1), place(2, model="xdpo")], replaced=[])
    table.close([place(3, score=3.0)], replaced=[("hpsv2", "sd15", "clip")])
    again = ScoreTable(tmp_path)
    assert {(row.model, row.sha256) for row in again.placed} == {("sd15", "sha3"), ("xdpo", "sha2")}
    assert again.known[key(1)] == 1.0


def test_storage_that_fails_is_not_taken_for_a_damaged_table(tmp_path, monkeypatch, full_disk):
    table = ScoreTable(tmp_path)
    table.add({key(1): 1.0})
    with pytest.raises(StorageError, match=r"could not write .*: the disk is full"):
        table.save_part()
    assert not any((tmp_path / PARTS).iterdir())

    (tmp_path / TABLE).write_bytes(b"PAR1")
    monkeypatch.setattr("io.open", failing(errno.EMFILE))
    with pytest.raises(StorageError, match=r"could not read .*scores\.parquet: too many files are open"):
        ScoreTable(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not parquet", "other columns"])
def test_a_damaged_table_is_named_with_what_to_do(tmp_path, damage):
    path = tmp_path / TABLE
    table = ScoreTable(tmp_path)
    table.add({key(number): float(number) for number in range(200)})
    table.close([], replaced=[])
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 4] ^= 0xFF
        path.write_bytes(content)
    elif damage == "not parquet":
        path.write_text("score\n1\n")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"score": [1.0]}), path)
    with pytest.raises(ValueError, match=r"scores\.parquet is not a score table.*move it away and run again"):
        ScoreTable(tmp_path)


# --- what is compared --------------------------------------------------------------------------------------------


def rows_of(scores, **where):
    """Rows of models' scores: {"sd15": {0: 1.0, 1: 2.0}}."""
    return [
        place(number, model=model, score=score, **where)
        for model, numbers in scores.items()
        for number, score in numbers.items()
    ]


def test_only_prompts_that_all_models_have_are_compared(tmp_path):
    nan = float("nan")
    rows = rows_of({"sd15": {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, "xdpo": {0: 2.0, 2: nan, 3: 1.0}})
    (benchmark,) = results.benchmarks(rows, ["sd15", "xdpo"], ["clip"])
    assert [prompt.key for prompt in benchmark.prompts] == ["anime/0", "anime/3"]
    assert benchmark.scores["clip"].tolist() == [[1.0, 4.0], [2.0, 1.0]]
    assert benchmark.prompts_seen == 4
    assert benchmark.limited_by == {"xdpo": 2}


def test_a_prompt_needs_scores_by_every_scorer(tmp_path):
    rows = rows_of({"sd15": {0: 1.0, 1: 2.0}}) + rows_of({"sd15": {1: 5.0}}, scorer="hpsv2")
    (benchmark,) = results.benchmarks(rows, ["sd15"], ["clip", "hpsv2"])
    assert [prompt.key for prompt in benchmark.prompts] == ["anime/1"]


def test_several_images_of_a_prompt_count_as_their_mean():
    rows = rows_of({"sd15": {0: 1.0}})
    rows.append(Score(**asdict(rows[0]) | {"repeat": 1, "score": 2.0, "sha256": "other"}))
    (benchmark,) = results.benchmarks(rows, ["sd15"], ["clip"])
    assert benchmark.of("sd15", "clip").tolist() == [1.5]


def test_prompts_stand_in_numeric_order_within_their_category():
    rows = rows_of({"sd15": {2: 0.0, 10: 0.0}}, category="photo") + rows_of({"sd15": {0: 0.0}}, category="anime")
    (benchmark,) = results.benchmarks(rows, ["sd15"], ["clip"])
    assert [prompt.key for prompt in benchmark.prompts] == ["anime/0", "photo/2", "photo/10"]


def test_sets_without_a_common_prompt_are_left_out():
    rows = rows_of({"sd15": {0: 1.0}, "xdpo": {1: 1.0}})
    assert results.benchmarks(rows, ["sd15", "xdpo"], ["clip"]) == []


# --- tables ------------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark():
    models = {"sd15": {0: 26.0, 1: 27.0, 2: 28.0}, "xdpo": {0: 27.0, 1: 27.0, 2: 30.0}}
    return results.benchmarks(rows_of(models, scorer="hpsv2"), ["sd15", "xdpo"], ["hpsv2"])[0]


def texts(grid, row):
    return [cell.text for cell in grid.rows[row]]


def test_win_rates_show_counts_rate_and_p(benchmark):
    grid = grids.win_rates(benchmark, ["sd15"])
    assert texts(grid, 0)[:4] == ["HPSv2", "xdpo", "sd15", "83.3 %"]
    assert texts(grid, 0)[5:] == ["2", "1", "0", "0.500"]


def test_details_show_mean_median_and_both_changes(benchmark):
    grid = grids.details(benchmark, "sd15")
    assert texts(grid, 1)[:5] == ["HPSv2", "xdpo", "3", "28.000", "27.000"]
    assert texts(grid, 1)[7:] == ["+1.000", "+3.7 %"]


def test_the_highest_mean_is_marked(benchmark):
    assert [row[1].best for row in grids.overview(benchmark).rows] == [False, True]


NASTY = "a|b *bold* [x](http://y) <script>alert(1)</script>\nsecond_line _so_"


def test_markdown_holds_no_markup_of_the_prompts():
    text = grids.to_markdown(Grid("t", ("Prompt",), ((Cell(NASTY, NASTY),),)))
    row = text.splitlines()[2]
    assert len(text.splitlines()) == 3
    assert row == r"| a\|b \*bold\* [x]\(http://y) &lt;script&gt;alert(1)&lt;/script&gt; second_line \_so\_ |"


def test_html_holds_no_markup_of_the_prompts():
    html = grids.to_html(Grid("<t>", ("<c>",), ((Cell(NASTY, NASTY),),)))
    assert "<script>" not in html and "<t>" not in html and "<c>" not in html
    assert "&lt;script&gt;" in html


def test_table_2_sets_the_published_numbers_and_the_difference_beside_ones_own(benchmark):
    grid = published.table2([benchmark])
    rows = {(row[0].text, row[1].text, row[2].text): [cell.text for cell in row[3:]] for row in grid.rows}
    assert rows["HPSV2", "xDPO (ours)", "measured"][0] == "28.000"
    assert rows["HPSV2", "xDPO (ours)", "published"] == ["27.98", "21.694", "0.737", "0.354", "5.66"]
    assert rows["HPSV2", "xDPO (ours)", "difference"] == ["+0.020", "–", "–", "–", "–"]
    assert ("HPSV2", "SePPO", "measured") not in rows
    assert len([row for row in grid.rows if row[2].text == "published"]) == 10


def test_table_3_shows_median_and_mean(benchmark):
    grid = published.table3([benchmark])
    rows = {(row[1].text, row[2].text): row[3].text for row in grid.rows}
    headline = "η = 0.05, n = 6, γ = 1/6"
    assert (rows[headline, "median"], rows[headline, "mean"]) == ("27.000", "28.000")
    assert (rows[headline, "published"], rows[headline, "difference"]) == ("27.98", "−0.980")
    assert len([row for row in grid.rows if row[2].text == "published"]) == 8


@pytest.mark.parametrize("name", ["xDPO", "xdpo_sd15", "x-dpo"])
def test_a_published_method_is_recognised_by_its_name(name):
    assert published.published_score("hpsv2", name, "image_reward") == 0.737


def test_published_numbers_are_only_those_of_the_papers_sets_and_models():
    assert published.published_score("tinyprompts", "xdpo", "hpsv2") is None
    assert published.published_score("hpsv2", "dpo_beta1050", "hpsv2") is None


def test_the_published_tables_are_those_handed_down(request):
    handed_down = request.config.rootpath.parent / "shared" / "paper" / "published_tables.yaml"
    if not handed_down.is_file():
        pytest.skip("no copy of the paper's numbers beside the repository")
    theirs, ours = yaml.safe_load(handed_down.read_text()), published._tables()
    assert ours["table2"] == theirs["table2"]
    scorers = ("hpsv2", "pickscore", "image_reward", "clip")
    assert [[row[s] for s in scorers] for row in ours["table3"]] == [
        [row[s] for s in scorers] for row in theirs["table3"]
    ]


# --- quality against training ------------------------------------------------------------------------------------


LOG = [{"step": step, "pairs_seen": 32 * step, "pairs_per_second": 16.0} for step in range(1, 11)]


def test_hours_add_up_over_steps():
    progress = curves.progress_by_step([*LOG, {"step": 10, "eval/margin": 0.1}])
    assert progress[10].pairs == 320
    assert progress[10].hours == pytest.approx(320 / 16 / 3600)


def test_a_runs_checkpoints_are_recognised_by_name_or_by_manifest(tmp_path):
    sources = {"base": "base", "xdpo@4": None, "early": "xdpo_step_00000002", "final": "xdpo", "other": "dpo"}
    curve = curves.curve(tmp_path / "xdpo", LOG, sources, "base")
    assert [(progress.pairs, model) for progress, model in curve.points] == [
        (0, "base"),
        (64, "early"),
        (128, "xdpo@4"),
        (320, "final"),
    ]


def test_a_run_without_a_log_or_with_a_step_it_never_made_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no training steps"):
        curves.curve(tmp_path / "xdpo", [], {"xdpo": "xdpo"})
    with pytest.raises(ValueError, match="step 99"):
        curves.curve(tmp_path / "xdpo", LOG, {"xdpo@99": None})


def test_pairs_to_reach_a_score_are_read_off_the_line_between_points():
    scores = {"base": {0: 1.0}, "xdpo@5": {0: 2.0}, "xdpo": {0: 5.0}}
    (benchmark,) = results.benchmarks(rows_of(scores), list(scores), ["clip"])
    at = {name: curves.Progress(pairs, 0.0) for name, pairs in (("base", 0), ("xdpo@5", 160), ("xdpo", 320))}
    curve = curves.Curve("xdpo", tuple((at[name], name) for name in at))
    assert curves.pairs_to_reach(benchmark, "clip", curve, 1.5) == 80
    assert curves.pairs_to_reach(benchmark, "clip", curve, 3.5) == 240
    assert curves.pairs_to_reach(benchmark, "clip", curve, 6.0) is None
