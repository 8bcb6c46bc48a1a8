"""Check what this project claims of GPUs on the one at hand: a table, gpu_report.md and gpu_report.json.

    python scripts/check_gpu.py            random weights of the published models' sizes: 60 GB of disk for a while
    python scripts/check_gpu.py --quick    a quarter of its width at 256 pixels: speed and memory are not judged
    python scripts/check_gpu.py --device cpu --tiny    the same code on next to no weights, without a GPU
    python scripts/check_gpu.py --only speed    one part, when something in it was changed
    python scripts/check_gpu.py --only fp16 sdxl    the claims in which one of these words stands

Each claim "holds", "DOES NOT HOLD", with the two numbers that were compared and what to try, or is "not possible here".
One that does not hold makes the exit status 1. It needs no network, and other versions than those of requirements.txt
will do: it prints which it met. On a CPU, graphs are traced without making kernels, fp16's loss scaling runs in
float32, and no memory is limited.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # of a bare checkout, where the package isn't installed
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

from xdpo.paths import user_path

if TYPE_CHECKING:
    from gpu_checks.rows import Row

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("losses", "memory", "speed", "trainings", "images")  # modules of gpu_checks


def main(arguments: list[str] | None = None) -> int:
    """Check every claim and write the report. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", default="true", help="minutes")
    sizes.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="a minute or two on a CPU")
    parser.add_argument(
        "--only", nargs="+", default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}; or words of a claim"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--output", type=user_path, default=Path("runs"), help="folder of the report (default: runs)")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    paths = [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # of the processes that checks start
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once; deterministic kernels need it
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        return check(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def check(options: argparse.Namespace) -> int:
    import torch  # not before the device is chosen
    from benchmarks.folders import working_folder
    from gpu_checks import report, rows
    from gpu_checks.context import SIZES, Context

    every = rows_of(options.only)
    is_possible = options.device == "cpu" or torch.cuda.is_available()
    facts = report.describe(options.size, options.device if is_possible else None)
    print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    for card in facts["cards"]:
        print("{name}, {memory_gb} GB".format_map(card))
    findings = []
    if not is_possible:
        print("there is no CUDA GPU here, so nothing is checked; --device cpu --tiny runs the same code on a CPU")
        findings = [rows.Finding(rows.Verdict.IMPOSSIBLE, remedy="there is no GPU")] * len(every)
        written = report.write(options.output, facts, every, findings)
    else:
        with working_folder() as working:
            context = Context(SIZES[options.size], working, on_gpu=options.device == "cuda")
            for row in every:
                findings.append(rows.judge(row, context))
                print(report.line(row, findings[-1]), flush=True)
                # After each row, so that a check that is stopped leaves what it found.
                written = report.write(options.output, facts, every[: len(findings)], findings)
    print(f"{report.tally(findings)}; see {' and '.join(map(str, written))}")
    return 1 if any(finding.verdict is rows.Verdict.FAILS for finding in findings) else 0


def rows_of(parts: Sequence[str] = PARTS) -> tuple["Row", ...]:
    """The rows of the named parts, and those whose claim contains one of the other texts, in the table's order.

    Raises ValueError for a text that no claim contains.
    """
    rows_by_part = {part: importlib.import_module(f"gpu_checks.{part}").ROWS for part in PARTS}
    words = [part for part in parts if part not in PARTS]
    for word in words:
        if not any(word in row.claim for rows in rows_by_part.values() for row in rows):
            raise ValueError(f"--only: {word!r} is none of {', '.join(PARTS)}, and no claim contains it")
    return tuple(
        row
        for part, rows in rows_by_part.items()
        for row in rows
        if part in parts or any(word in row.claim for word in words)
    )


if __name__ == "__main__":
    sys.exit(main())
