"""What features of images say: how diverse a prompt's images are, and how far a model drifts from a reference.

The features are unit vectors, of CLIP or of DINOv2 at 224 pixels (xdpo.scorers.embedders). CMMD as published uses
CLIP's ViT-L/14 at 336 pixels and KID another network, so their published numbers are on other scales.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xdpo.images.reading import IMAGE_SUFFIXES, Picture, with_checksums
from xdpo.scores.results import Benchmark

MMD_SIGMA, MMD_SCALE = 10.0, 1000.0  # of CMMD (Jayasumana et al. 2024)
Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # products of vectors, and the vectors
_ROWS = 1000  # of a kernel matrix that are computed at once


def reference_pictures(folder: Path) -> list[Picture]:
    """All images below a folder, whatever its layout. Raises ValueError where there are none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if len(paths) < 2:
        raise ValueError(f"--reference {folder} holds {len(paths)} images; give a folder of photographs, say")
    names = [path.relative_to(folder).as_posix() for path in paths]
    pictures = [Picture("reference", "", "", name, 0, path, name) for path, name in zip(paths, names, strict=True)]
    return with_checksums(pictures)[0]


# --- diversity -----------------------------------------------------------------------------------------------


def pairwise_distance(features: np.ndarray) -> float:
    """Mean cosine distance over all pairs of K ≥ 2 unit vectors (K, D), from 0 for equal ones to 2."""
    similarity = np.asarray(features, np.float64) @ np.asarray(features, np.float64).T
    cosines = similarity[np.triu_indices(len(features), k=1)]
    return float(1 - cosines.clip(max=1).mean())  # equal vectors, rounded to float32, may have a little more than 1


def vendi_score(features: np.ndarray) -> float:
    """Vendi score of K unit vectors (K, D) with the cosine as similarity: the effective number of different images,
    from 1 to K (Friedman and Dieng 2023)."""
    vectors = np.asarray(features, np.float64)
    shares = np.linalg.eigvalsh(vectors @ vectors.T / len(vectors))
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def diversity(
    benchmark: Benchmark,
    pictures: Mapping[tuple[str, str, str], Sequence[Picture]],
    features: Mapping[str, np.ndarray],
) -> Benchmark | None:
    """The diversity of each prompt's images as scores, over the prompts of which all models have equally many.

    None where fewer than two images a prompt are there.
    """

    def vectors_of(model: str, key: str) -> list[np.ndarray]:
        checksums = [str(p.sha256) for p in pictures.get((benchmark.name, model, key), ())]
        return [features[sha256] for sha256 in checksums if sha256 in features]

    kept, scores = [], defaultdict(list)
    for prompt in benchmark.prompts:
        of_models = [vectors_of(model, prompt.key) for model in benchmark.models]
        if len(of_models[0]) < 2 or len({len(vectors) for vectors in of_models}) > 1:
            continue
        kept.append(prompt)
        for name, measure in (("pairwise distance", pairwise_distance), ("Vendi score", vendi_score)):
            scores[name].append([measure(np.stack(vectors)) for vectors in of_models])
    if not kept:
        print(f"note: {benchmark.name}: no diversity, as no prompt has several images of every model", file=sys.stderr)
        return None
    columns = {name: np.array(rows).T for name, rows in scores.items()}
    return Benchmark(f"{benchmark.name}, diversity", benchmark.models, tuple(kept), columns, len(benchmark.prompts), {})


# --- drift ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """How far a model's images of a prompt set are from the reference images; counts of both."""

    prompt_set: str
    model: str
    images: int
    references: int
    gaussian: float
    polynomial: float


def drift(
    pictures: Mapping[tuple[str, str, str], Sequence[Picture]],
    references: Sequence[Picture],
    features: Mapping[str, np.ndarray],
) -> list[Drift]:
    """The drift of every model's images of every prompt set. Raises ValueError without readable reference images."""
    known = [features[str(p.sha256)] for p in references if p.sha256 in features]
    if len(known) < 2:
        raise ValueError(
            f"--reference: {len(known)} of its {len(references)} images can be decoded; give a folder of more"
        )
    expected = np.stack(known)
    vectors: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for (prompt_set, model, _), group in pictures.items():
        vectors[prompt_set, model] += [features[str(p.sha256)] for p in group if p.sha256 in features]
    gaussian, polynomial = GAUSSIAN.to(expected), POLYNOMIAL.to(expected)
    return [
        Drift(*owner, len(found), len(expected), gaussian(sample), polynomial(sample))
        for owner, found in vectors.items()
        if len(found) > 1
        for sample in [np.stack(found)]
    ]


@dataclass(frozen=True)
class Discrepancy:
    """1000 × the squared maximum mean discrepancy of two samples (N, D), (M, D) with a kernel.

    is_biased: every vector is also compared with itself, so that equal samples have 0 and none have less; else it is
    around 0 for samples of one distribution, also below.
    """

    kernel: Kernel
    is_biased: bool

    def to(self, second: np.ndarray) -> Callable[[np.ndarray], float]:
        """The discrepancy of any first sample from this second one, which is compared with itself once."""
        within = self._within(second)

        def of(first: np.ndarray) -> float:
            between = _kernel_sum(first, second, self.kernel) / (len(first) * len(second))
            return MMD_SCALE * (self._within(first) + within - 2 * between)

        return of

    def _within(self, sample: np.ndarray) -> float:
        total, count = _kernel_sum(sample, sample, self.kernel), len(sample)
        if self.is_biased:
            return total / count**2
        own = sum(self.kernel(each @ each.T, each, each).item() for each in np.asarray(sample, np.float64)[:, None])
        return (total - own) / (count * (count - 1))


def _gaussian(products: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    distances = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * products
    return np.exp(-distances / (2 * MMD_SIGMA**2))


def _polynomial(products: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (products / a.shape[1] + 1) ** 3


GAUSSIAN = Discrepancy(_gaussian, is_biased=True)
"""CMMD's estimate: a Gaussian kernel of width 10."""

POLYNOMIAL = Discrepancy(_polynomial, is_biased=False)
"""KID's: the kernel (x·y / D + 1)³ (Bińkowski et al. 2018)."""


def _kernel_sum(first: np.ndarray, second: np.ndarray, kernel: Kernel) -> float:
    """The sum of a kernel over all pairs, a thousand rows at a time: 30,000 references would need gigabytes at once."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    pieces = (a[start : start + _ROWS] for start in range(0, len(a), _ROWS))
    return float(sum(kernel(piece @ b.T, piece, b).sum() for piece in pieces))
