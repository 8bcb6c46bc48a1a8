"""How large evaluate.py's report.html is at the size of the paper's evaluation, and how fast a browser opens it.

The images and scores are made up: some JPEGs of 512 pixels under as many names as there are images. Needs Chromium or
Chrome.
"""

import argparse
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np

from benchmarks.arguments import add_number
from benchmarks.folders import working_folder
from benchmarks.pairs import make_caption, make_image
from benchmarks.results import Criterion, Outcome, Spread
from xdpo.images.making import makings_of
from xdpo.images.reading import Picture, by_prompt
from xdpo.report.grids import Cell, Grid
from xdpo.report.page import page
from xdpo.report.sections import Evaluation, sections
from xdpo.scores.image_statistics import NAMES
from xdpo.scores.results import Benchmark, ScoredPrompt

MOST_SECONDS, MOST_MB = 3.0, 60.0
SETS = {"hpsv2": (2 / 3, 4), "partiprompts": (1 / 3, 12)}  # its share of the prompts, its styles or categories
DIFFERENT_IMAGES = 64
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_number(parser, "--models", 5, "models")
    add_number(parser, "--prompts", 4832, "prompts of both sets together")
    add_number(parser, "--metrics", 10, "metrics")
    parser.add_argument("--embed-mb", type=float, default=40, help="as evaluate.py's (default: 40)")
    add_number(parser, "--rounds", 5, "times that the page is opened")


def run(options: argparse.Namespace) -> Outcome:
    with working_folder() as working:
        started = time.perf_counter()
        evaluation = make_evaluation(working / "images", options.models, options.prompts, options.metrics)
        made = time.perf_counter()
        results = working / "results"
        parts = sections(evaluation, results / "figures")
        html = page("Benchmark", evaluation, parts, results, int(options.embed_mb * 1e6))
        (results / "report.html").write_text(html, encoding="utf-8")
        written = time.perf_counter()
        megabytes = (results / "report.html").stat().st_size / 1e6
        loaded = open_page(results / "report.html", options.rounds)
    opened = Spread.of(loaded)
    rows = (
        (Cell("report.html, MB"), Cell(f"{megabytes:.1f}", megabytes)),
        (Cell("loaded, s"), opened.cell()),
        (Cell("written in, s"), Cell(f"{written - made:.0f}", written - made)),
    )
    title = (
        f"Report of {options.models} models × {options.prompts:,} prompts × {options.metrics} metrics; median of "
        f"{options.rounds} rounds (lowest–highest)"
    )
    criteria = (
        Criterion(f"it opens in under {MOST_SECONDS:g} s", opened.median, opened.median < MOST_SECONDS),
        Criterion(f"it stays under {MOST_MB:g} MB", megabytes, megabytes < MOST_MB),
    )
    measurements = {
        "megabytes": megabytes,
        "loaded_seconds": loaded,
        "making_seconds": made - started,
        "writing_seconds": written - made,
    }
    return Outcome(Grid(title, ("", ""), rows), measurements, criteria)


def make_evaluation(folder: Path, models: int, prompts: int, metrics: int) -> Evaluation:
    """An evaluation of made-up images, which lie in `folder`, with made-up scores and image statistics."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    different = [folder / f"{number}.jpg" for number in range(DIFFERENT_IMAGES)]
    for path in different:
        make_image(rng, 512).save(path, quality=75)
    names = tuple(f"model_{number}" for number in range(models))
    pictures, benchmarks, statistics = [], [], {}
    for prompt_set, (share, categories) in SETS.items():
        scored = []
        for number in range(max(categories, round(share * prompts))):
            category = f"category_{number % categories}"
            scored.append(ScoredPrompt(f"{category}/{number}", category, make_caption(rng)))
        for model in names:
            for number, prompt in enumerate(scored):
                path = folder / model / prompt_set / prompt.category / f"{number:05d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(different[rng.integers(len(different))], path)
                name = f"{prompt.category}/{path.name}"
                pictures.append(Picture(model, prompt_set, prompt.category, prompt.key, 0, path, name, prompt.text))
        benchmarks.append(_scored(rng, prompt_set, names, scored, [f"metric_{number}" for number in range(metrics)]))
        statistics[prompt_set] = _scored(rng, prompt_set, names, scored, NAMES)
    versions = dict.fromkeys(benchmarks[0].scorers, "1")
    return Evaluation(
        benchmarks, names[:1], (), (), by_prompt(pictures), versions, makings_of(pictures), statistics=statistics
    )


def _scored(
    rng: np.random.Generator, name: str, models: tuple[str, ...], prompts: list[ScoredPrompt], scorers: list | tuple
) -> Benchmark:
    """Scores around 20; each model is a little better than the one before it."""
    levels = 20 + 0.2 * np.arange(len(models))[:, None]
    scores = {scorer: rng.normal(levels, 2.0, (len(models), len(prompts))) for scorer in scorers}
    return Benchmark(name, models, tuple(prompts), scores, len(prompts), {})


def open_page(path: Path, rounds: int) -> list[float]:
    """Seconds until a page has loaded, each time in a new headless browser. Raises ValueError without a browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise ValueError(f"this benchmark needs a browser: one of {', '.join(BROWSERS)}")
    frame = path.with_name("frame.html")
    measuring = "document.title = performance.now()"
    frame.write_text(f'<iframe src="{path.name}" width="1400" height="900" onload="{measuring}"></iframe>', "utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    seconds = []
    for _ in range(rounds):
        shown = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=300)
        if (title := re.search("<title>(.+?)</title>", shown.stdout)) is None:
            raise ValueError(f"{browser} did not load the page: {shown.stderr.strip()[-500:]}")
        seconds.append(float(title[1]) / 1000)
    return seconds
