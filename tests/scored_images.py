"""Scores of made-up images, as rows of the score table."""

from xdpo.scores.table import PlacedScore, Placement, ScoreKey


def key(number, scorer="clip"):
    return ScoreKey(f"prompt {number}", f"sha{number}", scorer, "1")


def placement(number, model="sd15", category="anime", prompt_set="hpsv2", repeat=0):
    return Placement(prompt_set, model, category, f"{category}/{number}", repeat, f"{number}.png")


def rows_of(scores, scorer="clip", **where):
    """Rows of models' scores: {"sd15": {0: 1.0, 1: 2.0}}."""
    return [
        PlacedScore(placement(number, model, **where), key(number, scorer), score)
        for model, numbers in scores.items()
        for number, score in numbers.items()
    ]
