"""Train an embedded base model from nothing: `python scripts/train_tiny_base.py --work runs/tiny_base`.

It trains an autoencoder on drawn scenes, then tokenizers and text encoders on their captions, then text encoders and
denoiser together on (latent, caption) pairs of which a known share is flawed. The result is a pipeline folder in half
precision: in Stable Diffusion's format, or with --flow in Stable Diffusion 3's, with the same autoencoder. The same
command goes on where it was stopped. All training data come from `xdpo.tiny` and contain no held-out scene or
combination. One H100 took a quarter of an hour for both bases side by side (--device cuda); two cores take days.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch
from tiny_base.denoisers import train_denoiser, train_encoders
from tiny_base.diffusion import Diffusion
from tiny_base.flow import Flow
from tiny_base.images import draw, draw_training_set, encode_all, train_autoencoder
from transformers.utils import logging

from xdpo.files import replacing_folder
from xdpo.paths import user_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=user_path, default=Path("runs/tiny_base"), help="checkpoints and logs")
    parser.add_argument("--out", type=user_path, help="the finished pipeline (default: where it ships)")
    parser.add_argument("--flow", action="store_true", help="the flow base in place of the diffusion base")
    parser.add_argument("--images", type=int, default=240_000, help="size of the drawn training set")
    parser.add_argument("--vae-steps", type=int, default=4_000)
    parser.add_argument("--text-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, help="of the denoiser (default: those of the shipped base)")
    parser.add_argument("--batch", type=int, default=512, help="images of a step of the denoiser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()  # of writing weights
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic algorithms need on a GPU
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = True
    options.work.mkdir(parents=True, exist_ok=True)
    work, seed, device = options.work, options.seed, options.device

    images, captions = draw_training_set(
        work / f"images_{options.images}.npz", options.images, partial(draw, seed=seed)
    )
    vae = train_autoencoder(work, images, options.vae_steps, batch=32, seed=seed, device=device)
    latents = encode_all(vae, images, device)
    base = (Flow if options.flow else Diffusion)(captions, latents.shape[1], seed, device)
    train_encoders(work, base, captions, options.text_steps, 128, seed, device)
    steps = base.steps if options.steps is None else options.steps
    train_denoiser(work, base, latents, captions, steps, options.batch, seed, device)
    out = options.out or Path("assets/tiny") / ("flow_pipeline" if options.flow else "pipeline")
    with replacing_folder(out) as aside:
        base.save(aside, vae)
    print(f"saved the pipeline to {out}")


if __name__ == "__main__":
    main()
