"""A blind user study from image folders: build it, serve it, count the votes.

    python scripts/user_study.py build --a xdpo=images/xdpo --b images/sd15 images/diffusion_dpo \\
        --sample partiprompts=100 hpsv2=200 --annotators 5 --output study
    python scripts/user_study.py serve study
    python scripts/user_study.py analyze study
    python scripts/user_study.py demo          (builds and opens a study of the demo's images)

docs/user_study.md explains all of it.
"""

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from xdpo.arguments import count, positive
from xdpo.paths import user_path
from xdpo.report.grids import Cell, Grid, percent, to_text
from xdpo.study.folder import DEFAULT_TITLE, Key, Links, Study, StudyError
from xdpo.study.form import read_form
from xdpo.study.votes import VoteStore

# Imported by the commands that need them: a server starts in a moment, without the libraries of the others.

DEMO_IMAGES, DEMO_STUDY = Path("runs/chain/images"), Path("runs/study")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands. Returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; every vote that was acknowledged is kept, and the same command goes on", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="make a study from image folders")
    build.add_argument("--a", required=True, metavar="[NAME=]FOLDER", help="images of the tested model")
    for letter in "bcde":
        about = "images of the baselines, each compared with --a" if letter == "b" else "as --b"
        build.add_argument(
            f"--{letter}", nargs="+", required=letter == "b", default=[], metavar="[NAME=]FOLDER", help=about
        )
    build.add_argument(
        "--output", "--out", type=user_path, required=True, metavar="STUDY", help="a folder that isn't there"
    )
    build.add_argument(
        "--sample", nargs="+", metavar="N|SET=N", help="prompts drawn of each set, or of the named ones (default: all)"
    )
    build.add_argument("--seed", type=count, default=0, help="of draw, sides and order (default: 0)")
    build.add_argument("--annotators", type=positive, default=5, help="votes on every pair (default: 5)")
    build.add_argument("--links", type=positive, help="annotators in all, who share the pairs (default: --annotators)")
    build.add_argument(
        "--repeats", type=count, default=0, help="pairs that each sees twice, sides exchanged (default: 0)"
    )
    build.add_argument("--obvious", type=count, default=0, help="checks with a known answer (default: 0)")
    build.add_argument("--image-side", type=positive, metavar="PIXELS", help="scale all images to this size")
    build.add_argument(
        "--allow-different-settings",
        action="store_true",
        help="also if the models' images were made with other steps, guidance, sizes or the like",
    )
    build.add_argument(
        "--config",
        type=user_path,
        metavar="FILE",
        help="YAML: questions, a tie, the first page, a completion code (default: the paper's questions, no tie)",
    )
    build.add_argument("--title", default=DEFAULT_TITLE, help=f"on the page (default: {DEFAULT_TITLE})")
    build.set_defaults(run=run_build)

    serve = commands.add_parser("serve", help="serve a study to its annotators' browsers")
    add_study(serve)
    add_address(serve)
    serve.set_defaults(run=run_serve)

    out = commands.add_parser("export", help="one folder per annotator, for use without a server")
    add_study(out)
    out.add_argument("--static", type=user_path, required=True, metavar="DIR", help="where the folders go")
    out.add_argument("--annotator", type=positive, nargs="+", metavar="N", help="only these (default: all)")
    out.set_defaults(run=run_export)

    back = commands.add_parser("import", help="take in the votes that exported pages saved")
    add_study(back)
    back.add_argument("files", type=user_path, nargs="+", metavar="FILE", help="votes-….json")
    back.set_defaults(run=run_import)

    analyze = commands.add_parser("analyze", help="count the votes: report.html, report.md, a figure, votes.parquet")
    add_study(analyze)
    analyze.add_argument("--output", type=user_path, metavar="DIR", help="default: STUDY/report")
    analyze.add_argument(
        "--allow-failed",
        type=_share,
        default=0.25,
        metavar="SHARE",
        help="failed checks up to which an annotator counts as attentive (default: 0.25)",
    )
    analyze.set_defaults(run=run_analyze)

    plan = commands.add_parser("plan", help="how many prompts and annotators detect a given win rate")
    plan.add_argument("--rate", type=_share, nargs="+", default=[0.55, 0.6, 0.65, 0.7], help="of single votes")
    plan.add_argument("--annotators", type=positive, nargs="+", default=[1, 3, 5, 7], help="votes on every pair")
    plan.add_argument("--prompts", type=positive, default=200, help="prompts whose power is printed (default: 200)")
    plan.add_argument("--power", type=_share, default=0.8, help="power to reach (default: 0.8)")
    plan.add_argument(
        "--spread",
        type=float,
        default=0.15,
        help="standard deviation over pairs of the chance that a vote goes to the model; 0: all alike (default: 0.15)",
    )
    plan.set_defaults(run=run_plan)

    demo = commands.add_parser("demo", help=f"a study of {DEMO_IMAGES}, built where it isn't there, and served")
    demo.add_argument("--images", type=user_path, default=DEMO_IMAGES, help="what scripts/tiny_chain.sh leaves")
    demo.add_argument("--output", type=user_path, default=DEMO_STUDY, metavar="STUDY")
    demo.add_argument("--no-browser", action="store_true", help="print the links only")
    add_address(demo)
    demo.set_defaults(run=run_demo)
    return parser


def add_study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=user_path, metavar="STUDY")


def add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines (default: this one alone)")
    parser.add_argument("--port", type=count, default=8000, help="0: any free one (default: 8000)")


def run_build(options: argparse.Namespace) -> None:
    from xdpo.study.build import StudyPlan, build_study

    plan = StudyPlan(
        sample=_sample(options.sample, options.a),
        seed=options.seed,
        votes_per_pair=options.annotators,
        annotators=options.links or options.annotators,
        repeats=options.repeats,
        obvious=options.obvious,
        image_side=options.image_side,
        title=options.title,
        form=read_form(options.config),
        allow_different_settings=options.allow_different_settings,
    )
    baselines = [_named(word) for word in (*options.b, *options.c, *options.d, *options.e)]
    study = build_study(options.output, _named(options.a), baselines, plan)
    tell_built(study)
    print(f"next: python scripts/user_study.py serve {options.output}")


def tell_built(study: Study) -> None:
    pairs = sum(item.kind == "pair" for item in Key.load(study).items.values())
    shares = sorted({len(tasks) for tasks in study.tasks})
    print(
        f"{study.folder}: {pairs} pairs, {study.votes_per_pair} votes each, {len(study.tasks)} annotators with "
        f"{' or '.join(map(str, shares))} tasks"
    )


def run_serve(options: argparse.Namespace) -> None:
    from xdpo.study.server import serve

    serve(options.study, options.host, options.port, lambda address: tell_links(options.study, address))


def tell_links(folder: Path, address: str) -> None:
    links = Links.load(folder)
    print("Whoever has a link may vote by it; keep the administrator's to yourself. Ctrl-C ends, and loses nothing.")
    print(f"administrator  {address}/admin/{links.administrator}")
    for number, token in enumerate(links.annotators, start=1):
        print(f"annotator {number:<4} {address}/a/{token}", flush=True)


def run_export(options: argparse.Namespace) -> None:
    from xdpo.study.static import export

    for page in export(Study.load(options.study), options.static, options.annotator):
        print(page)


def run_import(options: argparse.Namespace) -> None:
    from xdpo.study.static import import_votes

    study = Study.load(options.study)
    for file in options.files:
        new, earlier = import_votes(study, file)
        print(f"{file}: {new} new votes, {earlier} known")


def run_analyze(options: argparse.Namespace) -> None:
    from xdpo.study import findings as tables
    from xdpo.study.report import write

    study = Study.load(options.study)
    findings = tables.find(study, Key.load(study), VoteStore(study).all(), options.allow_failed)
    path = write(findings, options.output or options.study / "report")
    print(to_text(tables.overview(study, findings.results)))
    if findings.excluded:
        print(f"annotators {', '.join(map(str, findings.excluded))} failed too many checks; without them:")
        print(to_text(tables.overview(study, findings.without_inattentive)))
    print(f"report: {path}")


def run_plan(options: argparse.Namespace) -> None:
    from xdpo.study import power

    rows = []
    for rate in options.rate:
        for annotators in options.annotators:
            seen = power.power(options.prompts, annotators, rate, options.spread)
            needed = power.prompts_needed(annotators, rate, options.power, options.spread)
            rows.append(
                (
                    Cell(percent(rate, decimals=0), rate),
                    Cell(str(annotators), annotators),
                    Cell(percent(seen.majority_rate), seen.majority_rate),
                    Cell(percent(seen.power), seen.power),
                    Cell(f"more than {power.MOST_PROMPTS:,}" if needed is None else f"{needed:,}", needed),
                )
            )
    columns = ("single votes", "annotators", "pairs won", f"power at {options.prompts}", "prompts needed")
    note = (
        f"Two-sided sign test of majorities at 5 %; prompts for a power of {percent(options.power, decimals=0)}; votes "
        f"on a pair agree as if its rate had a standard deviation of {options.spread:g} over pairs"
    )
    print(to_text(Grid("What a study can see", columns, tuple(rows), note)))


def run_demo(options: argparse.Namespace) -> None:
    from xdpo.study.build import StudyPlan, build_study
    from xdpo.study.server import serve

    if not (options.output / "study.json").is_file():
        folders = [options.images / name for name in ("xdpo", "base", "diffusion_dpo")]
        if absent := [folder for folder in folders if not folder.is_dir()]:
            raise StudyError(f"no images in {absent[0]}; make them with: bash scripts/tiny_chain.sh")
        plan = StudyPlan(
            {"tinyprompts": 12},
            0,
            votes_per_pair=2,
            annotators=2,
            repeats=2,
            obvious=2,
            image_side=256,
            form=read_form(None),
        )
        model, *baselines = ((folder.name, folder) for folder in folders)
        tell_built(build_study(options.output, model, baselines, plan))

    def started(address: str) -> None:
        tell_links(options.output, address)
        if not options.no_browser:
            webbrowser.open(f"{address}/a/{Links.load(options.output).annotators[0]}")

    serve(options.output, options.host, options.port, started)


def _named(word: str) -> tuple[str, Path]:
    """Model name and folder of [NAME=]FOLDER; without NAME the model is called after the folder."""
    name, equals, folder = word.partition("=")
    if not equals or user_path(word).is_dir():
        return user_path(word).name, user_path(word)
    return name, user_path(folder)


def _sample(words: Sequence[str] | None, folder: str) -> dict[str, int] | None:
    """--sample: one number for every set of the folder, or SET=N for some."""
    if words is None:
        return None
    named = {}
    for word in words:
        name, equals, count = word.rpartition("=")
        if not count.isdecimal() or int(count) < 1 or (not equals and len(words) > 1):
            raise StudyError(f"--sample takes one number, or SET=N for each set, got {' '.join(words)!r}")
        named[name] = int(count)
    if "" not in named:
        return named
    from xdpo.images.reading import read_model_folder

    name, path = _named(folder)
    pictures, _ = read_model_folder(path, name)
    return dict.fromkeys(sorted({picture.prompt_set for picture in pictures}), named[""])


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a share from 0 to below 1, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
