"""An optimizer's state as named tensors, for any optimizer whose state consists of tensors and numbers.

The state `exp_avg` of the parameter `conv.weight` is the tensor `conv.weight::exp_avg`; nested states have more names.
Numbers become tensors of one element, and their types are kept in the file's metadata.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_SEPARATOR = "::"
_KINDS = "kinds"  # the only entry of the file's metadata: several would be written in random order
_NUMBERS = {"int": int, "float": float, "bool": bool}
_ON_CPU = "tensor on the CPU"  # whatever device its parameter is on
_PROBE_SHAPE = (128, 64)  # large enough for bitsandbytes to quantize its state


def save(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Write the states of `parameters`, by name, as one safetensors file. Raises ValueError for other types."""
    tensors, kinds, seen = {}, {}, set()
    for name, parameter in parameters.items():
        for key, value in _leaves(optimizer.state.get(parameter, {}), name):
            tensors[key], kind = _to_tensor(key, value, parameter)
            if kind is not None:
                kinds[key] = kind
            if tensors[key].data_ptr() in seen:  # safetensors refuses shared memory, such as bitsandbytes' code book
                tensors[key] = tensors[key].clone()
            seen.add(tensors[key].data_ptr())
    save_file(tensors, path, metadata={_KINDS: json.dumps(kinds, sort_keys=True)})


def load(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Load a file's states into an optimizer that has none yet, tensor by tensor, each with its parameter's layout.

    Raises KeyError for a parameter that `parameters` lacks.
    """
    with safe_open(path, "pt") as file:
        kinds = json.loads((file.metadata() or {}).get(_KINDS, "{}"))
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            name, *inner = key.split(_SEPARATOR)
            parameter = parameters[name]
            state = optimizer.state[parameter]
            for key_part in inner[:-1]:
                state = state.setdefault(key_part, {})
            state[inner[-1]] = _from_tensor(file.get_tensor(key), kinds.get(key), parameter)


def check(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer], device: torch.device) -> None:
    """Raise ValueError where a checkpoint could not hold an optimizer's state. Takes one step on a small parameter."""
    parameter = nn.Parameter(torch.ones(_PROBE_SHAPE, device=device))
    optimizer = build([parameter])
    before = [_settings(group) for group in optimizer.param_groups]
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    name = type(optimizer).__name__
    for key, value in _leaves(optimizer.state[parameter], name):
        _to_tensor(key, value, parameter)
    for group, old in zip(optimizer.param_groups, before, strict=True):
        changed = [key for key, value in _settings(group).items() if repr(value) != repr(old.get(key))]
        if changed:
            raise ValueError(f"{name} keeps {', '.join(changed)} beside its parameters; a checkpoint can't hold that")


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _leaves(state: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if not isinstance(key, str):
            raise ValueError(f"the state of {name} has the key {key!r}; a checkpoint holds states named by text")
        full = f"{name}{_SEPARATOR}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, full)
        else:
            yield full, value


def _to_tensor(key: str, value: Any, parameter: nn.Parameter) -> tuple[Tensor, str | None]:
    """The value on the CPU, and its kind: None for a tensor on the parameter's device."""
    if isinstance(value, Tensor):
        kind = None if value.device == parameter.device else _ON_CPU
        return value.detach().cpu().contiguous(), kind
    if value is None:
        return torch.empty(0), "None"
    kind = type(value).__name__
    if kind not in _NUMBERS:
        raise ValueError(f"the optimizer's state {key} is of type {kind}; a checkpoint holds tensors and numbers")
    return torch.tensor(value, dtype={"int": torch.int64, "float": torch.float64, "bool": torch.bool}[kind]), kind


def _from_tensor(saved: Tensor, kind: str | None, parameter: nn.Parameter) -> Any:
    if kind == "None":
        return None
    if kind in _NUMBERS:
        return _NUMBERS[kind](saved.item())
    if kind == _ON_CPU:
        return saved
    if saved.shape != parameter.shape:
        return saved.to(parameter.device)
    # With the parameter's strides: fused kernels pair elements of weights and moments by their position in memory.
    return torch.empty_like(parameter, dtype=saved.dtype, requires_grad=False).copy_(saved)
