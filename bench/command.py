"""Measure how fast GOAT layers are here, beside the frozen layer, PEFT's LoRA and the public code's algorithm.

Contenders run in one process on the same inputs, interleaved round by round; each is checked against float64 on these
inputs first, and a wrong one gets no time. What cannot run here is skipped, with a line that says why.

    goat-kernels bench                             the layer suite, on the GPU if there is one
    goat-kernels bench --suite kernels memory      or: host, scaling, model, tuning, all
    goat-kernels bench --shape 8192,4096,4096,32   a layer of your own: T,N,M,R
    goat-kernels bench --report                    README's and docs' tables and figures anew

Results are JSON lines, in a new file in bench/results unless --output names one. Exit code: 0; 1 if a contender was
wrong or raised.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.cases import BenchSettings, Case
from bench.layers import KINDS
from bench.machine import describe
from bench.results import RESULTS_FOLDER, append, file_name, read_rows, timed
from bench.suites import SUITES, suite_rows
from bench.tables import not_timed
from goat_kernels.command_errors import CommandError

DTYPES = ("bfloat16", "float16", "float32")
_ROUNDS = {"quick": 2, "cuda": 31, "cpu": 15}


def whole(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _shape(text: str) -> Case:
    try:
        T, N, M, R = map(whole, text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} must be four whole numbers of at least 1: T,N,M,R") from None
    if R % Case.E:
        raise argparse.ArgumentTypeError(f"{text!r}: R = {R} must be a multiple of {Case.E}, the number of experts")
    return Case(T, N, M, R)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare every option of ``goat-kernels bench``."""
    flag = {"action": "store_true"}
    parser.add_argument("--report", **flag, help="write tables and figures from bench/results; run nothing")
    parser.add_argument(
        "--suite", nargs="+", choices=(*SUITES, "all"), default=["layer"], help="what to measure (default: layer)"
    )
    parser.add_argument("--output", metavar="FILE", help="append rows to FILE (default: a new one in bench/results)")
    parser.add_argument("--resume", **flag, help="go on with the run that stopped and left the rows in --output")
    parser.add_argument("--rounds", type=whole, help="timed rounds of each comparison (default: 15 on a CPU, else 31)")
    parser.add_argument(
        "--shape",
        action="append",
        type=_shape,
        default=[],
        metavar="T,N,M,R",
        help="measure this layer in place of the standard ones, in kernels, layer, host, memory and tuning; may be "
        "repeated",
    )
    parser.add_argument(
        "--without", nargs="+", choices=KINDS[1:], default=[], metavar="KIND", help=f"leave out: {', '.join(KINDS[1:])}"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="of x (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--threads", type=whole, help="torch threads (default: torch's own choice)")
    parser.add_argument("--quick", **flag, help="tiny sizes, to see that it runs; says nothing about speed")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        CommandError: an option that cannot be used here, a file that is not there or does not hold results.
    """
    if arguments.report:
        return _report(Path.cwd())
    settings = _settings(arguments)
    suites = list(SUITES) if "all" in arguments.suite else list(dict.fromkeys(arguments.suite))
    machine = describe(settings.device)
    output = Path(arguments.output) if arguments.output else RESULTS_FOLDER / file_name(machine, suites)
    if output.is_dir():
        raise CommandError(f"--output {str(output)!r} is a folder; it needs the name of a file")
    before = read_rows(output) if arguments.resume and output.exists() else []
    kept, failed = arguments.output is not None or not settings.quick, False
    where = f"results go to {output}" if kept else "--quick keeps no results without --output"
    print(f"{machine['gpu'] or machine['cpu']}, {settings.dtypes()['dtype']}; {where}", flush=True)
    for suite in suites:
        rows = [row for row in before if row["suite"] == suite]
        for row in suite_rows(suite, settings, before):
            rows.append(row)
            if kept:
                append(output, row)
        failed |= any("failed" in row for row in rows)
        print("\n".join([f"\n{suite}\n", *not_timed(rows)]))
        if timed(rows):
            print(f"\n{SUITES[suite].table(rows)}", flush=True)
    return 1 if failed else 0


def _settings(arguments: argparse.Namespace) -> BenchSettings:
    kind = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device 'cuda' needs a GPU, and PyTorch sees none")
    unshaped = [name for name in arguments.suite if name == "all" or not SUITES[name].shaped]
    if arguments.shape and unshaped:
        raise CommandError(f"--shape does not go with --suite {unshaped[0]}, which has sizes of its own")
    if arguments.resume and not arguments.output:
        raise CommandError("--resume needs --output, the file of the run that goes on")
    if arguments.shape and arguments.quick:
        raise CommandError("--shape does not go with --quick, which has sizes of its own")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(kind, torch.cuda.current_device() if kind == "cuda" else None)
    return BenchSettings(
        device=device,
        dtype=getattr(torch, arguments.dtype or ("bfloat16" if kind == "cuda" else "float32")),
        rounds=arguments.rounds or _ROUNDS["quick" if arguments.quick else kind],
        quick=arguments.quick,
        shapes=tuple(arguments.shape),
        without=frozenset(arguments.without),
    )


def _report(root: Path) -> int:
    from bench.report import PAGES, write  # which needs what draws

    missing = [path for path in (*PAGES, RESULTS_FOLDER) if not (root / path).exists()]
    if missing:
        raise CommandError(f"--report needs to run in the root of a checkout: there is no {missing[0]} here")
    written = write(root)
    print("\n".join(f"written: {path}" for path in written) or "everything was up to date")
    return 0
