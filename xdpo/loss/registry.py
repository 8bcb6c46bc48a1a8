"""Every objective by its name in a config, and what a caller has to know before calling it.

The signature of an objective's function is its declaration: the first argument's type says pairs or single images,
a keyword with a default is a config key with its published default, a keyword without one is a tensor to bring along.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from xdpo.loss.f_divergence import chipo, f_dpo
from xdpo.loss.pairwise import alpha_dpo, dmpo, dspo, hinge, ipo, mapo, seppo, sft
from xdpo.loss.types import LossOutput
from xdpo.loss.unpaired import diffusion_kto
from xdpo.loss.xdpo import diffusion_dpo, xdpo


@dataclass(frozen=True)
class Objective:
    """One objective and its needs."""

    function: Callable[..., LossOutput]
    needs_reference: bool = True  # if not, the errors of the reference may be None
    beta_scales_margin: bool = True  # β may be (B,), which weights the margins (modifiers.margin_weights)

    @property
    def keys(self) -> Mapping[str, float | str]:
        """The config keys that act here, with their published defaults."""
        return {name: value.default for name, value in self._keywords() if value.default is not value.empty}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors that the call needs besides the errors, as keyword arguments."""
        return tuple(name for name, value in self._keywords() if value.default is value.empty)

    @property
    def errors(self) -> type:
        """PairErrors or UnpairedErrors: what the first argument is."""
        return next(iter(self._parameters())).annotation

    def _parameters(self):
        return inspect.signature(self.function).parameters.values()

    def _keywords(self):
        return [(value.name, value) for value in self._parameters() if value.kind is value.KEYWORD_ONLY]


OBJECTIVES: Mapping[str, Objective] = {
    "xdpo": Objective(xdpo),
    "diffusion_dpo": Objective(diffusion_dpo),
    "f_dpo": Objective(f_dpo),
    "chipo": Objective(chipo),
    "ipo": Objective(ipo),
    "hinge": Objective(hinge),
    "dmpo": Objective(dmpo),
    "alpha_dpo": Objective(alpha_dpo),
    "seppo": Objective(seppo),
    "dspo": Objective(dspo, beta_scales_margin=False),
    "mapo": Objective(mapo, needs_reference=False, beta_scales_margin=False),
    "sft": Objective(sft, needs_reference=False, beta_scales_margin=False),
    "diffusion_kto": Objective(diffusion_kto, beta_scales_margin=False),
}

LOSSES: dict[str, Callable[..., LossOutput]] = {name: objective.function for name, objective in OBJECTIVES.items()}
"""From `loss.name` to the function that the step calls with the errors, its inputs and the section's other keys."""
