"""The embedded world: drawn scenes whose captions, flaws and preferences are known exactly.

Only configs, scripts and the scorers refer to it. Training sees a pipeline folder and parquet files.
"""
