"""Scores of images: computing them, keeping them in a table, and comparing them with intervals."""
