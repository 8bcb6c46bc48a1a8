"""Scorers behind one small interface: `load_scorer(name).score(images, prompts)`, one float per image.

There are the paper's five metrics, five later ones, the embedded world's judges, and any class in a user's file.
`load_scorer` is in `xdpo.scorers.loading`; this module has only the names, so that a command line finds them without
importing torch.
"""

import difflib

from xdpo.paths import user_path

PAPER_SCORERS = ("pickscore", "hpsv2", "image_reward", "clip", "aesthetic")
DEFAULT_SCORERS = ("pickscore", "hpsv2", "hpsv2.1", "image_reward", "clip", "aesthetic")
METRIC_NAMES = (*DEFAULT_SCORERS, "ict", "hp", "hpsv3", "vqascore")
_TINY_SCALES = {
    "alignment": "expected share of the caption's claims that hold, 0 to 1",
    "appeal": "estimated cleanness, 0 to 1",
    "warmth": "expected share of things in a warm colour, 0 to 1",
    "reward": "the embedded annotator's utility, 0 to 7",
    "warm_reward": "the utility of an annotator with a taste for warm colours, 0 to 6",
}
TINY_SCALES = _TINY_SCALES | {  # quantity → what its numbers are
    f"heldout_{quantity}": f"{scale}; by a second network" for quantity, scale in _TINY_SCALES.items()
}
REWARD_MODEL_RECORD = "reward_model.json"
EMBEDDER_NAMES = ("clip", "dinov2")
DEFAULT_EMBEDDER = "clip"
SCORER_NAMES = tuple(sorted([*METRIC_NAMES, *(f"tiny_{quantity}" for quantity in TINY_SCALES)]))


def check_name(name: str) -> None:
    """Raise ValueError, naming the nearest, for a name that is no scorer's, no class's in a file and no folder's."""
    if is_custom(name) or is_reward_model(name) or name in SCORER_NAMES:
        return
    near = difflib.get_close_matches(name, SCORER_NAMES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    choices = ", ".join(SCORER_NAMES)
    raise ValueError(
        f"unknown scorer {name!r}; choose from {choices}, or path/to/file.py:ClassName, or the folder of a reward "
        f"model{hint}"
    )


def is_custom(name: str) -> bool:
    return ".py:" in name


def is_reward_model(name: str) -> bool:
    """Whether a name is the folder of a model that scripts/train_reward_model.py made."""
    return (user_path(name) / REWARD_MODEL_RECORD).is_file()
