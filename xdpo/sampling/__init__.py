"""Generating images: an image depends on prompt, index, seed and settings, not on the number of processes."""
