"""What tables say, in the terminal, as Markdown and as HTML; the published numbers; quality against training."""

import pytest
import yaml
from scored_images import rows_of

from xdpo.report import curves, grids, published
from xdpo.report.grids import Cell, Grid
from xdpo.scores.results import benchmarks_of

# --- tables ------------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark():
    models = {"sd15": {0: 26.0, 1: 27.0, 2: 28.0}, "xdpo": {0: 27.0, 1: 27.0, 2: 30.0}}
    return benchmarks_of(rows_of(models, scorer="hpsv2"), ["sd15", "xdpo"], ["hpsv2"])[0]


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
    (benchmark,) = benchmarks_of(rows_of(scores), list(scores), ["clip"])
    at = {name: curves.Progress(pairs, 0.0) for name, pairs in (("base", 0), ("xdpo@5", 160), ("xdpo", 320))}
    curve = curves.Curve("xdpo", tuple((at[name], name) for name in at))
    assert curves.pairs_to_reach(benchmark, "clip", curve, 1.5) == 80
    assert curves.pairs_to_reach(benchmark, "clip", curve, 3.5) == 240
    assert curves.pairs_to_reach(benchmark, "clip", curve, 6.0) is None
