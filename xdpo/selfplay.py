"""SePPO's self-play: the reference is drawn from the run's own past, and draws what stands against the chosen image.

Training goes in rounds of `self_play.every` optimizer steps. Where round r begins, the policy is kept as snapshot r
(snapshot 0 is the base model), one of the snapshots 0 … r is drawn and becomes the reference, and the reference samples
an image for each caption of the round. Round, snapshot, starting noise and caption follow from (seed, position) alone;
what is sampled together never depends on the processes. So a run that was stopped samples its round again and goes on
as if it had not been.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xdpo import noise
from xdpo.checkpoint import CheckpointError, writing_aside
from xdpo.config import Config
from xdpo.models import PipelineParts, encode_captions, pipeline_with


@dataclass(frozen=True)
class Rounds:
    """Which round and which slot of its buffer a position of the training order belongs to."""

    steps: int  # optimizer steps of a round
    positions: int  # pairs trained on in a round
    slots: int  # images sampled in a round; fewer than positions are used several times, at other (t, ε)

    @classmethod
    def of(cls, settings: Config) -> "Rounds":
        positions = settings.self_play.every * settings.train.total_batch_pairs
        return cls(settings.self_play.every, positions, min(settings.self_play.buffer_pairs or positions, positions))

    def slot(self, position: int) -> tuple[int, int]:
        """(round, slot) of a position."""
        round_number, place = divmod(position, self.positions)
        return round_number, place % self.slots


class RoundOrder:
    """The training order in rounds: as noise.SampleOrder, but a round goes round and round its own `slots` pairs."""

    def __init__(self, order: noise.SampleOrder, rounds: Rounds):
        self.order, self.rounds = order, rounds

    def __getitem__(self, position: int) -> int:
        round_number, slot = self.rounds.slot(position)
        return self.order[round_number * self.rounds.slots + slot]


def draw_snapshot(seed: int, round_number: int, choice: str) -> int:
    """Which of the snapshots 0 … round_number is the round's reference (SePPO, Algorithm 1: uniformly at random)."""
    match choice:
        case "random":
            source = noise.generator(seed, round_number, "snapshot")
            return int(torch.randint(round_number + 1, (1,), generator=source))
        case "latest":
            return round_number
        case "base":
            return 0
    raise ValueError(f"unknown self_play.reference {choice!r}; choose from random, latest, base")


class SelfPlay:
    """The snapshots of a run, the reference of the round, and the latents that it sampled.

    dataset: of the training pairs; gives captions by index, and its order is made one of rounds. latent_shape:
    (C, h, w). reference: the module whose weights are exchanged.
    """

    def __init__(
        self,
        settings: Config,
        accelerator: Accelerator,
        parts: PipelineParts,
        dataset: object,
        latent_shape: tuple[int, int, int],
        reference: nn.Module,
        folder: Path,
    ):
        self.settings, self.accelerator, self.parts = settings, accelerator, parts
        self.dataset, self.order, self.latent_shape = dataset, dataset.order, latent_shape
        self.reference, self.folder = reference, folder
        self.rounds = Rounds.of(settings)
        dataset.order = RoundOrder(self.order, self.rounds)
        self.round_number, self.latents = -1, torch.empty(0)

    def begin_step(self, step_number: int, policy: nn.Module) -> str | None:
        """Begin the round of an optimizer step, where it isn't begun; every process calls it. Returns what it did.

        policy: outside its distributed wrapper. Raises CheckpointError where a snapshot can't be written or read.
        """
        round_number = step_number // self.rounds.steps
        if round_number == self.round_number:
            return None
        if step_number % self.rounds.steps == 0 and self.accelerator.is_main_process:
            self._save(round_number, policy)
        self.accelerator.wait_for_everyone()
        number = draw_snapshot(self.settings.seed, round_number, self.settings.self_play.reference)
        self._load(number)
        self.round_number, self.latents = round_number, self._sample_round(round_number)
        drawn = "the base model" if number == 0 else f"the policy of step {number * self.rounds.steps}"
        return f"self-play round {round_number + 1}: reference and opponent are {drawn}, {self.rounds.slots} images"

    def opponents(self, positions: Sequence[int] | Tensor) -> Tensor:
        """Latents (B, C, h, w), scaled as the UNet takes them, of what the reference sampled for B positions."""
        slots = []
        for position in positions:
            round_number, slot = self.rounds.slot(int(position))
            if round_number != self.round_number:
                raise ValueError(f"position {int(position)} is of round {round_number}, not of {self.round_number}")
            slots.append(slot)
        return self.latents[slots]

    def _save(self, number: int, policy: nn.Module) -> None:
        final = snapshot_path(self.folder, number).parent
        if not final.exists():
            with writing_aside(final) as aside:
                weights = {name: value.contiguous() for name, value in policy.state_dict().items()}
                save_file(weights, aside / snapshot_path(self.folder, number).name)

    def _load(self, number: int) -> None:
        path = snapshot_path(self.folder, number)
        try:
            self.reference.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"can't read the snapshot {path}: {error}; remove the run and start anew") from error

    @torch.no_grad()
    def _sample_round(self, round_number: int) -> Tensor:
        """(slots, C, h, w), the same on every process."""
        first = round_number * self.rounds.slots
        positions = range(first, first + self.rounds.slots)
        chunks = list(_chunks(positions, self.settings.self_play.batch_size))
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        per_process = -(-len(chunks) // world_size)
        own = [chunks[min(rank + turn * world_size, len(chunks) - 1)] for turn in range(per_process)]
        with self.accelerator.autocast():
            sampled = torch.stack([self._sample(chunk) for chunk in own])  # (turns, batch, C, h, w)
        gathered = self.accelerator.gather(sampled.unsqueeze(0))  # (world_size, turns, batch, …)
        in_order = gathered.transpose(0, 1).flatten(0, 2)  # chunk by chunk, as the chunks were dealt out
        return in_order[: self.rounds.slots]

    def _sample(self, positions: Sequence[int]) -> Tensor:
        settings, wanted = self.settings, self.settings.self_play
        start = noise.draw_noise(settings.seed, positions, self.latent_shape, stream="self_play")
        captions, empty = self._text_states(positions), self._text_states([None])
        output = pipeline_with(self.parts, self.reference)(
            prompt_embeds=captions,
            negative_prompt_embeds=empty.expand_as(captions),
            latents=start[: len(positions)].to(self.accelerator.device),  # of a pair's two draws the second has no use
            num_inference_steps=wanted.num_inference_steps,
            guidance_scale=wanted.guidance_scale,
            height=settings.data.resolution,
            width=settings.data.resolution,
            output_type="latent",
        )
        return output.images.float()

    def _text_states(self, positions: Sequence[int | None]) -> Tensor:
        """(B, L, D) of the captions at positions of the pairs' own order; None is the empty caption."""
        items = [self.dataset.caption(None if place is None else self.order[place]) for place in positions]
        if "text_states" in items[0]:
            states = torch.stack([item["text_states"] for item in items]).to(self.accelerator.device).float()
        else:
            input_ids = torch.stack([item["input_ids"] for item in items]).to(self.accelerator.device)
            states = encode_captions(self.parts.text_encoder, input_ids)
        return states


def snapshot_path(folder: Path, number: int) -> Path:
    """Where a run keeps the policy of the start of round `number`."""
    return folder / "snapshots" / f"{number:05d}" / "unet.safetensors"


def check_snapshots(settings: Config, folder: Path, start_step: int) -> None:
    """Raise CheckpointError where a resumed run lacks a snapshot that this round or a later one may draw."""
    begun = range(-(-start_step // settings.self_play.every))
    missing = [str(path) for path in (snapshot_path(folder, number) for number in begun) if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"the run goes on from step {start_step}, and the earlier checkpoints from which self-play draws its "
            f"references are gone: {', '.join(missing)}. Put them back, or start in another output_dir"
        )


def _chunks(positions: range, size: int) -> Iterator[list[int]]:
    """Chunks of equal size, the last one filled up with its last position: rounding depends on a batch's shape."""
    for start in range(0, len(positions), size):
        chunk = list(positions[start : start + size])
        yield chunk + chunk[-1:] * (size - len(chunk))
