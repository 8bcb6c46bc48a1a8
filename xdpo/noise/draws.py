"""Everything random about a training sample.

A draw depends on (seed, position of the sample in training order, stream) alone: never on the batch it is in,
the process, the worker or the time. Hence a run resumes by jumping to a position, and two processes equal one.
"""

import zlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch

HELD_OUT_SEED = 0  # held-out pairs have the same (t, ε) in every run, so that runs can be compared


def generator(seed: int, position: int, stream: str) -> torch.Generator:
    """A separate CPU generator for one purpose (stream) of one sample: "timestep", "noise", "augment", …

    The three are hashed to 32 bits, because torch's CPU generator (a Mersenne twister) uses only the low 32 bits
    of its seed: numbers packed side by side into 64 would collide. `seed` and `position` are not negative.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(stream.encode()), position))
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint32)[0]))


def permutation(seed: int, epoch: int, length: int) -> torch.Tensor:
    """The order of the rows 0 … length−1 in one epoch: (length,) int64."""
    return torch.randperm(length, generator=generator(seed, epoch, "permutation"))


class Order(Protocol):
    """Which pair is at a position of the training order."""

    def __getitem__(self, position: int, /) -> int: ...


class SampleOrder:
    """Which pair is at a position of the training order: `order[position]` is an index below `length`.

    Position p belongs to epoch p // length. With `shuffle` each epoch has its own permutation of the pairs.
    """

    def __init__(self, seed: int, length: int, shuffle: bool):
        self.seed, self.length, self.shuffle = seed, length, shuffle
        self._epoch, self._permutation = -1, torch.empty(0)

    def __getitem__(self, position: int) -> int:
        epoch, slot = divmod(position, self.length)
        if not self.shuffle:
            return slot
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, permutation(self.seed, epoch, self.length)
        return int(self._permutation[slot])


def draw_augmentation(seed: int, position: int) -> tuple[float, float, float]:
    """Three uniform numbers in [0, 1) for a pair's images: to flip them, and to place the crop across and down.

    All three are always drawn, so that switching one use off does not change the others.
    """
    coin, across, down = torch.rand(3, generator=generator(seed, position, "augment")).tolist()
    return coin, across, down


def draw_coin(seed: int, position: int, stream: str) -> float:
    """A uniform number in [0, 1): a pair's caption, say, is dropped where it is below the share to drop."""
    return torch.rand(1, generator=generator(seed, position, stream)).item()


def draw_timesteps(seed: int, positions: Iterable[int], schedule_length: int) -> torch.Tensor:
    """One timestep per pair, uniform over 0 … schedule_length−1: (B,) int64 on the CPU."""
    return torch.cat(
        [
            torch.randint(schedule_length, (1,), generator=generator(seed, int(position), "timestep"))
            for position in positions
        ]
    )


def draw_normals(seed: int, positions: Iterable[int], stream: str) -> torch.Tensor:
    """One standard normal number per pair: (B,) float32 on the CPU."""
    return torch.cat([torch.randn(1, generator=generator(seed, int(position), stream)) for position in positions])


def draw_noise(
    seed: int, positions: Iterable[int], shape: Sequence[int], shared: bool = True, stream: str = "noise"
) -> torch.Tensor:
    """Gaussian noise for B pairs of latents of `shape`: (2B, *shape) float32 on the CPU, chosen first.

    shared: both images of a pair get the same noise (Appendix C); otherwise the rejected image gets another one, and
    the chosen image's stays the same. stream: the purpose, "noise", or "posterior" for the VAE's sample.
    """
    chosen, rejected = [], []
    for position in positions:
        source = generator(seed, int(position), stream)
        chosen.append(torch.randn(*shape, generator=source))
        rejected.append(chosen[-1] if shared else torch.randn(*shape, generator=source))
    return torch.stack(chosen + rejected)
