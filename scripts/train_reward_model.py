"""Train a reward model on preference pairs (Eq. 2): a scorer for evaluate.py, relabelling and online training.

    accelerate launch scripts/train_reward_model.py --config configs/xdpo_sd15.yaml \\
        --base laion/CLIP-ViT-H-14-laion2B-s32B-b79K --output runs/reward
    python scripts/train_reward_model.py --config configs/tiny/xdpo.yaml --base assets/tiny/clip \\
        --output runs/tiny/reward --recipe head --steps 300 --batch 64                  the embedded world, in minutes

The loss is Bradley–Terry's, −log σ(r(x_w, c) − r(x_l, c)). A tie is half of it in either direction, and a pair weighs
1 / pairs of its prompt, both as in PickScore. --recipe clip trains a whole CLIP as PickScore was trained (4,000 steps
of 128 pairs, 3e-6 with 500 steps of warm-up and linear decay). --recipe head trains a small network on CLIP's frozen
embeddings, which a few thousand pairs suffice for. Pairs are those of the config's data section, and accuracy is
measured on those of its eval section, without ties. The same command resumes a run that was stopped. The scorer is the
folder reward_model in the output: evaluate.py --scorers and online.rewards take its path.
"""

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

from xdpo.arguments import count, positive
from xdpo.config import Config, config_parser, load_config
from xdpo.paths import user_path

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image
    from torch import Tensor

    from xdpo.data import PairTable
    from xdpo.noise import Order
    from xdpo.scorers.reward_model import Preparation, RewardModel


LEARNING_RATES = {"clip": 3e-6, "head": 3e-4}  # of --recipe


def main(arguments: list[str] | None = None) -> int:
    """Train and measure. Returns the exit status."""
    parser = config_parser(__doc__ or "")
    parser.add_argument("--base", required=True, help="a CLIP in transformers' format, by hub id or folder")
    parser.add_argument("--recipe", choices=tuple(LEARNING_RATES), default="clip", help="default: clip")
    parser.add_argument("--output", type=user_path, required=True, help="folder of checkpoints and the result")
    parser.add_argument("--steps", type=positive, default=4000, help="optimizer steps (default: 4000)")
    parser.add_argument("--batch", type=positive, default=128, help="pairs of an optimizer step (default: 128)")
    rates = " or ".join(f"{rate:g} for {recipe}" for recipe, rate in LEARNING_RATES.items())
    parser.add_argument("--learning-rate", type=float, help=f"after the warm-up (default: {rates})")
    parser.add_argument("--warmup-steps", type=count, default=500, help="at most an eighth of the steps (default: 500)")
    parser.add_argument("--checkpoint-every", type=positive, default=200, help="default: 200 steps")
    options = parser.parse_intermixed_args(arguments)
    if options.learning_rate is None:
        options.learning_rate = LEARNING_RATES[options.recipe]
    try:
        settings = load_config(options.config, options.overrides)
        from xdpo import ending
        from xdpo.compute import build_accelerator

        accelerator = build_accelerator(settings)
        if options.batch % accelerator.num_processes:
            raise ValueError(f"--batch {options.batch} can't be divided among {accelerator.num_processes} processes")
        if not options.learning_rate > 0:
            raise ValueError(f"--learning-rate must be above 0, got {options.learning_rate}")
        with ending.together():
            train(settings, options, accelerator)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


class PairBatch(NamedTuple):
    """B pairs as a reward model takes them."""

    pixels: "Tensor"  # (2, B, 3, R, R), chosen first
    tokens: "dict[str, Tensor]"  # (B, L) each
    weights: "Tensor"  # (B,)
    tied: "Tensor"  # (B,) bool
    unreadable: list[int]  # rows whose images could not be read, and that others stand in for


class RewardPairs:
    """Batches of pairs by position; a pair whose image is unreadable is replaced by the next one."""

    def __init__(self, table: "PairTable", preparation: "Preparation", order: "Order | Sequence[int]"):
        self.table, self.preparation, self.order = table, preparation, order
        captions = table.captions()
        counts = Counter(captions)
        # 1 / pairs of the prompt, ties included: a prompt counts once, however many it has. The weights' mean is 1.
        self.weights = [len(captions) / len(counts) / counts[caption] for caption in captions]

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, positions: Sequence[int]) -> PairBatch:
        import torch

        unreadable: list[int] = []
        found = [self._readable(self.order[position], unreadable) for position in positions]
        sides = [torch.stack([self.preparation.pixels(images[side]) for _, images in found]) for side in (0, 1)]
        tokens = self.preparation.tokens([self.table.caption(index) for index, _ in found])
        weights = torch.tensor([self.weights[index] for index, _ in found])
        tied = torch.tensor([bool(self.table.tied[index]) for index, _ in found])
        return PairBatch(torch.stack(sides), tokens, weights, tied, unreadable)

    def _readable(self, index: int, unreadable: list[int]) -> "tuple[int, list[Image.Image]]":
        """A pair's index and two images, or the next pair's that can be read. Adds the rows of those that can't."""
        from xdpo.data.images import UnreadableImageError, decode_rgb

        for step in range(len(self)):
            candidate = (index + step) % len(self)
            try:
                return candidate, [decode_rgb(image) for image in self.table.images_of(candidate)]
            except UnreadableImageError:
                unreadable.append(int(self.table.rows[candidate]))
        raise ValueError("no pair has two readable images")


def train(settings: Config, options: argparse.Namespace, accelerator: "Accelerator") -> None:
    """Train from the newest checkpoint on, then measure and write the model."""
    import torch

    from xdpo import data, noise, precompute, runs
    from xdpo.data import Split
    from xdpo.files import only_run
    from xdpo.scorers.reward_model import RewardModel, load_base

    folder: Path = options.output
    torch.manual_seed(settings.seed)
    clip, preparation = load_base(user_path(options.base))
    model = RewardModel(clip, options.recipe)
    table = precompute.load_table(settings, accelerator, Split.TRAIN, in_order=False, keep_ties=True)
    held_out = precompute.load_table(settings, accelerator, Split.HELD_OUT, in_order=True)
    ties = int(table.tied.sum())
    accelerator.print(f"{len(table):,} pairs to train on, {ties:,} of them ties; {len(held_out):,} held out")
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.0)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    with only_run([folder], "a training of a reward model", is_main=accelerator.is_main_process):
        start, decides = 0, what_decides(options, settings, table.fingerprint)
        if resume_from := runs.agree_on_checkpoint(folder):
            progress = runs.load_checkpoint(resume_from, accelerator.unwrap_model(prepared), optimizer)
            refuse_others(folder, progress["extra"], decides)
            start = progress["step"]
            accelerator.print(f"resumed from {resume_from}")
        unreadable = data.UnreadableTracker(table, settings.data.max_unreadable_share)
        pairs = RewardPairs(table, preparation, noise.SampleOrder(settings.seed, len(table), shuffle=True))
        sampler = data.StepSampler(
            start_step=start,
            total_batch_pairs=options.batch,
            micro_batch_pairs=options.batch // accelerator.num_processes,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        loader = data.make_loader(cast(Any, pairs), sampler, num_workers=settings.data.num_workers)
        warmup = min(options.warmup_steps, options.steps // 8)
        for step, batch in zip(range(start, options.steps), loader, strict=False):
            unreadable.update(len(batch.weights), batch.unreadable)
            share = min((step + 1) / max(warmup, 1), (options.steps - step) / max(options.steps - warmup, 1))
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * share
            with accelerator.autocast():
                chosen, rejected = rewards_of(prepared, batch, accelerator.device)
            margin = (chosen - rejected).float()
            tied = batch.tied.to(margin.device)
            loss = bradley_terry(margin, tied, batch.weights.to(margin.device))
            if not math.isfinite(loss.item()):
                raise ValueError(f"step {step + 1}: the loss is not finite; try a smaller --learning-rate")
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 100 == 0:
                right = ((margin > 0) & ~tied).sum().item() / max(1, (~tied).sum().item())
                line = f"step {step + 1}: loss {loss.item():.4f}, {right:.1%} of the batch right"
                accelerator.print(line, flush=True)
            if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
                bare = accelerator.unwrap_model(prepared)
                is_main = accelerator.is_main_process
                runs.save_checkpoint(folder, step + 1, bare, optimizer, is_main=is_main, keep=1, extra=decides)
        if accelerator.is_main_process:
            finish(accelerator.unwrap_model(prepared), preparation, held_out, options, accelerator, decides)


def what_decides(options: argparse.Namespace, settings: Config, pairs: str) -> dict[str, Any]:
    """Everything that decides the trained weights, as a checkpoint and the model's record keep it."""
    from xdpo.compute import precision_of

    names = ("base", "recipe", "steps", "batch", "learning_rate", "warmup_steps")
    of_settings = {"pairs": pairs, "seed": settings.seed, "precision": precision_of(settings.compute)}
    return of_settings | {name: getattr(options, name) for name in names}


def refuse_others(folder: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise ValueError where a checkpoint is of another training than the one that is asked for."""
    changed = [f"{name}: {saved.get(name)} → {value}" for name, value in asked.items() if saved.get(name) != value]
    if changed:
        raise ValueError(
            f"--output: {folder} holds another training ({', '.join(changed)}); repeat its command, or name a folder "
            "of its own"
        )


def bradley_terry(margin: "Tensor", tied: "Tensor", weights: "Tensor") -> "Tensor":
    """Mean over pairs of w times −log σ(m), m = r(x_w, c) − r(x_l, c) (the paper's Eq. 2). All are (B,).

    A tie's is −½·log σ(m) − ½·log σ(−m): the cross-entropy of PickScore's soft label of a half for each image.
    """
    from xdpo.loss import negative_log_sigmoid

    return (weights * negative_log_sigmoid(margin, 0.5 * tied)).mean()


def rewards_of(model, batch: PairBatch, device) -> "Tensor":
    """Rewards (2, B), chosen first."""
    return model(batch.pixels.to(device), **{name: value.to(device) for name, value in batch.tokens.items()})


def finish(
    model: "RewardModel",
    preparation: "Preparation",
    held_out: "PairTable",
    options: argparse.Namespace,
    accelerator: "Accelerator",
    decides: dict[str, Any],
) -> None:
    """Measure a trained model on the held-out pairs, and write it."""
    import torch

    from xdpo.scorers.reward_model import save_reward_model
    from xdpo.scores.statistics import wilson_interval

    model.eval()
    pairs, right = RewardPairs(held_out, preparation, range(len(held_out))), 0.0
    with torch.no_grad():
        for start in range(0, len(pairs), options.batch):
            batch = pairs.__getitems__(range(start, min(start + options.batch, len(pairs))))
            chosen, rejected = rewards_of(model, batch, accelerator.device)
            right += (chosen > rejected).sum().item() + 0.5 * (chosen == rejected).sum().item()
    low, high = wilson_interval(right, len(pairs))
    accuracy = right / len(pairs)
    record = {**decides, "held_out": {"pairs": len(pairs), "accuracy": accuracy, "interval": [low, high]}}
    folder = options.output / "reward_model"
    save_reward_model(model.cpu(), preparation, record, folder)
    print(f"{accuracy:.1%} [{low:.1%}, {high:.1%}] of {len(pairs)} held-out pairs ranked as labelled")
    print(f"the scorer is {folder}")


if __name__ == "__main__":
    sys.exit(main())
