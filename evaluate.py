"""Scores, win rates, tables, figures and a page from folders of images that generate.py made.

    python evaluate.py --images images/sd15 images/xdpo --scorers pickscore,hpsv2,clip --baseline sd15 --output results
    python evaluate.py --output results --table2 --table3      the paper's tables, from the scores that are there

Every score is kept in OUTPUT/scores.parquet by image checksum, prompt and scorer version: another model or metric costs
only what is new, and a run that was killed goes on where it was.
"""

import argparse
import gc
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from xdpo.data.images import UnreadableImageError, decode_rgb
from xdpo.files import check_writable, write_text
from xdpo.paths import expanded, user_path
from xdpo.prompts import load_prompts
from xdpo.report import curves, grids, images, published, results, sections
from xdpo.report.images import Picture, Problem
from xdpo.report.markdown import markdown
from xdpo.report.page import page
from xdpo.report.table import Score, ScoreKey, ScoreTable
from xdpo.runlog import read_rows
from xdpo.scorers import SCORER_NAMES, Scorer, load_scorer, scorer_version

PAPER_SCORERS = "pickscore,hpsv2,image_reward,clip,aesthetic"
SAVE_SECONDS = 20  # between parts of the score table: what a kill can cost


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `evaluate.py` with its command-line arguments. Returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        if options.images:
            return evaluate(options)
        if options.table2 or options.table3:
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
        default=PAPER_SCORERS,
        help=f"comma-separated: {', '.join(SCORER_NAMES)}, or path/to/file.py:Class (default: the paper's five)",
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
    how = parser.add_argument_group("scoring")
    how.add_argument("--device", help="default: the accelerator where there is one, else the CPU")
    how.add_argument("--batch-size", type=_positive, default=16, help="images at once (default: 16)")
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


# --- the whole of it -----------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace) -> int:
    """Check what is cheap to check, score what is new, write the report."""
    check_writable(options.output, "--output")
    folders = name_folders(options.images)
    scorers = list(dict.fromkeys(expanded(name.strip()) for name in options.scorers.split(",") if name.strip()))
    baselines = options.baseline or [next(iter(folders))]
    for baseline in baselines:
        if baseline not in folders:
            raise ValueError(f"unknown model {baseline!r} in --baseline; choose from {', '.join(folders)}")
    if not scorers:
        raise ValueError(f"--scorers names none; choose from {', '.join(SCORER_NAMES)}")
    device = choose_device(options.device)
    versions = {name: scorer_version(name, options.weights) for name in scorers}
    table = ScoreTable(options.output, for_writing=True)

    # Images.
    pictures, problems = read_images(folders, options.sets)
    for problem in problems:
        print(f"note: {problem.describe()}", file=sys.stderr)

    # Scores, with one scorer in memory at a time.
    broken: dict[str, Picture] = {}
    for name in scorers:
        todo = [p for p in pictures if _key(p, name, versions[name]) not in table.known and p.sha256 not in broken]
        todo = list({(p.sha256, p.prompt): p for p in todo}.values())
        print(f"{name}: {len(pictures):,} images, {len(todo):,} of them to score")
        if todo:
            broken |= score(name, versions[name], todo, table, device, options)
    table.close(
        [place for name in scorers for place in _places(pictures, name, versions[name], table)],
        replaced={(p.prompt_set, p.model, name) for p in pictures for name in scorers},
    )
    problems += account(pictures, set(broken), scorers, versions, table)

    # The report.
    benchmarks = results.benchmarks(table.placed, list(folders), scorers)
    benchmarks = [b for b in benchmarks if b.name in {p.prompt_set for p in pictures}]
    for prompt_set in dict.fromkeys(p.prompt_set for p in pictures):
        if prompt_set not in {b.name for b in benchmarks}:
            problems.append(Problem("all models", prompt_set, "left out: no prompt has scored images of all of them"))
    if not benchmarks:
        raise ValueError("nothing to compare:\n  " + "\n  ".join(problem.describe() for problem in problems))
    sources = {p.model: p.source for p in reversed(pictures)}
    found = [curves.curve(run, read_rows(run / "metrics.jsonl"), sources, baselines[0]) for run in options.runs]
    by_prompt = defaultdict(list)
    for picture in sorted(pictures, key=lambda picture: picture.repeat):
        if picture.sha256 not in broken:
            by_prompt[picture.prompt_set, picture.model, picture.key].append(picture)
    evaluation = sections.Evaluation(benchmarks, baselines, problems, [c for c in found if c], by_prompt, versions)
    write_report(options, evaluation)
    if options.table2 or options.table3:
        return print_tables(options, table)
    for benchmark in benchmarks:
        print("\n" + grids.to_text(grids.overview(benchmark)))
    return 0


def name_folders(words: Sequence[str]) -> dict[str, Path]:
    """Model name → folder, from "images/sd15" or "sd15=images/first run". Raises ValueError for a name given twice."""
    folders: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or user_path(word).is_dir():
            name, path = "", word
        folder = user_path(path)
        if not name:
            own = (folder / images.MANIFEST).is_file()  # a prompt set's own folder: its parent is the model
            name = folder.resolve().parent.name if own else folder.resolve().name
        if "/" in name or "\\" in name:
            raise ValueError(f"a model cannot be called {name!r}: its name becomes part of file names")
        if name in folders:
            raise ValueError(f"two models are called {name!r}: {folders[name]} and {folder}; write NAME={folder}")
        folders[name] = folder
    return folders


def read_images(folders: Mapping[str, Path], sets: Sequence[str] | None) -> tuple[list[Picture], list[Problem]]:
    """The pictures that can be scored, with prompts and checksums, and an account of the others."""
    pictures: list[Picture] = []
    problems: list[Problem] = []
    for model, folder in folders.items():
        found, wrong = images.read_model_folder(folder, model)
        pictures += found
        problems += wrong
    if sets is not None:
        known = sorted({picture.prompt_set for picture in pictures})
        if unknown := [name for name in sets if name not in known]:
            raise ValueError(f"no images of prompt set {unknown[0]!r} in these folders; there are {', '.join(known)}")
        pictures = [picture for picture in pictures if picture.prompt_set in sets]
        problems = [problem for problem in problems if problem.prompt_set in sets]
    pictures, without_prompt = images.with_prompts(pictures, known_prompts)
    pictures, changed = images.with_checksums(pictures)
    plain, missing = images.of_one_colour(pictures), images.missing_against_others(pictures)
    return pictures, [*problems, *without_prompt, *changed, *plain, *missing]


def known_prompts(prompt_set: str) -> dict[str, tuple[str, str]]:
    """(category, prompt) of every key of a set known by name; nothing for other sets, and where it cannot be had."""
    try:
        prompts = load_prompts(prompt_set).prompts
    except ValueError as error:
        print(f"note: no manifest, and {error}", file=sys.stderr)
        return {}
    return {f"{prompt.folder}/{prompt.index}": (prompt.category, prompt.text) for prompt in prompts}


# --- scoring -------------------------------------------------------------------------------------------


def choose_device(name: str | None) -> torch.device:
    """The device named, else the accelerator where there is one. Raises ValueError for one that does not work."""
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def score(
    name: str,
    version: str,
    pictures: Sequence[Picture],
    table: ScoreTable,
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, Picture]:
    """Score pictures into the table, saving as it goes; returns those that cannot be decoded, by checksum."""
    on_gpu = device.type != "cpu"
    workers = options.workers if options.workers is not None else (min(8, os.cpu_count() or 1) if on_gpu else 0)
    scorer = load_scorer(name, device, options.weights)
    broken, saved = {}, time.monotonic()
    try:
        with tqdm(total=len(pictures), desc=name, unit="image") as progress:
            for batch in prepared_batches(scorer, pictures, options.batch_size, workers):
                good = [(picture, item) for picture, item in batch if not isinstance(item, _Undecodable)]
                broken |= {picture.sha256: picture for picture, item in batch if isinstance(item, _Undecodable)}
                if good:
                    numbers = scorer.score_batch([item for _, item in good], [picture.prompt for picture, _ in good])
                    keys = [_key(picture, name, version) for picture, _ in good]
                    table.add(dict(zip(keys, map(float, numbers), strict=True)))
                progress.update(len(batch))
                if time.monotonic() - saved > SAVE_SECONDS:
                    table.save_part()
                    saved = time.monotonic()
    finally:
        table.save_part()
    del scorer
    gc.collect()
    if on_gpu:
        torch.accelerator.empty_cache()
    return broken


class _Undecodable:
    """Stands where a broken image's pixels would."""


class _Prepared(torch.utils.data.Dataset):
    """Decoding and preprocessing, one image per item, so that a DataLoader's workers can do it."""

    def __init__(self, scorer: Scorer, paths: Sequence[Path]):
        self.preprocess, self.paths = scorer.preprocess, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        try:
            image = decode_rgb(str(self.paths[index]))
        except UnreadableImageError:
            return _Undecodable()
        return self.preprocess(image)


def prepared_batches(
    scorer: Scorer, pictures: Sequence[Picture], batch_size: int, workers: int
) -> Iterator[list[tuple[Picture, object]]]:
    """Batches of (picture, what the scorer takes of it), in order."""
    items = _Prepared(scorer, [picture.path for picture in pictures])
    loader = DataLoader(items, batch_size=batch_size, num_workers=workers, collate_fn=list)
    for number, batch in enumerate(loader):
        yield list(zip(pictures[number * batch_size :], batch, strict=False))


def _key(picture: Picture, scorer: str, version: str) -> ScoreKey:
    return ScoreKey(picture.sha256, picture.prompt, scorer, version)


def _places(pictures: Sequence[Picture], scorer: str, version: str, table: ScoreTable) -> Iterator[Score]:
    for p in pictures:
        key = _key(p, scorer, version)
        if key in table.known:
            yield Score(p.prompt_set, p.model, p.category, p.key, p.repeat, p.name, *_place_of(key), table.known[key])


def _place_of(key: ScoreKey) -> tuple[str, str, str, str]:
    return key.prompt, key.sha256, key.scorer, key.version


def account(
    pictures: Sequence[Picture],
    broken: set[str],
    scorers: Sequence[str],
    versions: Mapping[str, str],
    table: ScoreTable,
) -> list[Problem]:
    """Pictures that could not be decoded, and those that a scorer gave no finite number."""
    undecodable, not_finite = defaultdict(list), defaultdict(list)
    for picture in pictures:
        owner = picture.model, picture.prompt_set
        if picture.sha256 in broken:
            undecodable[owner].append(picture.name)
        for name in scorers:
            number = table.known.get(_key(picture, name, versions[name]), 0.0)
            if not abs(number) < float("inf"):
                not_finite[*owner, name].append(picture.name)
    found = [Problem(*owner, "left out: cannot be decoded", tuple(names)) for owner, names in undecodable.items()]
    found += [
        Problem(model, prompt_set, f"left out: no finite score by {name}", tuple(names))
        for (model, prompt_set, name), names in not_finite.items()
    ]
    for problem in found:
        print(f"note: {problem.describe()}", file=sys.stderr)
    return found


# --- output --------------------------------------------------------------------------------------------


def write_report(options: argparse.Namespace, evaluation: sections.Evaluation) -> None:
    """report.md, report.html and figures/ in the output folder, each file written aside and renamed."""
    output = options.output
    parts = sections.sections(evaluation, output / "figures")
    write_text(output / "report.md", markdown(options.title, parts, output))
    write_text(output / "report.html", page(options.title, evaluation, parts, output, int(options.embed_mb * 1e6)))
    print(f"report: {output / 'report.html'}, {output / 'report.md'}; scores: {output / 'scores.parquet'}")


def print_tables(options: argparse.Namespace, table: ScoreTable) -> int:
    """The paper's tables from the scores of all models in the table, whatever else was evaluated lately."""
    if not table.placed:
        raise ValueError(f"no scores in {options.output}; run evaluate.py with --images and this --output first")
    models = list(dict.fromkeys(row.model for row in table.placed))
    scorers = [name for name in PAPER_SCORERS.split(",") if any(row.scorer == name for row in table.placed)]
    benchmarks = results.benchmarks(table.placed, models, scorers)
    if options.table2:
        print(grids.to_text(published.table2(benchmarks)) + "\n")
    if options.table3:
        print(grids.to_text(published.table3(benchmarks)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
