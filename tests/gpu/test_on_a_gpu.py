"""scripts/check_gpu.py --quick on this machine's GPU: a test for every claim."""

import json
import subprocess
import sys
from pathlib import Path

import check_gpu
import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What was found, by claim."""
    folder = tmp_path_factory.mktemp("report")
    command = [sys.executable, "scripts/check_gpu.py", "--quick", "--output", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    path = folder / "gpu_report.json"
    assert path.exists(), ended.stdout[-2000:] + ended.stderr[-2000:]
    return {row["claim"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


@pytest.mark.parametrize("claim", [row.claim for row in check_gpu.every_row()])
def test_it_holds(claim, found):
    row = found[claim]
    if row["verdict"] == "not possible here":
        pytest.skip(row["remedy"])
    assert row["verdict"] == "holds", f"{row['measured']}, expected {row['expected']}; try {row['remedy']}"
