"""The objectives by their name in the config, `loss.name`: the only declaration of what each one takes and needs.

Config, help text, configs/base.yaml and every `if` of the training follow from the two tables here. An objective is a
function in a file of this package and a line in OBJECTIVES; a number that no other objective has is a line in KEYS.
Nothing here needs PyTorch, so that a mistake in a config is reported at once: functions are imported when asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from xdpo.loss.types import LossOutput, PairErrors

Value = float | str


@dataclass(frozen=True)
class Key:
    """One key of the `loss` section: what it means and which values it may have, in every objective that has it."""

    description: str
    default: Value | None = None  # None: null in the config, which is each objective's published value, or "off"
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    choices: tuple[str, ...] = ()  # of a text; without choices the key is a number
    is_argument: bool = True  # of the objective's function; False: the training step or the data take it


KEYS: Mapping[str, Key] = {  # in the order of the config
    "beta": Key(
        "β, pull to the reference, for errors that are means over a latent; xDPO's paper calls 1000 to 2000 stable",
        gt=0,
    ),
    "eta": Key(
        "η, weight of the linear (logarithmic) reward; 1 with gamma 0 is Diffusion-DPO",
        default=0.05,
        ge=0,
    ),
    "gamma": Key("γ, weight of the exponential (power) reward; the paper takes 1/n", default=1 / 6, ge=0),
    "n": Key("n, exponent of the power reward; effective β near the reference is β·(η + γ·n)", default=6.0, gt=0),
    "reward": Key(
        "which of the three rewards that the paper prints: they differ",
        default="appendix_c",
        choices=("appendix_c", "eq9", "eq10"),
    ),
    "label_smoothing": Key("probability that a label is wrong (conservative DPO)", default=0.0, ge=0, lt=0.5),
    "safeguard": Key(
        "μ of Diffusion-SDPO: the larger, the less is left of the rejected image's gradient that raises the chosen "
        "one's error; published 0.9, for dspo 0.2; null: none",
        ge=0,
        le=1,
        is_argument=False,
    ),
    "margin_weight": Key(
        "SmPO: β of each pair times this·(2p−1), p from its columns score_0 and score_1 (scripts/relabel.py) and the "
        "range of all training pairs'; published 10; null: none",
        gt=0,
        is_argument=False,
    ),
    "alpha": Key("α, in f_dpo of alpha_divergence alone; below 1 but for f_dpo", gt=0),
    "divergence": Key(
        "which f-divergence keeps the policy near the reference; eta, gamma and n act in xdpo",
        choices=("reverse_kl", "forward_kl", "jensen_shannon", "alpha_divergence", "xdpo"),
    ),
    "kappa": Key("κ, unit of the likelihood ratio: ln z = −κ·d", gt=0),
    "max_reward": Key("bound R of the reward", gt=0),
    "k": Key("k of f(e) = k·e/(exp(k·e) − 1)", gt=0),
    "scale": Key("factor T of the margin", gt=0),
    "flip": Key(
        "what the sampled image is where the policy is worse: the chosen one, or left out",
        choices=("sign", "indicator"),
    ),
    "utility": Key("how gains and losses count", choices=("kto", "loss_averse", "risk_seeking")),
    "desirable_share": Key("share of the images that are desirable", gt=0, lt=1, is_argument=False),
    "desirable_weight": Key("weight of a desirable image", gt=0),
    "undesirable_weight": Key("weight of any other image", gt=0),
    "error_weight": Key(
        "weight of an error; constant: 1, as the objective is derived; self_normalized: errors of x̂_0, each divided by "
        "its mean deviation |x̂_0 − x_0|, as the public code has it",
        default="constant",
        choices=("constant", "self_normalized"),
        is_argument=False,
    ),
    "kl_weight": Key(
        "k of the added k·‖v_θ − v_base‖², which pulls predictions to the base model's; 0: none; published 2e-5·β with "
        "error_weight self_normalized",
        default=0.0,
        ge=0,
        is_argument=False,
    ),
}


@dataclass(frozen=True, eq=False)
class Objective:
    """One objective: its function, the keys that act in it, and what it needs of the training."""

    path: str  # module and function in this package, as in "pairwise.mapo"
    published: Mapping[str, Value]  # its own keys, with the values of those that the config leaves null
    shared: tuple[str, ...] = ()  # the other keys that act, with their default from KEYS
    inputs: tuple[str, ...] = ()  # tensors that the function takes beside the errors, by the name of its argument
    takes: Literal["pairs", "images"] = "pairs"  # types.PairErrors, or types.UnpairedErrors of single images
    needs_reference: bool = True  # if not, the errors of the reference may be None
    needs_predictions: bool = False  # of the reference: errors that were recorded before are not enough
    samples_rejected: bool = False  # self-play: a past policy is the reference and samples the rejected images
    effective_beta: Callable[..., tuple[float, str]] | None = None
    """Hyper-parameters → the β of the Diffusion-DPO that this equals near the reference (d ≈ 0), and its formula."""
    problem: Callable[..., str | None] = lambda **hyperparameters: None
    """What is wrong with hyper-parameters that are each in their range, or None."""
    citation: str = ""  # for the model card

    @property
    def function(self) -> "Callable[..., LossOutput]":
        """The function: (errors, *, every key that is an argument, every input) → types.LossOutput."""
        module, _, name = self.path.partition(".")
        return getattr(import_module(f"{__package__}.{module}"), name)

    def of_pairs(
        self, errors: "PairErrors", desirable: "Tensor | None" = None, **arguments: "Value | Tensor"
    ) -> "LossOutput":
        """The objective on a batch's types.PairErrors → types.LossOutput of its B pairs.

        An objective of single images gets the 2B images one by one. desirable (2B,) bool labels them; without it the
        chosen ones are desirable. Its loss and margin are then means over each pair's two images.
        """
        if not self.is_unpaired:
            return self.function(errors, **arguments)
        from xdpo.loss.types import mean_by_pair, single_images

        return mean_by_pair(self.function(single_images(errors, desirable), **arguments))

    @property
    def keys(self) -> dict[str, Value | None]:
        """All keys that act here, with their values where the config has none; None: the modifier is off."""
        return {**self.published, **{name: KEYS[name].default for name in self.shared}}

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """The keys that the function takes, with their published values."""
        return {name: value for name, value in self.keys.items() if KEYS[name].is_argument and value is not None}

    @property
    def is_unpaired(self) -> bool:
        return self.takes == "images"

    @property
    def can_reuse_reference(self) -> bool:
        """Whether errors of the reference that another run recorded can stand in for it."""
        return self.needs_reference and not (self.needs_predictions or self.samples_rejected)


def _beta_itself(beta: float, **_: Value) -> tuple[float, str]:
    return beta, "β itself"


def _twice_beta(beta: float, **_: Value) -> tuple[float, str]:
    return 2 * beta, f"2·β = 2 × {beta:g}"


def _attenuated_beta(
    beta: float, eta: float, gamma: float, n: float, reward: str = "", **_: Value
) -> tuple[float, str]:
    """The derivative of Appendix C's and Eq. 9's reward at d = 0; for Eq. 10 the derivative at an error of 0."""
    factor = ", whose γ·n part grows by exp(n·e) with the error e" if reward == "eq10" else ""
    return beta * (eta + gamma * n), f"β·(η + γ·n) = {beta:g} × ({eta:g} + {gamma:g} × {n:g}){factor}"


def _beta_of_f_dpo(beta: float, divergence: str, eta: float, gamma: float, n: float, **_: Value) -> tuple[float, str]:
    """β·f″(1)."""
    if divergence == "xdpo":
        return _attenuated_beta(beta, eta, gamma, n)
    if divergence == "jensen_shannon":
        return beta * 0.5, f"β/2 = {beta:g} / 2"
    return _beta_itself(beta)


def _no_reward(eta: float, gamma: float, divergence: str = "xdpo", **_: Value) -> str | None:
    if eta == gamma == 0 and divergence == "xdpo":
        return "eta and gamma are both 0, so that the loss has no gradient; raise one of them"
    return None


def _alpha_beyond_one(alpha: float, **_: Value) -> str | None:
    return None if alpha < 1 else f"alpha (got {alpha}) must lie between 0 and 1"


_XDPO = ("eta", "gamma", "n")
_LINEAR = ("safeguard", "margin_weight")  # a margin linear in β, of pairs whose two images may have scores
_LOG_SIGMOID = ("label_smoothing", *_LINEAR)

OBJECTIVES: Mapping[str, Objective] = {  # the first is the default
    "xdpo": Objective(
        "xdpo.xdpo",
        {"beta": 1000.0},
        (*_XDPO, "reward", *_LOG_SIGMOID),
        effective_beta=_attenuated_beta,
        problem=_no_reward,
        citation='xDPO (Zhang & Xiang,\n"Diffusion Preference Alignment via Attenuated Kullback–Leibler '
        'Regularization", Electronics 14:2939, 2025)',
    ),
    "diffusion_dpo": Objective("xdpo.diffusion_dpo", {"beta": 2000.0}, _LOG_SIGMOID, effective_beta=_beta_itself),
    "chipo": Objective(
        "f_divergence.chipo",
        {"beta": 1000.0, "kappa": 1.0, "max_reward": 10.0},
        _LOG_SIGMOID,
        effective_beta=_twice_beta,
    ),
    "f_dpo": Objective(
        "f_divergence.f_dpo",
        {"beta": 2000.0, "divergence": "reverse_kl", "kappa": 1.0, "alpha": 0.5},
        (*_XDPO, *_LOG_SIGMOID),
        effective_beta=_beta_of_f_dpo,
        problem=_no_reward,
    ),
    "ipo": Objective("pairwise.ipo", {"beta": 5000.0}, _LINEAR),
    "hinge": Objective("pairwise.hinge", {"beta": 5000.0}, _LINEAR),
    "dmpo": Objective("pairwise.dmpo", {"beta": 2000.0, "alpha": 0.01}, _LINEAR, problem=_alpha_beyond_one),
    "alpha_dpo": Objective("pairwise.alpha_dpo", {"beta": 4000.0, "alpha": 0.9999}, _LINEAR, problem=_alpha_beyond_one),
    "dspo": Objective(
        "pairwise.dspo", {"beta": 0.001}, ("safeguard",), inputs=("policy_dot_reference",), needs_predictions=True
    ),
    "mapo": Objective(
        "pairwise.mapo",
        {"beta": 0.1, "k": 0.5, "scale": 1000.0},
        ("label_smoothing", "safeguard"),
        needs_reference=False,
    ),
    "sft": Objective("pairwise.sft", {}, needs_reference=False),
    "seppo": Objective(  # its sampled images have no scores: no margin_weight
        "pairwise.seppo",
        {"beta": 2000.0, "flip": "sign"},
        ("label_smoothing", "safeguard"),
        samples_rejected=True,
        effective_beta=_beta_itself,
    ),
    "diffusion_kto": Objective(
        "unpaired.diffusion_kto",
        {
            "beta": 5000.0,
            "utility": "kto",
            "desirable_share": 0.8,
            "desirable_weight": 1.0,
            "undesirable_weight": 1.0,
        },
        inputs=("z0",),
        takes="images",
    ),
    "diffusion_nft": Objective(
        "unpaired.diffusion_nft",
        {"beta": 1.0, "desirable_share": 0.5},
        ("error_weight", "kl_weight"),
        inputs=("optimality", "image_dot_reference", "error_weights"),
        takes="images",
        needs_predictions=True,
    ),
}
