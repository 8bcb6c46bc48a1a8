"""What online training trains on: pairs of a round's images, or the images one by one; and the feed that gives them."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from xdpo import noise
from xdpo.batch import Batch, SingleImages, join_pairs, take_pairs
from xdpo.data import IMAGES_PER_POSITION, StepSampler, image_positions_of
from xdpo.feeds.offline import OfflineFeed
from xdpo.feeds.online_rounds import Chosen, OnlineRounds
from xdpo.feeds.rewards import SampledPair, choose_pairs, optimality, shuffled
from xdpo.feeds.rounds import Rounds


class OnlinePairs(OnlineRounds):
    """Rounds whose best and worst images, or all that differ enough, are pairs."""

    pairs: list[SampledPair]
    rounds: Rounds

    def _choose(self, round_number: int, rewards: np.ndarray) -> Chosen:
        choice = choose_pairs(rewards, self.settings.online.pairs, self.settings.online.margin)
        self.pairs = shuffled(choice.pairs, self.settings.seed, round_number)
        self.rounds = self._slots(len(self.pairs), 1)
        return Chosen(len(choice.pairs), choice.skipped_prompts, choice.not_finite)

    def batch(self, positions: Sequence[int]) -> Batch:
        settings, latents = self.settings, self.samples.latents(self.round_number)
        per_prompt, first = settings.online.images_per_prompt, self.round_number * settings.online.prompts_per_round
        pairs = [self.pairs[self.rounds.slot(position)[1]] for position in positions]
        chosen = [latents.read(pair.prompt * per_prompt + pair.chosen) for pair in pairs]
        rejected = [latents.read(pair.prompt * per_prompt + pair.rejected) for pair in pairs]
        return Batch(
            positions=torch.tensor(positions),
            rows=torch.tensor([self.prompts.row(first + pair.prompt) for pair in pairs]),
            pair_ids=[
                f"round {self.round_number + 1}, prompt {pair.prompt}, images {pair.chosen} and {pair.rejected}"
                for pair in pairs
            ],
            images=self._as_moments(torch.from_numpy(np.stack([*chosen, *rejected]))),
            captions=self._captions(positions, [first + pair.prompt for pair in pairs]),
            truncated=0,
            unreadable=[],
            sizes=self._whole(2 * len(positions)),
        )


class OnlineImages(OnlineRounds):
    """Rounds whose images are trained on one by one, for objectives on single images."""

    images: list[tuple[int, float]]  # number within the round, and optimality
    rounds: Rounds

    def _choose(self, round_number: int, rewards: np.ndarray) -> Chosen:
        good = optimality(rewards, self.settings.online.advantage_limit)
        found = [(int(number), float(good.flat[number])) for number in np.flatnonzero(np.isfinite(good))]
        self.images = shuffled(found, self.settings.seed, round_number)
        self.rounds = self._slots(len(self.images), IMAGES_PER_POSITION)
        skipped = int(np.isnan(good).all(axis=1).sum())
        return Chosen(len(found), skipped, int((~np.isfinite(rewards)).sum()))

    def batch(self, positions: Sequence[int]) -> Batch:
        settings, latents = self.settings, self.samples.latents(self.round_number)
        first = self.round_number * settings.online.prompts_per_round
        image_positions = image_positions_of(positions)
        images = [self.images[self.rounds.slot(position)[1]] for position in image_positions]
        prompts = [first + number // settings.online.images_per_prompt for number, _ in images]
        good = torch.tensor([value for _, value in images])
        names = [f"image {number} of round {self.round_number + 1}" for number, _ in images]
        return Batch(
            positions=torch.tensor(positions),
            rows=torch.tensor([self.prompts.row(prompt) for prompt in prompts]),
            pair_ids=[
                f"{one}, {other}" for one, other in zip(names[: len(positions)], names[len(positions) :], strict=True)
            ],
            images=self._as_moments(torch.from_numpy(np.stack([latents.read(number) for number, _ in images]))),
            captions=self._captions(image_positions, prompts),
            truncated=0,
            unreadable=[],
            sizes=self._whole(2 * len(positions)),
            single=SingleImages(torch.tensor(image_positions), good > 0.5, good),
        )


class OnlineFeed:
    """Batches of the policy's own images; of pairs, some are the data's instead (online.offline_share).

    sampler: the positions of this process's micro-batches. offline: the data's pairs at the same positions; None where
    none are mixed in.
    """

    def __init__(self, online: OnlineRounds, sampler: StepSampler, offline: OfflineFeed | None):
        self.online, self.offline = online, offline
        self._positions = iter(sampler)

    @property
    def wait_seconds(self) -> float:
        return 0.0 if self.offline is None else self.offline.wait_seconds

    def begin_step(self, step_number: int, policy: nn.Module) -> bool:
        if self.offline is not None:
            self.offline.begin_step(step_number, policy)
        return self.online.begin_step(step_number)

    def micro_batches(self) -> Iterator[Batch]:
        if self.offline is None:
            for _ in range(self.online.accelerator.gradient_accumulation_steps):
                yield self.online.batch(next(self._positions))
        else:
            for batch in self.offline.micro_batches():
                yield self._mixed(batch)

    def close(self) -> None:
        self.online.close()

    def _mixed(self, offline: Batch) -> Batch:
        """The data's pairs where a position's coin says so, and online pairs elsewhere."""
        settings, learner = self.online.settings, self.online.learner
        share, positions = settings.online.offline_share, offline.positions.tolist()
        is_offline = [noise.draw_coin(settings.seed, position, "online_share") < share for position in positions]
        kept = [index for index, keep in enumerate(is_offline) if keep]
        sampled = [position for position, keep in zip(positions, is_offline, strict=True) if not keep]
        parts = [take_pairs(offline, kept)] if kept else []
        parts += [self.online.batch(sampled)] if sampled else []
        # Encoded, so that pixels and latents, tokens and encoded captions can share a batch.
        with learner.accelerator.autocast():
            return join_pairs([learner.make_noisy.encoded(part) for part in parts])
