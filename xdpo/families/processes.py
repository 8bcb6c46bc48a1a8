"""The process of a pipeline: what its scheduler describes, with a config's choices."""

from typing import TYPE_CHECKING

from xdpo.config import NoiseConfig
from xdpo.noise import DiffusionProcess, FlowProcess, Weighting

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


def diffusion(scheduler: "SchedulerMixin", noise: NoiseConfig) -> DiffusionProcess:
    """Raises ValueError for another kind of scheduler, or a key that acts in flows alone."""
    if noise.shift is not None:
        raise ValueError(
            f"noise.shift (got {noise.shift:g}) acts in flows alone, and this model is a diffusion; remove it"
        )
    return DiffusionProcess.from_scheduler(scheduler, _weighting(noise))


def flow(scheduler: "SchedulerMixin", noise: NoiseConfig) -> FlowProcess:
    """Raises ValueError for another kind of scheduler, or a weighting that has no meaning in a flow."""
    return FlowProcess.from_scheduler(scheduler, _weighting(noise), noise.shift)


def _weighting(noise: NoiseConfig) -> Weighting:
    return Weighting(noise.weighting, noise.min_snr_gamma, noise.discount)
