"""The kind of head that the aesthetic predictor, ImageReward and HP have: linear layers without activations."""

import itertools
from pathlib import Path

from torch import Tensor, nn

from xdpo.scorers.weights import fill

HEAD_WIDTHS = (1024, 128, 64, 16, 1)
HEAD_DROPOUTS = (0.2, 0.2, 0.1)  # after the first three layers, in training only


def build_head(tensors: dict[str, Tensor], path: Path, width: int = 768) -> nn.Module:
    """A head (B, width) → (B, 1) from tensors named layers.0.weight, …; errors name `path`, the tensors' file."""
    from accelerate import init_empty_weights

    modules: list[nn.Module] = []
    with init_empty_weights():
        for index, (width_in, width_out) in enumerate(itertools.pairwise((width, *HEAD_WIDTHS))):
            modules.append(nn.Linear(width_in, width_out))
            if index < len(HEAD_DROPOUTS):
                modules.append(nn.Dropout(HEAD_DROPOUTS[index]))
        head = nn.Sequential(*modules)
    fill(head, {name.removeprefix("layers."): tensor for name, tensor in tensors.items()}, path)
    return head.eval().requires_grad_(False)
