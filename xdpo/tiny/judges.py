"""The embedded judges: they estimate what a picture shows, how clean it is, and what the annotators think of it.

A small network reads the attributes of a scene from pixels; it was trained on drawn scenes (flaws included, half
of them passed through the base's autoencoder) by `scripts/train_tiny_judge.py`. `tiny_alignment` is the expected
share of the caption's claims that hold, `tiny_appeal` the estimated cleanness, `tiny_warmth` the expected share of
warm colours; `tiny_reward` and `tiny_warm_reward` are the two annotators' utilities. A second network, from another
seed, gives `tiny_heldout_alignment` and so on: training that uses the first as its reward is judged by the second.
Accuracy against the truth is in judge.json and heldout_judge.json of assets/tiny.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from xdpo.tiny.annotator import ANNOTATORS, WARM_COLOURS
from xdpo.tiny.world import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    SIZES,
    Placement,
    Scene,
    Thing,
    first_comes_first,
    layout,
    parse,
)

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "tiny"
HELD_OUT = "heldout_"  # prefix of the second network's quantities

LAYOUTS = ("single", "horizontal", "vertical")
ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}
# What the network reads: the arrangement, the background, and three attributes of the first (left or upper) thing
# and of the second one.
HEADS = {"layout": LAYOUTS, "background": tuple(BACKGROUNDS)} | {
    f"{attribute}{slot}": values for slot in range(2) for attribute, values in ATTRIBUTES.items()
}


class AttributeReader(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] → logits per head (B, classes), and "appeal" (B,) in [0, 1]."""

    def __init__(self, width: int = 32):
        super().__init__()
        channels = (3, width, 2 * width, 3 * width, 3 * width)
        self.features = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=stride, padding=1), nn.BatchNorm2d(b), nn.ReLU())
                for a, b, stride in zip(channels, channels[1:], (2, 2, 2, 1), strict=False)
            ),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(channels[-1] * 16, 192),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(values)) for name, values in HEADS.items()})
        self.appeal = nn.Linear(192, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(images)
        logits = {name: head(features) for name, head in self.heads.items()}
        return logits | {"appeal": torch.sigmoid(self.appeal(features)).squeeze(1)}


def labels_of(scene: Scene, placement: Placement) -> dict[str, int]:
    """The right class of every head for a placed scene; -1 for the second thing if there is only one."""
    arrangement = layout(placement)
    axis = 0 if arrangement == "horizontal" else 1
    order = sorted(range(len(scene.things)), key=lambda index: placement.centres[index][axis])
    labels = {
        "layout": LAYOUTS.index(arrangement),
        "background": HEADS["background"].index(scene.background),
    }
    for slot in range(2):
        for attribute, values in ATTRIBUTES.items():
            drawn = slot < len(order)
            labels[f"{attribute}{slot}"] = values.index(getattr(scene.things[order[slot]], attribute)) if drawn else -1
    return labels


def to_batch(images: Sequence[Image.Image]) -> Tensor:
    """PIL images of any size and mode → (B, 3, 64, 64) float32 in [-1, 1]."""
    small = [image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX) for image in images]
    pixels = np.stack([np.asarray(image) for image in small])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def claims(scene: Scene, probabilities: dict[str, np.ndarray]) -> list[tuple[str, float]]:
    """Each claim of the caption, as (kind, probability that it holds).

    `probabilities` holds one vector per head. The better of the two readings decides which thing is which. Kinds are
    background, number, shape, colour, size and relation.
    """
    single = float(probabilities["layout"][LAYOUTS.index("single")])
    background = float(probabilities["background"][HEADS["background"].index(scene.background)])
    number = single if len(scene.things) == 1 else 1 - single

    def attributes(thing: Thing, slot: int) -> list[tuple[str, float]]:
        present = 1.0 if slot == 0 else 1 - single
        return [
            (name, present * float(probabilities[f"{name}{slot}"][values.index(getattr(thing, name))]))
            for name, values in ATTRIBUTES.items()
        ]

    readings = []
    for first_slot in range(len(scene.things)):
        reading = [claim for slot, thing in enumerate(scene.things) for claim in attributes(thing, slot ^ first_slot)]
        if scene.relation in RELATIONS:
            right_order = first_comes_first(scene.relation) == (first_slot == 0)
            holds = right_order * float(probabilities["layout"][LAYOUTS.index(RELATIONS[scene.relation])])
            reading.append(("relation", holds))
        elif scene.relation:
            reading.append(("relation", 1 - single))
        readings.append(reading)
    best = max(readings, key=lambda reading: sum(probability for _, probability in reading))
    return [("background", background), ("number", number), *best]


def alignment(scene: Scene, probabilities: dict[str, np.ndarray]) -> float:
    """Expected share of the caption's claims that hold, as the annotator counts them."""
    held = [probability for _, probability in claims(scene, probabilities)]
    return sum(held) / len(held)


def warmth(probabilities: dict[str, np.ndarray]) -> float:
    """Expected share of things in a warm colour. `probabilities` holds one vector per head."""
    warm = [HEADS["colour0"].index(colour) for colour in WARM_COLOURS]
    first, second = (float(probabilities[f"colour{slot}"][warm].sum()) for slot in range(2))
    single = float(probabilities["layout"][LAYOUTS.index("single")])
    return single * first + (1 - single) * (first + second) / 2


def judge_weights(quantity: str) -> Path:
    """The shipped network that estimates a quantity."""
    return ASSETS / ("heldout_judge.safetensors" if quantity.startswith(HELD_OUT) else "judge.safetensors")


class Judge:
    """A scorer of the embedded world: `score(images, prompts)` returns one float per PIL image.

    `quantity` is "alignment", "appeal", "warmth", "reward" or "warm_reward", or one of these after "heldout_". Raises
    ValueError for prompts outside the grammar and FileNotFoundError if the weights are missing.
    """

    def __init__(self, quantity: str, device: str | torch.device = "cpu", weights: str | Path | None = None):
        path = Path(weights or judge_weights(quantity))
        if not path.is_file():
            raise FileNotFoundError(
                f"no judge at {path}; it ships in assets/tiny, or make it: scripts/train_tiny_judge.py"
            )
        self.quantity, self.device = quantity.removeprefix(HELD_OUT), device
        self.reader = AttributeReader()
        self.reader.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        self.reader.to(device).eval().requires_grad_(False)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        scenes = [parse(prompt) for prompt in prompts]
        outputs = self.reader(to_batch(images).to(self.device))
        appeal = outputs.pop("appeal").tolist()
        rows = {name: logits.softmax(1).cpu().numpy() for name, logits in outputs.items()}
        return [
            self._quantity(scene, {name: row[index] for name, row in rows.items()}, appeal[index])
            for index, scene in enumerate(scenes)
        ]

    def _quantity(self, scene: Scene, probabilities: dict[str, np.ndarray], appeal: float) -> float:
        measures = {
            "alignment": alignment(scene, probabilities),
            "appeal": appeal,
            "warmth": warmth(probabilities),
        }
        rewards = {"reward": ANNOTATORS["reader"], "warm_reward": ANNOTATORS["warm"]}
        if annotator := rewards.get(self.quantity):
            return annotator.utility(**measures)
        return measures[self.quantity]
