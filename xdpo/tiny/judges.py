"""The embedded judges: they estimate what a picture shows, how clean it is, and the annotator's utility of it.

One small network reads the attributes of a scene from pixels; it was trained on drawn scenes (flaws included, half
of them passed through the base's autoencoder) by `scripts/train_tiny_judge.py` and is never shown to preference
training. `tiny_alignment` is the expected share of the caption's claims that hold, `tiny_appeal` the estimated
cleanness, `tiny_reward` the annotator's utility of both. Accuracy against the truth is in assets/tiny/judge.json.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from xdpo.tiny.annotator import utility
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

JUDGE_WEIGHTS = Path(__file__).resolve().parents[2] / "assets" / "tiny" / "judge.safetensors"

LAYOUTS = ("single", "horizontal", "vertical")
ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}
# What the network reads: the arrangement, the background, and three attributes of the first (left or upper) thing
# and of the second one.
HEADS = {"layout": LAYOUTS, "background": tuple(BACKGROUNDS)} | {
    f"{attribute}{slot}": values for slot in range(2) for attribute, values in ATTRIBUTES.items()
}


class AttributeReader(nn.Module):
    """Images (B, 3, 32, 32) in [-1, 1] → logits per head (B, classes), and "appeal" (B,) in [0, 1]."""

    def __init__(self, width: int = 32):
        super().__init__()
        channels = (3, width, 2 * width, 3 * width, 3 * width)
        self.features = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=stride, padding=1), nn.BatchNorm2d(b), nn.ReLU())
                for a, b, stride in zip(channels, channels[1:], (1, 2, 2, 1), strict=False)
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
    """PIL images of any size and mode → (B, 3, 32, 32) float32 in [-1, 1]."""
    small = [image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX) for image in images]
    pixels = np.stack([np.asarray(image) for image in small])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def alignment(scene: Scene, probabilities: dict[str, np.ndarray]) -> float:
    """Expected share of the caption's claims that hold, as the annotator counts them.

    `probabilities` holds one vector per head. The better of the two readings decides which thing is which.
    """
    single = probabilities["layout"][LAYOUTS.index("single")]
    background = probabilities["background"][HEADS["background"].index(scene.background)]

    def attributes(thing: Thing, slot: int) -> float:
        present = 1.0 if slot == 0 else 1 - single
        return present * sum(
            probabilities[f"{name}{slot}"][values.index(getattr(thing, name))] for name, values in ATTRIBUTES.items()
        )

    if len(scene.things) == 1:
        return float(background + single + attributes(scene.things[0], 0)) / 5
    first, second = scene.things
    readings = []
    for first_slot in (0, 1):
        relation = 1 - single
        if scene.relation in RELATIONS:
            right_order = first_comes_first(scene.relation) == (first_slot == 0)
            relation = right_order * probabilities["layout"][LAYOUTS.index(RELATIONS[scene.relation])]
        readings.append(relation + attributes(first, first_slot) + attributes(second, 1 - first_slot))
    return float(background + (1 - single) + max(readings)) / 9


class Judge:
    """A scorer of the embedded world: `score(images, prompts)` returns one float per PIL image.

    `quantity` is "alignment", "appeal" or "reward". Raises ValueError for prompts outside the grammar and
    FileNotFoundError if the weights are missing.
    """

    def __init__(self, quantity: str, device: str | torch.device = "cpu", weights: str | Path | None = None):
        path = Path(weights or JUDGE_WEIGHTS)
        if not path.is_file():
            raise FileNotFoundError(
                f"no judge at {path}; it ships in assets/tiny, or make it: scripts/train_tiny_judge.py"
            )
        self.quantity, self.device = quantity, device
        self.reader = AttributeReader()
        self.reader.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        self.reader.to(device).eval().requires_grad_(False)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        scenes = [parse(prompt) for prompt in prompts]
        outputs = self.reader(to_batch(images).to(self.device))
        appeal = outputs.pop("appeal").tolist()
        if self.quantity == "appeal":
            return appeal
        probabilities = {name: logits.softmax(1).cpu().numpy() for name, logits in outputs.items()}
        aligned = [
            alignment(scene, {name: rows[index] for name, rows in probabilities.items()})
            for index, scene in enumerate(scenes)
        ]
        if self.quantity == "alignment":
            return aligned
        return [utility(a, b) for a, b in zip(aligned, appeal, strict=True)]
