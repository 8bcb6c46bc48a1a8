"""Measure a run on the embedded default: images before and after training, and the judges' scores.

    python scripts/compare_tiny.py runs/tiny/xdpo

Samples `tinyprompts` (held-out scenes only) from the base and from the run's exported model at the same seeds,
scores both with the embedded judges, and writes before_after.png, curve.png and comparison.json into the run folder.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

import torch
from PIL import Image

from xdpo.config import Config, load_config
from xdpo.files import replacing, write_text
from xdpo.images.sheets import contact_sheet, save_sheet
from xdpo.models import ModelSpec, load_model, read_model_spec, resolve_model
from xdpo.paths import user_path
from xdpo.runlog import read_rows
from xdpo.sampling.images import sample_images
from xdpo.scorers.loading import load_scorer
from xdpo.scores.statistics import compare
from xdpo.tiny.world import tiny_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

SCORERS = ("tiny_reward", "tiny_alignment", "tiny_appeal")
SHEET_PROMPTS = 2  # of each category on the sheet


def sample(
    pipeline: "StableDiffusionPipeline", prompts: list[str], settings: Config, guidance: float, seed: int
) -> list[Image.Image]:
    return sample_images(
        pipeline,
        prompts,
        seed=seed,
        num_inference_steps=settings.samples.num_inference_steps,
        guidance_scale=guidance,
        image_size=settings.data.resolution,
        chunk_size=20,
    )


def draw_curve(run: Path, path: Path) -> None:
    """Training loss, held-out implicit accuracy, and both errors against the reference, by pairs seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from xdpo.report.figures import CHOSEN_COLOUR, REJECTED_COLOUR

    rows = read_rows(run / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval/margin" in row]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.6), constrained_layout=True)
    steps = [row["step"] for row in training]
    left.plot(steps, [row["loss"] for row in training], color="tab:blue", linewidth=1)
    left.axhline(0.6931, color="grey", linestyle=":", label="ln 2: policy equals reference")
    left.set(title="training loss", xlabel="optimizer step")
    left.legend(frameon=False)
    middle.plot([row["step"] for row in held_out], [row["eval/implicit_accuracy"] for row in held_out], marker="o")
    middle.axhline(0.5, color="grey", linestyle=":")
    middle.set(title="implicit accuracy, held-out pairs", xlabel="optimizer step")
    for side, colour in (("chosen", CHOSEN_COLOUR), ("rejected", REJECTED_COLOUR)):
        right.plot(
            [row["step"] for row in held_out], [row[f"eval/d_{side}"] for row in held_out], color=colour, label=side
        )
    right.axhline(0, color="grey", linestyle=":")
    right.set(title="d: policy's error − reference's, held-out", xlabel="optimizer step")
    right.legend(frameon=False)
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=user_path, help="run folder of train_xdpo.py")
    parser.add_argument("--prompts", type=int, default=50, help="prompts of each of the four categories")
    parser.add_argument("--seed", type=int, default=1000, help="image i starts from noise of seed + i")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the config's samples.guidance_scale")
    options = parser.parse_args()
    settings = load_config(options.run / "config.yaml")
    guidance = settings.samples.guidance_scale if options.guidance is None else options.guidance
    rows = tiny_prompts(options.prompts)
    prompts = [prompt for _, prompt in rows]

    model = settings.model
    base_spec = ModelSpec(base=model.pipeline, base_revision=model.revision, vae=model.vae, t5_tokens=model.t5_tokens)
    base = load_model(resolve_model("base", base_spec))
    trained = load_model(resolve_model(*read_model_spec(str(options.run))))
    with torch.inference_mode():
        images = {
            "before": sample(base, prompts, settings, guidance, options.seed),
            "after": sample(trained, prompts, settings, guidance, options.seed),
        }
    scores, comparisons = {}, {}
    for name in SCORERS:
        scorer = load_scorer(name)
        scores[name] = {side: scorer.score(pictures, prompts) for side, pictures in images.items()}
        comparisons[name] = compare(scores[name]["before"], scores[name]["after"])

    shown = [index for index in range(len(rows)) if index % options.prompts < SHEET_PROMPTS]
    sheet = contact_sheet(
        {side: [pictures[index] for index in shown] for side, pictures in images.items()},
        [prompts[index] for index in shown],
        cell=192,
    )
    save_sheet(options.run / "before_after.png", sheet)
    draw_curve(options.run, options.run / "curve.png")
    record = {
        "prompts": len(prompts),
        "seed": options.seed,
        "guidance": guidance,
        **{name: asdict(comparison) for name, comparison in comparisons.items()},
    }
    write_text(options.run / "comparison.json", json.dumps(record, indent=2) + "\n")

    print(f"\n{len(prompts)} prompts that training never saw, same seeds before and after:")
    for name, comparison in comparisons.items():
        print(f"  {name:<15}{comparison}")
    reward, alignment = comparisons["tiny_reward"], comparisons["tiny_alignment"]
    verdict = "preferred" if reward.win_rate_interval[0] > 0.5 else "not clearly preferred"
    kept = "kept" if alignment.mean_shift_interval[1] >= 0 else "lost"
    print(f"The trained model's images are {verdict} to the base's; caption agreement is {kept}.")
    print(
        f"Look at {options.run / 'before_after.png'} and {options.run / 'curve.png'}; numbers: comparison.json there."
    )


if __name__ == "__main__":
    main()
