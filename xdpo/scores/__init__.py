"""Scores of images: computing them, the table that keeps them, and what they say, in numbers with intervals."""
