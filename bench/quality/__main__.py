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
import gc
import os
import sys
from pathlib import Path

from goat_kernels.command_errors import CommandError


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit code, 2 for input that cannot be used."""
    # Nothing here comes from the hub, so nothing may ask it anything.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        _run(arguments)
    except CommandError as error:
        print(f"bench.quality: error: {error}", file=sys.stderr)
        return 2
    finally:
        gc.unfreeze()
    return 0


def _run(arguments: list[str] | None) -> None:
    import torch
    import transformers

    from bench.quality.contenders import ABLATION_TASK, contenders
    from bench.quality.runs import RESULTS_FOLDER, run_task
    from bench.quality.tasks import TASKS

    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=("main", "ablation"), default="main", help="(default: main)")
    parser.add_argument("--only", nargs="+", choices=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="contenders of the suite (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="test runs of each contender (default: 5)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="(default: bench/results/quality)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the models are small (default: 1)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto uses a GPU where there is one")
    parser.add_argument("--quick", action="store_true", help="tiny models, two steps: a test, not a measurement")
    parser.add_argument("--status", action="store_true", help="say what of it is there, and run nothing")
    options = parser.parse_args(arguments)
    if options.quick and options.results is None:
        raise CommandError("--quick needs --results FOLDER: its numbers are not to be kept among the others")
    known = contenders(options.suite)
    unknown = [name for name in options.methods or () if name not in known]
    if unknown:
        raise CommandError(f"--methods {' '.join(unknown)} is unknown; it must be among {', '.join(known)}")
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gc.freeze()  # every training collects garbage, and looking through what the imports left takes a second
    for name in options.only or (TASKS if options.suite == "main" else [ABLATION_TASK]):
        run_task(
            name,
            [known[method] for method in options.methods or known],
            options.results or RESULTS_FOLDER,
            seeds=options.seeds,
            quick=options.quick,
            device=options.device,
            status=options.status,
        )


if __name__ == "__main__":
    sys.exit(main())
