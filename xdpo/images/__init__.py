"""Image folders: writing them so that a kill does no harm, their manifest, reading them, and sheets side by side."""
