"""SePPO's self-play: the reference is a past snapshot of the policy; it samples what the chosen image is compared with.

Training consists of rounds of `self_play.every` optimizer steps. When round r begins, the policy is saved as snapshot r
(snapshot 0 is the base model), one of the snapshots 0 … r is drawn and becomes the reference, and the reference samples
an image for each caption of the round. Round, snapshot, starting noise and caption follow from (seed, position) alone.
The images sampled in one batch never depend on the number of processes.

Snapshots are kept as `output_dir/snapshots/00003/unet.safetensors`, named like the denoiser's folder.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xdpo import noise, processes
from xdpo.batch import Batch, Conditioning, stack
from xdpo.config import Config
from xdpo.data import PairExamples
from xdpo.families import PipelineParts
from xdpo.feeds.offline import OfflineFeed
from xdpo.feeds.rounds import Rounds, SampledRounds, encode_on, sample_latents
from xdpo.files import file_sha256, replacing_folder
from xdpo.runs import CheckpointError


def rounds_of(settings: Config) -> Rounds:
    """The rounds of a config, each with an image for every pair, or for self_play.buffer_pairs of them."""
    positions = settings.self_play.every * settings.train.total_batch_pairs
    return Rounds(settings.self_play.every, positions, min(settings.self_play.buffer_pairs or positions, positions))


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
        self.reference, self.folder, self.say = reference, folder, say
        self.rounds = rounds_of(settings)
        dataset.order = RoundOrder(self.order, self.rounds)
        self.round_number = -1
        self.samples = SampledRounds(
            folder,
            "self_play",
            steps=self.rounds.steps,
            count=self.rounds.slots,
            latent_shape=latent_shape,
            batch_size=settings.self_play.batch_size,
            accelerator=accelerator,
            say=say,
            is_asked_to_stop=is_asked_to_stop,
        )

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
        made_from = self._made_from(number) if self.accelerator.is_main_process else {}
        if not self.samples.fill(round_number, made_from, self._sample):
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
            latents.append(self.samples.latents(round_number).read(slot))
        return torch.from_numpy(np.stack(latents))

    def close(self) -> None:
        """Remove the samples of a finished run; one process calls it."""
        self.samples.close()

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

    def _sample(self, positions: Sequence[int]) -> Tensor:
        settings, sampling = self.settings, self.settings.self_play
        # Two draws for each position: those of a pair. The one image of a position uses the first.
        draws = noise.draw_noise(settings.seed, positions, self.latent_shape, stream="self_play")
        start = draws[: len(positions)].to(self.accelerator.device)
        return sample_latents(
            self.parts,
            self.reference,
            self._conditioning(positions),
            self._conditioning([None]),
            start,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            resolution=settings.data.resolution,
        )

    def _conditioning(self, positions: Sequence[int | None]) -> Conditioning:
        """The conditioning of the captions at positions of `order`, on the device; None is the empty caption."""
        indices = [None if position is None else self.order[position] for position in positions]
        captions = stack([self.dataset.caption(index) for index in indices])
        return encode_on(self.accelerator.device, self.parts, captions)


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
