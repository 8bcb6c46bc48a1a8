"""The last stage of both bases: text encoders and a denoiser learn together to denoise latents under a caption."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tiny_base.stages import Stage
from xdpo.noise import DiffusionProcess, FlowProcess
from xdpo.tiny import world

DROPPED_SHARE = 0.1  # of captions, so that guidance has something to lead away from

TokenIds = Mapping[str, Tensor]  # by tokenizer, (N, its length)


class Base(Protocol):
    """A base model in the making. `name` names its stages' files; `steps` is how long the shipped one was trained."""

    name: str
    encoders: nn.ModuleDict
    denoiser: nn.Module
    learning_rate: float
    steps: int

    @property
    def process(self) -> DiffusionProcess | FlowProcess:
        """What turns clean latents into noisy ones, and what the denoiser should predict."""

    def tokenize(self, captions: list[str]) -> dict[str, Tensor]:
        """Token ids by tokenizer."""

    def read(self, ids: TokenIds) -> Tensor:
        """What the encoders make of captions, as one vector each: (B, D)."""

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times of the process: (count,) on the CPU."""

    def predict(self, noisy: Tensor, times: Tensor, ids: TokenIds) -> Tensor:
        """The denoiser's prediction for noisy latents (B, C, h, w)."""

    def save(self, folder: Path, vae: nn.Module) -> None:
        """Write the pipeline, in half precision."""


def chosen(ids: TokenIds, rows: Tensor) -> dict[str, Tensor]:
    return {name: each[rows] for name, each in ids.items()}


def caption_labels(text: str) -> dict[str, int]:
    """What a caption says, as classes; -1 for attributes that it does not mention."""
    scene = world.parse(text)
    relations = (None, "and", *world.RELATIONS)
    labels = {
        "relation": relations.index(scene.relation),
        "background": list(world.BACKGROUNDS).index(scene.background),
    }
    for index in range(2):
        thing = scene.things[index] if index < len(scene.things) else None
        for name, values in (("shape", world.SHAPES), ("colour", world.COLOURS), ("size", world.SIZES)):
            labels[f"{name}{index}"] = list(values).index(getattr(thing, name)) if thing else -1
    return labels


def train_encoders(work: Path, base: Base, captions: list[str], steps: int, batch: int, seed: int, device: str) -> None:
    """Train the encoders until what they read encodes all that the caption says (CLIP learns this from images)."""
    torch.manual_seed(seed + 2)
    labels = [caption_labels(text) for text in captions]
    classes = {name: torch.tensor([label[name] for label in labels], device=device) for name in labels[0]}
    ids = {name: each.to(device) for name, each in base.tokenize(captions).items()}
    width = base.read(chosen(ids, torch.arange(1))).shape[1]
    heads = nn.ModuleDict({name: nn.Linear(width, int(values.max()) + 1) for name, values in classes.items()})
    trained = nn.ModuleDict({"encoders": base.encoders, "heads": heads.to(device)})

    def loss(rows: Tensor) -> Tensor:
        state = base.read(chosen(ids, rows))
        losses = [cross_entropy(heads[name](state), classes[name][rows], ignore_index=-1) for name in heads]
        return torch.stack(losses).sum()

    stage = Stage(f"{base.name}_text", trained, loss, work, steps, learning_rate=5e-3)
    while stage.step < steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + stage.step)
        stage.take_step(torch.randint(0, len(captions), (batch,), generator=generator))
        if stage.is_to_log and stage.smoothed is not None:
            stage.log(loss=stage.smoothed / len(heads))


def train_denoiser(
    work: Path, base: Base, latents: Tensor, captions: list[str], steps: int, batch: int, seed: int, device: str
) -> None:
    """Train encoders and denoiser together on the denoising loss (paper Eq. 1), with a share of captions dropped."""
    trained = nn.ModuleDict({"encoders": base.encoders, "denoiser": base.denoiser})
    process = base.process.to(device)
    ids = {name: each.to(device) for name, each in base.tokenize(captions).items()}
    empty = {name: each.to(device) for name, each in base.tokenize([""]).items()}

    def loss(rows: Tensor, times: Tensor, noise: Tensor, is_dropped: Tensor) -> Tensor:
        told = {name: torch.where(is_dropped[:, None], empty[name], each) for name, each in chosen(ids, rows).items()}
        clean = latents[rows]
        prediction = base.predict(process.add_noise(clean, noise, times), times, told)
        errors = (prediction - process.target(clean, noise, times)).square().mean((1, 2, 3))
        return (process.weights(times) * errors).mean()

    stage = Stage(base.name, trained, loss, work, steps, base.learning_rate, decay=0.25)
    while stage.step < steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + stage.step)
        rows = torch.randint(0, len(latents), (batch,), generator=generator)
        times = base.draw_times(batch, generator)
        noise = torch.randn((batch, *latents.shape[1:]), generator=generator)
        is_dropped = torch.rand(batch, generator=generator) < DROPPED_SHARE
        stage.take_step(rows, times, noise, is_dropped)
        if stage.is_to_log and stage.smoothed is not None:
            stage.log(loss=stage.smoothed)
    stage.ema.copy_to(trained.parameters())
    trained.eval().requires_grad_(False)
