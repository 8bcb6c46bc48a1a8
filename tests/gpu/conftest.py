"""Tests that need a GPU are left out, in a line, where there is none, and where nobody asks for them."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if not torch.cuda.is_available():
        pytest.skip("tests of a GPU left out: there is none here")
    if not (item.config.getoption("--all") or item.config.getoption("-m")):
        pytest.skip("tests of a GPU left out; pytest -m gpu runs them")
