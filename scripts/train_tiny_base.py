"""Train the embedded base model from nothing: `python scripts/train_tiny_base.py --work runs/tiny_base`.

It trains an autoencoder on drawn scenes, then a BPE tokenizer and a text encoder on their captions, then text encoder
and UNet together on (latent, caption) pairs of which a known share is flawed. The same command resumes a stage. The
result is a pipeline folder in Stable Diffusion format, in half precision. All training data come from `xdpo.tiny` and
contain no held-out scene or combination.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.nn.functional import cross_entropy
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from xdpo.files import replacing, replacing_folder
from xdpo.noise import DiffusionProcess, Weighting
from xdpo.paths import user_path
from xdpo.tiny import world
from xdpo.tiny.annotator import random_flaws, render

MAX_TOKENS = 32
WARMUP_STEPS = 100
# Of the base's training images, flawed in a way that the caption does not mention.
MISALIGNED_SHARE, SPOILT_SHARE = 0.15, 0.6


def draw_training_set(path: Path, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """`count` flawed renderings (count, 64, 64, 3) uint8 with captions, kept in `path` for the next start."""
    if not path.exists():
        rng = np.random.default_rng(seed)
        images, captions = np.empty((count, world.IMAGE_SIZE, world.IMAGE_SIZE, 3), np.uint8), []
        for index in range(count):
            scene = world.training_scene(rng)
            images[index] = render(scene, rng, random_flaws(rng, MISALIGNED_SHARE, SPOILT_SHARE)).pixels
            captions.append(world.caption(scene, int(rng.integers(3))))
        with replacing(path, "wb") as file:
            np.savez(file, images=images, captions=np.array(captions))
    stored = np.load(path)
    return stored["images"], stored["captions"].tolist()


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(N, 64, 64, 3) uint8 → (N, 3, 64, 64) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


class Stage:
    """One training stage: a module, its optimizers with warm-up and cosine decay, a log, and checkpoints.

    The learning rate falls over the last `decay` of the steps; before that it doesn't depend on their number, so a
    stage that was stopped there goes on with another number of steps as if it had been asked for at once.

    Muon takes every weight as a matrix of outputs × the rest, AdamW takes biases, norms and embeddings. On the
    autoencoder Muon needs less than half of AdamW's steps (assets/tiny/README.md).
    """

    def __init__(self, name: str, module: torch.nn.Module, work: Path, steps: int, learning_rate: float, decay: float = 1):
        self.name, self.module, self.steps, self.decay, self.step = name, module, steps, decay, 0
        self.path, self.log_path = work / f"{name}.pt", work / f"{name}.jsonl"
        embeddings = {layer.weight for layer in module.modules() if isinstance(layer, torch.nn.Embedding)}
        self.weights = [weight for weight in module.parameters() if weight.ndim >= 2 and weight not in embeddings]
        self.matrices = [torch.nn.Parameter(weight.data.flatten(1)) for weight in self.weights]  # the same memory
        others = [weight for weight in module.parameters() if weight.ndim < 2 or weight in embeddings]
        self.optimizers = (
            torch.optim.Muon(
                self.matrices, lr=learning_rate, weight_decay=0.0, momentum=0.9, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99)),
        )
        self.peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.ema = EMAModel(module.parameters(), decay=0.999)
        self.started = time.time()
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            module.load_state_dict(state["module"])
            for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
            self.ema.load_state_dict(state["ema"])
            self.step = state["step"]

    def update(self, loss: torch.Tensor) -> None:
        """One optimizer step on `loss`."""
        fallen = max(0.0, 1 - (self.steps - self.step) / (self.decay * self.steps))
        share = min((self.step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * fallen)) + 1e-3, 1.0)
        self.module.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()
        self.ema.step(self.module.parameters())
        self.step += 1

    def save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema.state_dict(),
            "step": self.step,
        }
        with replacing(self.path, "wb") as file:
            torch.save(state, file)

    def log(self, **metrics: float | torch.Tensor) -> None:
        """Write one line of metrics to the log file and the screen."""
        row = {"step": self.step, **{name: round(float(value), 5) for name, value in metrics.items()}}
        row["seconds"] = round(time.time() - self.started)
        print(self.name, row, flush=True)
        with self.log_path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def train_autoencoder(work: Path, images: np.ndarray, steps: int, batch: int, seed: int) -> AutoencoderKL:
    """An autoencoder 64×64×3 ↔ 8×8×16 under L1 + L2 and a small KL term, its scaling factor set to unit variance."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=world.IMAGE_SIZE,
        mid_block_add_attention=False,
    )
    stage = Stage("vae", vae, work, steps, learning_rate=5e-3)
    held_back = to_tensor(images[-256:])
    while stage.step < steps:
        rng = np.random.default_rng((seed, stage.step))
        pixels = to_tensor(images[rng.integers(0, len(images) - 256, batch)])
        posterior = vae.encode(pixels).latent_dist
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded - pixels
        loss = error.abs().mean() + error.square().mean() + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        stage.update(loss)
        if stage.step % 100 == 0 or stage.step == steps:
            with torch.no_grad():
                again = vae.decode(vae.encode(held_back).latent_dist.mode()).sample.clamp(-1, 1)
            psnr = -10 * torch.log10(((again - held_back) / 2).square().mean())
            stage.log(loss=loss.detach(), psnr_db=psnr)
        if stage.step % 200 == 0 or stage.step == steps:
            stage.save()
    stage.ema.copy_to(vae.parameters())
    vae.eval().requires_grad_(False)
    normalise_latents(vae, to_tensor(images[:4096]))
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
    vae.register_to_config(scaling_factor=1.0)


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose BPE was learnt on the captions: one token for every word of the grammar."""
    blank = CLIPTokenizer(model_max_length=MAX_TOKENS)
    return blank.train_new_from_iterator(captions, vocab_size=640)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text model."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=96,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def caption_labels(text: str) -> dict[str, int]:
    """What a caption says, as classes; -1 for attributes that it does not mention."""
    scene = world.parse(text)
    relations = (None, "and", *world.RELATIONS)
    labels = {
        "relation": relations.index(scene.relation),
        "background": list(world.BACKGROUNDS).index(scene.background),
    }
    for index in range(2):
        thing = scene.things[index] if index < len(scene.things) else None
        for name, values in (("shape", world.SHAPES), ("colour", world.COLOURS), ("size", world.SIZES)):
            labels[f"{name}{index}"] = list(values).index(getattr(thing, name)) if thing else -1
    return labels


def train_text_encoder(
    work: Path, captions: list[str], tokenizer: CLIPTokenizer, steps: int, batch: int, seed: int
) -> CLIPTextModel:
    """Train the text encoder until its last state encodes all that the caption says (CLIP learns this from images)."""
    torch.manual_seed(seed + 2)
    encoder = build_text_encoder(tokenizer)
    labels = [caption_labels(text) for text in captions]
    classes = {name: torch.tensor([label[name] for label in labels]) for name in labels[0]}
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(96, int(values.max()) + 1) for name, values in classes.items()})
    stage = Stage("text", torch.nn.ModuleDict({"encoder": encoder, "heads": heads}), work, steps, learning_rate=5e-3)
    token_ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    while stage.step < steps:
        rows = torch.randint(0, len(captions), (batch,), generator=torch.Generator().manual_seed(stage.step))
        state = encoder(token_ids[rows]).last_hidden_state[:, -1]
        losses = [cross_entropy(heads[name](state), classes[name][rows], ignore_index=-1) for name in heads]
        total = sum(losses, torch.zeros(()))
        stage.update(total)
        if stage.step % 100 == 0:
            stage.log(loss=total.detach() / len(losses))
    stage.save()
    return encoder


def build_unet(latent_channels: int) -> UNet2DConditionModel:
    """A UNet (64, 96) on 8×8 latents with cross-attention at both levels."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule: 1,000 scaled-linear steps, epsilon prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Scaled latents (N, 16, 8, 8) of all images."""
    batches = [vae.encode(to_tensor(images[i : i + 256])).latent_dist.mode() for i in range(0, len(images), 256)]
    return torch.cat(batches) * vae.config.scaling_factor


def train_text_to_latent(
    work: Path,
    latents: torch.Tensor,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    steps: int,
    batch: int,
    seed: int,
) -> torch.nn.ModuleDict:
    """Text encoder and UNet trained together on the denoising loss (paper Eq. 1), 10 % of captions dropped.

    λ(t) is min-SNR's: a small model learns several times faster with it than with a constant.
    """
    torch.manual_seed(seed + 1)
    modules = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": build_unet(latents.shape[1])})
    stage = Stage("unet", modules, work, steps, learning_rate=7e-3, decay=0.25)
    scheduler = new_scheduler()
    schedule = DiffusionProcess.from_scheduler(scheduler, Weighting("min_snr"))
    token_ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids[0]
    smoothed = None
    while stage.step < steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + stage.step)
        rows = torch.randint(0, len(latents), (batch,), generator=generator)
        timesteps = torch.randint(0, 1000, (batch,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        dropped = torch.rand(batch, generator=generator) < 0.1
        ids = torch.where(dropped[:, None], empty, token_ids[rows])
        states = modules["text_encoder"](ids).last_hidden_state
        noisy = scheduler.add_noise(latents[rows], noise, timesteps)
        error = modules["unet"](noisy, timesteps, states).sample - noise
        weights = schedule.weights(timesteps)
        loss = (weights * error.square().mean((1, 2, 3))).mean()
        stage.update(loss)
        smoothed = loss.item() if smoothed is None else 0.99 * smoothed + 0.01 * loss.item()
        if stage.step % 100 == 0:
            stage.log(loss=smoothed)
        if stage.step % 200 == 0 or stage.step == steps:
            stage.save()
    stage.ema.copy_to(modules.parameters())
    return modules.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=user_path, default=Path("runs/tiny_base"), help="checkpoints and logs")
    parser.add_argument("--out", type=user_path, default=Path("assets/tiny/pipeline"), help="the finished pipeline")
    parser.add_argument("--images", type=int, default=60_000, help="size of the drawn training set")
    parser.add_argument("--vae-steps", type=int, default=4_000)
    parser.add_argument("--text-steps", type=int, default=600)
    parser.add_argument("--unet-steps", type=int, default=2_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)

    images, captions = draw_training_set(options.work / f"images_{options.images}.npz", options.images, options.seed)
    vae = train_autoencoder(options.work, images, options.vae_steps, batch=16, seed=options.seed)
    tokenizer = train_tokenizer(captions)
    latents = encode_all(vae, images)
    text_encoder = train_text_encoder(options.work, captions, tokenizer, options.text_steps, 128, options.seed)
    modules = train_text_to_latent(
        options.work, latents, captions, tokenizer, text_encoder, options.unet_steps, options.batch, options.seed
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=modules["text_encoder"],
        tokenizer=tokenizer,
        unet=modules["unet"],
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with replacing_folder(options.out) as aside:
        pipeline.to(dtype=torch.float16).save_pretrained(aside, safe_serialization=True)
    print(f"saved the pipeline to {options.out}")


if __name__ == "__main__":
    main()
