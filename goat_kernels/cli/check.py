"""Check this machine: does every kernel compute what it should, for every dtype and form?

Each pass and the whole layer are compared with float64, on the GPU if there is one, else on small shapes in Triton's
interpreter, which the command starts by itself. Beside each error stands the torch backend's in the same dtype. Also
printed: the versions, and which backend "auto" picks here, and why.

    goat-kernels check
    goat-kernels check --dtype bfloat16 --json results.jsonl
    goat-kernels check --traffic        the bytes that each kernel moves, against the design; needs no GPU
    goat-kernels check --compile        registers, spills and shared memory on four GPUs; needs none of them

Exit code: 0 if all is well, 1 if anything is out of bounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from goat_kernels.command_errors import CommandError
from goat_kernels.files import atomic_path

_DTYPES = ("float32", "float16", "bfloat16")
_INTERPRET = "TRITON_INTERPRET"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare every option of ``goat-kernels check``."""
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--traffic", action="store_true", help="instead, count the bytes that each kernel moves, against the design"
    )
    modes.add_argument(
        "--compile",
        action="store_true",
        help="instead, compile some 150 kernels for sm_80, sm_90, sm_100 and gfx942, and look for spills, too much "
        "shared memory and missing matrix instructions",
    )
    parser.add_argument("--all", action="store_true", help="with --compile: every form and rank, some 3000 kernels")
    parser.add_argument("--dtype", choices=_DTYPES, help="check this dtype of x alone (default: all three)")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE too, one JSON object per line")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; CommandError for a file that cannot be written, or a mode that this machine cannot run."""
    target = arguments.json
    if target is not None and (Path(target).is_dir() or not Path(target).absolute().parent.is_dir()):
        raise CommandError(f"--json {target!r} needs the name of a file in a folder that exists")
    if arguments.all and not arguments.compile:
        raise CommandError("--all needs --compile")
    if arguments.compile and arguments.dtype is not None:
        raise CommandError(f"--dtype {arguments.dtype!r} does not go with --compile, which takes all dtypes")
    if arguments.compile:
        if not has_triton():
            raise CommandError("--compile needs the package triton, which is not installed")
        if _is_interpreting():
            return _run_in_process_of_its_own(arguments, interpret=False)
    elif _needs_interpreter(traffic=arguments.traffic):
        return _run_in_process_of_its_own(arguments, interpret=True)
    import torch

    from goat_kernels.checks.report import report_compilation, report_correctness, report_traffic

    dtypes = [getattr(torch, name) for name in ([arguments.dtype] if arguments.dtype else _DTYPES)]
    if arguments.compile:
        rows, failures = report_compilation(arguments.all)
    elif arguments.traffic:
        rows, failures = report_traffic(dtypes[0] if arguments.dtype else None)
    else:
        rows, failures = report_correctness(dtypes, interpreted=_is_interpreting())
    if target is not None:
        with atomic_path(Path(target)) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


def has_triton() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("triton") is not None


def _is_interpreting() -> bool:
    if not has_triton():
        return False
    from goat_kernels.kernels.common import INTERPRETED

    return INTERPRETED


def _needs_interpreter(*, traffic: bool) -> bool:
    """Whether this process cannot do it, and one in which Triton interprets can."""
    import torch

    if not has_triton():
        if traffic:
            raise CommandError("--traffic needs Triton's interpreter, and the package triton is not installed")
        return False
    if _is_interpreting() or (torch.cuda.is_available() and not traffic):
        return False
    if os.environ.get(_INTERPRET) == "1":
        raise CommandError(f"{_INTERPRET}=1 is set, but Triton does not interpret; it must be set before Triton loads")
    return True


def _run_in_process_of_its_own(arguments: argparse.Namespace, *, interpret: bool) -> int:
    """The same command where Triton interprets, or does not: it reads the variable when it is first imported."""
    command = [sys.executable, "-m", "goat_kernels", "check"]
    for name, value in vars(arguments).items():
        if name in ("traffic", "compile", "all", "dtype", "json") and value not in (None, False):
            command += [f"--{name}"] + ([] if value is True else [value])
    environment = {name: value for name, value in os.environ.items() if name != _INTERPRET}
    if interpret:  # with one thread: the tensors are so small that a second one only gets in the way
        environment = {"OMP_NUM_THREADS": "1", **environment, _INTERPRET: "1"}
    sys.stdout.flush()
    return subprocess.run(command, env=environment).returncode
