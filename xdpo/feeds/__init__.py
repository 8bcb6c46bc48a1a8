"""What an optimizer step trains on: the data's pairs or single images, or pairs with images sampled by the run."""

from collections.abc import Callable
from pathlib import Path

from xdpo.data import StepSampler, UnpairedDataset
from xdpo.feeds.interface import Feed
from xdpo.feeds.offline import OfflineFeed
from xdpo.feeds.self_play import SelfPlay, SelfPlayFeed, check_snapshots
from xdpo.learner import Learner
from xdpo.precompute import Examples, Pairs, latent_shape

__all__ = ["Feed", "OfflineFeed", "SelfPlay", "SelfPlayFeed", "build_feed", "check_snapshots"]


def build_feed(
    learner: Learner,
    pairs: Pairs,
    dataset: Examples,
    sampler: StepSampler,
    folder: Path,
    say: Callable[[str], None],
    is_asked_to_stop: Callable[[], bool],
) -> Feed:
    """The feed of a run's objective. folder: the run's. say: prints a line on the first process."""
    settings, accelerator = learner.settings, learner.accelerator
    self_play = None
    if settings.loss.samples_rejected:  # made first, because it replaces the order of the data set
        network = learner.reference.network
        assert network is not None and not isinstance(dataset, UnpairedDataset), "the config allows neither"
        shape = latent_shape(pairs, learner.parts, settings)
        self_play = SelfPlay(
            settings, accelerator, learner.parts, dataset, shape, network, folder, say, is_asked_to_stop
        )
    accumulation, pin_memory = accelerator.gradient_accumulation_steps, accelerator.device.type == "cuda"
    feed = OfflineFeed(settings, pairs, dataset, sampler, accumulation, pin_memory=pin_memory)
    return feed if self_play is None else SelfPlayFeed(self_play, feed)
