"""The table of ``goat-kernels check --traffic``: what each kernel moves, against what it should."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from goat_kernels.cli.check_rows import case_json, versions
from goat_kernels.command_errors import CommandError

if TYPE_CHECKING:
    from goat_kernels.checks.problem import LayerCase
    from goat_kernels.checks.traffic import Moved, StreamPasses, TrafficCase


def traffic(dtype: str | None) -> tuple[list[dict], list[str]]:
    """Print what each kernel moves; (rows for JSON, failures)."""
    from goat_kernels.checks.traffic import CASES, REAL_CASES, count_layer, plan_layer, stream_passes

    start = time.perf_counter()
    cases = [case for case in CASES if dtype in (None, str(case.layer.dtype).removeprefix("torch."))]
    if not cases:
        counted = ", ".join(sorted({str(case.layer.dtype).removeprefix("torch.") for case in CASES}))
        raise CommandError(f"--dtype {dtype!r} with --traffic must be one of {counted}; the others move as many bytes")
    print("Bytes that programs load and store, counted in Triton's interpreter; re-reads count, caches do not.")
    print("ok: exactly what the kernel's tiles imply, to the byte, and nothing outside of its tensors.")
    rows, failures, found = [], [], versions()
    for case in cases:
        moved = count_layer(case.layer)
        streams = stream_passes(case, moved)
        _print_traffic(case, moved, streams)
        failures += [f"{row.kernel}: {_why(row)}; {case.name}: {case.layer}" for row in moved if not row.passed]
        failures += [f"whole layer: {_stream(row)}; {case.name}: {case.layer}" for row in streams if not row.passed]
        common = {"check": "traffic", "case": case.name, **found, **case_json(case.layer)}
        rows += [{**common, **dataclasses.asdict(row), "passed": row.passed} for row in moved]
    print("\nThe same for real layers on an H200, forward and backward in bfloat16, from the formulas alone, in MiB:")
    print(f"  {'':58}{'x y dY dX':>10}{'adapter':>10}{'hidden':>10}{'rest':>8}{'forward x':>11}")
    for layer in REAL_CASES:
        _print_real(layer, plan_layer(layer))
    print(f"\n{len(rows)} rows, {len(failures)} out of bounds, {time.perf_counter() - start:.0f} s")
    return rows, failures


def _print_traffic(case: TrafficCase, moved: Sequence[Moved], streams: Sequence[StreamPasses]) -> None:
    print(f"\n{case.name}; {case.layer}; as on {case.layer.target.multiprocessors} multiprocessors")
    print(f"  {'kernel':24}{'what':10}{'read':>12}{'written':>12}{'once':>12}{'times':>8}")
    for row in moved:
        numbers = f"{row.read_bytes:12,}{row.written_bytes:12,}{row.once_bytes:12,}{row.times:8.2f}"
        print(f"  {row.kernel:24}{row.what:10}{numbers}  {'ok' if row.passed else 'FAIL: ' + _why(row)}")
    print("  whole layer: " + ", ".join(_stream(row) for row in streams), flush=True)


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
    kinds, directions = Counter(), Counter()
    for row in moved:
        kind = "wide" if row.what in ("x", "y", "dY", "dX") else row.what
        kinds[kind if kind in ("wide", "adapter", "hidden") else "rest"] += row.moved_bytes / 2**20
        directions[row.direction, row.what] += row.times if row.what == "x" else 0
    numbers = f"{kinds['wide']:10.0f}{kinds['adapter']:10.0f}{kinds['hidden']:10.0f}{kinds['rest']:8.0f}"
    print(f"  {layer.form + '; ' + layer.sizes:58}{numbers}{directions['forward', 'x']:10.0f}x")
