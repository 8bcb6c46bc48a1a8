"""Latents that a run samples in rounds, divided among the processes, and kept on the disk while they may be needed.

```
output_dir/{name}/00003/made_from.json       everything that decides the latents below
                        latents_00000.npy …  one batch each, with checksums
```

Every process writes its samples to the run folder, and all of them read there. So a run that was killed resumes with
the samples that exist, and gives the same result.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from xdpo import processes
from xdpo.batch import Conditioning, Tokens
from xdpo.cache import Shards
from xdpo.families import PipelineParts, pipeline_with
from xdpo.files import StorageError, storage_fault, write_text
from xdpo.progress import Progress
from xdpo.runs import finished_checkpoints, step_of


@dataclass(frozen=True)
class Rounds:
    """Maps a position of the training order to its round and its slot among what the round has."""

    steps: int  # optimizer steps of a round
    positions: int  # pairs trained on in a round, or images
    slots: int  # what a round has; if fewer than positions, each is used several times, at other (t, ε)

    def slot(self, position: int) -> tuple[int, int]:
        """(round, slot) of a position."""
        round_number, within = divmod(position, self.positions)
        return round_number, within % self.slots


class SampledRounds:
    """The latents of a run's rounds.

    name: of the folder that holds them in the run's. steps: optimizer steps of a round. count: images of a round.
    latent_shape: (C, h, w). batch_size: images sampled at once. say: prints a line on the first process.
    is_asked_to_stop: called between batches.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        steps: int,
        count: int,
        latent_shape: tuple[int, int, int],
        batch_size: int,
        accelerator: Accelerator,
        say: Callable[[str], None],
        is_asked_to_stop: Callable[[], bool],
    ):
        self.run_folder, self.name, self.steps, self.count = folder, name, steps, count
        self.latent_shape, self.batch_size, self.accelerator = latent_shape, batch_size, accelerator
        self.say, self.is_asked_to_stop = say, is_asked_to_stop
        self.title = name.replace("_", "-")
        self._opened: tuple[int, Shards] | None = None

    def latents(self, round_number: int) -> Shards:
        """A round's latents on the disk; a batch of samples is a shard."""
        if self._opened is None or self._opened[0] != round_number:
            shards = Shards(
                self.run_folder / self.name / f"{round_number:05d}",
                "latents",
                count=self.count,
                shape=(1, *self.latent_shape),
                dtype="float32",
                per_shard=self.batch_size,
            )
            self._opened = round_number, shards
        return self._opened[1]

    def is_whole(self, round_number: int) -> bool:
        """Whether all images of a round are on the disk."""
        latents = self.latents(round_number)
        return all(latents.is_finished(shard) for shard in range(len(latents)))

    @torch.no_grad()
    def fill(self, round_number: int, made_from: Mapping[str, Any], sample: Callable[[Sequence[int]], Tensor]) -> bool:
        """Sample the missing batches of a round, divided among the processes. Returns whether the round is complete.

        made_from: everything that decides the latents, as JSON has it; what was made from anything else is removed.
        sample: the numbers of images, counted through all rounds → their latents (N, C, h, w). Raises StorageError,
        also where the disk is too small. Every process calls it.
        """
        latents, first = self.latents(round_number), round_number * self.count
        is_main = self.accelerator.is_main_process
        missing = processes.agree(self._prepare_folder(latents, round_number, made_from) if is_main else None)
        bar = Progress(total=len(missing), desc=self.title, unit="batch", leave=False, disable=not is_main)
        with bar, self.accelerator.autocast():
            written = 0
            for number in processes.deal(f"{self.title}/{round_number}", range(len(missing)), self.is_asked_to_stop):
                slots = latents.records_of(missing[number])
                # The last batch is filled up, because rounding depends on a batch's shape.
                numbers = [first + min(slots.start + i, slots[-1]) for i in range(latents.per_shard)]
                sampled = sample(numbers)[: len(slots)]
                latents.write(missing[number], sampled.unsqueeze(1).cpu().numpy())
                written += 1
                bar.update(number + 1 - bar.n)  # counts the batches of all processes
        processes.wait()
        # The files are not looked for: network storage may cache that one doesn't exist.
        is_whole = sum(processes.gather(written)) == len(missing)
        if is_whole and is_main:
            self._remove_rounds_before(round_number)
        return is_whole

    def close(self, keep: int | None = None) -> None:
        """Remove the samples of a finished run, except those of the round `keep`; one process calls it."""
        rounds = self.run_folder / self.name
        others = [path for path in rounds.iterdir() if path.name != f"{keep:05d}"] if keep is not None else [rounds]
        for path in others:
            shutil.rmtree(path, ignore_errors=True)

    def _prepare_folder(self, latents: Shards, round_number: int, made_from: Mapping[str, Any]) -> list[int]:
        """Create a round's folder, or resume it. Returns the missing shards; one process calls it."""
        record, written = latents.folder / "made_from.json", json.dumps(made_from, indent=2) + "\n"
        try:
            if not record.is_file() or record.read_text(encoding="utf-8") != written:
                if latents.folder.exists():
                    shutil.rmtree(latents.folder)
                latents.folder.mkdir(parents=True)
                write_text(record, written)
            free = shutil.disk_usage(latents.folder).free
        except OSError as error:
            raise StorageError(f"could not begin {latents.folder}: {storage_fault(error, latents.folder)}") from error
        missing = [shard for shard in range(len(latents)) if not latents.is_finished(shard)]
        images = sum(len(latents.records_of(shard)) for shard in missing)
        needed = images * latents.num_bytes // latents.count
        if needed > free:
            raise StorageError(
                f"{self.title} round {round_number + 1} needs {needed / 1e9:.2f} GB more in {latents.folder}, and "
                f"{free / 1e9:.2f} GB are free; make room and run the same command again"
            )
        if missing:
            self.say(
                f"{self.title} round {round_number + 1}: sampling {images:,} of {latents.count:,} images; "
                f"{latents.num_bytes / 1e9:.2g} GB in {latents.folder}"
            )
        return missing

    def _remove_rounds_before(self, round_number: int) -> None:
        """Remove the rounds that end before the newest checkpoint; later ones are needed if the run resumes there."""
        finished = finished_checkpoints(self.run_folder)
        resumed = step_of(finished[-1]) // self.steps if finished else 0
        for folder in (self.run_folder / self.name).iterdir():
            if folder.name.isdigit() and int(folder.name) < min(resumed, round_number):
                shutil.rmtree(folder, ignore_errors=True)


def sample_latents(
    parts: PipelineParts,
    denoiser: nn.Module,
    captions: Conditioning,
    empty: Conditioning,
    start: Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    resolution: int,
) -> Tensor:
    """Latents (N, C, h, w) float32 of N captions, as the denoiser takes them.

    empty: the conditioning of one empty caption. start: noise (N, C, h, w). All tensors are on the denoiser's device.
    """
    empty = Conditioning({name: value.expand_as(captions[name]) for name, value in empty.items()})
    # The pipeline gets encoded captions and returns latents. It has no encoders, because they may be on another
    # device, and a pipeline without them runs on the denoiser's.
    pipeline = pipeline_with(parts, denoiser, encoders=False)
    output = pipeline(
        **parts.family.prompt_arguments(captions, empty),
        latents=parts.family.pack(start),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=resolution,
        width=resolution,
        output_type="latent",
    )
    return parts.family.unpack(output.images, start.shape[2]).float()


def encode_on(device: torch.device, parts: PipelineParts, captions: Tokens | Conditioning) -> Conditioning:
    """Captions as a data set gives them → the denoiser's inputs from them, float32 on a device."""
    if isinstance(captions, Conditioning):
        return Conditioning({name: value.to(device).float() for name, value in captions.items()})
    return parts.encode_captions(Tokens({name: ids.to(device) for name, ids in captions.items()}))
