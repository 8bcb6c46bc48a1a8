"""The kind of head that the aesthetic predictor and ImageReward have: linear layers without activations."""

import itertools
from pathlib import Path

from torch import Tensor, nn

from xdpo.scorers.weights import fill

HEAD_WIDTHS = (768, 1024, 128, 64, 16, 1)
HEAD_DROPOUTS = (0.2, 0.2, 0.1)  # after the first three layers, in training only


def build_head(tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """A head (B, 768) → (B, 1) from tensors named layers.0.weight, …; errors name `path`, the tensors' file."""
    from accelerate import init_empty_weights

    modules: list[nn.Module] = []
    with init_empty_weights():
        for index, (width, next_width) in enumerate(itertools.pairwise(HEAD_WIDTHS)):
            modules.append(nn.Linear(width, next_width))
            if index < len(HEAD_DROPOUTS):
                modules.append(nn.Dropout(HEAD_DROPOUTS[index]))
        head = nn.Sequential(*modules)
    fill(head, {name.removeprefix("layers."): tensor for name, tensor in tensors.items()}, path)
    return head.eval().requires_grad_(False)
