"""Train the embedded CLIP: `python scripts/train_tiny_clip.py`.

It learns which caption belongs to which drawn scene, among the others of its batch (Radford et al., arXiv 2103.00020).
The scenes have the flaws that the base's training images have, and none is a held-out one; half of the captions say
what spoils the picture. It is what a reward model of the embedded pairs starts from (scripts/train_reward_model.py), as
PickScore starts from a CLIP. The same command goes on where it was stopped.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tiny_base.captions import clip_ids
from tiny_base.images import HELD_BACK, draw_training_set, to_tensor
from tiny_base.stages import Stage
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.utils import logging

from xdpo.files import replacing_folder
from xdpo.paths import expanded, user_path
from xdpo.scorers.reward_model import Preparation
from xdpo.tiny.world import IMAGE_SIZE


def small_clip(tokenizer: CLIPTokenizer, side: int) -> tuple[CLIPModel, Preparation]:
    """A CLIP of 0.4 million random weights for images of `side` pixels, with its processors."""
    layers = {"hidden_size": 80, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length, **ends, **layers}
    vision = {"image_size": side, "patch_size": side // 8, **layers}
    size = {"height": side, "width": side}
    processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=80))
    return clip, Preparation(tokenizer, processor)


def similarities(clip: CLIPModel, pixels: Tensor, ids: Tensor) -> Tensor:
    """Scaled cosines (B, B) of B images (rows) and B captions; the scale is at most 100, as in the paper."""
    logits = clip(input_ids=ids, pixel_values=pixels).logits_per_image
    scale = clip.logit_scale.exp()
    return logits * (scale.clamp(max=100) / scale)


def contrastive(logits: Tensor) -> Tensor:
    """Mean of the two cross-entropies of (B, B) similarities: each image's caption, and each caption's image."""
    own = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def train(options: argparse.Namespace) -> tuple[CLIPModel, Preparation]:
    """A CLIP trained on drawn scenes; its log has the share of held-back images that find their caption."""
    path = options.work / f"images_{options.images}.npz"
    images, captions = draw_training_set(path, options.images, options.seed, named=0.5)
    tokenizer = CLIPTokenizer.from_pretrained(options.pipeline, subfolder="tokenizer")
    ids = clip_ids(tokenizer, captions)
    torch.manual_seed(options.seed)
    clip, preparation = small_clip(tokenizer, IMAGE_SIZE)
    clip.to(options.device)
    stage = Stage(
        "clip",
        clip,
        lambda pixels, ids: contrastive(similarities(clip, pixels, ids)),
        options.work,
        options.steps,
        learning_rate=2e-3,
    )
    held_back = to_tensor(images[-HELD_BACK:], options.device), ids[-HELD_BACK:].to(options.device)
    while stage.step < options.steps:
        rows = np.random.default_rng((options.seed, stage.step)).integers(0, len(images) - HELD_BACK, options.batch)
        stage.take_step(to_tensor(images[rows], options.device), ids[rows])
        if stage.is_to_log and stage.smoothed is not None:
            with torch.no_grad():
                found = similarities(clip, *held_back).argmax(1).cpu()
            stage.log(loss=stage.smoothed, found=(found == torch.arange(HELD_BACK)).float().mean())
    stage.ema.copy_to(clip.parameters())
    return clip.cpu(), preparation


def save_clip(clip: CLIPModel, preparation: Preparation, folder: Path) -> None:
    """Write a CLIP with its processors, in half precision."""
    with replacing_folder(folder) as aside:
        clip.half().save_pretrained(aside)
        preparation.tokenizer.save_pretrained(aside)
        preparation.image_processor.save_pretrained(aside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=user_path, default=Path("runs/tiny_clip"), help="checkpoints and logs")
    parser.add_argument("--out", type=user_path, default=Path("assets/tiny/clip"), help="the finished CLIP")
    parser.add_argument("--pipeline", type=expanded, default="assets/tiny/pipeline", help="whose tokenizer it takes")
    parser.add_argument("--images", type=int, default=60_000, help="size of the drawn training set")
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--batch", type=int, default=256, help="images of a step")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()  # of writing weights
    options.work.mkdir(parents=True, exist_ok=True)
    clip, preparation = train(options)
    save_clip(clip, preparation, options.out)
    print(f"saved the CLIP to {options.out}")


if __name__ == "__main__":
    main()
