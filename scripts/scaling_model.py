"""Training speed, memory and traffic against the number of GPUs, on paper: the tables of docs/scaling.md.

    python scripts/scaling_model.py

Counted: FLOPs (scripts/benchmark.py flops), bytes of weights, gradients and cache. Assumed: the rates below. The model
of an optimizer step on N GPUs is

    seconds = pairs / N · TFLOP per pair / rate + 2 (N − 1) / N · gradient bytes / link

with nothing hidden behind anything else: one all-reduce a step, as a ring, through the slowest link in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

TOTAL_BATCH_PAIRS = 256
TFLOPS_PER_GPU = 90.0  # bf16, the middle of 60 to 120 that such training reaches on cards from an RTX 4090 to an A100
CACHE_BYTES_PER_PAIR = 2 * 4 * 64 * 64 * 2 + 77 * 768 * 2  # latents of two images, text states of a caption, fp16
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Mode:
    """What a pair costs, and what travels in each optimizer step."""

    name: str
    tflop_per_pair: float
    gradient_bytes: float
    state_bytes: float  # per GPU: weights, gradients, Adam's moments, frozen networks


@dataclass(frozen=True)
class Link:
    name: str
    bytes_per_second: float


MODES = (
    Mode("full, recompute everything", 8.67, 3.44e9, 4 * 3.44e9 + 3.44e9 + 0.83e9),
    Mode("full, from caches", 4.81, 3.44e9, 4 * 3.44e9),
    Mode("LoRA r=64, from caches", 3.53, 0.051e9, 3.44e9 + 4 * 0.051e9),
)
LINKS = (
    Link("NVLink, 300 GB/s", 300e9),
    Link("PCIe 4 ×16 or InfiniBand 200 Gb/s, 25 GB/s", 25e9),
    Link("Ethernet 10 Gb/s, 1.25 GB/s", 1.25e9),
)


def step_seconds(mode: Mode, gpus: int, link: Link, total_batch: int = TOTAL_BATCH_PAIRS) -> tuple[float, float]:
    """Seconds of arithmetic and of exchange in one optimizer step."""
    arithmetic = total_batch / gpus * mode.tflop_per_pair / TFLOPS_PER_GPU
    return arithmetic, 2 * (gpus - 1) / gpus * mode.gradient_bytes / link.bytes_per_second


def efficiency(mode: Mode, gpus: int, link: Link, total_batch: int = TOTAL_BATCH_PAIRS) -> float:
    """Share of the step that is arithmetic: 1 is perfect scaling."""
    arithmetic, exchange = step_seconds(mode, gpus, link, total_batch)
    return arithmetic / (arithmetic + exchange)


def pairs_per_second(mode: Mode, gpus: int, link: Link, total_batch: int = TOTAL_BATCH_PAIRS) -> float:
    return total_batch / sum(step_seconds(mode, gpus, link, total_batch))


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table under its title."""
    lines = [title, "", "| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def main() -> None:
    header = ("", *(str(gpus) for gpus in GPUS))
    for mode in MODES:
        rows = [
            (
                link.name,
                *(f"{pairs_per_second(mode, n, link):.3g} ({100 * efficiency(mode, n, link):.0f} %)" for n in GPUS),
            )
            for link in LINKS
        ]
        print(table(f"Pairs per second (share that is arithmetic), {mode.name}, by GPUs and link:", header, rows))
    rows = [
        (
            mode.name,
            f"{mode.state_bytes / 1e9:.1f} GB",
            f"{2 * mode.gradient_bytes / 1e9:.3g} GB",
            f"{TFLOPS_PER_GPU / mode.tflop_per_pair * CACHE_BYTES_PER_PAIR / 1e6:.2g} MB/s"
            if "cache" in mode.name
            else "–",
        )
        for mode in MODES
    ]
    print(table("Per GPU:", ("", "weights and states", "sent in a step, at most", "read from the cache"), rows))


if __name__ == "__main__":
    main()
