"""How much time does scoring add to the work that no scorer can avoid? Prints the ratio of the two.

    python scripts/benchmark_scoring.py [--images 64] [--rounds 5] [--device cpu]

Makes 512-pixel PNGs and a CLIP of ViT-B/32's size with random weights, then times, in turn and on the same threads,
reading and scoring the files through `load_scorer("pickscore")`, and the bare work written out here: decode, resize,
crop and normalise, both towers, cosine.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xdpo.scorers import Scorer, load_scorer
from xdpo.scorers.clip import VIT_H_14
from xdpo.scorers.metrics import CLIP_TOKENIZER, PICKSCORE_V1
from xdpo.scorers.pixels import CHANNEL_MEANS, CHANNEL_STDS, SIDE

WORDS = ("a", "photo", "of", "cat", "dog", "castle", "red", "blue", "moon", "robot", "on", "the", "beach")
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


def make_weights(folder: Path) -> torch.nn.Module:
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
        (folder / file.place).parent.mkdir(parents=True)
    tokenizer.save(str(folder / CLIP_TOKENIZER.place))
    (folder / "sizes.json").write_text(json.dumps({"clip_vit_h_14": SIZES}))
    halves = {half: VIT_H_14[half] | SIZES[half] for half in ("text_config", "vision_config")}
    model = CLIPModel(CLIPConfig(projection_dim=SIZES["projection_dim"], **halves)).eval()
    save_file(model.state_dict(), folder / PICKSCORE_V1.place)
    return model


def make_images(folder: Path, count: int) -> list[Path]:
    """512-pixel PNGs that are as hard to decode as photographs: smooth with some noise."""
    rng, paths = np.random.default_rng(0), []
    rows, columns = np.mgrid[0:512, 0:512] / 512
    for number in range(count):
        waves = [np.sin(2 * np.pi * (rng.uniform(0.5, 4) * rows + rng.uniform(0.5, 4) * columns)) for _ in range(3)]
        pixels = 127.5 + 100 * np.stack(waves, -1) + rng.normal(0, 6, (512, 512, 3))
        paths.append(folder / f"{number:05d}.png")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1])
    return paths


@torch.inference_mode()
def bare_work(model, token_ids: torch.Tensor, paths: list[Path], batch_size: int, device: str) -> list[float]:
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
        image = torch.nn.functional.normalize(model.get_image_features(pixel_values=batch).pooler_output, dim=-1)
        text = torch.nn.functional.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)
        scores += (model.logit_scale.exp() * (image * text).sum(-1)).tolist()
    return scores


def score_files(scorer: Scorer, paths: list[Path], prompts: list[str], batch_size: int) -> list[float]:
    """Through the project's scorer, opening files as evaluate.py does."""
    scores: list[float] = []
    for first in range(0, len(paths), batch_size):
        items = []
        for path in paths[first : first + batch_size]:
            with Image.open(path) as opened:
                items.append(scorer.preprocess(opened))
        scores += scorer.score_batch(items, prompts[first : first + batch_size])
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) / "weights"
        model = make_weights(weights).to(options.device)
        scorer = load_scorer("pickscore", options.device, weights)
        paths = make_images(Path(temporary), options.images)
        rng = np.random.default_rng(1)
        prompts = [" ".join(rng.choice(WORDS, 10)) for _ in paths]
        words = [[WORDS.index(word) for word in prompt.split()] for prompt in prompts]
        token_ids = torch.tensor([[len(WORDS), *ids, len(WORDS) + 1] for ids in words])

        seconds: dict[str, list[float]] = {"bare": [], "scorer": []}
        for round_number in range(options.rounds + 1):  # the first one warms up
            start = time.perf_counter()
            bare = bare_work(model, token_ids, paths, options.batch_size, options.device)
            middle = time.perf_counter()
            ours = score_files(scorer, paths, prompts, options.batch_size)
            end = time.perf_counter()
            if round_number:
                seconds["bare"].append(middle - start)
                seconds["scorer"].append(end - middle)
    gap = max(abs(a - b) for a, b in zip(bare, ours, strict=True))
    assert gap < 1e-3, f"the bare work computes something else: scores differ by {gap}"
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [ours / bare for ours, bare in zip(seconds["scorer"], seconds["bare"], strict=True)]
    for name, median in medians.items():
        print(f"{name:<7}{1000 * median / options.images:8.2f} ms an image, median of {options.rounds} rounds")
    print(f"ratio  {statistics.median(ratios):8.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
