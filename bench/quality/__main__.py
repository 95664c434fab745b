"""The comparison of GOAT with other methods, and its ablations: run, resume, report.

python -m bench.quality                       all tasks and methods; what was run before is not run again
python -m bench.quality --only digits-rare photo-tiles --methods goat lora
python -m bench.quality --suite ablation      segments, scaling, experts, rank, balance coefficient, eta
python -m bench.quality --status              what is there

``goat-kernels bench --report`` writes docs/quality.md from the results.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from goat_kernels.command_errors import CommandError


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit code, 2 for input that cannot be used."""
    # Nothing here comes from the hub, so nothing may ask it anything.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    from bench.quality.contenders import ABLATION_TASK, SUITES
    from bench.quality.runs import RESULTS_FOLDER, rows_of_task, run_task
    from bench.quality.tasks import TASKS

    known = SUITES["main"] | SUITES["ablation"]
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="main", help="(default: main)")
    parser.add_argument("--only", nargs="+", choices=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--methods", nargs="+", choices=known, metavar="NAME", help="(default: all of the suite)")
    parser.add_argument("--seeds", type=int, default=5, help="test runs of each contender (default: 5)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", default=RESULTS_FOLDER, help="(default: %(default)s)")
    parser.add_argument("--status", action="store_true", help="say what of it is there, and run nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the models are small
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen = [known[method] for method in options.methods or SUITES[options.suite]]
    for task in options.only or (TASKS if options.suite == "main" else [ABLATION_TASK]):
        if options.status:
            done = [row["contender"] for row in rows_of_task(options.results, task)]
            print(f"{task}: " + ", ".join(f"{one.name} {done.count(one.name)}" for one in chosen))
            continue
        try:
            run_task(task, chosen, options.results, options.seeds)
        except CommandError as error:
            print(f"bench.quality: error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
