"""What a family's parts are to the rest: loaded once, and never sent to processes that load data."""

import pickle

import pytest

from xdpo.config import ComputeConfig, ModelConfig
from xdpo.families import load_parts
from xdpo.models import make_policy


@pytest.mark.parametrize("compile_", [False, True])
def test_what_data_sets_keep_of_a_model_is_its_tokenizers_alone(small_pipeline, compile_):
    """Processes that load are sent their data set where they are spawned, as on a Mac: weights are not, nor a graph."""
    parts = load_parts(ModelConfig(pipeline=small_pipeline))
    make_policy(parts, ModelConfig(), ComputeConfig(compile=compile_))
    sent = pickle.dumps(parts.tokenize)
    assert len(sent) < 100_000 < sum(weight.nbytes for weight in parts.denoiser.parameters())
    tokens, truncated = pickle.loads(sent)("abc")
    assert tokens["input_ids"].tolist() == parts.tokenize("abc")[0]["input_ids"].tolist() and not truncated
