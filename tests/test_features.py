"""Diversity and drift of features against other implementations."""

import numpy as np
import pytest
from scipy import stats

from xdpo.scores import features


def unit_vectors(count, seed, dimensions=12):
    vectors = np.random.default_rng(seed).normal(0.3, 1, (count, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_the_distance_is_the_mean_over_pairs():
    vectors = unit_vectors(5, 0)
    pairs = [1 - vectors[i] @ vectors[j] for i in range(5) for j in range(i)]
    assert features.pairwise_distance(vectors) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert features.pairwise_distance(vectors[[0, 0, 0]]) == pytest.approx(0, abs=1e-6)
    assert features.pairwise_distance(np.full((2, 2), 0.7072, np.float32)) == 0  # a length above 1 by rounding


@pytest.mark.parametrize("count", [2, 4, 20])
def test_the_vendi_score_is_the_exponential_of_scipys_entropy_of_singular_values(count):
    vectors = unit_vectors(count, 1)
    shares = np.linalg.svd(vectors.astype(float), compute_uv=False) ** 2 / count
    assert features.vendi_score(vectors) == pytest.approx(np.exp(stats.entropy(shares)), rel=1e-6)


def test_the_vendi_score_counts_different_images():
    assert features.vendi_score(np.eye(6)[:4]) == pytest.approx(4)
    assert features.vendi_score(np.eye(6)[[0, 0, 1, 1]]) == pytest.approx(2)
    assert features.vendi_score(unit_vectors(1, 0)[[0, 0, 0]]) == pytest.approx(1)


def test_the_gaussian_discrepancy_is_that_of_cmmds_code(monkeypatch):
    """clip-mmd 0.0.2, which carries the authors' estimator, printed these numbers."""
    monkeypatch.setattr(features, "_ROWS", 7)  # several pieces
    first, second = unit_vectors(20, 2), unit_vectors(33, 3) * 3
    assert features.GAUSSIAN.to(second)(first) == pytest.approx(6.4799299, rel=1e-6)
    assert features.GAUSSIAN.to(first[::-1])(first) == pytest.approx(0, abs=1e-9)


def test_the_polynomial_discrepancy_is_kids_by_its_definition(monkeypatch):
    monkeypatch.setattr(features, "_ROWS", 7)
    first, second = unit_vectors(15, 4).astype(float), unit_vectors(22, 5).astype(float) * 2

    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    def mean(a, b, same):
        return np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if not (same and i == j)])

    expected = mean(first, first, True) + mean(second, second, True) - 2 * mean(first, second, False)
    assert features.POLYNOMIAL.to(second)(first) == pytest.approx(1000 * expected, rel=1e-9)


def test_the_polynomial_discrepancy_of_one_distribution_is_zero_on_average():
    found = [features.POLYNOMIAL.to(unit_vectors(12, 1000 + n))(unit_vectors(12, n)) for n in range(300)]
    assert abs(np.mean(found)) < 3.5 * stats.sem(found) and min(found) < 0
