"""Reward models that scripts/train_reward_model.py has trained: scorers, named by their folder.

```
FOLDER/reward_model.json                       recipe, data, accuracy on held-out pairs
       model.safetensors config.json …         a CLIP, its tokenizer and image processor in transformers' format
       head.safetensors                        with the recipe head alone
```
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from xdpo.files import kept_sha256, reading, replacing_folder, write_text
from xdpo.scorers import REWARD_MODEL_RECORD as RECORD
from xdpo.scorers.interface import Scorer, as_rgb, full_precision

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

RECIPES = ("clip", "head")
_HEAD_WIDTH = 256


class Head(nn.Module):
    """A small network on an image's and a prompt's embeddings and their product: one number."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden, self.output = nn.Linear(3 * width, _HEAD_WIDTH), nn.Linear(_HEAD_WIDTH, 1)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(…) of unit embeddings (…, W)."""
        # Numbers of a unit embedding are about 1/√W. At 1, the head learns at the rates of any network.
        image, text = (math.sqrt(image.shape[-1]) * embedding for embedding in (image, text))
        return self.output(nn.functional.gelu(self.hidden(torch.cat([image, text, image * text], dim=-1)))).squeeze(-1)


class RewardModel(nn.Module):
    """A reward r(x, c) of image x and prompt c: higher is better, and only differences for one prompt mean anything.

    recipe clip: exp(logit_scale) · cos(image, text), everything trained (PickScore, arXiv 2305.01569, §3). recipe head:
    a Head on the unit embeddings of a frozen CLIP.
    """

    def __init__(self, clip: "CLIPModel", recipe: str):
        super().__init__()
        if recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}; choose from {', '.join(RECIPES)}")
        self.clip, self.head = clip, None
        if recipe == "head":
            clip.requires_grad_(False)
            self.head = Head(clip.config.projection_dim)

    def forward(self, pixels: Tensor, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards (S, B) of S images, (S, B, 3, R, R), for each of B prompts, (B, L) ids and mask."""
        sides, prompts = pixels.shape[:2]
        image = self._unit(self.clip.get_image_features(pixel_values=pixels.flatten(0, 1))).view(sides, prompts, -1)
        text = self._unit(self.clip.get_text_features(input_ids=token_ids, attention_mask=attention_mask))
        if self.head is None:
            return self.clip.logit_scale.exp() * (image * text).sum(-1)
        return self.head(image, text.expand_as(image))

    @staticmethod
    def _unit(embeddings: Any) -> Tensor:
        # transformers 5 returns a record here, earlier versions a tensor.
        found = embeddings if isinstance(embeddings, Tensor) else embeddings.pooler_output
        return nn.functional.normalize(found, dim=-1)


class Preparation:
    """Images → pixels, prompts → token ids, as a CLIP's own processors make them."""

    def __init__(self, tokenizer: "CLIPTokenizer", image_processor: "CLIPImageProcessor"):
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, R, R) float32."""
        return self.image_processor(as_rgb(image), return_tensors="pt").pixel_values[0]

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """token_ids and attention_mask, (B, L) each; longer prompts are cut."""
        found = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        return {"token_ids": found.input_ids, "attention_mask": found.attention_mask}


def load_base(folder: str | Path) -> "tuple[CLIPModel, Preparation]":
    """A CLIP with its processors, from the hub or a folder. Raises ValueError for one that can't be loaded."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading weights, which takes seconds
    try:
        # In full precision whatever the file's is: AdamW would train half-precision weights to nothing.
        clip = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        preparation = Preparation(CLIPTokenizer.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder))
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"no CLIP in transformers' format at {folder}: {str(error).splitlines()[0]}") from error
    return clip, preparation


def save_reward_model(model: RewardModel, preparation: Preparation, record: dict[str, Any], folder: Path) -> None:
    """Write a reward model, whole or not at all. Raises StorageError."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of writing weights, which takes seconds
    with replacing_folder(folder) as aside:
        model.clip.save_pretrained(aside)
        preparation.tokenizer.save_pretrained(aside)
        preparation.image_processor.save_pretrained(aside)
        if model.head is not None:
            (aside / "head.safetensors").write_bytes(save(model.head.state_dict()))
        write_text(aside / RECORD, json.dumps(record, indent=2) + "\n")


def reward_model_version(folder: str | Path) -> str:
    """A version that changes whenever a file of the model does."""
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".json", ".safetensors", ".txt"))
    return f"reward model {' '.join(kept_sha256(path)[:8] for path in files)}"


def load_reward_model(folder: str | Path, device: str | torch.device = "cpu") -> Scorer:
    """The scorer of a folder. Raises ValueError where the folder is damaged."""
    path = Path(folder)
    try:
        with reading(path / RECORD):
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        clip, preparation = load_base(path)
        model = RewardModel(clip, record["recipe"])
        if model.head is not None:
            model.head.load_state_dict(load_file(path / "head.safetensors"))
    except (KeyError, OSError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"the reward model in {folder} is damaged: {error}; train it again") from error
    model.to(device).eval()

    def score(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        tokens = {name: value.to(device) for name, value in preparation.tokens(prompts).items()}
        return model(torch.stack(list(images)).unsqueeze(0).to(device), **tokens)[0].tolist()

    accuracy = record.get("held_out", {}).get("accuracy")
    scale = "reward, of which differences for one prompt count" + (
        f"; {accuracy:.1%} of held-out pairs right" if accuracy is not None else ""
    )
    return Scorer(str(folder), reward_model_version(folder), scale, preparation.pixels, full_precision(score))
