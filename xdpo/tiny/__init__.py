"""The embedded world: drawn scenes whose captions, flaws and preferences are known exactly.

Only configs, scripts and the scorers' dict know of it; training sees nothing but a pipeline folder and parquet files.
"""
