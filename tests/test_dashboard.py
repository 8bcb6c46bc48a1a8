"""A run's index.html: bounded at any length, honest about both errors, written by the run itself."""

import re
from html.parser import HTMLParser

import pytest
from conftest import encoded_image

from xdpo.dashboard import RunPage, page
from xdpo.dashboard.charts import nice_ticks
from xdpo.dashboard.series import MOST_POINTS, Series
from xdpo.dashboard.verdict import verdict
from xdpo.files import StorageError
from xdpo.runlog import read_rows

STATISTICS = (
    "loss",
    "implicit_accuracy",
    "margin",
    "d_chosen",
    "d_rejected",
    "policy_error",
    "reference_error",
    "gain",
)
FURTHER = ("gradient_norm", "learning_rate", "pairs_seen", "pairs_per_second", "data_wait_share", "peak_memory_gb")
RUN = [
    {"step": 0} | {f"eval/{name}": 0.5 for name in STATISTICS},
    {"step": 1} | {name: 1.0 for name in [*STATISTICS, *FURTHER]},
    {"step": 1, "online/reward/tiny_reward": 4.5},
    {"step": 2} | {name: 0.7 for name in [*STATISTICS, *FURTHER]},
]
HOSTILE = "<script>alert(1)</script>"


class Tags(HTMLParser):
    """Elements of a page that are open at its end, and its attributes' values by name."""

    def __init__(self, text):
        super().__init__()
        self.open, self.values = [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attributes:
            self.values.setdefault(name, []).append(value)

    def handle_startendtag(self, tag, attributes):
        self.values.setdefault(tag, []).append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page_of(folder, rows, max_steps=10, description=""):
    folder.mkdir(exist_ok=True)
    run_page = RunPage(folder, max_steps=max_steps, description=description)
    for row in rows:
        run_page.add(row)
    return run_page


def test_a_curve_keeps_its_means_and_extremes_in_a_bounded_number_of_points():
    series = Series()
    for step in range(1, 10_001):
        series.add(step, -7.0 if step == 5_000 else float(step))
    assert MOST_POINTS / 2 <= len(series.points) <= MOST_POINTS
    assert sum(point.count for point in series.points) == 10_000 and len({p.count for p in series.points[:-1]}) == 1
    assert sum(point.values for point in series.points) == sum(range(1, 10_001)) - 5_007
    assert min(point.low for point in series.points) == -7 and series.points[-1].high == series.latest == 10_000
    assert [point.step for point in series.points] == sorted(point.step for point in series.points)


def test_values_that_are_not_finite_are_counted_and_not_drawn(tmp_path):
    rows = [{"step": step, "loss": value} for step, value in enumerate([0.7, float("nan"), 0.6, float("inf")])]
    run_page = page_of(tmp_path, rows)
    run_page.close()
    text = run_page.path.read_text()
    assert run_page.series["loss"].not_finite == 2 and "2 values are not finite and not drawn" in text
    assert not re.search(r'points="[^"]*(nan|inf)', text)
    run_page = page_of(tmp_path, [{"step": step, "margin": float("nan")} for step in range(3)])
    run_page.close()
    assert "3 values are not finite and not drawn" in run_page.path.read_text()


def test_a_long_run_has_a_page_as_small_as_a_short_one(tmp_path):
    rows = ({"step": step} | dict.fromkeys(STATISTICS, step % 97 / 97) for step in range(1, 100_001))
    run_page = page_of(tmp_path, rows, max_steps=100_000)
    run_page.write("training")
    assert max(len(series.points) for series in run_page.series.values()) <= MOST_POINTS
    assert run_page.path.stat().st_size < 200_000


def test_the_page_of_a_run_has_every_metric_and_is_well_formed(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in range(0, 3000, 100):
        (tmp_path / "samples" / f"step_{step:08d}.png").write_bytes(encoded_image())
    run_page = page_of(tmp_path, RUN, max_steps=RUN[-1]["step"] + 1, description=HOSTILE)
    run_page.write("training")
    text = run_page.path.read_text(encoding="utf-8")
    tags = Tags(text)
    assert tags.open == [] and HOSTILE not in text and "{{" not in text
    titles = re.findall("<h3>([^<]+)</h3>", text)
    assert {*titles} >= {"Pairs in the right order", "Margin", "Loss", "policy_error", *FURTHER} - {"pairs_seen"}
    assert "The same all along: reward/tiny_reward 4.5." in text and "time left is not known yet" in text
    sheets = [source for source in tags.values["src"] if source.startswith("samples/")]
    assert len(sheets) == page.MOST_SHEETS
    assert sheets[0] == "samples/step_00002900.png" and sheets[-1] == "samples/step_00000000.png"
    assert not [value for name in ("src", "href") for value in tags.values[name] if re.match(r"https?:|//", value)]

    run_page.close()
    assert "stopped; the same command resumes" in run_page.path.read_text(encoding="utf-8")


def test_a_page_says_how_long_a_run_will_take(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(page.time, "monotonic", lambda: now)
    run_page = page_of(tmp_path, [{"step": 1, "loss": 1.0}], max_steps=1000)
    run_page.write_if_due()
    run_page.add({"step": 11, "loss": 1.0})
    now += page.SECONDS_BETWEEN_PAGES - 1
    run_page.write_if_due()
    assert "step 1 of" in run_page.path.read_text(), "it is not written at every row"
    now = 300.0
    run_page.write_if_due()
    assert "step 11 of 1,000" in run_page.path.read_text()
    assert "about 5 h 30 min left" in run_page.path.read_text()  # 20 s a step, 989 steps


@pytest.mark.parametrize(
    "chosen, rejected, title",
    [
        (0.0, 0.0, "Still at the reference"),
        (-0.01, 0.02, "As intended"),
        (-0.01, 0.0005, "As intended"),
        (-0.02, -0.01, "Better on both images"),
        (0.01, 0.02, "Worse on both images"),
        (0.02, 0.01, "The wrong way round"),
        (0.01, -0.01, "The wrong way round"),
        (-0.01, -0.02, "The wrong way round"),
        (float("nan"), 0.0, "Not numbers"),
    ],
)
def test_both_errors_are_put_into_words(chosen, rejected, title):
    assert verdict(chosen, rejected).title == title


def test_the_words_are_on_held_out_pairs_once_these_say_something(tmp_path):
    d = {"d_chosen": -0.01, "d_rejected": 0.01, "reference_error": 0.1}
    start = {"step": 0} | {f"eval/{name}": 0.0 for name in d} | {"eval/reference_error": 0.1}
    trained = {"step": 1} | d
    held_out = {"step": 1, "eval/d_chosen": 0.01, "eval/d_rejected": 0.02, "eval/reference_error": 0.1}
    for rows, title, numbers in (
        ([start], "There are no errors against a reference yet", ""),
        ([start, trained], "As intended", "chosen −10.0 %, rejected +10.0 %"),
        ([start, trained, held_out], "Worse on both images", "chosen +10.0 %, rejected +20.0 %"),
    ):
        run_page = page_of(tmp_path, rows)
        run_page.close()
        text = run_page.path.read_text(encoding="utf-8")
        assert title in text and numbers in text


@pytest.mark.parametrize(
    "low, high, level",
    [(0, 0, None), (0.5, 0.5, 0.5), (-3e-7, 4e-7, 0), (12, 13_000, None), (6.719079026348635, 6.719079026348636, None)],
)
def test_ticks_are_few_and_around_everything(low, high, level):
    ticks = nice_ticks(low, high, level)
    assert 2 <= len(ticks) <= 7 and ticks[0] <= low and high <= ticks[-1] * (1 + 1e-9)
    assert level is None or ticks[0] <= level <= ticks[-1]


def test_a_run_that_ends_with_an_error_says_so_on_its_page(run):
    status, folder = run("run", "optim.learning_rate=1e30", "train.max_steps=6")
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert status == 1 and re.search(r"ended with an error: [^<]*not finite", text) and 'data-refresh="0"' in text


def test_a_page_that_can_not_be_written_is_an_error(tmp_path, full_disk):
    with pytest.raises(StorageError, match=r"could not write .*index\.html: the disk is full"):
        page_of(tmp_path, RUN).write_if_due()


def test_a_run_writes_its_page_and_a_resumed_one_goes_on_with_it(run, small_pairs):
    options = (
        "eval.every=1",
        f"eval.path={small_pairs}",
        "eval.pairs=2",
        "samples.every=2",
        "log.trackers=[tensorboard]",
    )
    status, folder = run("run", *options, "train.max_steps=2")
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert status == 0 and "<title>run: finished</title>" in text and "step 2 of 2" in text
    assert "samples/step_00000002.png" in text and 'data-refresh="0"' in text

    run("run", *options, "train.max_steps=3")
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "step 3 of 3" in text and "held-out pairs, step 3" in text
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row] == [1, 2, 3]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((folder / "tensorboard").rglob("*tfevents*")).parent)).Reload()
    groups = {tag.partition("/")[0] for tag in events.Tags()["scalars"]}
    assert groups == {"train", "optim", "speed", "data", "eval"}
    sheet = events.Images("samples")[0]
    assert events.Tags()["images"] == ["samples"] and (sheet.width, sheet.height) > (16, 16)
