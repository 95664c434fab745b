"""The table of ``goat-kernels check --compile``: what each kernel takes of GPUs that are not here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from goat_kernels.cli.check_rows import case_json, versions

if TYPE_CHECKING:
    from goat_kernels.checks.compilation import Case, Compiled


def compilation(everything: bool) -> tuple[list[dict], list[str]]:
    """Compile and print the table, in the order in which kernels are done; (rows for JSON, failures)."""
    from goat_kernels.checks.compilation import cases, compile_all

    start, common = time.perf_counter(), {"check": "compilation", **versions()}
    chosen = cases(everything=everything)
    print(f"{len(chosen)} kernels, compiled by Triton {common['triton']} for GPUs that are not here")
    print(
        f"{'kernel':24} {'target':8}{'x':9}{'tile':26}{'registers':>9}{'spilled':>8}{'shared':>8}{'occupancy':>10}  "
        f"{'matrix instruction':19}{'instructions of its loops'}"
    )
    rows: list[dict] = []
    failures: list[str] = []

    def report(case: Case, result: Compiled | Exception) -> None:
        if isinstance(result, Exception):
            reason = " ".join(str(result).split())[:300]
            failures.append(f"{case}: {type(result).__name__}: {reason}")
            rows.append({**common, "target": case.target, **case_json(case.layer), "fault": reason})
            return
        fault = result.fault()
        if fault is not None:
            failures.append(f"{result.kernel} on {case.target}: {fault}; {case.layer}, {result.tile}")
        _print(result, fault)
        rows.append({**common, **_row(result), "fault": fault})

    compile_all(chosen, report)
    print(f"\n{len(rows)} compiled, {len(failures)} faults, {time.perf_counter() - start:.0f} s")
    return rows, failures


def _print(result: Compiled, fault: str | None) -> None:
    tile = result.tile
    described = f"{tile.rows} x {tile.columns}" + f" x {tile.rank}" * bool(tile.rank)
    described += f", {tile.warps} warps, {tile.stages}"
    print(
        f"{result.kernel:24} {result.target:8}{str(result.layer.dtype).removeprefix('torch.'):9}{described:26}"
        f"{result.registers:9}{result.spilled_bytes:8}{result.shared_bytes:8}{result.occupancy:10.0%}  "
        f"{result.matrix_instruction or '-':19}{' '.join(map(str, result.loops)) or '-'}"
        f"{'' if fault is None else '  FAIL: ' + fault}",
        flush=True,
    )


def _row(result: Compiled) -> dict:
    tile = result.tile
    return {
        "kernel": result.kernel,
        "target": result.target,
        **case_json(result.layer),
        **{f"tile_{name}": getattr(tile, name) for name in ("rows", "columns", "rank", "warps", "stages")},
        "registers": result.registers,
        "spilled_bytes": result.spilled_bytes,
        "shared_bytes": result.shared_bytes,
        "occupancy": result.occupancy,
        "matrix_instruction": result.matrix_instruction,
        "loops": list(result.loops),
    }
