"""What tables say, in the terminal, as Markdown and as HTML; the published numbers; quality against training."""

import csv
import io
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from scored_images import rows_of

from xdpo.images.reading import Picture
from xdpo.report import browser, curves, exports, figures, grids, published
from xdpo.report.grids import Cell, Grid
from xdpo.report.sections import Evaluation
from xdpo.scores.results import benchmarks_of

# --- tables ------------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark():
    models = {"sd15": {0: 26.0, 1: 27.0, 2: 28.0}, "xdpo": {0: 27.0, 1: 27.0, 2: 30.0}}
    return benchmarks_of(rows_of(models, scorer="hpsv2"), ["sd15", "xdpo"], ["hpsv2"])[0]


def texts(grid, row):
    return [cell.text for cell in grid.rows[row]]


def test_win_rates_show_counts_rate_and_p(benchmark):
    (paired,) = grids.compared(benchmark, ["sd15"])
    grid = grids.win_rates(benchmark, ["sd15"], {paired: 0.75, paired._replace(prompt_set="other"): 0.0})
    assert texts(grid, 0)[:4] == ["HPSv2", "xdpo", "sd15", "83.3 %"]
    assert texts(grid, 0)[5:] == ["2", "1", "0", "0.500", "0.750"]
    assert "Holm's method for the 2 comparisons of this report" in grid.note
    assert grid.rows[0][3].tone == ""
    assert grids.win_rates(benchmark, ["sd15"], {paired: 0.04}).rows[0][3].tone == "better"


def test_details_show_mean_median_and_both_changes(benchmark):
    grid = grids.details(benchmark, "sd15")
    assert texts(grid, 1)[:5] == ["HPSv2", "xdpo", "3", "28.000", "27.000"]
    assert texts(grid, 1)[7:] == ["+1.000", "+3.7 %"]


def test_a_mean_is_marked_where_it_is_better_than_every_other_and_not_where_it_is_highest(benchmark):
    assert [row[1].best for row in grids.overview(benchmark).rows] == [False, False]  # one win, one tie: no telling
    clear = {"sd15": {0: 26.0, 1: 27.0, 2: 28.0}, "xdpo": {0: 27.0, 1: 27.5, 2: 30.0}}
    (told,) = benchmarks_of(rows_of(clear, scorer="hpsv2"), ["sd15", "xdpo"], ["hpsv2"])
    assert [row[1].best for row in grids.overview(told).rows] == [False, True]
    measured = [row[3] for row in published.table2([told]).rows if row[2].text == "measured"]
    assert [cell.best for cell in measured] == [False, True]


THREE = {"a": {0: 1.0, 1: 5.0}, "b": {0: 2.0, 1: 4.0}, "c": {0: 3.0, 1: 5.0}}


def test_ranks_and_every_pair_are_those_counted_by_hand():
    (benchmark,) = benchmarks_of(rows_of(THREE), list(THREE), ["clip"])
    assert [texts(grids.ranks(benchmark), row) for row in range(3)] == [
        ["c", "1.25", "1.25"],
        ["a", "2.25", "2.25"],
        ["b", "2.50", "2.50"],
    ]
    rates = {(row[1].text, row[2].text): row[3].value for row in grids.every_pair(benchmark).rows}
    assert rates == {("a", "b"): 0.5, ("a", "c"): 0.25, ("b", "a"): 0.5, ("b", "c"): 0, ("c", "a"): 0.75, ("c", "b"): 1}


def test_every_category_has_its_means_and_changes():
    rows = rows_of(THREE) + rows_of({"a": {0: 1.0}, "b": {0: 3.0}, "c": {0: 1.0}}, category="photo")
    (benchmark,) = benchmarks_of(rows, list(THREE), ["clip"])
    grid = grids.by_category(benchmark, "a")
    assert [(texts(grid, row)[1:4], texts(grid, row)[4:6]) for row in (1, 4)] == [
        (["anime", "2", "b"], ["3.0000", "+0.0000"]),
        (["photo", "1", "b"], ["3.0000", "+2.0000"]),
    ]


def test_a_tables_csv_holds_its_numbers_unrounded_and_its_latex_no_commands():
    cells = (Cell("a_b, 50 % #1\\", "a"), Cell("0.33", 1 / 3, "[0.1, 0.5]", best=True, tone="better"), Cell("–"))
    grid = Grid("t: x", ("Model", "Mean", "p"), (cells, (Cell("[c]", "c"), Cell("1", 1), Cell("[1, 2]", 1))))
    read = list(csv.DictReader(io.StringIO(exports.to_csv(grid))))
    assert read[0] == {"Model": "a_b, 50 % #1\\", "Mean": str(1 / 3), "Mean: detail": "[0.1, 0.5]", "p": "–"}
    assert read[1]["p"] == "[1, 2]"
    assert exports.to_latex(grid).splitlines()[5:7] == [
        r"a\_b, 50 \% \#1\textbackslash{} & \textbf{0.33} $\uparrow$ {\scriptsize {[}0.1, 0.5]} & -- \\",
        r"{[}c] & 1 & {[}1, 2] \\",
    ]
    assert exports.file_stem(grid) == "t_x"


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


# --- colours -------------------------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes (2009), full severity, on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
)
TOLD_APART = {"normal": 25, "protanopia": 20, "deuteranopia": 20, "tritanopia": 15}  # ΔE of 1976; some 2 is just seen


def linear(colour):
    channels = np.array(to_rgb(colour))
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(colour, sight):
    xyz = TO_XYZ @ np.clip(np.array(SIGHT[sight]) @ linear(colour), 0, 1) / (0.95047, 1, 1.08883)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one, other):
    dark, light = sorted(float(TO_XYZ[1] @ linear(colour)) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("sight", SIGHT)
def test_readers_of_every_sight_tell_any_two_models_apart(sight):
    assert np.linalg.norm(lab("white", sight) - lab("black", sight)) == pytest.approx(100, abs=0.1)
    colours = [figures.BASELINE_COLOUR, *figures.COLOURS]
    assert len(colours) == 9
    apart = {pair: np.linalg.norm(lab(pair[0], sight) - lab(pair[1], sight)) for pair in combinations(colours, 2)}
    assert min(apart.values()) >= TOLD_APART[sight], min(apart, key=apart.get)


def test_marks_have_a_contrast_of_3_with_the_paper_and_texts_one_of_4_5_with_what_they_stand_on():
    assert contrast("#777777", "white") == pytest.approx(4.48, abs=0.01)
    assert min(contrast(colour, "white") for colour in (figures.BASELINE_COLOUR, *figures.COLOURS)) >= 3
    axes = Figure().subplots()
    for value in np.linspace(-1, 1, 201):
        figures._cell_text(axes, 0, 0, "1", value, limit=1, bold=False)
        ground = colormaps[figures._DIVERGING](0.5 + value / 2)[:3]
        assert contrast(axes.texts[-1].get_color(), ground) >= 4.5
    (benchmark,) = benchmarks_of(rows_of(THREE), list(THREE), ["clip"])
    for figure in every_figure(benchmark, "a"):
        figure.draw_without_rendering()
        texts = [text for text in figure.findobj(Text) if text.get_text() and text not in cell_texts(figure)]
        assert len(texts) > 5
        assert min(contrast(text.get_color(), "white") for text in texts) >= 4.5


def every_figure(benchmark, baseline):
    """One of each kind that shows models, and the heat maps."""
    colours = figures.colours_of(benchmark.models, baseline)
    ends = [(curves.Progress(0, 0.0), baseline)]
    runs = [curves.Curve(m, (*ends, (curves.Progress(9, 1.0), m))) for m in benchmark.models if m != baseline]
    return [
        figures.win_rate_bars(benchmark, baseline, colours),
        figures.metric_bars(benchmark, baseline),
        figures.score_differences(benchmark, baseline, colours),
        figures.quality_curves(benchmark, runs, baseline),
        figures.category_heat_map(benchmark, baseline),
        figures.win_matrix(benchmark),
    ]


def cell_texts(figure):
    return [text for axes in figure.axes if axes.images for text in axes.texts]


def test_a_model_has_one_colour_in_every_figure():
    (benchmark,) = benchmarks_of(rows_of(THREE), list(THREE), ["clip"])
    colours = {m: to_rgb(colour) for m, colour in figures.colours_of(benchmark.models, "a").items()}
    rates, means, violins, training, *_ = (figure.axes[0] for figure in every_figure(benchmark, "a"))

    def bars(axes):
        return [to_rgb(bar.get_facecolor()) for bar in axes.patches]

    assert bars(rates) == [colours["b"], colours["c"]]
    assert bars(means) == [colours["a"], colours["b"], colours["c"]]
    assert [to_rgb(violin.get_facecolor()[0]) for violin in violins.collections[::2]] == [colours["b"], colours["c"]]
    assert {line.get_label(): to_rgb(line.lines[0].get_color()) for line in training.containers} == {
        name: colours[name] for name in ("b", "c")
    }


def test_the_papers_methods_have_their_own_colours_whatever_stands_beside_them():
    few = figures.colours_of(["sd15", "xdpo"], "sd15")
    many = figures.colours_of(["one", "xDPO-SD15", "two", "dpo", "three", "xdpo@40", "sd15"], "one")
    assert list(many) == ["one", "xDPO-SD15", "two", "dpo", "three", "xdpo@40", "sd15"]
    assert many["xDPO-SD15"] == few["xdpo"] != many["dpo"]
    assert len(set(many.values())) == 7
    crowd = figures.colours_of([f"model {n}" for n in range(12)], "model 0")
    assert len(set(crowd.values())) == 9 and crowd["model 9"] == crowd["model 1"]


def test_an_interval_is_seen_over_a_bar_of_any_colour():
    """It is dark, and its white rim has a contrast of 3 with every colour, as the test above has it."""
    (benchmark,) = benchmarks_of(rows_of(THREE), list(THREE), ["clip"])
    for figure in every_figure(benchmark, "a")[:2]:
        intervals = [part for bar in figure.axes[0].containers if isinstance(bar, ErrorbarContainer) for part in bar[2]]
        assert len(intervals) == 2
        for interval in intervals:
            (rim,) = interval.get_path_effects()
            assert to_rgb(rim._gc["foreground"]) == (1, 1, 1) and rim._gc["linewidth"] > interval.get_linewidth()[0]


def test_a_model_of_a_colour_that_was_used_is_striped():
    names = [f"m{n}" for n in range(10)]
    (benchmark,) = benchmarks_of(rows_of({name: {0: 1.0} for name in names}), names, ["clip"])
    axes = figures.win_rate_bars(benchmark, "m0", figures.colours_of(names, "m0")).axes[0]
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False] * 8 + [True]


# --- images of the page --------------------------------------------------------------------------------------------


def test_images_are_dealt_from_all_sets_metrics_and_models_in_turn():
    """The first round has every ranking's first prompt, and no prompt's second image comes before all first ones."""
    count, models, scorers = 40, ["base", "one", "two"], ["clip", "hpsv2"]
    scores, pictures = np.random.default_rng(0).normal(size=(2, 2, 3, count)), {}
    benchmarks = []
    for name, of_set in zip(("large", "small"), scores, strict=True):
        numbers = range(count if name == "large" else 10)
        rows = []
        for scorer, of_scorer in zip(scorers, of_set, strict=True):
            told = {m: {n: of_model[n] for n in numbers} for m, of_model in zip(models, of_scorer, strict=True)}
            rows += rows_of(told, scorer=scorer, prompt_set=name)
        benchmarks += benchmarks_of(rows, models, scorers)
        for model in models:
            for n in numbers:
                paths = [Path(name, model, f"{n}_{repeat}.png") for repeat in range(2)]
                pictures[name, model, f"anime/{n}"] = [
                    Picture(model, name, "anime", f"anime/{n}", repeat, path, path.name)
                    for repeat, path in enumerate(paths)
                ]
    evaluation = Evaluation(benchmarks, ["base"], [], [], pictures, {}, [])
    dealt = list(dict.fromkeys(browser.dealt(evaluation)))
    assert len(dealt) == 2 * 3 * (count + 10)
    ends = set()
    for benchmark in benchmarks:
        ends.add((benchmark.name, benchmark.prompts[0].key))
        for scorer in scorers:
            for model in models[1:]:
                change = benchmark.of(model, scorer) - benchmark.of("base", scorer)
                ends |= {(benchmark.name, benchmark.prompts[i].key) for i in (change.argmin(), change.argmax())}
    first_round = dealt[: len(models) * len(ends)]
    assert set(first_round) == {pictures[name, model, key][0].path for name, key in ends for model in models}
    assert {path.stem[-1] for path in dealt[: len(dealt) // 2]} == {"0"}
    assert {path.parts[0] for path in dealt[len(dealt) // 2 :][: len(models) * len(ends)]} == {"large", "small"}


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


def test_the_bars_of_the_training_figure_are_those_of_paired_differences():
    """Prompts differ by ten, the models by a tenth: unpaired bars would hide the change."""
    start = np.random.default_rng(0).normal(0, 10, 40)
    scores = {"base": dict(enumerate(start)), "xdpo": dict(enumerate(start + 0.1))}
    (benchmark,) = benchmarks_of(rows_of(scores), list(scores), ["clip"])
    points = tuple((curves.Progress(pairs, 0.0), name) for pairs, name in ((0, "base"), (320, "xdpo")))
    axes = figures.quality_curves(benchmark, [curves.Curve("xdpo", points)], "base").axes[0]
    (bars,) = axes.collections
    low, high = bars.get_paths()[1].vertices[:, 1]
    assert 0 <= high - low < 1e-9 and low == pytest.approx(start.mean() + 0.1)


def test_figures_are_drawn_of_equal_scores_and_of_single_prompts():
    (benchmark,) = benchmarks_of(rows_of({"a": {0: 1.0}, "b": {0: 1.0}, "c": {0: 2.0}}), ["a", "b", "c"], ["clip"])
    colours = figures.colours_of(benchmark.models, "a")
    for drawn in (
        figures.score_differences(benchmark, "a", colours),
        figures.category_heat_map(benchmark, "a"),
        figures.win_matrix(benchmark),
    ):
        drawn.canvas.draw()
    assert [text.get_text() for text in figures.win_matrix(benchmark).axes[0].texts] == [
        "50",
        "0",
        "50",
        "0",
        "100",
        "100",
    ]


def test_pairs_to_reach_a_score_are_read_off_the_line_between_points():
    scores = {"base": {0: 1.0}, "xdpo@5": {0: 2.0}, "xdpo": {0: 5.0}}
    (benchmark,) = benchmarks_of(rows_of(scores), list(scores), ["clip"])
    at = {name: curves.Progress(pairs, 0.0) for name, pairs in (("base", 0), ("xdpo@5", 160), ("xdpo", 320))}
    curve = curves.Curve("xdpo", tuple((at[name], name) for name in at))
    assert curves.pairs_to_reach(benchmark, "clip", curve, 1.5) == 80
    assert curves.pairs_to_reach(benchmark, "clip", curve, 3.5) == 240
    assert curves.pairs_to_reach(benchmark, "clip", curve, 6.0) is None
