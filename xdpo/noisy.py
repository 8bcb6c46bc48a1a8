"""A batch → the networks' inputs: encoded, unless a cache did it, and noised by draws of (seed, position)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xdpo.batch import Batch, Conditioning, LatentMoments
from xdpo.config import Config
from xdpo.families import PipelineParts
from xdpo.families.interface import Family
from xdpo.noise import Process, draw_noise


class NoisyBatch(NamedTuple):
    """B pairs ready for the networks, on their device; images chosen first, then rejected."""

    family: Family
    positions: Sequence[int] | Tensor  # (B,) of the training order, or of the held-out pairs' draws
    latents: Tensor  # (2B, C, h, w), noised
    timesteps: Tensor  # (2B,)
    conditioning: Conditioning  # of 2B
    targets: Tensor  # (2B, C, h, w) float32
    weights: Tensor  # (2B,) ω(t)
    denoised_scales: Tensor  # (2B,) |x̂_0 − x_0| for a prediction that is off by 1


@dataclass(frozen=True)
class NoisyBatchMaker:
    """Encodes a batch, unless a cache did it, and draws its randomness from (seed, position) alone."""

    parts: PipelineParts
    process: Process
    settings: Config
    device: torch.device

    def __call__(self, batch: Batch, seed: int, positions: Sequence[int] | Tensor | None = None) -> NoisyBatch:
        """A batch, encoded and noised.

        positions: (B,) that decide each pair's draws, instead of the batch's own. A single image has its own position.
        """
        noise, family = self.settings.noise, self.parts.family
        positions = batch.positions if positions is None else positions
        moments, conditioning = self.encode(batch)
        drawn_at = positions if batch.single is None else batch.single.positions
        if batch.single is None:
            conditioning = Conditioning({name: torch.cat([value, value]) for name, value in conditioning.items()})
        conditioning = family.with_size(conditioning, self.settings.data.resolution, self._sizes(batch))
        shape, num_images = moments.means.shape[1:], len(moments.means)

        def draw(stream: str, shared: bool) -> Tensor:
            # draw_noise draws twice per position, for a pair; a single image uses the first draw only.
            return self._to_device(draw_noise(seed, drawn_at, shape, shared=shared, stream=stream)[:num_images])

        posterior_noise = draw("posterior", shared=False) if self.settings.data.sample_latents else None
        drawn = draw("noise", shared=noise.shared_by_pair)
        timesteps = self._to_device(self.process.draw_times(seed, drawn_at, shape))
        timesteps = timesteps if batch.single is not None else timesteps.repeat(2)

        latents = family.to_latents(moments, posterior_noise)
        if batch.rejected_latents is not None:
            latents = torch.cat([latents[: len(batch.rejected_latents)], self._to_device(batch.rejected_latents)])
        ones = torch.ones(timesteps.shape, device=self.device)
        return NoisyBatch(
            family=family,
            positions=positions,
            latents=self.process.add_noise(latents, drawn, timesteps),
            timesteps=timesteps,
            conditioning=conditioning,
            targets=self.process.target(latents, drawn, timesteps),
            weights=self.process.weights(timesteps),
            denoised_scales=self.process.denoised(torch.zeros_like(ones), ones, timesteps).abs(),
        )

    def encoded(self, batch: Batch) -> Batch:
        """The batch with its images and captions encoded, for several draws on the same pairs."""
        moments, conditioning = self.encode(batch)
        return batch._replace(images=moments, captions=conditioning)

    def encode(self, batch: Batch) -> tuple[LatentMoments, Conditioning]:
        """The batch's latents and text states, float32: from the batch if they are cached, else by the encoders."""
        images, captions = batch.images, batch.captions
        if isinstance(images, LatentMoments):
            stds = None if images.stds is None else self._to_device(images.stds).float()
            images = images._replace(means=self._to_device(images.means).float(), stds=stds)
        else:
            images = self.parts.encode_images(self._to_device(images))
        if isinstance(captions, Conditioning):
            captions = Conditioning({name: self._to_device(value).float() for name, value in captions.items()})
        else:
            tokens = type(captions)({name: self._to_device(value) for name, value in captions.items()})
            captions = self.parts.encode_captions(tokens)
        return images, captions

    def _sizes(self, batch: Batch) -> Tensor | None:
        """(2B, 4), what the denoiser is told of each image; None where all are said to be whole and alike."""
        if self.settings.model.size_conditioning is None or batch.sizes is None:
            return None
        sizes, side = self._to_device(batch.sizes), float(self.settings.data.resolution)
        if (sampled := batch.rejected_latents) is not None:  # they were sampled as whole images of the training's size
            whole = sizes.new_tensor([side, side, 0, 0]).expand(len(sampled), -1)
            sizes = torch.cat([sizes[: len(sampled)], whole])
        return sizes

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def residuals(denoiser: nn.Module, noisy: NoisyBatch) -> Tensor:
    """Prediction − target, (2B, C, h, w) float32."""
    prediction = noisy.family.predict(denoiser, noisy.latents, noisy.timesteps, noisy.conditioning)
    return prediction.float() - noisy.targets


def weighted_mean(values: Tensor, noisy: NoisyBatch) -> Tensor:
    """ω(t) · mean over (C, h, w), (N,) of the first N images."""
    return noisy.weights[: len(values)] * values.mean(dim=(1, 2, 3))


def denoising_errors(denoiser: nn.Module, noisy: NoisyBatch) -> Tensor:
    """ω(t) · mean over (C, h, w) of (prediction − target)², (2B,) float32 (Eq. 10's norms; docs/paper.md: mean)."""
    return weighted_mean(residuals(denoiser, noisy).square(), noisy)
