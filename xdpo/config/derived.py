"""Values that follow from a config (batch, learning rate, effective β), and the differences between two configs."""

from typing import Any

from xdpo.config.explain import in_yaml
from xdpo.config.files import shown, values_of
from xdpo.config.sections import KEYS, Config
from xdpo.config.splitting import micro_steps

PICKAPIC_V2_PAIRS = 851_293
"""Training pairs of Pick-a-Pic v2 without ties, as the Diffusion-DPO paper counts them."""


KEYS_WITHOUT_EFFECT = frozenset(
    {
        "output_dir",
        "model.family",
        "train.micro_batch_pairs",  # the same pairs per step, to float rounding
        "data.num_workers",
        "data.max_unreadable_share",
        "cache.build",
        "cache.local_copy",
        "cache.reference",
        *(key for key in KEYS if key.partition(".")[0] in ("eval", "samples", "checkpoint", "export", "log")),
    }
)
"""The keys that may differ between two parts of one run: they change what is shown of it, not what it computes.

`train.max_steps` is one too while the learning rate is constant; with a decaying one it sets the decay.
Precision, compilation, deterministic kernels and checkpointed gradients are not: they leave the method alone but
change bits.
"""


def changed_keys(old: Config, new: Config) -> list[str]:
    """Lines such as `loss.beta: 1000 → 2000`, for the keys that change what a run computes."""
    ignored = KEYS_WITHOUT_EFFECT
    if bool(old.cache.examples) == bool(new.cache.examples):
        ignored = ignored | {"cache.examples"}  # it may move; reading from it at all rounds as cache.dtype does
    if old.optim.schedule == new.optim.schedule == "constant":
        ignored = ignored | {"train.max_steps"}
    before, after = values_of(old), values_of(new)
    return [
        f"{key}: {_text(before[key])} → {_text(after[key])}"
        for key in KEYS
        if key not in ignored and before[key] != after[key]
    ]


def _text(value: Any) -> str:
    """A value on one line, a number as a config file has it (1000, 5e-5, 1/6)."""
    return in_yaml(value) if isinstance(value, float) else shown(value)


def accumulation_steps(config: Config, num_processes: int) -> int:
    """Micro-steps per optimizer step: total batch / (micro batch × processes).

    Raises:
        ValueError: when that is not a whole number; the message names the sizes that would work.
    """
    return micro_steps(config.train.total_batch_pairs, config.train.micro_batch_pairs, num_processes)


def effective_learning_rate(config: Config) -> float:
    """The learning rate after warm-up: the configured one, times the total batch in pairs with `scale_lr`."""
    scale = config.train.total_batch_pairs if config.optim.scale_lr else 1
    return config.optim.learning_rate * scale


def effective_beta(config: Config) -> float | None:
    """The β of the Diffusion-DPO loss that this loss equals near the reference, where d is about 0.

    None for an objective that is not Diffusion-DPO near the reference. With loss.margin_weight, each pair's is this
    times its weight.
    """
    objective = config.loss.objective
    return objective.effective_beta and objective.effective_beta(**config.loss.hyperparameters)[0]


def describe(config: Config, num_processes: int, num_pairs: int | None = None) -> str:
    """What follows from a config on `num_processes` processes, one line each, for a person to check before a run.

    `num_pairs` is the number of training pairs where it is known.

    Raises:
        ValueError: when the total batch cannot be split over the processes (`accumulation_steps`).
    """
    train, optim, loss = config.train, config.optim, config.loss
    accumulation = accumulation_steps(config, num_processes)
    effective_rate = float(f"{effective_learning_rate(config):g}")  # without what the product adds in its last digit
    lines = {
        "total batch": f"{train.total_batch_pairs} pairs = {num_processes} (processes) × {accumulation} (accumulation) "
        f"× {train.micro_batch_pairs} (micro batch)",
        "learning rate": f"{_text(optim.learning_rate)} configured, {_text(effective_rate)} effective "
        + (f"(× {train.total_batch_pairs} pairs, optim.scale_lr)" if optim.scale_lr else "(not scaled)"),
        "warm-up": f"{optim.warmup_steps} steps, then {optim.schedule}"
        + (": longer than the run" if optim.warmup_steps > train.max_steps else ""),
    }
    lines["objective"] = loss.name + "".join(f", {key} {in_yaml(value)}" for key, value in loss.hyperparameters.items())
    if loss.objective.effective_beta:
        effective, formula = loss.objective.effective_beta(**loss.hyperparameters)
        lines["effective β"] = f"{effective:g} = {formula}"
    if loss.margin_weight is not None:
        lines["margin weights"] = f"{loss.margin_weight:g}·(2p − 1) times each pair's β, p from its two scores"
    pairs_seen = train.max_steps * train.total_batch_pairs
    lines["steps"] = f"{train.max_steps:,} optimizer steps, {pairs_seen:,} pairs seen"
    lines["epochs"] = _epochs(config, pairs_seen, num_pairs)
    width = max(map(len, lines))
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines.items())


def _epochs(config: Config, pairs_seen: int, num_pairs: int | None) -> str:
    if num_pairs is not None:
        return f"{pairs_seen / num_pairs:.2f} of {num_pairs:,} pairs"
    if config.data.source != "hub":
        return "known once the data are read"
    about = min(PICKAPIC_V2_PAIRS, config.data.max_pairs or PICKAPIC_V2_PAIRS)
    return f"about {pairs_seen / about:.2f}, if the data are Pick-a-Pic v2 ({about:,} pairs)"
