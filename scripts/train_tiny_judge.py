"""Train and measure the embedded judge: `python scripts/train_tiny_judge.py` (about ten minutes on one core).

The judge learns from freshly drawn scenes, flaws included. Half of the images pass through the base's autoencoder
first, so that the judge reads generated images as well as drawn ones. Its accuracy on unseen scenes goes to
assets/tiny/judge.json. The held-out judge is the same from another seed:

    python scripts/train_tiny_judge.py --seed 2 --out assets/tiny/heldout_judge.safetensors
"""

import argparse
import json

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save
from torch.nn.functional import cross_entropy

from xdpo.files import replacing, write_text
from xdpo.paths import expanded, user_path
from xdpo.tiny.annotator import Rendering, random_flaws, render
from xdpo.tiny.judges import HEADS, AttributeReader, Judge, alignment, judge_weights, labels_of
from xdpo.tiny.world import Scene, random_scene

MISALIGNED_SHARE, SPOILT_SHARE = 0.35, 0.5  # of the images


def draw_batch(rng: np.random.Generator, count: int) -> tuple[list[Scene], list[Rendering], torch.Tensor]:
    """`count` scenes of any kind, held-out ones among them, with their renderings and pixels (B, 3, 64, 64)."""
    scenes = [random_scene(rng) for _ in range(count)]
    renderings = [render(scene, rng, random_flaws(rng, MISALIGNED_SHARE, SPOILT_SHARE)) for scene in scenes]
    pixels = torch.from_numpy(np.stack([rendering.pixels for rendering in renderings]))
    return scenes, renderings, pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def labels_and_appeal(renderings: list[Rendering]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    labels = [labels_of(rendering.shown, rendering.placement) for rendering in renderings]
    classes = {name: torch.tensor([label[name] for label in labels]) for name in HEADS}
    return classes, torch.tensor([rendering.appeal for rendering in renderings], dtype=torch.float32)


@torch.no_grad()
def through_autoencoder(vae: AutoencoderKL, pixels: torch.Tensor, spread: float) -> torch.Tensor:
    """Encode, add Gaussian noise of `spread` standard deviations, decode, and round as a saved image is rounded."""
    latents = vae.encode(pixels).latent_dist.mode()
    latents = latents + spread / vae.config.scaling_factor * torch.randn(latents.shape).to(latents.device)
    decoded = vae.decode(latents).sample.clamp(-1, 1)
    return ((decoded + 1) * 127.5).round() / 127.5 - 1


@torch.no_grad()
def measure(reader: AttributeReader, vae: AutoencoderKL | None, count: int, seed: int, device: str) -> dict[str, float]:
    """Agreement with the truth on `count` new renderings; through the autoencoder if one is given."""
    scenes, renderings, pixels = draw_batch(np.random.default_rng(seed), count)
    pixels = pixels.to(device)
    seen = reader(pixels if vae is None else through_autoencoder(vae, pixels, spread=0.0))
    outputs = {name: output.cpu() for name, output in seen.items()}
    classes, appeal = labels_and_appeal(renderings)
    metrics: dict[str, float] = {}
    right, labelled_total = 0, 0
    for name in HEADS:
        is_labelled = classes[name] >= 0
        hits = (outputs[name].argmax(1) == classes[name])[is_labelled]
        metrics[name] = hits.float().mean().item()
        right, labelled_total = right + int(hits.sum()), labelled_total + int(is_labelled.sum())
    metrics["all attributes"] = right / labelled_total
    probabilities = {name: outputs[name].softmax(1).numpy() for name in HEADS}
    judged = [alignment(s, {n: rows[i] for n, rows in probabilities.items()}) for i, s in enumerate(scenes)]
    truth = [rendering.alignment for rendering in renderings]
    metrics["alignment: mean absolute error"] = float(np.abs(np.subtract(judged, truth)).mean())
    metrics["alignment: correlation"] = float(np.corrcoef(judged, truth)[0, 1])
    metrics["appeal: mean absolute error"] = (outputs["appeal"] - appeal).abs().mean().item()
    metrics["appeal: correlation"] = float(np.corrcoef(outputs["appeal"], appeal)[0, 1])
    return {name: round(value, 4) for name, value in metrics.items()}


def train(vae: AutoencoderKL, options: argparse.Namespace) -> AttributeReader:
    """A reader trained on freshly drawn scenes."""
    reader = AttributeReader().to(options.device)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=options.steps)
    for step in range(options.steps):
        rng = np.random.default_rng((options.seed, step))
        _, renderings, pixels = draw_batch(rng, options.batch)
        pixels, half = pixels.to(options.device), options.batch // 2
        pixels[:half] = through_autoencoder(vae, pixels[:half], spread=float(rng.uniform(0, 0.25)))
        classes, appeal = labels_and_appeal(renderings)
        outputs = reader(pixels)
        losses = [cross_entropy(outputs[name], classes[name].to(options.device), ignore_index=-1) for name in HEADS]
        loss = sum(losses) + 5 * (outputs["appeal"] - appeal.to(options.device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    return reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pipeline", type=expanded, default="assets/tiny/pipeline", help="whose autoencoder images pass through"
    )
    parser.add_argument(
        "--out", type=user_path, default=judge_weights("reward"), help="where the weights go; the measures beside them"
    )
    parser.add_argument("--steps", type=int, default=2_500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--test-images", type=int, default=4_000)
    parser.add_argument("--measure-only", action="store_true", help="measure the judge that is there")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    vae = (
        AutoencoderKL.from_pretrained(options.pipeline, subfolder="vae", dtype=torch.float32).eval().to(options.device)
    )
    if options.measure_only:
        reader = Judge("reward", device=options.device, weights=options.out).reader
    else:
        reader = train(vae, options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.half().cpu().contiguous() for name, tensor in reader.state_dict().items()}
        with replacing(options.out, "wb") as file:
            file.write(save(weights))
        reader = reader.eval().half().float()  # what half precision keeps is what gets measured
    accuracy = {
        "drawn": measure(reader, None, options.test_images, options.seed + 1_000, options.device),
        "through the autoencoder": measure(reader, vae, options.test_images, options.seed + 2_000, options.device),
    }
    report = {"images": options.test_images, "seed": options.seed, "steps": options.steps, "accuracy": accuracy}
    write_text(options.out.with_suffix(".json"), json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
