"""What the policy is measured against: a frozen copy, the policy without adapter, a moving average, recorded errors.

Policy and reference run the same forward in the same shape and precision, so that equal weights give equal bits and
the first margin is 0. A compiler rounds a forward that saves activations differently from one that doesn't, and one
with an adapter differently from one without. So where training is compiled, the reference records gradients too, which
are dropped, and an adapter stays in its graph with B = 0, which adds an exact 0. The price is the memory of the
policy's activations during the reference's forward.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xdpo.cache import ReferenceCache
from xdpo.models import adapter_layers, adapter_off
from xdpo.noisy import NoisyBatch, residuals, weighted_mean


class ReferenceErrors(NamedTuple):
    """The reference's errors on a batch, without gradient."""

    errors: Tensor  # (2, B), chosen first
    residuals: Tensor | None  # (2B, C, h, w); None where the errors were recorded


class Reference:
    """What all references can do. This class itself is the absent one, for objectives without a reference."""

    network: nn.Module | None = None
    """Its own network; None where it has none, or shares the policy's."""

    @contextmanager
    def running(self) -> Iterator[nn.Module | None]:
        """A context in which the yielded denoiser is the reference; None where there is no network to run."""
        yield None

    def measure(self, noisy: NoisyBatch) -> ReferenceErrors:
        """Its errors on a batch. Raises ValueError where there is no network to measure them with."""
        with self.running() as denoiser:
            if denoiser is None:
                raise ValueError("there is no reference to measure with, and its errors were not recorded")
            difference = residuals(denoiser, noisy).detach()
        return ReferenceErrors(weighted_mean(difference.square(), noisy).view(2, -1), difference)

    def after_update(self, policy: nn.Module) -> None:
        """Called when the policy has taken an optimizer step. policy: outside its distributed wrapper."""

    def become(self, policy: nn.Module) -> None:
        """Take the policy's weights. Raises ValueError where there is no network of its own to take them."""
        raise ValueError("this reference has no network of its own, so it can't take the policy's weights")

    def commit(self) -> None:
        """Called when the errors measured since the last call were seen to be finite, so that they may be kept."""


class Frozen(Reference):
    """A copy of the base model that never changes."""

    network: nn.Module

    def __init__(self, network: nn.Module):
        self.network = network

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        with torch.set_grad_enabled(_is_compiled(self.network)):
            yield self.network

    @torch.no_grad()
    def become(self, policy: nn.Module) -> None:
        torch._foreach_copy_(list(self.network.parameters()), list(policy.parameters()))


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
        self.layers = adapter_layers(policy)

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        if _is_compiled(self.policy):
            with _zero_adapter(self.policy):
                yield self.policy
        else:
            with torch.no_grad(), adapter_off(self.layers):
                yield self.policy


class Recorded(Reference):
    """Errors from a cache. `inner` measures those that it lacks, which are recorded once they are seen to be finite."""

    def __init__(self, inner: Reference, cache: ReferenceCache, device: torch.device):
        self.inner, self.cache, self.device = inner, cache, device
        self.network = inner.network
        self._measured: list[tuple[Sequence[int] | Tensor, Tensor]] = []

    @contextmanager
    def running(self) -> Iterator[nn.Module | None]:
        with self.inner.running() as denoiser:
            yield denoiser

    def measure(self, noisy: NoisyBatch) -> ReferenceErrors:
        if (recorded := self.cache.get(noisy.positions, self.device)) is not None:
            return ReferenceErrors(recorded, None)
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
    """Whether the network's forward would run compiled now; without gradients it runs uncompiled."""
    return getattr(network, "is_compiled_for_training", False) and torch.is_grad_enabled()


@contextmanager
def _zero_adapter(policy: nn.Module) -> Iterator[None]:
    """Make a LoRA adapter add 0 while the graph stays the same."""
    outputs: list[Tensor] = [parameter for name, parameter in policy.named_parameters() if ".lora_B." in name]
    saved = [parameter.detach().clone() for parameter in outputs]
    with torch.no_grad():
        torch._foreach_zero_(outputs)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(outputs, saved)
