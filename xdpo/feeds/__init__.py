"""What an optimizer step trains on: the data's own pairs or single images, or pairs that the run samples itself."""

from collections.abc import Callable
from pathlib import Path

from torch.utils.data import Dataset

from xdpo.data import StepSampler
from xdpo.feeds.interface import Feed
from xdpo.feeds.offline import OfflineFeed
from xdpo.feeds.self_play import SelfPlay, SelfPlayFeed, check_snapshots
from xdpo.learner import Learner
from xdpo.precompute import Pairs, latent_shape

__all__ = ["Feed", "OfflineFeed", "SelfPlay", "SelfPlayFeed", "build_feed", "check_snapshots"]


def build_feed(
    learner: Learner,
    pairs: Pairs,
    dataset: Dataset,
    sampler: StepSampler,
    folder: Path,
    say: Callable[[str], None],
    is_asked_to_stop: Callable[[], bool],
) -> Feed:
    """The feed that a run's objective asks for. `folder` is the run's; `say` prints a line on the first process."""
    settings, accelerator = learner.settings, learner.accelerator
    self_play = None
    if settings.loss.samples_rejected:  # before the data set is loaded from: it changes its order
        shape = latent_shape(pairs, learner.parts, settings)
        network = learner.reference.network
        self_play = SelfPlay(
            settings, accelerator, learner.parts, dataset, shape, network, folder, say, is_asked_to_stop
        )
    accumulation, pin_memory = accelerator.gradient_accumulation_steps, accelerator.device.type == "cuda"
    feed = OfflineFeed(settings, pairs, dataset, sampler, accumulation, pin_memory=pin_memory)
    return feed if self_play is None else SelfPlayFeed(self_play, feed)
