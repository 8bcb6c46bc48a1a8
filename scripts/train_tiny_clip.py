"""Train the embedded CLIP: `python scripts/train_tiny_clip.py`.

It learns which caption belongs to which drawn scene (Radford et al., arXiv 2103.00020), and that captions fit the worse
the more of their claims do not hold: each image's caption comes with one, two and four claims changed as well (hard
negatives as in NegCLIP, Yuksekgonul et al., arXiv 2210.01936, here in their order). The captions say what spoils the
picture, and how much. No scene is a held-out one. A reward model of the embedded pairs starts from it
(scripts/train_reward_model.py), as PickScore starts from a CLIP. The same command goes on where it was stopped.
"""

import argparse
import itertools
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tiny_base.captions import clip_ids, clip_tokenizer
from tiny_base.images import HELD_BACK, draw, draw_training_set, to_tensor
from tiny_base.stages import Stage
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.utils import logging

from xdpo.files import replacing_folder
from xdpo.paths import user_path
from xdpo.scorers.reward_model import Preparation
from xdpo.tiny import world
from xdpo.tiny.annotator import APPEAL_FLAWS, LEAST_SEVERITY, Rendering

DEGREES = ("slight", "clear", "strong")  # thirds of the severities
SPOILT = ("", *(f", {degree} {flaw}" for flaw in APPEAL_FLAWS for degree in DEGREES))  # ends of captions
WORDS = (world.SHAPES, tuple(world.COLOURS), tuple(world.SIZES), tuple(world.BACKGROUNDS), tuple(world.RELATIONS))
_CLAIM = re.compile(rf"\b({'|'.join(itertools.chain(*WORDS))})\b")
WRONG_CLAIMS = (1, 2, 4)  # of an image's wrong captions, each with the wrong ones of the caption before
RANKING_WEIGHT = 0.5


def full_caption(scene: world.Scene, rendering: Rendering, rng: np.random.Generator) -> str:
    """What the picture shows, in one of the three sentence forms, and what spoils it: "…, strong blur".

    The rendering has one flaw of appeal or none.
    """
    end = ""
    for flaw in rendering.flaws:
        share = (1 - rendering.appeal - LEAST_SEVERITY) / (1 - LEAST_SEVERITY)
        end = f", {DEGREES[min(int(share * len(DEGREES)), len(DEGREES) - 1)]} {flaw}"
    return world.caption(scene, int(rng.integers(3))) + end


def wrong_captions(caption: str, rng: np.random.Generator) -> list[str]:
    """A full caption with WRONG_CLAIMS changed: shapes, colours, sizes, background, relation, what spoils it."""
    end, found = next(filter(caption.endswith, SPOILT[1:]), ""), []
    pieces = [*_CLAIM.split(caption.removesuffix(end)), end]  # every second one is a claim
    order = rng.permutation(range(1, len(pieces), 2))
    for start, stop in itertools.pairwise((0, *WRONG_CLAIMS)):
        for index in order[start:stop]:
            (alternatives,) = (words for words in (*WORDS, SPOILT) if pieces[index] in words)
            pieces[index] = str(rng.choice([other for other in alternatives if other != pieces[index]]))
        found.append("".join(pieces))
    return found


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
    """Scaled cosines (B, C) of B images and C captions; the scale is at most 100, as in the paper."""
    logits = clip(input_ids=ids, pixel_values=pixels).logits_per_image
    scale = clip.logit_scale.exp()
    return logits * (scale.clamp(max=100) / scale)


def contrastive(logits: Tensor) -> Tensor:
    """Mean of two cross-entropies of similarities (B, B + W) of B images with their captions and W wrong ones.

    Each image's caption is to be found among all captions, and each caption's image among the images.
    """
    images = len(logits)
    own = torch.arange(images, device=logits.device)
    return (cross_entropy(logits, own) + cross_entropy(logits[:, :images].T, own)) / 2


def ranked(logits: Tensor) -> Tensor:
    """−log likelihood, by Plackett and Luce, that each row of (B, R) is ranked from left to right; mean over rows."""
    from_here_on = logits.flip(1).logcumsumexp(1).flip(1)
    return (from_here_on - logits).sum(1).mean()  # of the last one, 0


def train(options: argparse.Namespace) -> tuple[CLIPModel, Preparation]:
    """A CLIP trained on drawn scenes.

    Its log has the shares of held-back images that find their caption among the others, and that are nearer to their
    caption than to a wrong one.
    """
    path = options.work / f"images_{options.images}.npz"
    draw_part = partial(draw, seed=options.seed, misaligned_share=0, describe=full_caption)
    images, captions = draw_training_set(path, options.images, draw_part)
    tokenizer = clip_tokenizer(captions)
    ids = clip_ids(tokenizer, captions)
    torch.manual_seed(options.seed)
    clip, preparation = small_clip(tokenizer, world.IMAGE_SIZE)
    clip.to(options.device)

    def loss(pixels: Tensor, ids: Tensor) -> Tensor:
        found = similarities(clip, pixels, ids)
        _, *wrong = found.split(len(pixels), dim=1)
        return contrastive(found) + RANKING_WEIGHT * ranked(torch.stack([each.diagonal() for each in wrong], dim=1))

    stage = Stage("clip", clip, loss, options.work, options.steps, learning_rate=2e-3)

    def batch(rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        wrong = zip(*(wrong_captions(captions[row], rng) for row in rows), strict=True)
        wrong_ids = [clip_ids(tokenizer, list(said)) for said in wrong]
        return to_tensor(images[rows], options.device), torch.cat([ids[rows], *wrong_ids]).to(options.device)

    held_back = batch(np.arange(len(images) - HELD_BACK, len(images)), np.random.default_rng(options.seed))
    while stage.step < options.steps:
        rng = np.random.default_rng((options.seed, stage.step))
        stage.take_step(*batch(rng.integers(0, len(images) - HELD_BACK, options.batch), rng))
        if stage.is_to_log and stage.smoothed is not None:
            with torch.no_grad():
                own, one_wrong, *_ = similarities(clip, *held_back).cpu().split(HELD_BACK, dim=1)
            found = own.argmax(1) == torch.arange(HELD_BACK)
            told_apart = own.diagonal() > one_wrong.diagonal()
            stage.log(loss=stage.smoothed, found=found.float().mean(), told_apart=told_apart.float().mean())
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
    parser.add_argument("--images", type=int, default=120_000, help="size of the drawn training set")
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--batch", type=int, default=192, help="images of a step")
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
