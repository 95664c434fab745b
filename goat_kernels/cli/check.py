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
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from goat_kernels.cli.check_compilation import compilation
from goat_kernels.cli.check_rows import case_json, has_triton, versions
from goat_kernels.cli.check_traffic import traffic
from goat_kernels.command_errors import CommandError
from goat_kernels.files import atomic_path

if TYPE_CHECKING:
    import torch

    from goat_kernels.checks.correctness import CaseGroup, Comparison
    from goat_kernels.checks.problem import LayerCase

_DTYPES = ("float32", "float16", "bfloat16")
_INTERPRET = "TRITON_INTERPRET"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare every option of ``goat-kernels check``."""
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--traffic",
        action="store_true",
        help="count the bytes that each kernel loads and stores, and hold them against what its tiles and the design "
        "imply, in place of checking results",
    )
    modes.add_argument(
        "--compile",
        action="store_true",
        help="compile some 150 kernels that cover each kernel and tile, for sm_80, sm_90, sm_100 and gfx942, and "
        "look for spills, too much shared memory and missing matrix instructions, in place of checking results",
    )
    parser.add_argument("--all", action="store_true", help="with --compile: every form and rank, some 3000 kernels")
    parser.add_argument("--dtype", choices=_DTYPES, help="check this dtype of x alone (default: all three)")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE too, one JSON object per line")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        CommandError: a file that cannot be written, or a mode that this machine cannot run.
    """
    _check_json(arguments.json)
    if arguments.all and not arguments.compile:
        raise CommandError("--all needs --compile")
    if arguments.compile:
        if arguments.dtype is not None:
            raise CommandError(f"--dtype {arguments.dtype!r} does not go with --compile, which takes all dtypes")
        if _needs_compiler():
            return _run_in_process_of_its_own(arguments, interpret=False)
        rows, failures = compilation(arguments.all)
    elif _needs_interpreter(traffic=arguments.traffic):
        return _run_in_process_of_its_own(arguments, interpret=True)
    else:
        rows, failures = traffic(arguments.dtype) if arguments.traffic else _correctness(arguments.dtype)
    if arguments.json is not None:
        with atomic_path(Path(arguments.json)) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


def _check_json(target: str | None) -> None:
    if target is not None and (Path(target).is_dir() or not Path(target).absolute().parent.is_dir()):
        raise CommandError(f"--json {target!r} needs the name of a file in a folder that exists")


# --- where to run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Machine:
    """Where results are checked: ``backend`` on ``device``; ``without_triton`` is why Triton's is not, if it is not."""

    device: torch.device
    backend: str
    interpreted: bool
    without_triton: str | None

    @classmethod
    def this(cls) -> _Machine:
        import torch

        from goat_kernels.backends import why_not_auto

        interpreted = _is_interpreting()
        device = torch.device("cuda" if torch.cuda.is_available() and not interpreted else "cpu")
        reason = None if interpreted else why_not_auto("triton", device, torch.float32)
        return cls(device, "triton" if reason is None else "torch", interpreted, reason)

    @property
    def name(self) -> str:
        import torch

        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return "Triton's interpreter" if self.interpreted else "CPU"


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


def _needs_compiler() -> bool:
    """Whether this process interprets, and so cannot compile."""
    if not has_triton():
        raise CommandError("--compile needs the package triton, which is not installed")
    return _is_interpreting()


def _run_in_process_of_its_own(arguments: argparse.Namespace, *, interpret: bool) -> int:
    """The same command where Triton interprets, or does not: it reads the variable when it is first imported.

    The interpreter runs with one thread: its tensors are so small that a second one only gets in the way.
    """
    command = [sys.executable, "-m", "goat_kernels", "check"]
    for name, value in vars(arguments).items():
        if name in ("traffic", "compile", "all", "dtype", "json") and value not in (None, False):
            command += [f"--{name}"] + ([] if value is True else [value])
    environment = {name: value for name, value in os.environ.items() if name != _INTERPRET}
    if interpret:
        environment = {"OMP_NUM_THREADS": "1", **environment, _INTERPRET: "1"}
    sys.stdout.flush()
    return subprocess.run(command, env=environment).returncode


# --- results ------------------------------------------------------------------------------------------------------


def _correctness(dtype: str | None) -> tuple[list[dict], list[str]]:
    """Print the table as it comes; (rows for JSON, failures)."""
    import torch

    from goat_kernels.checks.correctness import compare, compile_ahead, groups

    start = time.perf_counter()
    machine, found = _Machine.this(), versions()
    dtypes = tuple(getattr(torch, name) for name in ((dtype,) if dtype else _DTYPES))
    _print_machine(machine, found, dtypes)
    # Without a GPU the torch backend alone would take the real sizes too, but slowly.
    blocks = groups(interpreted=machine.device.type == "cpu", dtypes=dtypes)
    if machine.device.type == "cuda" and machine.backend == "triton":
        compile_ahead((case for block in blocks for case in block.cases), machine.device)
        print(f"Kernels compiled in {time.perf_counter() - start:.0f} s; Triton keeps them for the next time.")
    rows: list[Comparison] = []
    raised: list[tuple[LayerCase, str]] = []
    for block in blocks:
        of_forms = []
        for case in block.cases:
            try:
                of_forms.append(compare(case, machine.backend, machine.device))
            except Exception as error:  # whatever a driver or a compiler raises here is a result, and others follow
                raised.append((case, f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        _print_block(block, of_forms)
        rows += [row for of_form in of_forms for row in of_form]
    passed = sum(row.passed for row in rows)
    failures = [f"{case}: {message}" for case, message in raised]
    failures += [_failed_comparison(row) for row in rows if not row.passed]
    ran = [case for block in blocks for case in block.cases if case not in dict(raised)]
    if machine.backend == "triton" and ran:
        failures += _replay(ran[0], machine)
    print(f"\n{passed} of {len(rows)} within bounds, {time.perf_counter() - start:.0f} s")
    common = {"check": "correctness", "backend": machine.backend, "machine": machine.name, **found}
    found = [_comparison_json(row) for row in rows]
    found += [{**case_json(case), "what": message, "passed": False} for case, message in raised]
    return [{**common, **row} for row in found], failures


def _replay(case: LayerCase, machine: _Machine) -> list[str]:
    """Print whether calls are replayed, and how many of one layer's are; failures."""
    from goat_kernels.checks.replay import STEPS, check_replay
    from goat_kernels.kernels.replay import REPLAY_VARIABLE

    found = check_replay(case, machine.device)
    bits = "with the bits of the first" if found.identical else "with OTHER BITS than the first"
    if found.is_on:
        switch = f"on ({REPLAY_VARIABLE}=0 turns it off)"
    else:
        switch = f"off ({REPLAY_VARIABLE}=0), every call runs the passes"
    print(
        f"\nReplay is {switch}: {STEPS} steps of one layer, {found.replayed} of {found.calls} calls replayed, {bits}."
    )
    return [] if found.fault() is None else [f"replay: {found.fault()}"]


def _print_machine(machine: _Machine, versions: dict[str, str], dtypes: Iterable[torch.dtype]) -> None:
    import torch

    from goat_kernels.backends import ENVIRONMENT_VARIABLE, available_backends, resolve_backend, why_not_auto

    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "PyTorch sees none")
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    for dtype in dtypes:
        try:
            picked = resolve_backend("auto", machine.device, dtype)
        except (RuntimeError, ValueError) as error:  # the environment names a backend that is not to be had
            raise CommandError(str(error)) from error
        reasons = {name: why_not_auto(name, machine.device, dtype) for name in available_backends()}
        because = [f"{name} is passed over, because {reason}" for name, reason in reasons.items() if reason is not None]
        if asked:
            because = [f"{ENVIRONMENT_VARIABLE} asks for it"]
        print(f"auto picks {picked} for {str(dtype).removeprefix('torch.')}" + "".join(f"; {why}" for why in because))
    if machine.interpreted:
        print(
            "The kernels run in Triton's interpreter, on small shapes: their arithmetic is checked, not compiled code."
        )
    if machine.without_triton is not None:
        print(f"The torch backend alone is checked, because triton cannot run: {machine.without_triton}")


def _print_block(block: CaseGroup, of_forms: Sequence[Sequence[Comparison]]) -> None:
    """One line for each pass and result, one column for each form that ran."""
    first = block.cases[0]
    compared = " (torch's)" if of_forms and of_forms[0][0].torch_error is not None else ""
    if of_forms and of_forms[0][-1].lora_error is not None:
        compared += ", | that of PEFT's float32-adapter LoRA arithmetic"
    print(f"\n{first.dtypes}; {block.title}: {first.sizes}; relative error{compared}")
    print(" " * 36 + "".join(f"{rows[0].case.form:31}" for rows in of_forms) + "bound")
    for rows in zip(*of_forms, strict=True):
        kernels = ", ".join(dict.fromkeys(row.kernels for row in rows if row.kernels))
        name = rows[0].what + (f" ({kernels})" if kernels else "")
        cells = "".join(f"{_errors(row):31}" for row in rows)
        verdict = "pass" if all(row.passed for row in rows) else "FAIL"
        print(f"  {name:34}{cells}{rows[0].bound:<8.0e}{verdict}", flush=True)


def _errors(row: Comparison) -> str:
    beside = ("" if row.torch_error is None else f" ({row.torch_error:.1e})") + (
        "" if row.lora_error is None else f" | {row.lora_error:.1e}"
    )
    return f"{row.error:.1e}{beside}"


def _failed_comparison(row: Comparison) -> str:
    name = row.what + (f" ({row.kernels})" if row.kernels else "")
    return f"{name}: {_errors(row)} above {row.bound:.0e}; {row.case}"


def _comparison_json(row: Comparison) -> dict:
    errors = {name: getattr(row, name) for name in ("error", "torch_error", "lora_error")}
    return {
        **case_json(row.case),
        "what": row.what,
        "kernels": row.kernels or None,
        **{name: None if error is None or math.isnan(error) else error for name, error in errors.items()},
        "bound": row.bound,
        "passed": row.passed,
    }
