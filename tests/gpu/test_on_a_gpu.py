"""scripts/check_gpu.py --quick on this machine's GPU: a test for every claim."""

import json
import subprocess
import sys
from pathlib import Path

import check_gpu
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="tests of a GPU left out: there is none here"),
]
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """What was found, by claim."""
    if not (request.config.getoption("--all") or request.config.getoption("-m")):
        pytest.skip("tests of a GPU left out; pytest -m gpu runs them")
    folder = tmp_path_factory.mktemp("report")
    command = [sys.executable, "scripts/check_gpu.py", "--quick", "--output", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    path = folder / "gpu_report.json"
    assert path.exists(), ended.stdout[-2000:] + ended.stderr[-2000:]
    return {row["claim"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


@pytest.mark.parametrize("claim", [row.claim for row in check_gpu.rows_of()])
def test_it_holds(claim, found):
    row = found[claim]
    if row["verdict"] == "not possible here":
        pytest.skip(row["remedy"])
    assert row["verdict"] == "holds", f"{row['measured']}, expected {row['expected']}; try {row['remedy']}"
