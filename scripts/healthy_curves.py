"""Train the runs of docs/healthy_curves.md in the embedded world, measure them, and draw the page's figure and table.

    python scripts/healthy_curves.py --jobs 2                 twenty minutes on two quiet cores
    python scripts/healthy_curves.py --seeds 0 --steps 40 --prompts 20 --page runs/curves.md     a trial of it

Each config of RUNS is trained with every seed, sampled at four steps and scored by the embedded judges. The page's
figure is written beside it, and its table between the two marks in its text; a page that isn't there gets these alone.
The same command resumes after a stop. What is done stays done, so take a new --output after the embedded base changed.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xdpo.arguments import positive
from xdpo.experiments.plan import BASE
from xdpo.experiments.runs import ROOT, Run, enter_root, make_run, train_all
from xdpo.experiments.stages import base_model, keeping, model_name, sampling, scores_in, scoring
from xdpo.experiments.tasks import Interrupted, StageError, finish
from xdpo.files import write_text
from xdpo.paths import user_path
from xdpo.report.figures import BASELINE_COLOUR, CHOSEN_COLOUR, COLOURS, REJECTED_COLOUR, STYLE, save
from xdpo.report.grids import Cell, Grid, percent, title_of, to_markdown
from xdpo.runs import checkpoint_path

RUNS = {  # title of a column → config
    "works": ROOT / "configs/tiny/xdpo.yaml",
    "over-optimises": ROOT / "configs/tiny/curves/over_optimises.yaml",
    "diverges": ROOT / "configs/tiny/curves/diverges.yaml",
}
MAY_DIVERGE = {"diverges"}  # the columns whose runs are drawn as far as they came
COMMON = (  # half of the embedded default's batch, and only what is drawn
    "train.total_batch_pairs=16",
    "train.micro_batch_pairs=16",
    "eval.pairs=64",
    "samples.every=0",
    "log.trackers=[]",
)
REWARDS = {"tiny_reward": "#36393a", "tiny_heldout_reward": COLOURS[0]}  # the judge, and one that no config trains on
ALIGNMENT = "tiny_alignment"  # whether an image shows what its prompt says
SCORERS = (*REWARDS, ALIGNMENT)
MEASURED = 4  # times that a run's model is scored, equally far apart
WINDOW = 15  # steps over which a noisy curve of training is smoothed
BEGIN, END = "<!-- written by scripts/healthy_curves.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Column:
    """A config's runs, one for each seed, and their scores."""

    title: str
    runs: Sequence[Run]
    scores: Mapping[str, tuple[list[int], np.ndarray]]  # scorer → steps, and mean scores (seeds, steps)

    @cached_property
    def rows(self) -> list[list[dict]]:
        return [run.rows() for run in self.runs]

    def curve(self, metric: Callable[[Mapping[str, float]], float], needs: str) -> tuple[list[int], np.ndarray]:
        """Steps that every run logged, and a number of their rows with the key `needs`, (seeds, steps)."""
        values = [{row["step"]: metric(row) for row in rows if needs in row} for rows in self.rows]
        steps = sorted(set.intersection(*map(set, values)))
        return steps, np.array([[each[step] for step in steps] for each in values])

    def logged(self, key: str) -> tuple[list[int], np.ndarray]:
        return self.curve(lambda row: row[key], key)

    def at_end(self, key: str) -> np.ndarray:
        """The last values, (seeds,)."""
        return last(self.logged(key)[1])

    @cached_property
    def ends(self) -> list[int]:
        """The optimizer steps that each run made."""
        return [max((row["step"] for row in rows if "loss" in row), default=0) for rows in self.rows]

    def share(self, side: str) -> tuple[list[int], np.ndarray]:
        """d of held-out images, in shares of the reference's error."""
        key = f"eval/d_{side}"
        return self.curve(lambda row: row[key] / row["eval/reference_error"], key)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure and draw. Returns the exit status, 130 after a request to stop."""
    options = build_parser().parse_args(arguments)
    try:
        options.output, options.page = enter_root(options.output, options.page)
        around_marks(options.page)  # a page without them is told before hours of training
        columns = measure(options)
        figure = options.page.with_suffix("") / "curves"
        written = [*save(draw(columns), figure), options.page]
        command = shlex.join(["python", "scripts/healthy_curves.py", *(arguments or sys.argv[1:])])
        fill(options.page, figure.relative_to(options.page.parent), to_markdown(table(columns)), command)
    except (ValueError, OSError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt):
        print("stopped; what was in work has saved, and the same command goes on", file=sys.stderr)
        return 130
    print("\n".join(map(str, written)))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--steps", type=positive, default=300, metavar="N", help="of each training (default: 300)")
    parser.add_argument("--prompts", type=positive, default=60, metavar="N", help="prompts scored (default: 60)")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="processes at once (default: 1)")
    parser.add_argument("--output", type=user_path, default=Path("runs/healthy_curves"), metavar="DIR")
    parser.add_argument("--page", type=user_path, default=ROOT / "docs/healthy_curves.md", metavar="FILE")
    return parser


# --- trainings, images, scores -----------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> list[Column]:
    """Train all runs, and score their images. Raises StageError if anything fails but a run that may diverge."""
    if options.steps % MEASURED:
        raise ValueError(f"--steps must be a multiple of {MEASURED}, got {options.steps}")
    every = options.steps // MEASURED
    steps = [every * (number + 1) for number in range(MEASURED)]
    overrides = [*COMMON, *keeping(steps), f"eval.every={max(1, every // 3)}"]
    runs = {
        title: [
            make_run(f"{config.stem}-seed{seed}", config, (*overrides, f"seed={seed}"), options.output / "runs")
            for seed in options.seeds
        ]
        for title, config in RUNS.items()
    }
    every_run = [run for of_title in runs.values() for run in of_title]
    refuse_failures(runs, train_all(every_run, options.jobs))
    models = {BASE: base_model(every_run[0].settings)}
    inputs: dict[str, tuple[Path, ...]] = {BASE: ()}
    for run in every_run:
        for step in steps:
            checkpoint = checkpoint_path(run.folder, step)
            if checkpoint.is_dir():
                models[model_name(run, step)] = [str(checkpoint)]
                inputs[model_name(run, step)] = (checkpoint / "policy.safetensors",)
    arguments = ("--sample", str(options.prompts), "--steps", "20", "--guidance", "1", "--batch-size", "20")
    folder, results = options.output / "images", options.output / "results"
    images = [
        sampling(f"images of {name}", model, folder / name, ["tinyprompts"], arguments, inputs[name])
        for name, model in models.items()
    ]
    finish(images, options.jobs)
    finish([scoring(images, SCORERS, results, "Healthy curves")])
    means = {which: float(scores.mean()) for which, scores in scores_in(results, list(models), SCORERS).items()}
    return [Column(title, of_title, scores_of(of_title, [0, *steps], means)) for title, of_title in runs.items()]


def refuse_failures(runs: Mapping[str, Sequence[Run]], failed: Mapping[str, str]) -> None:
    """Raise StageError for a failed run, unless its numbers were no longer finite in a column of MAY_DIVERGE."""
    for title, of_title in runs.items():
        for run in of_title:
            end = failed.get(run.name)
            if end is not None and not (title in MAY_DIVERGE and "not finite" in end):
                raise StageError(f"{run.name} failed:\n{end}")


def model_of(run: Run, step: int) -> str:
    return model_name(run, step) if step else BASE


def scores_of(
    runs: Sequence[Run], steps: Iterable[int], means: Mapping[tuple[str, str], float]
) -> dict[str, tuple[list[int], np.ndarray]]:
    """Scorer → the steps at which every run has scores, and their means (seeds, steps)."""
    scored = {model for model, _ in means}
    common = [step for step in steps if all(model_of(run, step) in scored for run in runs)]
    return {
        scorer: (common, np.array([[means[model_of(run, step), scorer] for step in common] for run in runs]))
        for scorer in SCORERS
    }


# --- the page ----------------------------------------------------------------------------------------------


def draw(columns: Sequence[Column]) -> Figure:
    """A column of panels for each config: loss, accuracy, margin, both d, scores. Each row has one scale."""
    rows: Sequence[tuple[str, Callable[[Axes, Column], None]]] = (
        ("loss (logarithmic)", draw_loss),
        ("pairs in the right order", draw_accuracy),
        ("margin, held-out pairs", draw_margin),
        ("d / reference's error, held out", draw_errors),
        ("mean reward of images", partial(draw_scores, colours=REWARDS)),
        ("images show their prompt", partial(draw_scores, colours={ALIGNMENT: COLOURS[3]})),
    )
    with rc_context(STYLE):
        figure = Figure(figsize=(3.3 * len(columns) + 1, 2.2 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), len(columns), sharex=True, sharey="row", squeeze=False)
        for (label, draw_row), row in zip(rows, panels, strict=True):
            row[0].set_ylabel(label)
            for column, axes in zip(columns, row, strict=True):
                draw_row(axes, column)
                axes.grid(color="#e6e9ee", linewidth=0.7)
            row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
        for column, top, bottom in zip(columns, panels[0], panels[-1], strict=True):
            top.set_title(column.title)
            bottom.set_xlabel("optimizer step")
    return figure


def draw_loss(axes: Axes, column: Column) -> None:
    axes.set_yscale("log")
    axes.axhline(np.log(2), color=BASELINE_COLOUR, linestyle=":", label="ln 2: policy = reference")
    smooth = smoothed(*column.logged("loss"), np.median)  # single spikes would be all that a mean shows
    lines(axes, *smooth, "#36393a", f"training, median of {WINDOW}")
    lines(axes, *column.logged("eval/loss"), COLOURS[0], "held out", marker="o")


def draw_accuracy(axes: Axes, column: Column) -> None:
    axes.axhline(0.5, color=BASELINE_COLOUR, linestyle=":", label="a coin toss")
    smooth = smoothed(*column.logged("implicit_accuracy"), np.mean)
    lines(axes, *smooth, "#36393a", f"training, mean of {WINDOW}")
    lines(axes, *column.logged("eval/implicit_accuracy"), COLOURS[0], "held out", marker="o")


def draw_margin(axes: Axes, column: Column) -> None:
    axes.set_yscale("symlog", linthresh=1)
    axes.axhline(0, color=BASELINE_COLOUR, linestyle=":")
    lines(axes, *column.logged("eval/margin"), COLOURS[0], "held out", marker="o")


def draw_errors(axes: Axes, column: Column) -> None:
    axes.set_yscale("symlog", linthresh=1)
    axes.axhline(0, color=BASELINE_COLOUR, linestyle=":", label="the reference's")
    for side, colour in (("chosen", CHOSEN_COLOUR), ("rejected", REJECTED_COLOUR)):
        lines(axes, *column.share(side), colour, side, marker="o")


def draw_scores(axes: Axes, column: Column, colours: Mapping[str, str]) -> None:
    for number, (scorer, colour) in enumerate(colours.items()):
        steps, values = column.scores[scorer]
        if number == 0:
            axes.axhline(values[0, 0], color=BASELINE_COLOUR, linestyle=":", label="the base's")
        lines(axes, steps, values, colour, title_of(scorer), marker="o")


def lines(axes: Axes, steps: Sequence[int], values: np.ndarray, colour: str, label: str, marker: str = "") -> None:
    """The mean over seeds, and a band of their range. values: (seeds, steps)."""
    axes.plot(steps, values.mean(axis=0), color=colour, label=label, marker=marker, markersize=3, linewidth=1.2)
    if len(values) > 1:
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)


def smoothed(
    steps: list[int], values: np.ndarray, statistic: Callable[..., np.ndarray]
) -> tuple[list[int], np.ndarray]:
    """A statistic of each WINDOW steps, at their middle. values: (seeds, steps)."""
    if not steps:
        return steps, values
    window = min(WINDOW, len(steps))
    smooth = statistic(np.lib.stride_tricks.sliding_window_view(values, window, axis=1), axis=-1)
    return steps[window // 2 : window // 2 + smooth.shape[1]], smooth


def table(columns: Sequence[Column]) -> Grid:
    """The end of each config's runs in numbers: means over seeds, and their range."""
    settings = [run.settings for run in columns[0].runs]
    cells: dict[str, Callable[[Column], str]] = {
        "config": lambda column: str(RUNS[column.title].relative_to(ROOT)),
        "training loss, last tenth": lambda column: spread(last_tenth(column.logged("loss")[1])),
        "held-out loss": lambda column: spread(column.at_end("eval/loss")),
        "training pairs in the right order, last tenth": lambda column: spread(
            last_tenth(column.logged("implicit_accuracy")[1]), percent
        ),
        "held-out pairs in the right order": lambda column: spread(column.at_end("eval/implicit_accuracy"), percent),
        "held-out margin": lambda column: spread(column.at_end("eval/margin")),
        "d of chosen images / reference's error": lambda column: spread(last(column.share("chosen")[1])),
        "d of rejected images / reference's error": lambda column: spread(last(column.share("rejected")[1])),
        **{f"{title_of(scorer)}: base → best → last": partial(course, scorer=scorer) for scorer in SCORERS},
    }
    rows = tuple((Cell(label), *(Cell(cell(column)) for column in columns)) for label, cell in cells.items())
    train, seeds = settings[0].train, ", ".join(str(each.seed) for each in settings)
    note = f"{train.max_steps} steps of {train.total_batch_pairs} pairs; seeds: {seeds}. "
    note += "".join(
        f"“{column.title}” with seed {run.settings.seed} ended after {end}, its numbers no longer finite. "
        for column in columns
        for run, end in zip(column.runs, column.ends, strict=True)
        if end < train.max_steps
    )
    note += "Numbers are of the end: means over seeds with their range; scores are means."
    return Grid("Curves", ("", *(column.title for column in columns)), rows, note)


def last(values: np.ndarray) -> np.ndarray:
    """Values (seeds,) at the last step; none without steps."""
    return values[:, -1:].reshape(-1)


def last_tenth(values: np.ndarray) -> np.ndarray:
    """Means (seeds,) over the last tenth of the steps; none without steps."""
    ends = values[:, -max(1, values.shape[1] // 10) :]
    return ends.mean(axis=1) if ends.size else last(values)


def course(column: Column, scorer: str) -> str:
    """Mean scores at the start, at the best step and at the end."""
    steps, values = column.scores[scorer]
    means = values.mean(axis=0)
    best = int(means.argmax())
    return f"{means[0]:.3g} → {means[best]:.3g} (step {steps[best]}) → {means[-1]:.3g}"


def brief(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(values: np.ndarray, shown: Callable[[float], str] = brief) -> str:
    """The mean over seeds, with the range of more than one."""
    if not len(values):
        return "not measured"
    text = shown(float(values.mean()))
    if len(values) > 1:
        text += f" [{shown(float(values.min()))}, {shown(float(values.max()))}]"
    return text.replace("-", "−")


def around_marks(page: Path) -> tuple[str, str]:
    """A page's text before and after its marks; none if the page isn't there. Raises ValueError where a mark lacks."""
    text = page.read_text(encoding="utf-8") if page.is_file() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the lines {BEGIN!r} and {END!r}, between which its figure and table stand")
    return before, after


def fill(page: Path, figure: Path, grid: str, command: str) -> None:
    """Write the figure's link, the table and the command between the page's marks."""
    before, after = around_marks(page)
    written = f"![Curves of the three runs]({figure}.png)\n\n{grid}\n\n```bash\n{command}\n```"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, f"{before}{BEGIN}\n\n{written}\n\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
