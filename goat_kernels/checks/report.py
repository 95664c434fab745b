"""What ``goat-kernels check`` prints: the table of each check. Each returns (rows for --json, failures)."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence

import torch

import goat_kernels
from goat_kernels.backends import ENVIRONMENT_VARIABLE, available_backends, resolve_backend, why_not_auto
from goat_kernels.checks import correctness, traffic
from goat_kernels.checks.correctness import check_replay
from goat_kernels.checks.problem import LayerCase, compile_ahead, make_problem, name_of
from goat_kernels.checks.traffic import Moved, StreamPasses
from goat_kernels.command_errors import CommandError

Findings = tuple[list[dict], list[str]]


def _versions() -> dict[str, str]:
    found = {"goat_kernels": goat_kernels.__version__, "python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton
    except ImportError:
        return found
    return {**found, "triton": triton.__version__}


def _of_case(case: LayerCase) -> dict:
    """The fields of a row that say which layer it is."""
    sizes = {letter: getattr(case, letter) for letter in "TNMREK"}
    dtypes = {"dtype": name_of(case.dtype), "adapter_dtype": name_of(case.adapter_dtype)}
    return {**sizes, **dtypes, "residual": "path" if case.path else "fold", "dropout": case.dropout_p}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# --- correctness ----------------------------------------------------------------------------------------------------


def report_correctness(dtypes: Sequence[torch.dtype], *, interpreted: bool) -> Findings:
    """Every pass and the whole layer against float64, on the GPU if there is one.

    Args:
        dtypes: of x.
        interpreted: whether Triton interprets kernels in this process.
    """
    start, versions = time.perf_counter(), _versions()
    on_gpu = torch.cuda.is_available() and not interpreted
    device = torch.device("cuda" if on_gpu else "cpu")
    without_triton = None if interpreted else why_not_auto("triton", device, torch.float32)
    backend = "triton" if without_triton is None else "torch"
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "PyTorch sees none")
    for dtype in dtypes:
        print(_what_auto_picks(device, dtype))
    if interpreted:
        print(
            "The kernels run in Triton's interpreter, on small shapes: their arithmetic is checked, not compiled code."
        )
    if without_triton is not None:
        print(f"The torch backend alone is checked, because triton cannot run: {without_triton}")
    # Without a GPU the torch backend alone would take the real sizes too, but slowly.
    groups = correctness.groups(interpreted=not on_gpu, dtypes=tuple(dtypes))
    if on_gpu and backend == "triton":
        compile_ahead((make_problem(case, "meta") for _, cases in groups for case in cases), device)
        print(f"Kernels compiled in {time.perf_counter() - start:.0f} s; Triton keeps them for the next time.")
    machine = torch.cuda.get_device_name() if on_gpu else "Triton's interpreter" if interpreted else "CPU"
    common = {"check": "correctness", "backend": backend, "machine": machine, **versions}
    rows, failures, ran = [], [], []
    for title, cases in groups:
        compared: dict[LayerCase, list[dict]] = {}
        for case in cases:
            try:
                compared[case] = correctness.compare(case, backend, device)
            except Exception as error:  # whatever a driver or a compiler raises here is a result, and others follow
                what = f"raised {type(error).__name__}: {_one_line(error)}"
                failures.append(f"{case}: {what}")
                rows.append({**common, **_of_case(case), "what": what, "passed": False})
        _print_group(f"{cases[0].dtypes}; {title}: {cases[0].sizes}", compared)
        ran += compared
        for case, of_case in compared.items():
            rows += [{**common, **_of_case(case), **row} for row in of_case]
            wrong = [row for row in of_case if not row["passed"]]
            failures += [f"{_label([row])}: {_errors(row)} above {row['bound']:.0e}; {case}" for row in wrong]
    if backend == "triton" and ran:
        told, fault = check_replay(ran[0], device)
        print(f"\nReplay is {told}.")
        failures += [] if fault is None else [f"replay: {fault}"]
    passed = sum(row["passed"] for row in rows)
    print(f"\n{passed} of {len(rows)} within bounds, {time.perf_counter() - start:.0f} s")
    # JSON has no NaN.
    return [{name: None if value != value else value for name, value in row.items()} for row in rows], failures


def _what_auto_picks(device: torch.device, dtype: torch.dtype) -> str:
    try:
        picked = resolve_backend("auto", device, dtype)
    except (RuntimeError, ValueError) as error:  # the environment names a backend that is not available
        raise CommandError(str(error)) from error
    reasons = {name: why_not_auto(name, device, dtype) for name in available_backends()}
    because = [f"{name} is passed over, because {reason}" for name, reason in reasons.items() if reason is not None]
    if os.environ.get(ENVIRONMENT_VARIABLE):
        because = [f"{ENVIRONMENT_VARIABLE} asks for it"]
    return "; ".join([f"auto picks {picked} for {name_of(dtype)}", *because])


def _print_group(heading: str, compared: dict[LayerCase, list[dict]]) -> None:
    """One line for each pass and result, one column for each form that ran."""
    last_row = next((rows[-1] for rows in compared.values()), {})
    beside = " (torch's)" if last_row.get("torch_error") is not None else ""
    if last_row.get("lora_error") is not None:
        beside += ", | that of PEFT's float32-adapter LoRA arithmetic"
    print(f"\n{heading}; relative error{beside}")
    print(" " * 36 + "".join(f"{case.form:31}" for case in compared) + "bound")
    for rows in zip(*compared.values(), strict=True):
        verdict = "pass" if all(row["passed"] for row in rows) else "FAIL"
        errors = "".join(f"{_errors(row):31}" for row in rows)
        print(f"  {_label(rows):34}{errors}{rows[0]['bound']:<8.0e}{verdict}", flush=True)


def _label(rows: Sequence[dict]) -> str:
    """What the rows of one line are of, and which kernels ran."""
    kernels = ", ".join(dict.fromkeys(row["kernels"] for row in rows if row["kernels"]))
    return rows[0]["what"] + (f" ({kernels})" if kernels else "")


def _errors(row: dict) -> str:
    torch_error = "" if row["torch_error"] is None else f" ({row['torch_error']:.1e})"
    return f"{row['error']:.1e}{torch_error}" + ("" if row["lora_error"] is None else f" | {row['lora_error']:.1e}")


# --- traffic --------------------------------------------------------------------------------------------------------


def report_traffic(dtype: torch.dtype | None) -> Findings:
    """What each kernel moves, against what it should; of x in ``dtype``, or in all."""
    start = time.perf_counter()
    cases = [case for case in traffic.CASES if dtype in (None, case.layer.dtype)]
    if not cases:
        counted = ", ".join(sorted({name_of(case.layer.dtype) for case in traffic.CASES}))
        raise CommandError(
            f"--dtype {name_of(dtype)!r} with --traffic must be one of {counted}; the others move as many bytes"
        )
    print("Bytes that programs load and store, counted in Triton's interpreter; re-reads count, caches do not.")
    print("ok: exactly what the kernel's tiles imply, to the byte, and nothing outside of its tensors.")
    rows, failures, versions = [], [], _versions()
    for case in cases:
        moved = traffic.count_layer(case.layer)
        streams = traffic.stream_passes(case, moved)
        print(f"\n{case.name}; {case.layer}; as on {case.layer.target.multiprocessors} multiprocessors")
        print(f"  {'kernel':24}{'what':10}{'read':>12}{'written':>12}{'once':>12}{'times':>8}")
        for row in moved:
            numbers = f"{row.read_bytes:12,}{row.written_bytes:12,}{row.once_bytes:12,}{row.times:8.2f}"
            print(f"  {row.kernel:24}{row.what:10}{numbers}  {'ok' if row.passed else 'FAIL: ' + _why(row)}")
        print("  whole layer: " + ", ".join(map(_stream, streams)), flush=True)
        failures += [f"{row.kernel}: {_why(row)}; {case.name}: {case.layer}" for row in moved if not row.passed]
        failures += [f"whole layer: {_stream(row)}; {case.name}: {case.layer}" for row in streams if not row.passed]
        common = {"check": "traffic", "case": case.name, **versions, **_of_case(case.layer)}
        rows += [{**common, **dataclasses.asdict(row), "passed": row.passed} for row in moved]
    print("\nThe same for real layers on an H200, forward and backward in bfloat16, from the formulas alone, in MiB:")
    print(f"  {'':58}{'x y dY dX':>10}{'adapter':>10}{'hidden':>10}{'rest':>8}{'forward x':>11}")
    for layer in traffic.REAL_CASES:
        _print_real(layer, traffic.plan_layer(layer))
    print(f"\n{len(rows)} rows, {len(failures)} out of bounds, {time.perf_counter() - start:.0f} s")
    return rows, failures


def _stream(row: StreamPasses) -> str:
    designed = "" if row.designed is None else f" of {row.designed}"
    return f"{row.direction} {row.what} {row.times:.2f}{designed}" + ("" if row.passed else " FAIL")


def _why(row: Moved) -> str:
    """A failed row in words."""
    if row.planned is None:
        return f"{row.what} is {row.moved_bytes:,} of {row.launch_bytes:,} bytes"
    read, written = row.planned
    return f"{row.what} {row.read_bytes:,} read, {row.written_bytes:,} written, not {read:,} and {written:,}"


def _print_real(layer: LayerCase, moved: Sequence[Moved]) -> None:
    wide, forward_x, kinds = ("x", "y", "dY", "dX"), 0.0, Counter()
    for row in moved:
        kind = "wide" if row.what in wide else row.what if row.what in ("adapter", "hidden") else "rest"
        kinds[kind] += row.moved_bytes / 2**20
        forward_x += row.times if (row.direction, row.what) == ("forward", "x") else 0
    numbers = f"{kinds['wide']:10.0f}{kinds['adapter']:10.0f}{kinds['hidden']:10.0f}{kinds['rest']:8.0f}"
    print(f"  {layer.form + '; ' + layer.sizes:58}{numbers}{forward_x:10.0f}x")


# --- compilation ----------------------------------------------------------------------------------------------------


def report_compilation(everything: bool) -> Findings:
    """What each kernel takes of GPUs that are not here, in the order in which they are done."""
    from goat_kernels.checks.compilation import cases, compile_all  # imports Triton

    start, common = time.perf_counter(), {"check": "compilation", **_versions()}
    chosen = cases(everything=everything)
    print(f"{len(chosen)} kernels, compiled by Triton {common['triton']} for GPUs that are not here")
    heads = f"{'kernel':24} {'target':8}{'x':9}{'tile':26}{'registers':>9}{'spilled':>8}{'shared':>8}"
    print(f"{heads}  {'matrix instruction':19}instructions of its loops")
    rows, failures = [], []
    for case, result in compile_all(chosen):
        row = {**common, "target": case.target, **_of_case(case.layer)}
        if isinstance(result, BaseException):
            failures.append(f"{case}: {type(result).__name__}: {_one_line(result)}")
            rows.append({**row, "fault": _one_line(result)})
            continue
        row |= result
        rows.append(row)
        size = " x ".join(str(row[f"tile_{side}"]) for side in ("rows", "features", "rank") if row[f"tile_{side}"])
        tile = f"{size}, {row['tile_warps']} warps, {row['tile_stages']}"
        if row["fault"] is not None:
            failures.append(f"{row['kernel']} on {case.target}: {row['fault']}; {case.layer}, tile {tile}")
        print(
            f"{row['kernel']:24} {case.target:8}{row['dtype']:9}{tile:26}"
            f"{row['registers']:9}{row['spilled_bytes']:8}{row['shared_bytes']:8}  "
            f"{row['matrix_instruction'] or '-':19}{' '.join(map(str, row['loops'])) or '-'}"
            f"{'' if row['fault'] is None else '  FAIL: ' + row['fault']}",
            flush=True,
        )
    print(f"\n{len(rows)} compiled, {len(failures)} faults, {time.perf_counter() - start:.0f} s")
    return rows, failures
