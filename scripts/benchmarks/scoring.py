"""How much time scoring adds to the work that no scorer can avoid: the project's scorer against bare arithmetic.

Makes 512-pixel PNGs and a CLIP of ViT-B/32's size with random weights, then times, in turn and on the same threads,
reading and scoring the files through `load_scorer("pickscore")`, and the bare work written out here: decode, resize,
crop and normalise, both towers, cosine.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.arguments import add_number
from benchmarks.folders import working_folder
from benchmarks.pairs import WORDS, make_caption, make_image
from benchmarks.results import Outcome, Spread, ratios, time_in_turn
from xdpo.report.grids import Cell, Grid
from xdpo.scorers.clip import VIT_H_14
from xdpo.scorers.interface import Scorer
from xdpo.scorers.loading import load_scorer
from xdpo.scorers.metrics import CLIP_TOKENIZER, PICKSCORE_V1
from xdpo.scorers.pixels import CHANNEL_MEANS, CHANNEL_STDS, SIDE

OURS, BARE = "scorer", "bare work"
SIZES = {
    "projection_dim": 512,
    "text_config": {
        "bos_token_id": 0,
        "vocab_size": len(WORDS) + 2,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
    },
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 32,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_number(parser, "--images", 64, "images of a round")
    add_number(parser, "--batch-size", 16, "images at once")
    add_number(parser, "--rounds", 5, "rounds")
    parser.add_argument("--device", default="cpu", help="default: cpu")


def run(options: argparse.Namespace) -> Outcome:
    torch.manual_seed(0)
    with working_folder() as working:
        model = make_weights(working / "weights").to(options.device)
        scorer = load_scorer("pickscore", options.device, working / "weights")
        paths = make_images(working, options.images)
        rng = np.random.default_rng(1)
        prompts = [make_caption(rng) for _ in paths]
        token_ids = torch.stack([encode(prompt) for prompt in prompts])
        scores: dict[str, list[float]] = {}

        def bare() -> None:
            scores[BARE] = bare_scores(model, token_ids, paths, options.batch_size, options.device)

        def ours() -> None:
            scores[OURS] = score_files(scorer, paths, prompts, options.batch_size)

        seconds = time_in_turn({BARE: bare, OURS: ours}, options.rounds)
    gap = max(abs(a - b) for a, b in zip(scores[BARE], scores[OURS], strict=True))
    assert gap < 1e-3, f"the bare work computes something else: scores differ by {gap}"
    rows = [
        (Cell(name), Spread.of([1000 * value / options.images for value in times]).cell())
        for name, times in seconds.items()
    ]
    ratio = ratios(seconds[OURS], seconds[BARE])
    title = (
        f"Scoring 512-pixel PNGs, batches of {options.batch_size}; median of {options.rounds} rounds (lowest–highest)"
    )
    note = f"time of the scorer over the bare work's: {ratio}"
    measurements = {"seconds_per_round": seconds, "images_per_round": options.images, "time_ratio": ratio.median}
    return Outcome(Grid(title, ("", "ms an image"), tuple(rows), note), measurements)


def make_weights(folder: Path) -> nn.Module:
    """A weights folder with the model, and the model itself."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel

    start, end = len(WORDS), len(WORDS) + 1
    vocabulary = {word: number for number, word in enumerate((*WORDS, "<start>", "<end>"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    for file in (PICKSCORE_V1, CLIP_TOKENIZER):
        (folder / file.relative_path).parent.mkdir(parents=True)
    tokenizer.save(str(folder / CLIP_TOKENIZER.relative_path))
    (folder / "sizes.json").write_text(json.dumps({"clip_vit_h_14": SIZES}))
    halves = {half: VIT_H_14[half] | SIZES[half] for half in ("text_config", "vision_config")}
    model = CLIPModel(CLIPConfig(projection_dim=SIZES["projection_dim"], **halves)).eval()
    save_file(model.state_dict(), folder / PICKSCORE_V1.relative_path)
    return model


def make_images(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [folder / f"{number:05d}.png" for number in range(count)]
    for path in paths:
        make_image(rng, 512).save(path)
    return paths


def encode(prompt: str) -> Tensor:
    """A prompt of WORDS as token ids."""
    return torch.tensor([len(WORDS), *(WORDS.index(word) for word in prompt.split()), len(WORDS) + 1])


@torch.inference_mode()
def bare_scores(model: nn.Module, token_ids: Tensor, paths: list[Path], batch_size: int, device: str) -> list[float]:
    """Decode, preprocess and forward, nothing else."""
    means, deviations = (np.array(values, dtype=np.float32) for values in (CHANNEL_MEANS, CHANNEL_STDS))
    scores: list[float] = []
    for first in range(0, len(paths), batch_size):
        arrays = []
        for path in paths[first : first + batch_size]:
            with Image.open(path) as opened:
                small = opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            pixels = (np.asarray(small, dtype=np.float32) / np.float32(255) - means) / deviations
            arrays.append(torch.from_numpy(pixels).permute(2, 0, 1))
        batch = torch.stack(arrays).contiguous().to(device)
        ids = token_ids[first : first + batch_size].to(device)
        image = nn.functional.normalize(model.get_image_features(pixel_values=batch).pooler_output, dim=-1)
        text = nn.functional.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)
        scores += (model.logit_scale.exp() * (image * text).sum(-1)).tolist()
    return scores


def score_files(scorer: Scorer, paths: list[Path], prompts: list[str], batch_size: int) -> list[float]:
    """Score with the project's scorer, opening files as evaluate.py does."""
    scores: list[float] = []
    for first in range(0, len(paths), batch_size):
        items = []
        for path in paths[first : first + batch_size]:
            with Image.open(path) as opened:
                items.append(scorer.preprocess(opened))
        scores += scorer.score_batch(items, prompts[first : first + batch_size])
    return scores
