"""Measure the embedded base: `python scripts/measure_tiny_base.py` (about two minutes on one core).

It samples `tinyprompts` with and without guidance and lets the held-out judge read the images: the share of captions
that hold as a whole, of their claims by kind, the mean appeal, and the share of clean pictures. The ceiling is what
the judge reads in flawless drawings after a pass through the autoencoder. All of it goes to assets/tiny/base.json.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from xdpo.files import write_text
from xdpo.models import load_model, read_model_spec, resolve_model
from xdpo.paths import expanded, user_path
from xdpo.sampling.images import sample_images
from xdpo.tiny import world
from xdpo.tiny.annotator import ANNOTATORS, render
from xdpo.tiny.judges import Judge, alignment, claims, to_batch

CLEAN = 0.9  # least estimated appeal of a picture that counts as clean
STEPS = 20


def measure(judge: Judge, images: list[Image.Image], rows: list[tuple[str, str]]) -> dict:
    """What the judge reads in one image for each (category, prompt): shares in [0, 1], and the mean reward."""
    outputs = judge.reader(to_batch(images))
    appeal = outputs.pop("appeal")
    probabilities = {name: logits.softmax(1).numpy() for name, logits in outputs.items()}
    whole, kinds, aligned = defaultdict(list), defaultdict(list), []
    for index, (category, prompt) in enumerate(rows):
        scene = world.parse(prompt)
        seen = {name: values[index] for name, values in probabilities.items()}
        aligned.append(alignment(scene, seen))
        certain = {name: np.eye(len(values))[values.argmax()] for name, values in seen.items()}
        held = claims(scene, certain)
        whole[category].append(all(holds for _, holds in held))
        for kind, holds in held:
            kinds[kind].append(holds)
    reader = ANNOTATORS["reader"]
    rewards = [reader.utility(a, b, 0.0) for a, b in zip(aligned, appeal.tolist(), strict=True)]
    measures = {
        "captions right": {category: np.mean(hits) for category, hits in whole.items()}
        | {"all": np.mean([hit for hits in whole.values() for hit in hits])},
        "claims right": {kind: np.mean(hits) for kind, hits in kinds.items()},
        "mean alignment": np.mean(aligned),
        "mean appeal": appeal.mean().item(),
        "clean pictures": (appeal > CLEAN).float().mean().item(),
        "mean reward": np.mean(rewards),
    }
    return json.loads(json.dumps(measures, default=float), parse_float=lambda text: round(float(text), 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=expanded, default="assets/tiny/pipeline", help="a pipeline or a run folder")
    parser.add_argument("--out", type=user_path, default=Path("assets/tiny/base.json"))
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0, 7.5])
    parser.add_argument("--seed", type=int, default=1000, help="image i starts from noise of seed + i")
    parser.add_argument("--judge", default="heldout_reward", help="whose network reads the images")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = load_model(resolve_model(*read_model_spec(options.pipeline)))
    judge, rows = Judge(options.judge), world.tiny_prompts()
    prompts = [prompt for _, prompt in rows]
    report: dict = {"prompts": len(rows), "seed": options.seed, "steps": STEPS}
    with torch.inference_mode():
        rng = np.random.default_rng(options.seed)
        drawn = [Image.fromarray(render(world.parse(prompt), rng).pixels) for prompt in prompts]
        latents = pipeline.vae.encode(to_batch(drawn)).latent_dist.mode()
        decoded = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample)
        report["ceiling"] = measure(judge, decoded, rows)
        for guidance in options.guidance:
            images = sample_images(
                pipeline,
                prompts,
                seed=options.seed,
                num_inference_steps=STEPS,
                guidance_scale=guidance,
                image_size=world.IMAGE_SIZE,
                chunk_size=20,
            )
            report[f"guidance {guidance:g}"] = measure(judge, images, rows)
    write_text(options.out, json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
