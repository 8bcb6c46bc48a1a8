"""Scorers behind one small interface: `load_scorer(name).score(images, prompts)`, one float per image.

There are the paper's five metrics, the embedded world's judges, and any class in a user's file. `load_scorer` is in
`xdpo.scorers.loading`; this module has only the names, so that a command line finds them without importing torch.
"""

PAPER_SCORERS = ("pickscore", "hpsv2", "image_reward", "clip", "aesthetic")
METRIC_NAMES = (*PAPER_SCORERS, "hpsv2.1")
TINY_SCALES = {  # quantity → what its numbers are
    "alignment": "expected share of the caption's claims that hold, 0 to 1",
    "appeal": "estimated cleanness, 0 to 1",
    "reward": "the embedded annotator's utility, 0 to 7",
}
SCORER_NAMES = tuple(sorted([*METRIC_NAMES, *(f"tiny_{quantity}" for quantity in TINY_SCALES)]))
