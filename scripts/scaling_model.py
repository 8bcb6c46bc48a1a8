"""Training time, speed and traffic against the number of GPUs, on paper: the tables of docs/scaling.md.

    python scripts/scaling_model.py

Counted: FLOPs and memory (scripts/benchmark.py flops, and memory --count), bytes of weights, gradients and cache.
Assumed: the rates below. The model of a pass (one micro-batch) and of an optimizer step on N GPUs is

    pass = pairs in it · TFLOP per pair / rate(images in it) + bytes that any pass moves / memory bandwidth
    step = passes of a GPU · pass + 2 (N − 1) / N · gradient bytes / link

where nothing overlaps. A step has one all-reduce, as a ring, through the slowest link in it. With few images a GPU
waits for the next kernel, hence rate(images) = most · images / (images + 2). A pass of any size casts every float32
weight to bf16 in each forward (6 bytes a weight), and casts and adds every gradient (18 bytes).
"""

from collections.abc import Sequence
from dataclasses import dataclass

TOTAL_BATCH_PAIRS = 256
STEPS = 6_000
LOW, MIDDLE, HIGH = 60.0, 90.0, 120.0  # TFLOP/s of a GPU in large passes, bf16, from an RTX 4090 to an A100
IMAGES_AT_HALF_RATE = 2
BYTES_PER_SECOND = 1.0e12  # of a GPU's memory: an RTX 4090's
CACHE_BYTES_PER_PAIR = 2 * 4 * 64 * 64 * 2 + 77 * 768 * 2  # latents of two images, text states of a caption, fp16
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

UNET_WEIGHTS, ENCODER_WEIGHTS, ADAPTER_WEIGHTS = 859.5e6, 157.2e6, 12.75e6  # the autoencoder's decoder left out
UNET_TFLOP, AUTOENCODER_TFLOP, TEXT_TFLOP = 0.803, 1.117, 0.013  # forward, of an image or a caption
POLICY_TFLOP = {("full", False): 2.407, ("full", True): 3.002, ("lora", False): 1.765, ("lora", True): 2.371}
CACHED = {"nothing": "recompute everything", "examples": "examples cached", "both": "from both caches"}
CAST_BYTES = 4 + 2  # of a weight: read as float32, written as bf16
GRADIENT_BYTES = 2 + 4 + 4 + 4 + 4  # of a weight: read as bf16, written as float32; read, added to the sum, written


@dataclass(frozen=True)
class Mode:
    """A way to train. `cached`: nothing, examples or both. `peak_gb`: a GPU's peak memory, counted with two GPUs."""

    trainable: str
    cached: str
    checkpointing: bool
    micro_batch: int
    peak_gb: float

    def __str__(self) -> str:
        return f"{self.trained}, {self.cached_words}, micro-batch {self.micro_batch}"

    @property
    def trained(self) -> str:
        return {"full": "full", "lora": "LoRA r=64"}[self.trainable]

    @property
    def cached_words(self) -> str:
        return {"nothing": "recompute everything", "examples": "examples cached", "both": "from both caches"}[
            self.cached
        ]

    @property
    def tflop_per_pair(self) -> float:
        tflop = 2 * POLICY_TFLOP[self.trainable, self.checkpointing]
        tflop += 0 if self.cached == "both" else 2 * UNET_TFLOP
        return tflop + (2 * AUTOENCODER_TFLOP + TEXT_TFLOP if self.cached == "nothing" else 0)

    @property
    def trained_weights(self) -> float:
        return UNET_WEIGHTS if self.trainable == "full" else ADAPTER_WEIGHTS

    @property
    def pass_bytes(self) -> float:
        """Bytes that any pass moves: the casts of each forward's weights, and the gradients."""
        forwards = 1 + self.checkpointing + (self.cached != "both")
        encoders = ENCODER_WEIGHTS if self.cached == "nothing" else 0
        return CAST_BYTES * (forwards * UNET_WEIGHTS + encoders) + GRADIENT_BYTES * self.trained_weights

    @property
    def gradient_bytes(self) -> float:
        return 4 * self.trained_weights


@dataclass(frozen=True)
class Link:
    name: str
    bytes_per_second: float


RUNS = (
    Mode("full", "nothing", True, 1, 18.96),
    Mode("full", "nothing", True, 2, 19.91),
    Mode("full", "nothing", False, 1, 22.22),
    Mode("full", "examples", True, 1, 18.70),
    Mode("full", "examples", True, 4, 19.67),
    Mode("full", "both", True, 1, 15.26),
    Mode("full", "both", True, 4, 16.23),
    Mode("full", "both", False, 1, 17.95),
    Mode("full", "both", False, 2, 20.48),
    Mode("lora", "nothing", False, 1, 8.47),
    Mode("lora", "nothing", False, 4, 15.56),
    Mode("lora", "both", False, 4, 14.74),
)
"""Of the paper's run, those of which the time is estimated."""
MODES = (RUNS[1], RUNS[8], RUNS[11])
LINKS = (
    Link("NVLink, 300 GB/s", 300e9),
    Link("PCIe 4 ×16 or InfiniBand 200 Gb/s, 25 GB/s", 25e9),
    Link("Ethernet 10 Gb/s, 1.25 GB/s", 1.25e9),
)


def rate(images: float, most: float) -> float:
    """TFLOP/s that a pass of this many images reaches."""
    return most * images / (images + IMAGES_AT_HALF_RATE)


def pass_seconds(mode: Mode, pairs: float, most: float = MIDDLE) -> float:
    return pairs * mode.tflop_per_pair / rate(2 * pairs, most) + mode.pass_bytes / BYTES_PER_SECOND


def step_seconds(
    mode: Mode, gpus: int, link: Link, total_batch: int = TOTAL_BATCH_PAIRS, most: float = MIDDLE
) -> tuple[float, float]:
    """Seconds of all passes of a GPU and of the exchange in one optimizer step."""
    share = total_batch / gpus
    pairs = min(mode.micro_batch, share)
    exchange = 2 * (gpus - 1) / gpus * mode.gradient_bytes / link.bytes_per_second
    return share / pairs * pass_seconds(mode, pairs, most), exchange


def pairs_per_second(mode: Mode, gpus: int, link: Link, total_batch: int = TOTAL_BATCH_PAIRS) -> float:
    return total_batch / sum(step_seconds(mode, gpus, link, total_batch))


def efficiency(mode: Mode, gpus: int, link: Link, total_batch: int = TOTAL_BATCH_PAIRS) -> float:
    """Speed on N GPUs over N times one GPU's speed; 1 is perfect scaling."""
    alone = pairs_per_second(mode, 1, link, total_batch)
    return pairs_per_second(mode, gpus, link, total_batch) / (gpus * alone)


def hours(mode: Mode, gpus: int, link: Link, most: float = MIDDLE) -> float:
    """Hours of the paper's run, without evaluation, samples and checkpoints."""
    return STEPS * sum(step_seconds(mode, gpus, link, most=most)) / 3600


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table under its title; the first `words` columns hold text, the others numbers."""
    lines = [title, "", "| " + " | ".join(header) + " |", "|---" * words + "|---:" * (len(header) - words) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def run_rows(link: Link) -> list[tuple[str, ...]]:
    return [
        (
            mode.trained,
            mode.cached_words,
            "yes" if mode.checkpointing else "no",
            str(mode.micro_batch),
            f"{mode.peak_gb:.1f}",
            f"{1000 * mode.pass_bytes / BYTES_PER_SECOND:.0f} ms",
            f"{1000 * pass_seconds(mode, mode.micro_batch):.0f} ms",
            *(
                "{:.0f} ({:.0f}–{:.0f})".format(*(hours(mode, gpus, link, most) for most in (MIDDLE, HIGH, LOW)))
                for gpus in (1, 2)
            ),
        )
        for mode in RUNS
    ]


def main() -> None:
    rates = f"{MIDDLE:.0f} ({HIGH:.0f}–{LOW:.0f}) TFLOP/s"
    title = f"Hours of the paper's run, {STEPS:,} steps of {TOTAL_BATCH_PAIRS} pairs, at {rates} in large passes:"
    header = ("trained", "", "checkpointing", "micro-batch", "GB a GPU", "bytes of a pass", "a pass", "1 GPU", "2 GPUs")
    print(table(title, header, run_rows(LINKS[1]), words=3))
    gpus_header = ("", *(str(gpus) for gpus in GPUS))
    for mode in MODES:
        rows = [
            (
                link.name,
                *(f"{pairs_per_second(mode, n, link):.3g} ({100 * efficiency(mode, n, link):.0f} %)" for n in GPUS),
            )
            for link in LINKS
        ]
        print(table(f"Pairs per second (share of N times one GPU), {mode}, by GPUs and link:", gpus_header, rows))
    rows = [
        (
            str(mode),
            f"{2 * mode.gradient_bytes / 1e9:.3g} GB",
            f"{pairs_per_second(mode, 1, LINKS[0]) * CACHE_BYTES_PER_PAIR / 1e6:.2g} MB/s"
            if mode.cached != "nothing"
            else "–",
        )
        for mode in MODES
    ]
    print(table("Per GPU:", ("", "sent in a step, at most", "read from the cache"), rows))


if __name__ == "__main__":
    main()
