"""Scores, win rates, tables, figures and a page from folders of images that generate.py made.

    python evaluate.py --images images/sd15 images/xdpo --scorers pickscore,hpsv2,clip --baseline sd15 --output results
    python evaluate.py --output results --table2 --table3      the paper's tables, from the scores that are there

Every score is kept in OUTPUT/scores.parquet by image checksum, prompt and scorer version. Another model or metric costs
only the new scores, and a killed run resumes.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

from xdpo.arguments import positive
from xdpo.files import check_writable, write_text
from xdpo.images.making import differences, makings_of
from xdpo.images.reading import Problem, by_prompt, name_folders, read_models
from xdpo.paths import expanded, user_path
from xdpo.scorers import DEFAULT_SCORERS, PAPER_SCORERS, SCORER_NAMES, check_name

if TYPE_CHECKING:
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
        help="one folder per model, as generate.py leaves it; the model is called after the folder unless named",
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
        "--diversity", action="store_true", help="also how much several images of one prompt differ (CLIP features)"
    )
    what.add_argument(
        "--reference",
        type=user_path,
        metavar="FOLDER",
        help="also how far each model's images drift from the images of this folder (CLIP features)",
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


def evaluate(options: argparse.Namespace) -> int:
    """Check what is cheap to check, score what is new, write the report. Returns 0."""
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

    # The images come first: a mistyped folder costs no download of weights.
    pictures, problems = read_models(folders, options.sets)
    makings = makings_of(pictures)
    problems += differences(makings)
    for problem in problems:
        print(f"note: {problem.describe()}", file=sys.stderr)

    from xdpo.report import curves, grids
    from xdpo.report.sections import Evaluation
    from xdpo.runlog import read_rows
    from xdpo.scorers.loading import scorer_version
    from xdpo.scores import features, image_statistics, scoring
    from xdpo.scores.results import benchmarks_of
    from xdpo.scores.table import ScoreTable

    how = {
        "device": scoring.choose_device(options.device),
        "batch_size": options.batch_size,
        "workers": options.workers,
        "weights": options.weights,
    }
    versions = {name: scorer_version(name, options.weights) for name in scorers}
    references = features.reference_pictures(options.reference) if options.reference else []
    if options.diversity or references:
        features.embedder_version(options.weights)  # finds what is missing before the scoring
    table = ScoreTable(options.output, for_writing=True)
    broken = scoring.score_missing(pictures, versions, table, **how)
    whole = [picture for picture in pictures if picture.sha256 not in broken]
    statistic_keys = image_statistics.measure_missing(whole, baselines[0], table)
    statistic_names = (*image_statistics.STATISTICS, image_statistics.DISTANCE)
    scoring.close(table, [*scoring.keys_of(pictures, versions), *statistic_keys], (*versions, *statistic_names))
    problems += scoring.left_out(pictures, broken, versions, table)

    # What is compared.
    sets = list(dict.fromkeys(picture.prompt_set for picture in pictures))
    benchmarks = [each for each in benchmarks_of(table.placed, list(folders), scorers) if each.name in sets]
    compared = {benchmark.name for benchmark in benchmarks}
    none_in_common = "left out: no prompt has scored images of all of them"
    problems += [Problem("all models", name, none_in_common) for name in sets if name not in compared]
    if not benchmarks:
        raise ValueError("nothing to compare:\n  " + "\n  ".join(problem.describe() for problem in problems))
    sources = {picture.model: picture.source for picture in reversed(pictures)}
    by_run = [curves.curve(run, read_rows(run / "metrics.jsonl"), sources, baselines[0]) for run in options.runs]
    drawn = [curve for curve in by_run if curve]
    shown = by_prompt(whole)
    statistics = {each.name: each for each in benchmarks_of(table.placed, list(folders), statistic_names)}

    # Diversity and drift.
    vectors = {}
    if options.diversity or references:
        vectors = features.image_features([*whole, *references], options.output, **how)
    diversity = [features.diversity(each, shown, vectors) for each in benchmarks] if options.diversity else []
    drifts = features.drift(shown, references, vectors) if references else []

    # The report.
    evaluation = Evaluation(
        benchmarks,
        baselines,
        problems,
        drawn,
        shown,
        versions,
        makings,
        diversity=[each for each in diversity if each],
        drifts=drifts,
        statistics=statistics,
        trained_on=trained_on,
        placed=table.placed,
    )
    write_report(options, evaluation)
    if options.table2 or options.table3:
        return print_tables(options, table)
    for benchmark in benchmarks:
        print("\n" + grids.to_text(grids.overview(benchmark)))
    return 0


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

    if not table.placed:
        raise ValueError(f"no scores in {options.output}; run evaluate.py with --images and this --output first")
    models = list(dict.fromkeys(row.placement.model for row in table.placed))
    scorers = [name for name in PAPER_SCORERS if any(row.key.scorer == name for row in table.placed)]
    benchmarks = benchmarks_of(table.placed, models, scorers)
    if options.table2:
        print(grids.to_text(published.table2(benchmarks)) + "\n")
    if options.table3:
        print(grids.to_text(published.table3(benchmarks)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
