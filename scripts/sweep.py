"""Train configs × values × seeds, one after another, with shared caches; the same command resumes.

    python scripts/sweep.py --configs configs/tiny/xdpo.yaml configs/tiny/sft.yaml --seeds 0 1 2 --output runs/sweep
    python scripts/sweep.py --configs configs/tiny/xdpo.yaml --grid loss.eta=0.05,0.5 loss.n=3,6 --output runs/eta_n

Every run is checked before the first one starts. A finished run is skipped, an interrupted one resumes, and a failed
one is named while the others continue. --dry-run prints how far each run is. On Slurm, run one job a run, and fill
cache.examples before, so that no two jobs fill it:

    sbatch --array=0-5 --gpus=1 --wrap 'python scripts/sweep.py … --array $SLURM_ARRAY_TASK_ID'
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from xdpo.config import ConfigError
from xdpo.experiments.runs import make_runs, progress, train_all
from xdpo.experiments.tasks import Interrupted
from xdpo.paths import user_path
from xdpo.report.grids import to_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep. Returns the exit status: 1 if a run failed, 130 after a request to stop."""
    options = build_parser().parse_args(arguments)
    try:
        runs = make_runs(
            options.configs, options.output, seeds=options.seeds, grid=dict(options.grid), common=options.set
        )
        if options.array is not None:
            if not 0 <= options.array < len(runs):
                raise ConfigError(f"--array {options.array}: the runs are 0 to {len(runs) - 1}")
            runs = runs[options.array : options.array + 1]
        if options.dry_run:
            for number, run in enumerate(runs):
                print(f"{number}: {shlex.join(run.task(options.processes).command)}")
            print(to_text(progress(runs)))
            return 0
        failed = train_all(runs, options.jobs, options.processes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt):
        print("stopped; the training in work has saved, and the same command goes on", file=sys.stderr)
        return 130
    print(to_text(progress(runs, failed)))
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=user_path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    parser.add_argument("--grid", type=_values, nargs="+", default=[], metavar="KEY=V,V,…", help="each with each")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for all runs")
    parser.add_argument(
        "--output", type=user_path, required=True, metavar="DIR", help="a folder per run, and the caches"
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="GPUs for each run (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs trained at once (default: 1)")
    parser.add_argument("--array", type=int, metavar="I", help="only run I, counted from 0")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and how each would be started")
    return parser


def _values(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    if not equals or not all(values.split(",")):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE,VALUE,…, got {text!r}")
    return key, values.split(",")


if __name__ == "__main__":
    sys.exit(main())
