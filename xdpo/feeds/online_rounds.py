"""The rounds of online training: the policy samples images of prompts, and rewards score them.

Training consists of rounds of `online.every` optimizer steps. When round r begins, the policy, its moving average or
the reference samples K images of each of P prompts, and every reward scores them. The best and the worst image of a
prompt, or all that differ enough, become the pairs of the round; or all of its images are trained on one by one, each
as good as its reward says. Image k of prompt p depends on (seed, r, p, k) and the weights alone.

```
output_dir/online/00003.json              prompts, every score, and the rewards' running moments
output_dir/online_samples/00003/…         the round's latents and scores, removed when no checkpoint needs them
output_dir/samples/round_00003.png        the images of the first prompts, with their rewards
```
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from xdpo import noise, processes, runs
from xdpo.batch import Batch, Conditioning, LatentMoments, Tokens, stack
from xdpo.config import Config
from xdpo.data import PairExamples
from xdpo.families import pipeline_with
from xdpo.feeds.rewards import Moments, mixture
from xdpo.feeds.rounds import Rounds, SampledRounds, encode_on, sample_latents
from xdpo.files import reading, write_text
from xdpo.images.sheets import contact_sheet, save_sheet
from xdpo.learner import Learner
from xdpo.prompts import PromptSet, load_prompts
from xdpo.runlog import RunLog
from xdpo.scorers import check_name
from xdpo.scorers.interface import Scorer
from xdpo.scorers.loading import load_scorer, scorer_version

SHEET_PROMPTS = 4  # of a round's sheet


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run's rounds, one after another, without end: a file's or set's, or the training captions."""

    given: PromptSet | None  # None: the captions of the training pairs
    dataset: PairExamples
    order: noise.Order

    @classmethod
    def of(cls, settings: Config, dataset: PairExamples) -> "Prompts":
        given = None if settings.online.prompts is None else load_prompts(settings.online.prompts)
        count = len(dataset.table) if given is None else len(given.prompts)
        return cls(given, dataset, noise.SampleOrder(settings.seed, count, shuffle=True))

    @property
    def fingerprint(self) -> str:
        """Equal for equal prompts in equal order."""
        return self.dataset.table.fingerprint if self.given is None else self.given.sha256

    def text(self, number: int) -> str:
        index = self.order[number]
        return self.dataset.table.caption(index) if self.given is None else self.given.prompts[index].text

    def row(self, number: int) -> int:
        """The row of the source whose caption a prompt is; -1 for a prompt of a file."""
        return int(self.dataset.table.rows[self.order[number]]) if self.given is None else -1


def check_online(settings: Config) -> None:
    """Check rewards and prompts before any weight of the pipeline is loaded, fetching the rewards' own files.

    Raises ValueError for an unknown reward or one whose files are missing, and for prompts that can't be read.
    """
    online = settings.online
    for name in (*online.rewards, *online.held_out_rewards):
        check_name(name)
        scorer_version(name, online.scorer_weights)
    if online.prompts is not None:
        load_prompts(online.prompts)


class Chosen(NamedTuple):
    """What a round trains on, and what of it can't be trained on."""

    items: int  # pairs or images
    skipped_prompts: int  # they gave none
    not_finite: int  # images whose reward is NaN or infinite


class OnlineRounds(ABC):
    """The rounds of a run: their images and scores. Subclasses choose what of them is trained on, and batch it.

    latent_shape: (C, h, w). folder: of the run, on storage that all machines share. is_asked_to_stop: called between
    batches.
    """

    def __init__(
        self,
        learner: Learner,
        dataset: PairExamples,
        latent_shape: tuple[int, int, int],
        folder: Path,
        log: RunLog,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
    ):
        self.learner, self.dataset, self.latent_shape = learner, dataset, latent_shape
        self.settings, self.accelerator = learner.settings, learner.accelerator
        self.folder, self.log, self.is_asked_to_stop = folder, log, is_asked_to_stop
        online = self.settings.online
        self.prompts = Prompts.of(self.settings, dataset)
        self.round_number = -1
        self.samples = SampledRounds(
            folder,
            "online_samples",
            steps=online.every,
            count=online.prompts_per_round * online.images_per_prompt,
            latent_shape=latent_shape,
            batch_size=online.batch_size,
            accelerator=self.accelerator,
            say=log.say,
            is_asked_to_stop=is_asked_to_stop,
        )
        self._scorers: dict[str, Scorer] = {}

    def begin_step(self, step_number: int) -> bool:
        """Begin the round of an optimizer step, unless it has begun; every process calls it.

        Returns False where the run was asked to stop before all was sampled and scored. Raises ValueError where no
        reward is finite or no two images differ in it, CheckpointError where a resumed round has lost its images.
        """
        round_number = step_number // self.settings.online.every
        if round_number == self.round_number:
            return True
        begins = step_number % self.settings.online.every == 0
        if begins and self.settings.online.renew_reference:
            self.learner.reference.become(self.learner.bare_policy)
        if begins:
            if not self._sample_and_score(round_number):
                return False
        else:
            self._refuse_lost_round(round_number, step_number)
        record = self._read_record(round_number)
        chosen = self._choose(round_number, self._rewards(record))
        if not chosen.items:
            self._refuse_rewards(round_number, chosen)
        self.round_number = round_number
        if begins:
            self._report(round_number, record, chosen)
        return True

    @abstractmethod
    def _choose(self, round_number: int, rewards: np.ndarray) -> Chosen:
        """Choose what a round trains on by its images' rewards, (prompts, images)."""

    @abstractmethod
    def batch(self, positions: Sequence[int]) -> Batch:
        """B positions of the training order, as latents; a round repeats what it has until it ends."""

    def _slots(self, slots: int, per_position: int) -> Rounds:
        """Where the positions of a round find what it has, `slots` of it; a position takes `per_position` of it."""
        steps = self.settings.online.every
        return Rounds(steps, per_position * steps * self.settings.train.total_batch_pairs, slots)

    def close(self) -> None:
        """Remove the samples of a finished run; one process calls it.

        Where it ended within a round, those of the round stay: a larger train.max_steps goes on with them.
        """
        last, rest = divmod(self.settings.train.max_steps, self.settings.online.every)
        self.samples.close(keep=last if rest else None)

    def _as_moments(self, latents: Tensor) -> LatentMoments:
        """Latents as the denoiser takes them → as the autoencoder gives them, of a posterior without spread."""
        vae = self.learner.parts.vae.config
        shift = getattr(vae, "shift_factor", None) or 0.0
        stds = torch.zeros_like(latents) if self.settings.data.sample_latents else None
        return LatentMoments(latents / vae.scaling_factor + shift, stds, vae.scaling_factor, shift)

    def _whole(self, images: int) -> Tensor:
        """Sizes and crops (N, 4) of sampled images, as a Batch has them: they are whole images."""
        side = float(self.settings.data.resolution)
        return torch.tensor([side, side, 0.0, 0.0]).repeat(images, 1)

    def _record(self, round_number: int) -> Path:
        return self.folder / "online" / f"{round_number:05d}.json"

    def _read_record(self, round_number: int) -> dict[str, Any]:
        """Raises CheckpointError where it is gone or damaged: later rounds are normalised by what it holds."""
        path = self._record(round_number)
        try:
            with reading(path):
                return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError) as error:
            raise runs.CheckpointError(
                f"the record of an online round is gone or damaged: {path}. Put it back, or remove the checkpoints "
                f"after step {round_number * self.settings.online.every}, where that round began"
            ) from error

    def _sample_and_score(self, round_number: int) -> bool:
        """Make what is missing of a round: its images, their scores, its record. Returns whether it is whole."""
        online = self.settings.online
        with self.learner.encoders_on_device():
            with self.learner.averaged() if online.sampler == "average" else nullcontext():
                if not self.samples.fill(round_number, self._made_from(), self._sample):
                    return False
            if not self._score(round_number):
                return False
            if self.accelerator.is_main_process:
                self._write_record(round_number)
                self._draw_sheet(round_number)
        processes.wait()
        return True

    def _refuse_lost_round(self, round_number: int, step_number: int) -> None:
        if not (self._record(round_number).is_file() and self.samples.is_whole(round_number)):
            start = round_number * self.settings.online.every
            folder = self.samples.latents(round_number).folder
            raise runs.CheckpointError(
                f"the run goes on from step {step_number}, within the round that began at step {start}, and images of "
                f"that round are gone from {folder}, or its record {self._record(round_number)}. Put them "
                f"back, or remove the checkpoints after step {start}"
            )

    @property
    def _sampler(self) -> nn.Module:
        """The denoiser that samples; where that is the moving average, the policy has its weights meanwhile."""
        if self.settings.online.sampler != "reference":
            return self.learner.bare_policy
        assert self.learner.reference.network is not None, "the config asks for one"
        return self.learner.reference.network

    def _made_from(self) -> dict[str, Any]:
        """Everything that decides what a round samples, and how it is scored."""
        settings, online = self.settings, self.settings.online
        return {
            "sampler": runs.weights_checksum(self._sampler),
            "pipeline": [settings.model.pipeline, settings.model.revision],
            "prompts": self.prompts.fingerprint,
            "captions": f"cached as {settings.cache.dtype}" if settings.cache.examples else "encoded while sampling",
            "seed": settings.seed,
            "resolution": settings.data.resolution,
            "online": online.model_dump(),
            "rewards": {
                name: scorer_version(name, online.scorer_weights)
                for name in (*online.rewards, *online.held_out_rewards)
            },
            "precision": self.accelerator.mixed_precision,
        }

    def _sample(self, numbers: Sequence[int]) -> Tensor:
        """Latents of images by their numbers through all rounds: K of the first prompt, K of the second, …"""
        settings, online = self.settings, self.settings.online
        # Two draws for each number: those of a pair. An image uses the first.
        draws = noise.draw_noise(settings.seed, numbers, self.latent_shape, stream="online")
        start = draws[: len(numbers)].to(self.accelerator.device)
        captions = stack([self._caption(number // online.images_per_prompt) for number in numbers])
        captions, empty = (
            encode_on(self.accelerator.device, self.learner.parts, given)
            for given in (captions, stack([self._caption(None)]))
        )
        return sample_latents(
            self.learner.parts,
            self._sampler,
            captions,
            empty,
            start,
            num_inference_steps=online.num_inference_steps,
            guidance_scale=online.guidance_scale,
            resolution=settings.data.resolution,
        )

    def _caption(self, position: int | None) -> Tokens | Conditioning:
        """The caption of a position of all rounds' prompts; None is the empty one."""
        if position is None or self.prompts.given is None:
            return self.dataset.caption(None if position is None else self.prompts.order[position])
        return self.learner.parts.tokenize(self.prompts.text(position))[0]

    def _captions(self, positions: Sequence[int], prompts: Sequence[int]) -> Tokens | Conditioning:
        """The captions of prompts, some of them dropped as the coins of their positions say."""
        settings = self.settings
        coins = [noise.draw_coin(settings.seed, position, "caption") for position in positions]
        dropped = [coin < settings.data.caption_dropout for coin in coins]
        return stack([self._caption(None if drop else one) for drop, one in zip(dropped, prompts, strict=True)])

    @torch.no_grad()
    def _images(self, round_number: int, numbers: Sequence[int]) -> list[Image.Image]:
        """Images of a round by their numbers within it."""
        parts, latents = self.learner.parts, self.samples.latents(round_number)
        pipeline = pipeline_with(parts, self.learner.bare_policy)
        stacked = torch.from_numpy(np.stack([latents.read(number) for number in numbers])).to(self.accelerator.device)
        parts.vae.enable_slicing()  # one image at a time: decoding several would need more memory than a step
        pixels = parts.family.decode(pipeline, parts.family.pack(stacked))
        parts.vae.disable_slicing()  # it would round the encoding of training images differently
        return pipeline.image_processor.postprocess(pixels, output_type="pil")

    def _score(self, round_number: int) -> bool:
        """Score the images that have no scores yet, divided among the processes. Returns whether all are scored."""
        latents, online = self.samples.latents(round_number), self.settings.online
        first = round_number * online.prompts_per_round
        shards = range(len(latents))
        missing = processes.agree([shard for shard in shards if not self._scores_path(round_number, shard).is_file()])
        scored = 0
        for shard in processes.deal(f"online scores/{round_number}", missing, self.is_asked_to_stop):
            numbers = latents.records_of(shard)
            images = self._images(round_number, numbers)
            texts = [self.prompts.text(first + number // online.images_per_prompt) for number in numbers]
            scores = {name: scorer.score(images, texts, online.batch_size) for name, scorer in self.scorers().items()}
            write_text(self._scores_path(round_number, shard), json.dumps(scores))
            scored += 1
        if not online.keep_scorers:
            self._scorers.clear()
        processes.wait()
        return sum(processes.gather(scored)) == len(missing)

    def scorers(self) -> Mapping[str, Scorer]:
        """The rewards and the held-out ones, loaded on the training's device when they are first needed."""
        online = self.settings.online
        for name in (*online.rewards, *online.held_out_rewards):
            if name not in self._scorers:
                self._scorers[name] = load_scorer(name, self.accelerator.device, online.scorer_weights)
        return self._scorers

    def _scores_path(self, round_number: int, shard: int) -> Path:
        return self.samples.latents(round_number).folder / f"scores_{shard:05d}.json"

    def _write_record(self, round_number: int) -> None:
        """Collect a round's scores, and add them to the moments of the rounds before; one process calls it."""
        online = self.settings.online
        parts = [
            json.loads(self._scores_path(round_number, shard).read_text(encoding="utf-8"))
            for shard in range(len(self.samples.latents(round_number)))
        ]
        scores = {name: [score for part in parts for score in part[name]] for name in parts[0]}
        before = dict[str, list[float]]()
        if round_number:
            before = self._read_record(round_number - 1)["moments"]
        moments = {name: Moments(*before.get(name, ())).with_values(np.array(scores[name])) for name in online.rewards}
        first = round_number * online.prompts_per_round
        record = {
            "prompts": [self.prompts.text(first + number) for number in range(online.prompts_per_round)],
            "images_per_prompt": online.images_per_prompt,
            "scores": scores,
            "moments": moments,
        }
        self._record(round_number).parent.mkdir(exist_ok=True)
        write_text(self._record(round_number), json.dumps(record))

    def _rewards(self, record: Mapping[str, Any]) -> np.ndarray:
        """The weighted, normalised rewards of a round's images: (prompts, images)."""
        online = self.settings.online
        scores = {name: self._by_prompt(record["scores"][name]) for name in online.rewards}
        moments = {name: Moments(*values) for name, values in record["moments"].items()}
        return mixture(scores, dict(zip(online.rewards, online.weights, strict=True)), moments)

    def _by_prompt(self, scores: Sequence[float]) -> np.ndarray:
        return np.array(scores, dtype=np.float64).reshape(-1, self.settings.online.images_per_prompt)

    def _refuse_rewards(self, round_number: int, chosen: Chosen) -> NoReturn:
        """Raise ValueError for a round whose rewards tell no image from another."""
        online = self.settings.online
        raise ValueError(
            f"online round {round_number + 1}: no two images of a prompt differ in their reward by more than "
            f"online.margin={online.margin:g}, so there is nothing to train on; {chosen.not_finite} of "
            f"{online.prompts_per_round * online.images_per_prompt} rewards are not finite. Every score is in "
            f"{self._record(round_number)}: try another reward, more images of a prompt, or a smaller margin"
        )

    def _report(self, round_number: int, record: Mapping[str, Any], chosen: Chosen) -> None:
        """Log a round's rewards, with those that training never sees, and what is trained on."""
        online = self.settings.online
        metrics = {f"online/{name}": float(value) for name, value in chosen._asdict().items()}
        metrics["online/repeated_prompts"] = float(len(record["prompts"]) - len(set(record["prompts"])))
        for kind, names in (("reward", online.rewards), ("held_out_reward", online.held_out_rewards)):
            for name in names:
                scores = self._by_prompt(record["scores"][name])
                metrics[f"online/{kind}/{name}"] = float(np.nanmean(scores))
                metrics[f"online/{kind}_spread/{name}"] = float(np.nanmean(np.nanstd(scores, axis=1)))
        self.log.row(round_number * online.every + 1, metrics)
        means = [f"{name} {metrics[f'online/reward/{name}']:.4g}" for name in online.rewards]
        means += [
            f"{name} {metrics[f'online/held_out_reward/{name}']:.4g} (held out)" for name in online.held_out_rewards
        ]
        self.log.say(
            f"online round {round_number + 1}: {chosen.items} {self.settings.loss.objective.takes} of "
            f"{online.prompts_per_round} prompts, {chosen.skipped_prompts} without one; mean {', '.join(means)}"
        )

    def _draw_sheet(self, round_number: int) -> None:
        """A sheet of the first prompts' images, with their rewards; one process calls it."""
        per_prompt = self.settings.online.images_per_prompt
        record = self._read_record(round_number)
        rewards = self._rewards(record)[:SHEET_PROMPTS]
        images = self._images(round_number, range(rewards.size))
        columns = {f"image {number}": images[number::per_prompt] for number in range(per_prompt)}
        captions = [
            f"{prompt} (reward {', '.join(f'{reward:+.2f}' for reward in group)})"
            for prompt, group in zip(record["prompts"], rewards, strict=False)
        ]
        save_sheet(self.folder / "samples" / f"round_{round_number:05d}.png", contact_sheet(columns, captions))
