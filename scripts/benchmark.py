"""Measure what a step costs, its speed and its memory: each subcommand prints a table and writes it with --json FILE.

    python scripts/benchmark.py flops
    python scripts/benchmark.py step --rounds 5 --json step.json
    python scripts/benchmark.py step --help

Variants are timed in turn within one process. OMP_NUM_THREADS sets the number of threads.
"""

import argparse
import os
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import notes concern torchvision, not used here

from benchmarks import data, flops, loading, memory, reports, results, sampling, scoring, steps

from xdpo.paths import user_path

BENCHMARKS = {
    "flops": flops,
    "step": steps,
    "memory": memory,
    "loader": loading,
    "data": data,
    "sample": sampling,
    "score": scoring,
    "report": reports,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark. Returns the exit status."""
    options = build_parser().parse_args(arguments)
    settings = {name: value for name, value in vars(options).items() if name not in ("benchmark", "json")}
    try:
        outcome = BENCHMARKS[options.benchmark].run(options)
        results.show(outcome)
        if options.json:
            results.save(options.json, options.benchmark, settings, outcome)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, module in BENCHMARKS.items():
        description = module.__doc__ or ""
        command = commands.add_parser(name, help=description.partition("\n")[0], description=description)
        module.add_arguments(command)
        command.add_argument(
            "--json", type=user_path, metavar="FILE", help="write table, all rounds, machine and versions"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
