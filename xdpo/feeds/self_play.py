"""SePPO's self-play: the reference is a past snapshot of the policy; it samples what the chosen image is compared with.

Training consists of rounds of `self_play.every` optimizer steps. When round r begins, the policy is saved as snapshot r
(snapshot 0 is the base model), one of the snapshots 0 … r is drawn and becomes the reference, and the reference samples
an image for each caption of the round. Round, snapshot, starting noise and caption follow from (seed, position) alone.
The images sampled in one batch never depend on the number of processes.

```
output_dir/snapshots/00003/unet.safetensors     named like the denoiser's folder
output_dir/self_play/00003/made_from.json       everything that decides the latents below
                           latents_00000.npy …  one batch each, with checksums
```

Every process writes its samples to the run folder, and all of them read there. So a run that was killed resumes with
the samples that exist, and gives the same result.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from xdpo import noise, processes
from xdpo.batch import Batch, Conditioning, Tokens, stack
from xdpo.cache import Shards
from xdpo.config import Config
from xdpo.data import PairExamples
from xdpo.families import PipelineParts, pipeline_with
from xdpo.feeds.offline import OfflineFeed
from xdpo.files import StorageError, file_sha256, replacing_folder, storage_fault, write_text
from xdpo.runs import CheckpointError, finished_checkpoints, step_of


@dataclass(frozen=True)
class Rounds:
    """Maps a position of the training order to its round and its slot in the round's buffer."""

    steps: int  # optimizer steps of a round
    positions: int  # pairs trained on in a round
    slots: int  # images sampled in a round; if fewer than positions, each is used several times, at other (t, ε)

    @classmethod
    def of(cls, settings: Config) -> "Rounds":
        positions = settings.self_play.every * settings.train.total_batch_pairs
        return cls(settings.self_play.every, positions, min(settings.self_play.buffer_pairs or positions, positions))

    def slot(self, position: int) -> tuple[int, int]:
        """(round, slot) of a position."""
        round_number, within = divmod(position, self.positions)
        return round_number, within % self.slots


class RoundOrder:
    """The training order in rounds: a round takes the next `slots` pairs of `order`, and repeats them until it ends."""

    def __init__(self, order: noise.Order, rounds: Rounds):
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

    dataset: of the training pairs. Its order is replaced by a RoundOrder, so nothing may be loaded from it before.
    latent_shape: (C, h, w). reference: the module whose weights are replaced in each round, as accelerate prepared it,
    so that guidance is computed in float32 in any precision. folder: of the run, on storage that all machines share.
    say: prints a line on the first process. is_asked_to_stop: called between batches.
    """

    def __init__(
        self,
        settings: Config,
        accelerator: Accelerator,
        parts: PipelineParts,
        dataset: PairExamples,
        latent_shape: tuple[int, int, int],
        reference: nn.Module,
        folder: Path,
        say: Callable[[str], None] = print,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
    ):
        self.settings, self.accelerator, self.parts = settings, accelerator, parts
        self.dataset, self.order, self.latent_shape = dataset, dataset.order, latent_shape
        self.reference, self.folder = reference, folder
        self.say, self.is_asked_to_stop = say, is_asked_to_stop
        self.rounds = Rounds.of(settings)
        dataset.order = RoundOrder(self.order, self.rounds)
        self.round_number = -1
        self._opened: tuple[int, Shards] | None = None

    def begin_step(self, step_number: int, policy: nn.Module) -> bool:
        """Begin the round of an optimizer step, unless it has begun; every process calls it.

        policy: outside its distributed wrapper. Returns False where the run was asked to stop before all was sampled.
        Raises CheckpointError where a snapshot can't be written or read, StorageError where the latents can't.
        """
        round_number = step_number // self.rounds.steps
        if round_number == self.round_number:
            return True
        if step_number % self.rounds.steps == 0 and self.accelerator.is_main_process:
            self._save(round_number, policy)
        processes.wait()
        number = draw_snapshot(self.settings.seed, round_number, self.settings.self_play.reference)
        self._load(number)
        if not self._sample_round(round_number, number):
            return False
        self.round_number = round_number
        drawn = "the base model" if number == 0 else f"the policy of step {number * self.rounds.steps}"
        self.say(f"self-play round {round_number + 1}: reference and opponent are {drawn}, {self.rounds.slots} images")
        return True

    def sampled_rejected(self, positions: Sequence[int] | Tensor) -> Tensor:
        """Latents (B, C, h, w) that the reference sampled for B positions, as the denoiser takes them, on the CPU."""
        latents = []
        for position in positions:
            round_number, slot = self.rounds.slot(int(position))
            if round_number != self.round_number:
                raise ValueError(f"position {int(position)} is of round {round_number}, not of {self.round_number}")
            latents.append(self._latents(round_number).read(slot))
        return torch.from_numpy(np.stack(latents))

    def close(self) -> None:
        """Remove the samples of a finished run; one process calls it."""
        shutil.rmtree(self.folder / "self_play", ignore_errors=True)

    def _save(self, number: int, policy: nn.Module) -> None:
        path = self._snapshot(number)
        if not path.parent.exists():
            with replacing_folder(path.parent) as aside:
                weights = {name: value.cpu().contiguous() for name, value in policy.state_dict().items()}
                save_file(weights, aside / path.name)

    def _load(self, number: int) -> None:
        path = self._snapshot(number)
        try:
            self.reference.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"can't read the snapshot {path}: {error}; remove the run and start anew") from error

    def _snapshot(self, number: int) -> Path:
        return snapshot_folder(self.folder, number) / f"{self.parts.family.denoiser}.safetensors"

    def _latents(self, round_number: int) -> Shards:
        """A round's latents on the disk; a batch of samples is a shard."""
        if self._opened is None or self._opened[0] != round_number:
            shards = Shards(
                self.folder / "self_play" / f"{round_number:05d}",
                "latents",
                count=self.rounds.slots,
                shape=(1, *self.latent_shape),
                dtype="float32",
                per_shard=self.settings.self_play.batch_size,
            )
            self._opened = round_number, shards
        return self._opened[1]

    @torch.no_grad()
    def _sample_round(self, round_number: int, snapshot: int) -> bool:
        """Sample the missing batches of a round, divided among the processes. Returns whether the round is complete."""
        latents, first = self._latents(round_number), round_number * self.rounds.slots
        is_main = self.accelerator.is_main_process
        missing = processes.agree(self._prepare_folder(latents, round_number, snapshot) if is_main else None)
        bar = tqdm(total=len(missing), desc="self-play", unit="batch", leave=False, disable=not is_main)
        with bar, self.accelerator.autocast():
            written = 0
            for number in processes.deal(f"self-play/{round_number}", range(len(missing)), self.is_asked_to_stop):
                slots = latents.records_of(missing[number])
                # The last batch is filled up, because rounding depends on a batch's shape.
                positions = [first + min(slots.start + i, slots[-1]) for i in range(latents.per_shard)]
                sampled = self._sample(positions)[: len(slots)]
                latents.write(missing[number], sampled.unsqueeze(1).cpu().numpy())
                written += 1
                bar.update(number + 1 - bar.n)  # counts the batches of all processes
        processes.wait()
        # The files are not looked for: network storage may cache that one doesn't exist.
        is_whole = sum(processes.gather(written)) == len(missing)
        if is_whole and is_main:
            self._remove_rounds_before(round_number)
        return is_whole

    def _prepare_folder(self, latents: Shards, round_number: int, snapshot: int) -> list[int]:
        """Create a round's folder, or resume it. Returns the missing shards; one process calls it.

        Samples that were made from anything else are removed. Raises StorageError, also where the disk is too small.
        """
        made_from = json.dumps(self._made_from(snapshot), indent=2) + "\n"
        record = latents.folder / "made_from.json"
        try:
            if not record.is_file() or record.read_text(encoding="utf-8") != made_from:
                if latents.folder.exists():
                    shutil.rmtree(latents.folder)
                latents.folder.mkdir(parents=True)
                write_text(record, made_from)
            free = shutil.disk_usage(latents.folder).free
        except OSError as error:
            raise StorageError(f"could not begin {latents.folder}: {storage_fault(error, latents.folder)}") from error
        missing = [shard for shard in range(len(latents)) if not latents.is_finished(shard)]
        images = sum(len(latents.records_of(shard)) for shard in missing)
        needed = images * latents.num_bytes // latents.count
        if needed > free:
            raise StorageError(
                f"self-play round {round_number + 1} needs {needed / 1e9:.2f} GB more in {latents.folder}, and "
                f"{free / 1e9:.2f} GB are free; make room and run the same command again"
            )
        if missing:
            self.say(
                f"self-play round {round_number + 1}: sampling {images:,} of {latents.count:,} images; "
                f"{latents.num_bytes / 1e9:.2g} GB in {latents.folder}"
            )
        return missing

    def _made_from(self, snapshot: int) -> dict[str, Any]:
        """Everything that decides what a round samples."""
        settings = self.settings
        return {
            "snapshot": snapshot,
            "snapshot_sha256": file_sha256(self._snapshot(snapshot)),
            "pipeline": [settings.model.pipeline, settings.model.revision],
            "pairs": self.dataset.table.fingerprint,
            "captions": f"cached as {settings.cache.dtype}" if settings.cache.examples else "encoded while sampling",
            "seed": settings.seed,
            "resolution": settings.data.resolution,
            "self_play": settings.self_play.model_dump(),
            "images": self.rounds.slots,
            "precision": self.accelerator.mixed_precision,
        }

    def _remove_rounds_before(self, round_number: int) -> None:
        """Remove the rounds that end before the newest checkpoint; later ones are needed if the run resumes there."""
        finished = finished_checkpoints(self.folder)
        resumed = step_of(finished[-1]) // self.rounds.steps if finished else 0
        for folder in (self.folder / "self_play").iterdir():
            if folder.name.isdigit() and int(folder.name) < min(resumed, round_number):
                shutil.rmtree(folder, ignore_errors=True)

    def _sample(self, positions: Sequence[int]) -> Tensor:
        settings, sampling = self.settings, self.settings.self_play
        # Two draws for each position: those of a pair. The one image of a position uses the first.
        draws = noise.draw_noise(settings.seed, positions, self.latent_shape, stream="self_play")
        start = draws[: len(positions)].to(self.accelerator.device)
        captions, empty = self._conditioning(positions), self._conditioning([None])
        empty = Conditioning({name: value.expand_as(captions[name]) for name, value in empty.items()})
        # The pipeline gets encoded captions and returns latents. It has no encoders, because they may be on another
        # device, and a pipeline without them runs on the denoiser's.
        pipeline = pipeline_with(self.parts, self.reference, encoders=False)
        output = pipeline(
            **self.parts.family.prompt_arguments(captions, empty),
            latents=self.parts.family.pack(start),
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            height=settings.data.resolution,
            width=settings.data.resolution,
            output_type="latent",
        )
        return self.parts.family.unpack(output.images, start.shape[2]).float()

    def _conditioning(self, positions: Sequence[int | None]) -> Conditioning:
        """The conditioning of the captions at positions of `order`, on the device; None is the empty caption."""
        indices = [None if position is None else self.order[position] for position in positions]
        captions, device = stack([self.dataset.caption(index) for index in indices]), self.accelerator.device
        if isinstance(captions, Conditioning):
            return Conditioning({name: value.to(device).float() for name, value in captions.items()})
        return self.parts.encode_captions(Tokens({name: ids.to(device) for name, ids in captions.items()}))


class SelfPlayFeed:
    """Pairs whose rejected images the reference has sampled, round by round."""

    def __init__(self, self_play: SelfPlay, pairs: OfflineFeed):
        self.self_play, self.pairs = self_play, pairs

    @property
    def wait_seconds(self) -> float:
        return self.pairs.wait_seconds

    def begin_step(self, step_number: int, policy: nn.Module) -> bool:
        return self.pairs.begin_step(step_number, policy) and self.self_play.begin_step(step_number, policy)

    def micro_batches(self) -> Iterator[Batch]:
        for batch in self.pairs.micro_batches():
            yield batch._replace(rejected_latents=self.self_play.sampled_rejected(batch.positions))

    def close(self) -> None:
        self.self_play.close()


def snapshot_folder(folder: Path, number: int) -> Path:
    """Where a run keeps the policy as it was when round `number` began."""
    return folder / "snapshots" / f"{number:05d}"


def check_snapshots(settings: Config, folder: Path, start_step: int) -> None:
    """Raise CheckpointError where a resumed run lacks a snapshot that this round or a later one may draw."""
    rounds = range(-(-start_step // settings.self_play.every))
    paths = (snapshot_folder(folder, number) for number in rounds)
    missing = [str(path) for path in paths if not any(path.glob("*.safetensors"))]
    if missing:
        raise CheckpointError(
            f"the run goes on from step {start_step}, and the earlier checkpoints from which self-play draws its "
            f"references are gone: {', '.join(missing)}. Put them back, or start in another output_dir"
        )
