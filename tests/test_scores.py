"""Statistics against SciPy, the score table's survival, and what is compared."""

import errno
from math import isinf, isnan

import numpy as np
import pytest
from conftest import failing
from scipy import stats
from scored_images import key, placement, rows_of

from xdpo.files import StorageError
from xdpo.scores import statistics
from xdpo.scores.results import benchmarks_of
from xdpo.scores.statistics import bootstrap_interval, compare, sign_test, summarize, wilson_interval
from xdpo.scores.table import PARTS, TABLE, PlacedScore, ScoreTable

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
        low, high = wilson_interval(wins + ties / 2, wins + ties + losses)
        covered += low <= 0.6 <= high
    assert covered / 400 >= 0.94  # ties vary less than wins and losses, so more than 95 % is expected
    rates = rng.binomial(6, 0.95, 4000)  # near a full score, where a bootstrap covers 26 %
    covered = sum(low <= 0.95 <= high for low, high in (wilson_interval(wins, 6) for wins in rates))
    assert covered / 4000 > 0.94


def test_a_win_rates_interval_is_wilsons_over_the_bootstrap_of_its_prompts():
    comparison = compare([0.0] * 100, [1.0] * 60 + [0.0] * 10 + [-1.0] * 30)
    points = np.repeat([1.0, 0.5, 0.0], [60, 10, 30])
    assert comparison.win_rate_interval == pytest.approx(bootstrap_interval(points), abs=0.011)
    assert compare([0.0] * 3, [1.0] * 3).win_rate_interval[0] < 0.5  # three wins of three say little


def rejected(p_values, level):
    """Holm's procedure as he gives it: the smallest first, until one is too large for those that are left."""
    gone = set()
    for position in np.argsort(p_values):
        if p_values[position] > level / (len(p_values) - len(gone)):
            break
        gone.add(int(position))
    return gone


def test_a_corrected_p_value_is_the_level_at_which_holms_procedure_rejects():
    rng = np.random.default_rng(5)
    for count in (1, 2, 7, 40):
        p_values = np.round(rng.uniform(0, 1, count) ** 4, 3)  # with repeated values among 40
        corrected = statistics.holm(list(p_values))
        for level in (0.001, 0.01, 0.05, 0.2, 0.7):
            assert rejected(p_values, level) == {i for i, p in enumerate(corrected) if p <= level}
    assert statistics.holm([]) == []


def test_holms_correction_errs_in_at_most_the_claimed_share_of_reports():
    rng = np.random.default_rng(6)
    wrong = 0
    for _ in range(300):
        p_values = [sign_test(wins, 60 - wins) for wins in rng.binomial(60, 0.5, 20)]
        assert min(statistics.holm(p_values)) >= min(p_values)
        wrong += min(statistics.holm(p_values)) < 0.05
    assert wrong / 300 <= 0.07  # 5 %, and three standard errors less what a discrete test leaves unused


def test_a_rank_counts_the_higher_ones_and_half_of_its_equals():
    scores = np.random.default_rng(7).integers(0, 4, (5, 30)).astype(float)  # with ties
    higher = (scores[None] > scores[:, None]).sum(axis=1)
    equal = (scores[None] == scores[:, None]).sum(axis=1) - 1
    assert statistics.average_ranks(scores) == pytest.approx((1 + higher + equal / 2).mean(axis=1))


def test_the_wilson_interval_is_scipys():
    expected = stats.binomtest(61, 100).proportion_ci(method="wilson")
    assert wilson_interval(61, 100) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_wilson_interval_of_all_or_nothing_ends_there_exactly():
    for trials in range(1, 400):
        assert wilson_interval(trials, trials)[1] == 1.0
        assert wilson_interval(0, trials)[0] == 0.0


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


# --- the score table -------------------------------------------------------------------------------------------


def test_scores_come_back_as_they_were(tmp_path):
    table = ScoreTable(tmp_path)
    table.add({key(1): 0.1 + 0.2, key(2): float("-inf")})
    table.close([(placement(1), key(1))], replaced=[])
    again = ScoreTable(tmp_path)
    assert again.scores == {key(1): 0.1 + 0.2, key(2): float("-inf")}
    assert again.placed == [(placement(1), key(1), 0.1 + 0.2)]


def test_a_kill_loses_only_what_came_after_the_last_part(tmp_path):
    table = ScoreTable(tmp_path)
    table.add({key(1): 1.0})
    table.save_part()
    table.add({key(2): 2.0})
    assert ScoreTable(tmp_path).scores == {key(1): 1.0}


def test_closing_merges_the_parts_and_removes_them(tmp_path):
    table = ScoreTable(tmp_path)
    table.add({key(1): 1.0})
    table.save_part()
    table.close([], replaced=[])
    assert not (tmp_path / PARTS).exists()
    assert ScoreTable(tmp_path).scores == {key(1): 1.0}


def test_new_images_take_their_places_and_old_scores_stay_known(tmp_path):
    table = ScoreTable(tmp_path)
    table.add({key(1): 1.0, key(2): 2.0, key(3): 3.0})
    table.close([(placement(1), key(1)), (placement(2, "xdpo"), key(2))], replaced=[])
    table.close([(placement(3), key(3))], replaced=[("hpsv2", "sd15", "clip")])
    again = ScoreTable(tmp_path)
    assert {(row.placement.model, row.key.sha256) for row in again.placed} == {("sd15", "sha3"), ("xdpo", "sha2")}
    assert again.scores[key(1)] == 1.0


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


def test_only_prompts_that_all_models_have_are_compared(tmp_path):
    nan = float("nan")
    rows = rows_of({"sd15": {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, "xdpo": {0: 2.0, 2: nan, 3: 1.0}})
    (benchmark,) = benchmarks_of(rows, ["sd15", "xdpo"], ["clip"])
    assert [prompt.key for prompt in benchmark.prompts] == ["anime/0", "anime/3"]
    assert benchmark.scores["clip"].tolist() == [[1.0, 4.0], [2.0, 1.0]]
    assert benchmark.prompts_seen == 4
    assert benchmark.limited_by == {"xdpo": 2}


def test_a_prompt_needs_scores_by_every_scorer(tmp_path):
    rows = rows_of({"sd15": {0: 1.0, 1: 2.0}}) + rows_of({"sd15": {1: 5.0}}, scorer="hpsv2")
    (benchmark,) = benchmarks_of(rows, ["sd15"], ["clip", "hpsv2"])
    assert [prompt.key for prompt in benchmark.prompts] == ["anime/1"]


def test_several_images_of_a_prompt_count_as_their_mean():
    rows = rows_of({"sd15": {0: 1.0}})
    rows.append(PlacedScore(placement(0, repeat=1), key(0)._replace(sha256="other"), 2.0))
    (benchmark,) = benchmarks_of(rows, ["sd15"], ["clip"])
    assert benchmark.of("sd15", "clip").tolist() == [1.5]


def test_prompts_stand_in_numeric_order_within_their_category():
    rows = rows_of({"sd15": {2: 0.0, 10: 0.0}}, category="photo") + rows_of({"sd15": {0: 0.0}}, category="anime")
    (benchmark,) = benchmarks_of(rows, ["sd15"], ["clip"])
    assert [prompt.key for prompt in benchmark.prompts] == ["anime/0", "photo/2", "photo/10"]


def test_the_best_model_is_one_that_the_prompts_tell_from_every_other():
    rng = np.random.default_rng(8)
    start = rng.normal(0, 1, 60)
    scores = {"a": start, "b": start + rng.normal(0.02, 1, 60), "c": start + rng.normal(1, 0.5, 60)}

    def benchmark(*models):
        rows = rows_of({model: dict(enumerate(scores[model])) for model in models})
        return benchmarks_of(rows, models, ["clip"])[0]

    assert benchmark("a", "b", "c").best("clip") == "c"
    assert benchmark("a", "b").best("clip") is None
    assert benchmark("a").best("clip") is None


def test_sets_without_a_common_prompt_are_left_out():
    rows = rows_of({"sd15": {0: 1.0}, "xdpo": {1: 1.0}})
    assert benchmarks_of(rows, ["sd15", "xdpo"], ["clip"]) == []
