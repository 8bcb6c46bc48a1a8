"""compute.tf32 and compute.deterministic: what they switch, and that a CPU needs neither."""

import os

import pytest
import torch
from training_runs import assert_same_run

from xdpo.compute import choose_kernels
from xdpo.config import ComputeConfig


@pytest.fixture(autouse=True)
def switches(monkeypatch):
    """Every switch as it was, afterwards."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    choose_kernels(ComputeConfig())


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_of_matrix_products_and_of_convolutions(tf32):
    choose_kernels(ComputeConfig(tf32=tf32))

    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


def test_deterministic_kernels_are_asked_for_everywhere_and_only_then():
    choose_kernels(ComputeConfig(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"

    choose_kernels(ComputeConfig())
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


def test_on_a_cpu_deterministic_kernels_are_the_usual_ones(run):
    status, deterministic = run("deterministic", "compute.deterministic=true", "train.max_steps=3")
    assert status == 0 and torch.are_deterministic_algorithms_enabled()
    assert_same_run(deterministic, run("usual", "train.max_steps=3")[1])
