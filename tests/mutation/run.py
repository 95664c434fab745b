"""Run the mutation check: put each deliberate fault into a copy of the package and see which test notices.

    python tests/mutation/run.py                    all of them; about 25 minutes
    python tests/mutation/run.py scaling dropout    those whose names contain one of these words
    python tests/mutation/run.py --list             what there is

Exit code: 0 all caught, 1 some survived, 2 a mutant could not be judged (its text is gone, or its tests do not run).
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mutation_check import BROKEN, CAUGHT, SURVIVED, check, read_mutants


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutants whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="list the mutants and run nothing")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without any mutant first")
    arguments = parser.parse_args(argv)
    mutants = read_mutants()
    if arguments.words:
        mutants = [mutant for mutant in mutants if any(word in mutant.name for word in arguments.words)]
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.name:50} {mutant.file:40} {mutant.breaks}")
        return 0
    start, statuses = time.perf_counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            for verdict in check(mutants, Path(folder), with_baseline=not arguments.no_baseline):
                statuses[verdict.status] += 1
                by = verdict.test.partition("::")[2] or verdict.test or verdict.mutant.breaks
                print(f"{verdict.status:9} {verdict.seconds:5.0f} s  {verdict.mutant.name:50} {by}", flush=True)
                if verdict.status == BROKEN:
                    print(verdict.output)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    import torch

    print(
        f"\n{len(mutants)} mutants: {statuses[CAUGHT]} caught, {statuses[SURVIVED]} survived, {statuses[BROKEN]} not "
        f"judged; {time.perf_counter() - start:.0f} s (Python {platform.python_version()}, torch {torch.__version__})"
    )
    return 2 if statuses[BROKEN] else 1 if statuses[SURVIVED] else 0


if __name__ == "__main__":
    sys.exit(main())
