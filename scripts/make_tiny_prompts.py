"""Write `tinyprompts`, the prompt set of the embedded world: `python scripts/make_tiny_prompts.py` (a second)."""

from pathlib import Path

from xdpo.files import write_text
from xdpo.tiny.world import tiny_prompts

if __name__ == "__main__":
    lines = ["category\tprompt", *(f"{category}\t{prompt}" for category, prompt in tiny_prompts())]
    path = Path(__file__).resolve().parent.parent / "assets" / "tiny" / "prompts.tsv"
    write_text(path, "\n".join(lines) + "\n")
