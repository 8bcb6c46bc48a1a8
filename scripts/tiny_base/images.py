"""Drawn scenes as training images, and the autoencoder that makes latents of them."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from tiny_base.stages import Stage
from xdpo.files import replacing
from xdpo.tiny import world
from xdpo.tiny.annotator import Rendering, random_flaws, render

# Of the base's training images, flawed in a way that the caption does not mention.
MISALIGNED_SHARE, SPOILT_SHARE = 0.15, 0.6
DRAWN_TOGETHER = 1000  # images of one generator: as many processes as there are may draw
HELD_BACK = 256
LATENT_SHAPE = (16, 8, 8)


def plain_caption(scene: world.Scene, rendering: Rendering, rng: np.random.Generator) -> str:
    """What the picture should show, in one of the three sentence forms; of flaws it says nothing."""
    return world.caption(scene, int(rng.integers(3)))


def draw(
    part: int,
    seed: int,
    misaligned_share: float = MISALIGNED_SHARE,
    describe: Callable[[world.Scene, Rendering, np.random.Generator], str] = plain_caption,
) -> tuple[np.ndarray, list[str]]:
    """One part of a training set: flawed renderings (DRAWN_TOGETHER, 64, 64, 3) uint8 with captions."""
    rng, captions = np.random.default_rng((seed, part)), []
    images = np.empty((DRAWN_TOGETHER, world.IMAGE_SIZE, world.IMAGE_SIZE, 3), np.uint8)
    for index in range(DRAWN_TOGETHER):
        scene = world.training_scene(rng)
        rendering = render(scene, rng, random_flaws(rng, misaligned_share, SPOILT_SHARE))
        images[index] = rendering.pixels
        captions.append(describe(scene, rendering, rng))
    return images, captions


def draw_training_set(
    path: Path, count: int, draw_part: Callable[[int], tuple[np.ndarray, list[str]]]
) -> tuple[np.ndarray, list[str]]:
    """`count` images (count, 64, 64, 3) uint8 with captions, kept in `path` for the next start.

    draw_part: `draw` with its seed, which other processes call with the numbers of parts.
    Raises ValueError for a count that is no multiple of DRAWN_TOGETHER.
    """
    if count % DRAWN_TOGETHER or count <= 0:
        raise ValueError(f"--images (got {count}) must be a multiple of {DRAWN_TOGETHER}")
    if not path.exists():
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(draw_part, range(count // DRAWN_TOGETHER)))
        images = np.concatenate([drawn for drawn, _ in parts])
        captions = [caption for _, said in parts for caption in said]
        with replacing(path, "wb") as file:
            np.savez(file, images=images, captions=np.array(captions))
    stored = np.load(path)
    return stored["images"], stored["captions"].tolist()


def to_tensor(images: np.ndarray, device: str) -> torch.Tensor:
    """(N, 64, 64, 3) uint8 → (N, 3, 64, 64) float32 in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_autoencoder(work: Path, images: np.ndarray, steps: int, batch: int, seed: int, device: str) -> AutoencoderKL:
    """An autoencoder 64×64×3 ↔ 8×8×16 under L1 + L2 and a small KL term; each latent channel has unit variance."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_SHAPE[0],
        norm_num_groups=8,
        sample_size=world.IMAGE_SIZE,
        mid_block_add_attention=False,
    ).to(device)

    def loss(pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded - pixels
        return error.abs().mean() + error.square().mean() + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    stage = Stage("vae", vae, loss, work, steps, learning_rate=5e-3)
    held_back = to_tensor(images[-HELD_BACK:], device)
    while stage.step < steps:
        rng = np.random.default_rng((seed, stage.step))
        pixels = to_tensor(images[rng.integers(0, len(images) - HELD_BACK, batch)], device)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        stage.take_step(pixels, torch.randn((batch, *LATENT_SHAPE), generator=generator))
        if stage.is_to_log and stage.smoothed is not None:
            with torch.no_grad():
                again = vae.decode(vae.encode(held_back).latent_dist.mode()).sample.clamp(-1, 1)
            psnr = -10 * torch.log10(((again - held_back) / 2).square().mean())
            stage.log(loss=stage.smoothed, psnr_db=psnr)
    stage.ema.copy_to(vae.parameters())
    vae.eval().requires_grad_(False)
    normalise_latents(vae, to_tensor(images[:4096], device))
    return vae


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Give every latent channel mean 0 and variance 1 by folding the change into the 1×1 convolutions around it.

    With one scaling factor some channels would have a third of the spread of others, and noise would drown them first.
    """
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in pixels.split(256)])
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    encode, decode, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    encode.weight[:channels] /= spread[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / spread
    encode.bias[channels:] -= 2 * spread.log()  # the posterior's log-variance
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= spread[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: np.ndarray, device: str) -> torch.Tensor:
    """Latents (N, 16, 8, 8) of all images."""
    parts = (to_tensor(images[start : start + 256], device) for start in range(0, len(images), 256))
    return torch.cat([vae.encode(pixels).latent_dist.mode() for pixels in parts])
