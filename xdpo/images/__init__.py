"""Image folders: writing one that survives a kill, its manifest, reading any, and sheets of several side by side."""
