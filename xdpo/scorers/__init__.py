"""Scorers behind one small interface: `load_scorer(name).score(images, prompts)`, one float per image.

The paper's five metrics, the embedded world's judges, and any class in a file of the user's own. `xdpo.scorers.loading`
has `load_scorer`; the names alone are here, where a command line finds them without importing torch.
"""

PAPER_SCORERS = ("pickscore", "hpsv2", "image_reward", "clip", "aesthetic")
METRIC_NAMES = (*PAPER_SCORERS, "hpsv2.1")
TINY_SCALES = {  # quantity → what its numbers are
    "alignment": "expected share of the caption's claims that hold, 0 to 1",
    "appeal": "estimated cleanness, 0 to 1",
    "reward": "the embedded annotator's utility, 0 to 7",
}
SCORER_NAMES = tuple(sorted([*METRIC_NAMES, *(f"tiny_{quantity}" for quantity in TINY_SCALES)]))
