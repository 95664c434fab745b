"""The comparison of GOAT with other methods, and its ablations: run, resume, report.

python -m bench.quality                       all tasks and methods; what was run before is not run again
python -m bench.quality --only digits-rare photo-tiles --methods goat lora
python -m bench.quality --suite ablation      segments, scaling, experts, rank, balance coefficient, eta
python -m bench.quality --status              what is there
python -m bench.quality --quick --results FOLDER        everything in small, in seconds; numbers that mean nothing

``goat-kernels bench --report`` writes docs/quality.md and its figures from the results.
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
    try:
        return _run(arguments)
    except CommandError as error:
        print(f"bench.quality: error: {error}", file=sys.stderr)
        return 2


def _run(arguments: list[str] | None) -> int:
    import torch
    import transformers

    from bench.quality.contenders import ABLATION_TASK, contenders
    from bench.quality.runs import RESULTS_FOLDER, Plan, run_task
    from bench.quality.tasks import TASKS

    options = _parser(list(TASKS)).parse_args(arguments)
    if options.quick and options.results is None:
        raise CommandError("--quick needs --results FOLDER: its numbers are not to be kept among the others")
    known = contenders(options.suite)
    unknown = [name for name in options.methods or () if name not in known]
    if unknown:
        raise CommandError(f"--methods {' '.join(unknown)} is unknown; it must be among {', '.join(known)}")
    chosen = [known[name] for name in options.methods or known]
    names = options.only or (list(TASKS) if options.suite == "main" else [ABLATION_TASK])
    plan = Plan(seeds=options.seeds, quick=options.quick, device=options.device)
    folder = options.results or RESULTS_FOLDER
    if options.status:
        for name in names:
            print(_status(name, chosen, plan, folder))
        return 0
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in names:
        run_task(name, chosen, plan, folder)
    return 0


def _status(name: str, chosen, plan, folder: Path) -> str:
    from bench.quality.runs import rows_of_task
    from bench.quality.tasks import TASKS

    names = {one.name for one in chosen}
    rows = [row for row in rows_of_task(folder, name) if row["contender"] in names and row["quick"] == plan.quick]
    total = len(names) * (len(plan.rates(TASKS[name])) + len(plan.test_seeds()))
    mean = sum(row["time_s"] for row in rows) / len(rows) if rows else float("nan")
    return f"{name}: {len(rows)} of {total} runs, {mean:.1f} s each"


def _parser(tasks: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=("main", "ablation"), default="main", help="(default: main)")
    parser.add_argument("--only", nargs="+", choices=tasks, metavar="TASK", help=f"of {', '.join(tasks)}")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="contenders of the suite (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="test runs of each contender (default: 5)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="(default: bench/results/quality)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the models are small (default: 1)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto uses a GPU where there is one")
    parser.add_argument("--quick", action="store_true", help="tiny models, two steps: a test, not a measurement")
    parser.add_argument("--status", action="store_true", help="say what of it is there, and run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
