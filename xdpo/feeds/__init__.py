"""What an optimizer step trains on: the data's pairs or single images, or pairs with images sampled by the run."""

from collections.abc import Callable
from pathlib import Path

from xdpo.data import StepSampler, UnpairedDataset
from xdpo.feeds.interface import Feed
from xdpo.feeds.offline import OfflineFeed
from xdpo.feeds.online import OnlineFeed, OnlineImages, OnlinePairs
from xdpo.feeds.online_rounds import check_online
from xdpo.feeds.self_play import SelfPlay, SelfPlayFeed, check_snapshots
from xdpo.learner import Learner
from xdpo.precompute import Examples, Pairs, latent_shape
from xdpo.runlog import RunLog

__all__ = [
    "Feed",
    "OfflineFeed",
    "OnlineFeed",
    "OnlineImages",
    "OnlinePairs",
    "SelfPlay",
    "SelfPlayFeed",
    "build_feed",
    "check_online",
    "check_snapshots",
]


def build_feed(
    learner: Learner,
    pairs: Pairs,
    dataset: Examples,
    sampler: StepSampler,
    folder: Path,
    log: RunLog,
    is_asked_to_stop: Callable[[], bool],
) -> Feed:
    """The feed that a run's config asks for. folder: the run's."""
    settings, accelerator = learner.settings, learner.accelerator
    self_play = None
    if settings.loss.samples_rejected:  # made first, because it replaces the order of the data set
        network = learner.reference.network
        assert network is not None and not isinstance(dataset, UnpairedDataset), "the config allows neither"
        shape = latent_shape(pairs, learner.parts, settings)
        self_play = SelfPlay(
            settings, accelerator, learner.parts, dataset, shape, network, folder, log.say, is_asked_to_stop
        )
    online = None
    if settings.feed.is_online:
        shape = latent_shape(pairs, learner.parts, settings)
        examples = dataset.pairs if isinstance(dataset, UnpairedDataset) else dataset
        kind = {"online_pairs": OnlinePairs, "online_images": OnlineImages}[settings.feed.name]
        online = kind(learner, examples, shape, folder, log, is_asked_to_stop)
        if not settings.online.offline_share:
            return OnlineFeed(online, sampler, None)
    accumulation, pin_memory = accelerator.gradient_accumulation_steps, accelerator.device.type == "cuda"
    feed = OfflineFeed(settings, pairs, dataset, sampler, accumulation, pin_memory=pin_memory)
    if online is not None:
        return OnlineFeed(online, sampler, feed)
    return feed if self_play is None else SelfPlayFeed(self_play, feed)
