"""Score pictures into the table: only new scores, one scorer in memory at a time, saved every few seconds.

Every process of a run calls the functions that score. They share out the batches, and all get the result. The batches
are the same whatever was scored before and by how many processes, because a score's last bits depend on its batch.
"""

import gc
import itertools
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch.utils.data import DataLoader

from xdpo import processes
from xdpo.data.images import UnreadableImageError, decode_rgb
from xdpo.images.reading import Picture, Problem
from xdpo.progress import Progress
from xdpo.scorers.interface import Scorer
from xdpo.scorers.loading import load_scorer
from xdpo.scores.table import Placement, ScoreKey, ScoreTable

Key = TypeVar("Key", bound=Hashable)

SAVE_SECONDS = 20  # between parts of the score table: a kill loses at most this much work


def choose_device(name: str | None, own: torch.device) -> torch.device:
    """The named device, else the process's own. Raises ValueError for one that fails.

    A CPU has no number: weights would be copied to "cpu:0", and some kernels' last bits depend on where weights lie.
    """
    if name is None:
        return torch.device("cpu") if own.type == "cpu" else own
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def default_workers(device: torch.device) -> int:
    """Processes that decode: none on a CPU, up to 8 beside a GPU."""
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def score_missing(
    pictures: Sequence[Picture],
    versions: Mapping[str, str],
    table: ScoreTable,
    *,
    device: torch.device,
    batch_size: int,
    workers: int | None = None,
    weights: Path | None = None,
) -> set[str]:
    """Add the scores that the first process's table lacks. The pictures have prompts and checksums.

    versions: of each scorer, by name. workers: processes that decode; None: `default_workers`.
    Returns the checksums of pictures that cannot be decoded.
    """
    workers = default_workers(device) if workers is None else workers
    broken: set[str] = set()
    for name, version in versions.items():
        unique = {_key(p, name, version): p for p in pictures if p.sha256 not in broken}
        batches = missing_batches(unique, table.scores, batch_size)
        if processes.rank() == 0:
            print(f"{name}: {len(pictures):,} images, {sum(map(len, batches)):,} of them to score")
        if batches:
            scorer = load_scorer(name, device, weights)
            try:
                found = _score(scorer, version, batches, table, workers)
            finally:
                table.save_part()
            for scores, undecodable in processes.gather(found):
                table.gather(scores)
                broken |= undecodable
            del scorer
            gc.collect()
            if device.type != "cpu":
                torch.accelerator.empty_cache()
    return broken


def keys_of(pictures: Sequence[Picture], versions: Mapping[str, str]) -> list[tuple[Picture, ScoreKey]]:
    """Every picture with the keys of its scores."""
    return [(picture, _key(picture, name, version)) for name, version in versions.items() for picture in pictures]


def close(table: ScoreTable, keys: Sequence[tuple[Picture, ScoreKey]], scorers: Sequence[str]) -> None:
    """Put the pictures' scores in the places of all that these scorers gave earlier, and write the table."""
    owners = {(picture.prompt_set, picture.model) for picture, _ in keys}
    table.close(
        [(_placement(picture), key) for picture, key in keys if key in table.scores],
        replaced={(*owner, scorer) for owner in owners for scorer in scorers},
    )


def left_out(
    pictures: Sequence[Picture], broken: set[str], versions: Mapping[str, str], table: ScoreTable
) -> list[Problem]:
    """Problems of pictures that could not be decoded, and of those with a score that is not finite."""
    undecodable, not_finite = defaultdict(list), defaultdict(list)
    for picture in pictures:
        owner = picture.model, picture.prompt_set
        if picture.sha256 in broken:
            undecodable[owner].append(picture.name)
        for name, version in versions.items():
            score = table.scores.get(_key(picture, name, version), 0.0)
            if not abs(score) < float("inf"):
                not_finite[*owner, name].append(picture.name)
    problems = [Problem(*owner, "left out: cannot be decoded", tuple(names)) for owner, names in undecodable.items()]
    problems += [
        Problem(model, prompt_set, f"left out: no finite score by {name}", tuple(names))
        for (model, prompt_set, name), names in not_finite.items()
    ]
    for problem in problems:
        print(f"note: {problem.describe()}", file=sys.stderr)
    return problems


def _score(
    scorer: Scorer, version: str, batches: Sequence[Sequence[Picture]], table: ScoreTable, workers: int
) -> tuple[dict[ScoreKey, float], set[str]]:
    """The scores of this process's share, which the table has too, and the checksums of broken pictures."""
    found: dict[ScoreKey, float] = {}
    broken: set[str] = set()
    saved = time.monotonic()
    for batch in prepared_batches(scorer.name, scorer.preprocess, batches, workers):
        good = [(picture, item) for picture, item in batch if not isinstance(item, Undecodable)]
        bad = [picture for picture, item in batch if isinstance(item, Undecodable)]
        broken |= {_key(picture, scorer.name, version).sha256 for picture in bad}
        if good:
            keys = [_key(picture, scorer.name, version) for picture, _ in good]
            scores = scorer.score_batch([item for _, item in good], [key.prompt for key in keys])
            new = dict(zip(keys, map(float, scores), strict=True))
            table.add(new)
            found |= new
        if time.monotonic() - saved > SAVE_SECONDS:
            table.save_part()
            saved = time.monotonic()
    return found, broken


class Undecodable:
    """Takes the place of a broken image's pixels."""


class _Prepared(torch.utils.data.Dataset):
    """Decoding and preprocessing, one image per item, so that a DataLoader's workers can do it."""

    def __init__(self, preprocess: Callable[[Image.Image], Any], paths: Sequence[Path]):
        self.preprocess, self.paths = preprocess, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        try:
            image = decode_rgb(str(self.paths[index]))
        except UnreadableImageError:
            return index, Undecodable()
        return index, self.preprocess(image)


def missing_batches(pictures: Mapping[Key, Picture], done: Container[Key], batch_size: int) -> list[list[Picture]]:
    """The pictures in batches, without those whose key is done. The first process says what is done."""
    keyed = list(pictures.items())
    batches = [
        [picture for key, picture in keyed[start : start + batch_size] if key not in done]
        for start in range(0, len(keyed), batch_size)
    ]
    return processes.agree([batch for batch in batches if batch])


def prepared_batches(
    work: str, preprocess: Callable[[Image.Image], Any], batches: Sequence[Sequence[Picture]], workers: int
) -> Iterator[list[tuple[Picture, Any]]]:
    """This process's share of the batches, each as (picture, its preprocessed image or Undecodable)."""
    pictures = [picture for batch in batches for picture in batch]
    starts = [0, *itertools.accumulate(map(len, batches))]
    dealt = (list(range(starts[n], starts[n + 1])) for n in processes.deal(f"scoring/{work}", range(len(batches))))
    items = _Prepared(preprocess, [picture.path for picture in pictures])
    loader = DataLoader(items, batch_sampler=dealt, num_workers=workers, collate_fn=list)
    with Progress(total=len(pictures), desc=work, unit="image", disable=processes.rank() > 0) as progress:
        for batch in loader:
            yield [(pictures[index], item) for index, item in batch]
            progress.update(batch[-1][0] + 1 - progress.n)  # earlier ones are another process's, or done
        progress.update(len(pictures) - progress.n)


def _key(picture: Picture, scorer: str, version: str) -> ScoreKey:
    assert picture.prompt is not None and picture.sha256 is not None, "read_models gives every picture both"
    return ScoreKey(picture.prompt, picture.sha256, scorer, version)


def _placement(picture: Picture) -> Placement:
    return Placement(picture.prompt_set, picture.model, picture.category, picture.key, picture.repeat, picture.name)
