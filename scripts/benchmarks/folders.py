"""A temporary working folder."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def working_folder() -> Iterator[Path]:
    """A temporary folder, which `datasets` also uses for its copies, in this process and in those that it starts."""
    with tempfile.TemporaryDirectory(prefix="xdpo-benchmark-") as folder:
        before = {name: os.environ.get(name) for name in ("HF_DATASETS_CACHE", "HF_DATASETS_DISABLE_PROGRESS_BARS")}
        os.environ |= {"HF_DATASETS_CACHE": f"{folder}/datasets", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
