"""Statistics of pixels that change when a model games its reward: colour, contrast, sharpness, detail, distances.

They are kept in the score table as scores are, so no image is measured twice.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from xdpo import processes
from xdpo.data.images import UnreadableImageError, decode_rgb
from xdpo.images.reading import Picture
from xdpo.progress import Progress
from xdpo.scores.scoring import SAVE_SECONDS
from xdpo.scores.table import ScoreKey, ScoreTable

COMPUTATION = 1  # raise it when a change here moves the numbers
STATISTICS = ("saturation", "contrast", "sharpness", "high frequencies")
DISTANCE = "distance"  # from the baseline's image of the same prompt and seed
SPREAD = "spread"  # distance from the model's next image of the same prompt, where it has several
NAMES = (*STATISTICS, DISTANCE, SPREAD)
SHARE = 64  # prompts that a process takes at once
FINE = 0.25  # cycles per pixel, half of what an image can hold


def measure(rgb: np.ndarray) -> dict[str, float]:
    """Pixels (H, W, 3) uint8 → statistics, each independent of the image's size.

    saturation: mean of (max − min) / max over a pixel's channels, 0 to 1. contrast: standard deviation of the
    luma, which runs from 0 to 1. sharpness: that of its Laplacian. high frequencies: the share of the luma's
    variance at more than a quarter of a cycle per pixel.
    """
    pixels = rgb.astype(np.float32) / 255
    red, green, blue = np.moveaxis(pixels, 2, 0)
    highest, lowest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    luma = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    around = np.pad(luma, 1, mode="edge")
    laplacian = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:] - 4 * luma
    height, width = luma.shape
    power = np.abs(np.fft.rfft2(luma - float(luma.mean(dtype=np.float64)))) ** 2
    power[:, 1 : (width + 1) // 2] *= 2  # for the other half of the spectrum, which mirrors this one
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    total = float(power.sum(dtype=np.float64))
    fine = float(power[frequency > FINE].sum(dtype=np.float64))
    return {
        "saturation": float(np.divide(highest - lowest, highest, out=np.zeros_like(highest), where=highest > 0).mean()),
        "contrast": float(luma.std(dtype=np.float64)),
        "sharpness": float(laplacian.std(dtype=np.float64)),
        "high frequencies": fine / total if total > 0 else 0.0,
    }


def distance(image: Image.Image, baseline: Image.Image) -> float:
    """Root mean square difference of two images' channels, which run from 0 to 1; the first is scaled to the other's
    size."""
    if image.size != baseline.size:
        image = image.resize(baseline.size, Image.Resampling.LANCZOS)
    difference = np.asarray(image, np.float32) - np.asarray(baseline, np.float32)
    return float(np.sqrt(np.mean(difference**2, dtype=np.float64)) / 255)


def measure_missing(pictures: Sequence[Picture], baseline: str, table: ScoreTable) -> list[tuple[Picture, ScoreKey]]:
    """Add the statistics that the first process's table lacks. Returns every picture with the keys of its statistics.

    Every process calls it, and each measures its share of the prompts.
    The distance is left out on prompt sets where a seed differs from the baseline's, the spread on those where a prompt
    has a single image of some model. Pictures that can't be decoded are left out.
    """
    of_baseline = {(p.prompt_set, p.key, p.repeat): p for p in pictures if p.model == baseline}
    seeds: dict[str, set] = defaultdict(set)
    for picture in pictures:
        seeds[picture.prompt_set].add(picture.settings.get("seed"))
    following = _following(pictures)

    def keys_of(picture: Picture) -> dict[str, ScoreKey]:
        keys = {name: _key(picture, name, str(COMPUTATION)) for name in STATISTICS}
        partner = of_baseline.get((picture.prompt_set, picture.key, picture.repeat))
        if partner is not None and len(seeds[picture.prompt_set]) == 1:
            keys[DISTANCE] = _key(picture, DISTANCE, f"{COMPUTATION} from {partner.sha256}")
        if picture.path in following:
            keys[SPREAD] = _key(picture, SPREAD, f"{COMPUTATION} from {following[picture.path].sha256}")
        return keys

    slots: dict[tuple, list[Picture]] = defaultdict(list)
    for picture in pictures:
        if any(key not in table.scores for key in keys_of(picture).values()):
            slots[picture.prompt_set, picture.key, picture.repeat].append(picture)
    slots = processes.agree(slots)
    order = list(slots)

    def of_slot(slot: tuple) -> dict[ScoreKey, float]:
        found: dict[ScoreKey, float] = {}
        partner = _decoded(of_baseline[slot]) if slot in of_baseline else None
        for picture in slots[slot]:
            image, keys = _decoded(picture), keys_of(picture)
            if image is not None:
                found |= {keys[name]: value for name, value in measure(np.asarray(image)).items()}
            if image is not None and partner is not None and DISTANCE in keys:
                found[keys[DISTANCE]] = distance(image, partner)
            other = _decoded(following[picture.path]) if SPREAD in keys else None
            if image is not None and other is not None:
                found[keys[SPREAD]] = distance(image, other)
        return found

    is_first = processes.rank() == 0
    todo = sum(map(len, slots.values()))
    if is_first:
        print(f"image statistics: {len(pictures):,} images, {todo:,} of them to measure")
    measured: dict[ScoreKey, float] = {}
    saved = time.monotonic()
    try:
        with (
            ThreadPoolExecutor() as pool,
            Progress(total=todo, desc="statistics", unit="image", disable=not (todo and is_first)) as bar,
        ):
            for start in processes.deal("statistics", range(0, len(order), SHARE)):
                share = order[start : start + SHARE]
                for slot, found in zip(share, pool.map(of_slot, share), strict=True):
                    table.add(found)
                    measured |= found
                    bar.update(len(slots[slot]))
                    if time.monotonic() - saved > SAVE_SECONDS:
                        table.save_part()
                        saved = time.monotonic()
            bar.update(todo - bar.n)  # what other processes measured
    finally:
        table.save_part()
    for found in processes.gather(measured):
        table.gather(found)
    return [(picture, key) for picture in pictures for key in keys_of(picture).values() if key in table.scores]


def _following(pictures: Sequence[Picture]) -> dict[Path, Picture]:
    """A picture's path → the next picture of the same model and prompt; the first one follows the last.

    Only of prompt sets in which every model has several images of each of its prompts.
    """
    of_prompt: dict[tuple, list[Picture]] = defaultdict(list)
    for picture in sorted(pictures, key=lambda picture: picture.repeat):
        of_prompt[picture.prompt_set, picture.model, picture.key].append(picture)
    single = {prompt_set for (prompt_set, _, _), alike in of_prompt.items() if len(alike) < 2}
    return {
        picture.path: after
        for (prompt_set, _, _), alike in of_prompt.items()
        if prompt_set not in single
        for picture, after in zip(alike, [*alike[1:], alike[0]], strict=True)
    }


def _key(picture: Picture, statistic: str, version: str) -> ScoreKey:
    return ScoreKey(str(picture.prompt), str(picture.sha256), statistic, version)


def _decoded(picture: Picture) -> Image.Image | None:
    try:
        return decode_rgb(str(picture.path))
    except UnreadableImageError:  # reported where it is scored
        return None
