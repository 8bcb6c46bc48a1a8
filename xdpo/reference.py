"""What the policy is measured against: a frozen copy, the policy without adapter, a moving average, recorded errors.

Policy and reference run the same forward in the same shape and precision, so that equal weights give equal bits and
the first margin is 0. A compiler rounds a forward that saves activations differently from one that doesn't, and one
with an adapter differently from one without. So where training is compiled, the reference records gradients too, which
are dropped, and an adapter stays in its graph with B = 0, which adds an exact 0. That costs the policy's activations
for the length of a forward.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xdpo.cache import ReferenceCache
from xdpo.models import adapter_off
from xdpo.noisy import NoisyBatch, residuals, weighted_mean


class ReferenceErrors(NamedTuple):
    """What the reference gave on a batch, without gradient."""

    errors: Tensor  # (2, B), chosen first
    residuals: Tensor | None  # (2B, C, h, w); None where the errors were recorded


class Reference:
    """The reference, whatever it is; this one is absent, for objectives without any."""

    network: nn.Module | None = None
    """The network of its own that it has."""

    @contextmanager
    def running(self) -> Iterator[nn.Module | None]:
        """The denoiser that is the reference in here; None where there is none to run."""
        yield None

    def measure(self, noisy: NoisyBatch) -> ReferenceErrors:
        """Its errors on a batch. Raises ValueError where there is nothing to measure with."""
        with self.running() as denoiser:
            if denoiser is None:
                raise ValueError("there is no reference to measure with, and its errors were not recorded")
            found = residuals(denoiser, noisy).detach()
        return ReferenceErrors(weighted_mean(found.square(), noisy).view(2, -1), found)

    def after_update(self, policy: nn.Module) -> None:
        """The policy, outside its distributed wrapper, has taken an optimizer step."""

    def commit(self) -> None:
        """The errors measured since the last call were finite: they may be kept."""


class Frozen(Reference):
    """A copy of the base model, which stays as it is."""

    def __init__(self, network: nn.Module):
        self.network = network

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        with torch.set_grad_enabled(_is_compiled(self.network)):
            yield self.network


class Moving(Frozen):
    """A moving average of the policy: decay · reference + (1 − decay) · policy after each step."""

    def __init__(self, network: nn.Module, decay: float):
        super().__init__(network)
        self.decay = decay

    @torch.no_grad()
    def after_update(self, policy: nn.Module) -> None:
        torch._foreach_lerp_(list(self.network.parameters()), list(policy.parameters()), 1 - self.decay)


class AdapterOff(Reference):
    """The policy without its adapter."""

    def __init__(self, policy: nn.Module):
        self.policy = policy

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        if _is_compiled(self.policy):
            with _zero_adapter(self.policy):
                yield self.policy
        else:
            with torch.no_grad(), adapter_off(self.policy):
                yield self.policy


class Recorded(Reference):
    """Errors from a cache; those that it lacks are measured by `inner`, and kept once they are seen to be finite."""

    def __init__(self, inner: Reference, cache: ReferenceCache, device: torch.device):
        self.inner, self.cache, self.device = inner, cache, device
        self._measured: list[tuple[Sequence[int] | Tensor, Tensor]] = []

    @property
    def network(self) -> nn.Module | None:
        return self.inner.network

    def running(self):
        return self.inner.running()

    def measure(self, noisy: NoisyBatch) -> ReferenceErrors:
        if (known := self.cache.get(noisy.positions, self.device)) is not None:
            return ReferenceErrors(known, None)
        measured = self.inner.measure(noisy)
        self._measured.append((noisy.positions, measured.errors))
        return measured

    def after_update(self, policy: nn.Module) -> None:
        self.inner.after_update(policy)

    def commit(self) -> None:
        for positions, errors in self._measured:
            self.cache.record(positions, errors)
        self._measured.clear()


def _is_compiled(network: nn.Module) -> bool:
    """Whether the network's forward is the compiled one now: what records no gradient runs as written."""
    return getattr(network, "is_compiled_for_training", False) and torch.is_grad_enabled()


@contextmanager
def _zero_adapter(policy: nn.Module) -> Iterator[None]:
    """A LoRA adapter that adds 0, in the same graph as ever."""
    outputs = [parameter for name, parameter in policy.named_parameters() if ".lora_B." in name]
    kept = [parameter.detach().clone() for parameter in outputs]
    with torch.no_grad():
        torch._foreach_zero_(outputs)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(outputs, kept)
