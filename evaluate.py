"""Scores, win rates, tables, figures and a page from folders of images that generate.py made.

    python evaluate.py --images images/sd15 images/xdpo --scorers pickscore,hpsv2,clip --baseline sd15 --output results
    python evaluate.py --output results --table2 --table3      the paper's tables, from the scores that are there

Every score is kept in OUTPUT/scores.parquet by image checksum, prompt and scorer version. Another model or metric costs
only the new scores, and a killed run resumes. `accelerate launch evaluate.py …` shares the scoring out to several GPUs.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

from xdpo.arguments import positive
from xdpo.files import check_writable, write_text
from xdpo.images.making import Making, differences, makings_of
from xdpo.images.manifest import MANIFEST
from xdpo.images.reading import WITHOUT_PROMPT, Picture, Problem, by_prompt, name_folders, read_models
from xdpo.paths import expanded, user_path
from xdpo.scorers import (
    DEFAULT_EMBEDDER,
    DEFAULT_SCORERS,
    EMBEDDER_NAMES,
    PAPER_SCORERS,
    SCORER_NAMES,
    check_name,
)

if TYPE_CHECKING:
    import numpy as np
    from accelerate import PartialState

    from xdpo.report.sections import Evaluation
    from xdpo.scores.table import ScoreTable

# What needs torch is imported after the arguments are read, so that --help and a bad argument answer at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `evaluate.py` with its command-line arguments. Returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        if options.images:
            return evaluate(options)
        if options.table2 or options.table3:
            from xdpo.scores.table import ScoreTable

            return print_tables(options, ScoreTable(options.output))
        raise ValueError("give --images, folders that generate.py made; or --table2 or --table3 for earlier scores")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the scores that are saved", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to evaluate")
    what.add_argument(
        "--images",
        nargs="+",
        default=(),
        metavar="[NAME=]FOLDER",
        help="one folder per model, as generate.py leaves it; the model is called after the folder unless named "
        "(images of another program: docs/evaluation.md)",
    )
    what.add_argument("--sets", nargs="+", help="only these prompt sets (default: all that are in the folders)")
    what.add_argument(
        "--scorers",
        default=",".join(DEFAULT_SCORERS),
        help=f"comma-separated: {', '.join(SCORER_NAMES)}, or path/to/file.py:Class "
        "(default: the paper's five, and hpsv2.1)",
    )
    what.add_argument("--baseline", nargs="+", help="models to compare with (default: the first)")
    what.add_argument(
        "--runs",
        nargs="+",
        type=user_path,
        default=(),
        help="run folders of train_xdpo.py, to draw quality against training: their models are recognised by name "
        "(xdpo, xdpo_step_00000200 or xdpo@200 for a run folder called xdpo)",
    )
    what.add_argument(
        "--trained-on",
        nargs="+",
        default=(),
        metavar="SCORER",
        help="those of --scorers that the training used as its reward; the report tells them from the others",
    )
    what.add_argument(
        "--diversity", action="store_true", help="also how much several images of one prompt differ, by their features"
    )
    what.add_argument(
        "--reference",
        type=user_path,
        metavar="FOLDER",
        help="also how far each model's images drift from the images of this folder, by their features",
    )
    what.add_argument(
        "--features",
        choices=EMBEDDER_NAMES,
        help="the network whose features --diversity and --reference take: clip, which sees what captions name, or "
        f"dinov2, which learned from images alone (default: {DEFAULT_EMBEDDER})",
    )
    how = parser.add_argument_group("scoring")
    how.add_argument("--device", help="default: the accelerator where there is one, else the CPU")
    how.add_argument("--batch-size", type=positive, default=16, help="images at once (default: 16)")
    how.add_argument("--workers", type=int, help="processes that decode (default: 0 on a CPU, up to 8 beside a GPU)")
    how.add_argument("--weights", type=user_path, help="folder of the scorers' weights, for machines without a hub")
    where = parser.add_argument_group("output")
    where.add_argument("--output", type=user_path, required=True, help="folder of the score table and the report")
    where.add_argument("--title", default="Evaluation", help="of the report")
    where.add_argument(
        "--embed-mb", type=float, default=40, help="images that the page holds itself; the rest it links (default: 40)"
    )
    where.add_argument("--table2", action="store_true", help="print the paper's Table 2 with the numbers measured")
    where.add_argument("--table3", action="store_true", help="print the paper's Table 3 with the numbers measured")
    return parser


@dataclass(frozen=True)
class Plan:
    """What the options name, checked: models' folders, scorers, models to compare with, scorers used in training.

    embedder: whose features are asked for; None: nobody's.
    """

    folders: Mapping[str, Path]
    scorers: Sequence[str]
    baselines: Sequence[str]
    trained_on: Sequence[str]
    embedder: str | None


@dataclass(frozen=True)
class Found:
    """What is there before anything is scored. Problems and makings are those of the first process."""

    pictures: Sequence[Picture]
    references: Sequence[Picture]
    problems: Sequence[Problem]
    makings: Sequence[Making]
    versions: Mapping[str, str]  # scorer → version


@dataclass(frozen=True)
class Scored:
    """The score table, checksums of broken pictures, the pictures that are whole, features by checksum."""

    table: "ScoreTable"
    broken: set[str]
    whole: Sequence[Picture]
    vectors: Mapping[str, "np.ndarray"]


def check(options: argparse.Namespace) -> Plan:
    """Raises ValueError for whatever can be refused without a look at images or weights."""
    check_writable(options.output, "--output")
    folders = name_folders(options.images)
    scorers = list(dict.fromkeys(expanded(name.strip()) for name in options.scorers.split(",") if name.strip()))
    baselines = options.baseline or [next(iter(folders))]
    for baseline in baselines:
        if baseline not in folders:
            raise ValueError(f"unknown model {baseline!r} in --baseline; choose from {', '.join(folders)}")
    if not scorers:
        raise ValueError(f"--scorers names none; choose from {', '.join(SCORER_NAMES)}")
    for name in scorers:
        check_name(name)
    trained_on = [expanded(name) for name in options.trained_on]
    for name in trained_on:
        if name not in scorers:
            raise ValueError(f"--trained-on {name} is none of --scorers; choose from {', '.join(scorers)}")
    if options.reference and not options.reference.is_dir():
        raise ValueError(f"--reference: no folder {options.reference}")
    needs_features = options.diversity or options.reference
    if options.features and not needs_features:
        raise ValueError("--features is for --diversity and --reference; give one of them too")
    embedder = (options.features or DEFAULT_EMBEDDER) if needs_features else None
    return Plan(folders, scorers, baselines, trained_on, embedder)


def evaluate(options: argparse.Namespace) -> int:
    """Check what is cheap to check, score what is new, write the report. Returns 0.

    Every process calls it and scores its share. The first one reads and writes everything else.
    """
    plan = check(options)

    import torch
    from accelerate import PartialState

    from xdpo import ending, processes
    from xdpo.files import only_run

    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=processes.COLLECTIVE_TIMEOUT)
    processes.connect()
    with ending.together():
        found = find(options, plan, state)
        with only_run([options.output], "evaluate.py", is_main=state.is_main_process):
            scored = score(options, plan, state, found)
            if state.is_main_process:
                report(options, plan, found, scored)
    return 0


def find(options: argparse.Namespace, plan: Plan, state: "PartialState") -> Found:
    """Read the image folders, then find the scorers' weights: a mistyped folder costs no download."""
    from xdpo import processes
    from xdpo.scorers.loading import embedder_version, scorer_version
    from xdpo.scores.features import reference_pictures

    pictures: list[Picture] = []
    references: list[Picture] = []
    problems: list[Problem] = []
    if state.is_main_process:
        pictures, problems = read_models(plan.folders, options.sets)
        if not pictures:
            raise ValueError(nothing_to_compare(problems))
        references = reference_pictures(options.reference) if options.reference else []
    makings = makings_of(pictures)
    problems += differences(makings)
    for problem in problems:
        print(f"note: {problem.describe()}", file=sys.stderr)
    with processes.one_first(state.is_main_process):  # it downloads, the others find the files
        versions = {name: scorer_version(name, options.weights) for name in plan.scorers}
        if plan.embedder:
            embedder_version(plan.embedder, options.weights)
    processes.refuse_differences(versions, "Give every machine the same files")
    pictures, references = processes.agree((pictures, references))
    return Found(pictures, references, problems, makings, versions)


def nothing_to_compare(problems: Sequence[Problem]) -> str:
    """The error of folders without a prompt that all models have images of."""
    lines = ["nothing to compare:", *(problem.describe() for problem in problems)]
    if any(problem.kind == WITHOUT_PROMPT for problem in problems):
        lines.append(
            f"Write a {MANIFEST} beside the images, with a line for each: "
            '{"file": "fox.png", "prompt": "a red fox"} (docs/evaluation.md, "Images of another program")'
        )
    return "\n  ".join(lines)


def score(options: argparse.Namespace, plan: Plan, state: "PartialState", found: Found) -> Scored:
    """Compute what is not there yet. On the first process the table is complete and on the disk."""
    from xdpo.scores import embeddings, image_statistics, scoring
    from xdpo.scores.table import ScoreTable

    how = {
        "device": scoring.choose_device(options.device, state.device),
        "batch_size": options.batch_size,
        "workers": options.workers,
        "weights": options.weights,
    }
    table = ScoreTable(options.output, read=state.is_main_process)
    broken = scoring.score_missing(found.pictures, found.versions, table, **how)
    whole = [picture for picture in found.pictures if picture.sha256 not in broken]
    statistic_keys = image_statistics.measure_missing(whole, plan.baselines[0], table)
    if state.is_main_process:
        keys = [*scoring.keys_of(found.pictures, found.versions), *statistic_keys]
        scoring.close(table, keys, (*found.versions, *image_statistics.NAMES))
    vectors = {}
    if plan.embedder:
        pictures = [*whole, *found.references]
        vectors = embeddings.image_features(pictures, options.output, embedder=plan.embedder, **how)
    return Scored(table, broken, whole, vectors)


def report(options: argparse.Namespace, plan: Plan, found: Found, scored: Scored) -> None:
    """Compare the models, write the report, print the tables. Raises ValueError where nothing can be compared."""
    from xdpo.report import curves, grids
    from xdpo.report.sections import Evaluation
    from xdpo.runlog import read_rows
    from xdpo.scorers.embedders import EMBEDDERS
    from xdpo.scores import features, image_statistics, scoring
    from xdpo.scores.results import benchmarks_of

    placed, models, baselines = scored.table.placed, list(plan.folders), plan.baselines
    problems = [*found.problems, *scoring.left_out(found.pictures, scored.broken, found.versions, scored.table)]

    # What is compared.
    sets = list(dict.fromkeys(picture.prompt_set for picture in found.pictures))
    benchmarks = [each for each in benchmarks_of(placed, models, plan.scorers) if each.name in sets]
    compared = {benchmark.name for benchmark in benchmarks}
    none_in_common = "left out: no prompt has scored images of all of them"
    problems += [Problem("all models", name, none_in_common) for name in sets if name not in compared]
    if not benchmarks:
        raise ValueError(nothing_to_compare(problems))
    sources = {picture.model: picture.source for picture in reversed(found.pictures)}
    by_run = [curves.curve(run, read_rows(run / "metrics.jsonl"), sources, baselines[0]) for run in options.runs]
    shown = by_prompt(scored.whole)
    diversity = [features.diversity(each, shown, scored.vectors) for each in benchmarks] if options.diversity else []

    # The report.
    evaluation = Evaluation(
        benchmarks,
        baselines,
        problems,
        [curve for curve in by_run if curve],
        shown,
        found.versions,
        found.makings,
        diversity=[each for each in diversity if each],
        drifts=features.drift(shown, found.references, scored.vectors) if found.references else [],
        features=EMBEDDERS[plan.embedder].title if plan.embedder else "",
        statistics={each.name: each for each in benchmarks_of(placed, models, image_statistics.NAMES)},
        trained_on=plan.trained_on,
        placed=placed,
    )
    write_report(options, evaluation)
    if options.table2 or options.table3:
        print_tables(options, scored.table)
        return
    for benchmark in benchmarks:
        print("\n" + grids.to_text(grids.overview(benchmark)))


def write_report(options: argparse.Namespace, evaluation: "Evaluation") -> None:
    """Write report.md, report.html, figures/ and tables/ into the output folder."""
    from xdpo.report.exports import write_tables
    from xdpo.report.markdown import markdown
    from xdpo.report.page import page
    from xdpo.report.sections import sections

    output = options.output
    report_sections = sections(evaluation, output / "figures")
    write_tables([table for section in report_sections for table in section.tables], output)
    write_text(output / "report.md", markdown(options.title, report_sections, output))
    embed_bytes = int(options.embed_mb * 1e6)
    write_text(output / "report.html", page(options.title, evaluation, report_sections, output, embed_bytes))
    print(f"report: {output / 'report.html'}, {output / 'report.md'}; scores: {output / 'scores.parquet'}")


def print_tables(options: argparse.Namespace, table: "ScoreTable") -> int:
    """Print the paper's tables from all models in the score table, not only those just evaluated. Returns 0."""
    from xdpo.report import grids, published
    from xdpo.scores.results import benchmarks_of

    placed = table.placed
    if not placed:
        raise ValueError(f"no scores in {options.output}; run evaluate.py with --images and this --output first")
    models = list(dict.fromkeys(row.placement.model for row in placed))
    versions = {(row.key.scorer, row.key.version) for row in placed}
    scorers = [name for name in PAPER_SCORERS if any(scorer == name for scorer, _ in versions)]
    for name in scorers:
        if len(of_name := sorted(version for scorer, version in versions if scorer == name)) > 1:
            raise ValueError(
                f"the scores by {name} are of several versions ({'; '.join(of_name)}) and don't compare; run "
                "evaluate.py with --images of all models again"
            )
    benchmarks = benchmarks_of(placed, models, scorers)
    if options.table2:
        print(grids.to_text(published.table2(benchmarks)) + "\n")
    if options.table3:
        print(grids.to_text(published.table3(benchmarks)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
