"""The content of a report: one list of sections, which is written as Markdown and as a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from xdpo.images.making import Making, differences
from xdpo.images.reading import Picture, Problem
from xdpo.report import figures, grids, hacking, published
from xdpo.report.curves import Curve, pairs_to_reach
from xdpo.report.grids import Cell, Grid, Paired
from xdpo.scores.features import Drift
from xdpo.scores.results import Benchmark
from xdpo.scores.statistics import holm
from xdpo.scores.table import PlacedScore

EXTREMES = 5  # best and worst prompts listed
SHORT = 12  # rows up to which a table is open on the page although a figure shows the same, and a matrix is readable


@dataclass(frozen=True)
class Evaluation:
    """Everything that a report shows. `pictures` maps (prompt set, model, prompt key) to that prompt's images, of which
    `placed` are the scores."""

    benchmarks: Sequence[Benchmark]
    baselines: Sequence[str]
    problems: Sequence[Problem]
    curves: Sequence[Curve]
    pictures: Mapping[tuple[str, str, str], Sequence[Picture]]
    versions: Mapping[str, str]  # scorer → version
    makings: Sequence[Making]
    diversity: Sequence[Benchmark] = ()  # a prompt's images among one another, as scores
    drifts: Sequence[Drift] = ()
    features: str = ""  # of which network diversity and drifts are, in words
    statistics: Mapping[str, Benchmark] = field(default_factory=dict)  # of images, by prompt set
    trained_on: Sequence[str] = ()  # the scorers that the training used as its reward
    placed: Sequence[PlacedScore] = ()

    @cached_property
    def score_of(self) -> dict[tuple[str, str, str, int, str], float]:
        """(prompt set, model, prompt key, repeat, scorer) → that one image's score."""
        return {(at.prompt_set, at.model, at.key, at.repeat, key.scorer): score for at, key, score in self.placed}

    @cached_property
    def corrected_p_values(self) -> dict[Paired, float]:
        """P-values of the sign tests of all comparisons with baselines, corrected together by Holm's method."""
        raw = {
            paired: benchmark.comparison(paired.baseline, paired.model, paired.scorer).sign_test
            for benchmark in self.benchmarks
            for paired in grids.compared(benchmark, self.baselines_of(benchmark))
        }
        return dict(zip(raw, holm(list(raw.values())), strict=True))

    def baselines_of(self, benchmark: Benchmark) -> list[str]:
        """The baselines that have images there; the first model if none has."""
        return [b for b in self.baselines if b in benchmark.models] or [benchmark.models[0]]


@dataclass(frozen=True)
class FigureFile:
    """A saved figure and its description."""

    png: Path
    svg: Path
    alt: str


@dataclass(frozen=True)
class Section:
    """A heading with text, tables and figures. `folded` tables are closed on the page until a reader opens them;
    `files` are too long to be read and are written as files alone."""

    title: str
    text: tuple[str, ...] = ()
    blocks: tuple[Grid | FigureFile, ...] = ()
    folded: tuple[Grid, ...] = ()
    files: tuple[Grid, ...] = ()
    benchmark: Benchmark | None = None  # whose results these are

    @property
    def tables(self) -> list[Grid]:
        return [*(block for block in self.blocks if isinstance(block, Grid)), *self.folded, *self.files]


def sections(evaluation: Evaluation, figure_folder: Path) -> list[Section]:
    """Draw the figures into `figure_folder` and put the report together."""
    report = [_benchmark_section(evaluation, benchmark, figure_folder) for benchmark in evaluation.benchmarks]
    if evaluation.curves:
        report += [_curve_section(evaluation, benchmark, figure_folder) for benchmark in evaluation.benchmarks]
    report += [
        _hacking_section(evaluation, benchmark, figure_folder)
        for benchmark in evaluation.benchmarks
        if len(benchmark.models) > 1 and benchmark.name in evaluation.statistics
    ]
    for benchmark in evaluation.diversity:
        text = (
            f"Of several images of one prompt, on features of {evaluation.features}: the mean cosine distance of two, "
            f"and the Vendi score, the effective number of different ones. {_how_many(benchmark)}"
        )
        details = grids.details(benchmark, evaluation.baselines_of(benchmark)[0])
        report.append(Section(benchmark.name, (text,), (grids.overview(benchmark),), (details,)))
    if evaluation.drifts:
        report.append(Section("Drift", (), (grids.drifts(evaluation.drifts, evaluation.features),)))
    if any(published.has_published(benchmark) for benchmark in evaluation.benchmarks):
        tables = [published.table2(evaluation.benchmarks)]
        if any(benchmark.name == "hpsv2" for benchmark in evaluation.benchmarks):
            tables.append(published.table3(evaluation.benchmarks))
        report.append(Section("Beside the paper", (published.user_study(),), tuple(tables)))
    return [*report, _making_section(evaluation), _account_section(evaluation)]


def _benchmark_section(evaluation: Evaluation, benchmark: Benchmark, figure_folder: Path) -> Section:
    baselines = evaluation.baselines_of(benchmark)
    baseline = baselines[0]
    blocks: list[Grid | FigureFile] = [grids.overview(benchmark)]
    folded, files = [grids.details(benchmark, baseline)], []

    def draw(figure: Figure, name: str, alt: str) -> None:
        blocks.append(FigureFile(*figures.save(figure, figure_folder / name), alt))

    if len(benchmark.models) > 1:
        rates = grids.win_rates(benchmark, baselines, evaluation.corrected_p_values)
        (blocks if len(rates.rows) <= SHORT else folded).append(rates)
        colours = figures.colours_of(benchmark.models, baseline)
        for against in baselines:
            bars = figures.win_rate_bars(benchmark, against, colours)
            draw(
                bars,
                f"win_rates_{benchmark.name}_against_{against}",
                f"Win rates against {against} on {benchmark.name}",
            )
        bars = figures.metric_bars(benchmark, baseline)
        draw(bars, f"metrics_{benchmark.name}", f"Mean scores on {benchmark.name}, as change against {baseline}")
        violins = figures.score_differences(benchmark, baseline, colours)
        draw(violins, f"differences_{benchmark.name}", f"Score differences from {baseline} on {benchmark.name}")
        folded.append(extremes(benchmark, baseline))
    if len(benchmark.models) > 2:
        blocks.append(grids.ranks(benchmark))
        if len(benchmark.models) <= SHORT:
            matrix = figures.win_matrix(benchmark)
            draw(matrix, f"pairs_{benchmark.name}", f"Win rates of every pair on {benchmark.name}")
        files.append(grids.every_pair(benchmark))
    if len(benchmark.categories) > 1:
        files.append(grids.by_category(benchmark, baseline))
        if len(benchmark.models) > 1:
            heat_map = figures.category_heat_map(benchmark, baseline)
            draw(heat_map, f"categories_{benchmark.name}", f"Change by style or category on {benchmark.name}")
    unlike = [problem for problem in differences(evaluation.makings) if problem.prompt_set == benchmark.name]
    text = (_how_many(benchmark), *(f"Not made alike: {problem.kind}." for problem in unlike))
    return Section(benchmark.name, text, tuple(blocks), tuple(folded), tuple(files), benchmark)


def _how_many(benchmark: Benchmark) -> str:
    common, seen = len(benchmark.prompts), benchmark.prompts_seen
    if common == seen:
        return f"{common:,} prompts, each with images of all {len(benchmark.models)} models."
    lacking = ", ".join(f"{model} lacks {count:,}" for model, count in benchmark.limited_by.items())
    return f"{common:,} of {seen:,} prompts have scored images of all models and are compared ({lacking})."


def extremes(benchmark: Benchmark, baseline: str) -> Grid:
    """The prompts on which each model gains and loses most against the baseline, by the first scorer."""
    scorer = benchmark.scorers[0]
    rows = []
    for model in benchmark.models:
        if model == baseline:
            continue
        change = benchmark.of(model, scorer) - benchmark.of(baseline, scorer)
        order = np.argsort(-change, kind="stable")
        count = min(EXTREMES, len(order) // 2 or 1)
        for which, positions in (("best", order[:count]), ("worst", order[::-1][:count])):
            for position in positions:
                prompt, value = benchmark.prompts[position], float(change[position])
                rows.append(
                    (
                        Cell(model, model),
                        Cell(which, which),
                        Cell(grids.number(value, scorer, sign=True), value),
                        Cell(prompt.key, prompt.key),
                        Cell(prompt.text, prompt.text),
                    )
                )
    title = f"{benchmark.name}: best and worst prompts by {grids.title_of(scorer)} against {baseline}"
    return Grid(title, ("Model", "Which", "Change", "Image", "Prompt"), tuple(rows))


def _curve_section(evaluation: Evaluation, benchmark: Benchmark, figure_folder: Path) -> Section:
    stem = figure_folder / f"training_{benchmark.name}"
    files = figures.save(
        figures.quality_curves(benchmark, evaluation.curves, evaluation.baselines_of(benchmark)[0]), stem
    )
    drawing = FigureFile(*files, f"Quality on {benchmark.name} against training pairs and hours")
    rows = []
    for scorer in benchmark.scorers:
        for reference in evaluation.curves:
            progress, final_model = reference.points[-1]
            if final_model not in benchmark.models:
                continue
            final = float(benchmark.of(final_model, scorer).mean())
            for curve in evaluation.curves:
                if curve.run == reference.run:
                    continue
                needed = pairs_to_reach(benchmark, scorer, curve, final)
                factor = None if not needed else progress.pairs / needed
                rows.append(
                    (
                        Cell(grids.title_of(scorer), grids.title_of(scorer)),
                        Cell(curve.run, curve.run),
                        Cell(reference.run, reference.run),
                        Cell(grids.number(final, scorer), final),
                        Cell(f"{progress.pairs:,}", progress.pairs),
                        Cell("not reached" if needed is None else f"{needed:,.0f}", needed),
                        Cell("–" if factor is None else f"{factor:.2f} ×", factor),
                    )
                )
    columns = ("Metric", "Run", "To reach", "Its final mean", "Its pairs", "Pairs needed", "Speed-up")
    note = "Pairs until another run's final mean is reached, linear between evaluated checkpoints."
    blocks: list[Grid | FigureFile] = [drawing]
    if rows:
        blocks.append(Grid(f"{benchmark.name}: pairs needed", columns, tuple(rows), note))
    return Section(f"Training: {benchmark.name}", (), tuple(blocks))


def _hacking_section(evaluation: Evaluation, benchmark: Benchmark, figure_folder: Path) -> Section:
    baseline = evaluation.baselines_of(benchmark)[0]
    panel = hacking.Panel(benchmark, evaluation.statistics[benchmark.name], baseline, evaluation.trained_on)
    stem = figure_folder / f"hacking_{benchmark.name}"
    files = figures.save(hacking.draw(panel, evaluation.curves), stem)
    alt = f"Rewards and image statistics on {benchmark.name}, as change against {baseline}"
    return Section(
        f"Signs of reward hacking: {benchmark.name}",
        hacking.in_words(panel),
        (FigureFile(*files, alt),),
        (hacking.table(panel),),
    )


def _making_section(evaluation: Evaluation) -> Section:
    baselines = {benchmark.name: evaluation.baselines_of(benchmark)[0] for benchmark in evaluation.benchmarks}
    makings = [making for making in evaluation.makings if making.prompt_set in baselines]
    return Section("How the images were made", (), (grids.made(makings, baselines),))


def _account_section(evaluation: Evaluation) -> Section:
    used = [f"{grids.title_of(scorer)}: {version}" for scorer, version in evaluation.versions.items()]
    lines = [problem.describe() for problem in evaluation.problems]
    return Section(
        "Account", tuple([*(lines or ["Nothing is missing, broken or left out."]), "Scorers – " + "; ".join(used)])
    )
