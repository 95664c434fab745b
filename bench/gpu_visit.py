"""Everything that a GPU has to answer, in one call that ends in time, from a checkout without an installation.

    python -m bench.gpu_visit --minutes 9 --out visit

The steps run in the order of what their results are worth, each as a process of its own with a share of the time that
is left; what one does not use goes to those after it. Benchmarks write every row as soon as it is measured. Run again
with the same folder, the visit goes on where it stopped: finished steps are not repeated, and a suite that was cut off
leaves out the shapes that it has. A folder belongs to one state of the code: take another one for other code.

In the folder:

    log.txt           what every step printed
    state.json        each step by GPU: command, seconds, exit code (null: it was cut off); written after every step
    check.jsonl       goat-kernels check, row by row
    results.jsonl     the benchmarks' rows, as for bench/results
    summary.txt       the table that the visit ends with
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.visit import ROOT, Outcome, Step, Visit, run_process

#: Kept back for the table at the end, and for a step that does not stop at once, in seconds.
RESERVE_S = 15

#: The step of what only a GPU can show of the kernels, and its files; and the step of every other test that uses one.
KERNEL_TESTS, OTHER_TESTS = "tests of the kernels", "other tests on the GPU"
_KERNEL_TESTS = ("tests/test_triton_gpu.py", "tests/test_triton_plans.py")

#: Marked for a GPU, or with the fixture that hands one out.
_ON_GPU = re.compile(r"mark\.gpu\b|def test_\w+\([^)]*\bdevice\b")

#: Run under compute-sanitizer: every pass of small layers in both forms: fused, in stages with dropout, decoding.
_SMALL_CASE = """
import torch
from goat_kernels.kernels.passes import TritonPasses
from goat_kernels.checks.problem import LayerCase, make_problem, run_passes
for T, E, K, dropout_p in ((1100, 8, 2, 0.0), (75, 6, 3, 0.1), (16, 6, 3, 0.0)):
    for path in (False, True):
        case = LayerCase(T=T, N=200, M=328, R=24, E=E, K=K, path=path, dropout_p=dropout_p)
        run_passes(TritonPasses(), make_problem(case, "cuda"))
torch.cuda.synchronize()
print("every pass ran")
"""


def plan(folder: Path, *, quick: bool) -> list[Step]:
    """The steps of a visit, what is worth most first; ``quick``: at tiny sizes, on any machine, as a trial."""
    python = sys.executable
    bench = (python, "-m", "goat_kernels", "bench", "--resume", "--output", str(folder / "results.jsonl"))

    def suite(name: str, weight: int) -> Step:
        # Compiled layers, which take seconds each to compile, have a step of their own.
        tiny = ("--quick",) if quick else ()
        return Step(name, (*bench, "--suite", name, "--without", "compiled", *tiny), weight, resumes=True)

    check = (python, "-m", "goat_kernels", "check", "--json", str(folder / "check.jsonl"))
    steps = [
        Step("check", (*check, "--dtype", "float32") if quick else check, 70),
        Step(KERNEL_TESTS, _pytest("--maxfail=20", *_KERNEL_TESTS), 60),
        suite("design", 50),
        suite("layer", 220),
        suite("kernels", 100),  # which measures the roofline first
        suite("host", 25),
        suite("model", 90),
        Step("compute-sanitizer", _sanitizer(python), 50, needs="compute-sanitizer"),
        suite("memory", 20),
        suite("tuning", 70),
        # Hundreds of kernels to compile, in shapes of no use: after what the targets are read from.
        Step(OTHER_TESTS, _pytest("--maxfail=20", "-m", "gpu and not slow", *_other_tests()), 100),
        suite("scaling", 50),
        suite("startup", 30),
    ]
    if quick:
        return [step for step in steps if step.name not in (KERNEL_TESTS, OTHER_TESTS, "startup")]
    compiled = ("--suite", "layer", "--shape", "8192,4096,4096,32", "--without", "loop", "lora", "graph", "unsloth")
    return [*steps, Step("compiled layers", (*bench, *compiled), 40)]


def _sanitizer(python: str) -> tuple[str, ...]:
    # Without torch's caching every tensor has bounds that the tool knows.
    environment = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
    return (*environment, "compute-sanitizer", "--error-exitcode", "1", python, "-c", _SMALL_CASE)


def _pytest(*arguments: str) -> tuple[str, ...]:
    """pytest with the project's options, less those of a plugin that is not here; on several processors if it can."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_benchmark") is None:
        command += ["-o", "addopts=-ra --strict-markers --strict-config"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    return (*command, *arguments)


def _other_tests() -> list[str]:
    """Files with tests that run on a GPU where there is one, the backend's before PEFT's; to collect all takes long."""
    paths = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")]
    found = [path for path in paths if _ON_GPU.search((ROOT / path).read_text(encoding="utf-8"))]
    found.sort(key=lambda path: (len(path.parts), not path.name.startswith("test_triton_"), path))
    return [str(path) for path in found if str(path) not in _KERNEL_TESTS]


# --- what is kept ---------------------------------------------------------------------------------------------------


def device_name() -> str:
    """The first GPU, without importing torch; "no GPU" where there is none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.splitlines()[0].strip()
    return "no GPU"


def read_state(folder: Path) -> dict[str, dict[str, Outcome]]:
    """GPU -> step -> what became of it in earlier calls."""
    path = folder / "state.json"
    if not path.exists():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    return {device: {name: Outcome(**one) for name, one in steps.items()} for device, steps in kept.items()}


def write_state(folder: Path, state: dict[str, dict[str, Outcome]]) -> None:
    """As :func:`read_state` reads it, whole or not at all."""
    rows = {device: {name: asdict(one) for name, one in steps.items()} for device, steps in state.items()}
    partial = folder / "state.json.partial"
    partial.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / "state.json")


def summary(steps: Sequence[Step], outcomes: dict[str, Outcome], results: Path) -> str:
    """The table at the end: what became of each step, and what the benchmarks say in a few lines."""
    lines = [
        f"{step.name:22} {outcomes[step.name].seconds:6.1f} s  {outcomes[step.name].verdict}"
        for step in steps
        if step.name in outcomes
    ]
    try:
        lines += ["", *_headlines(results)]
    except Exception as failure:  # the rows are in the file, whatever is wrong with reading them here
        lines += ["", f"no table: {type(failure).__name__}: {failure}"]
    return "\n".join(lines)


def _headlines(results: Path) -> list[str]:
    """The layer beside the frozen one and LoRA; the design's orders; the passes furthest from the roofline."""
    if not results.exists():
        return ["no results"]
    from goat_kernels.benchmarking.results import key_of, read_rows, timed
    from goat_kernels.benchmarking.tables import design_table, summary_table, tuning_table

    of_suite: dict[str, list[dict]] = {}
    for row in {key_of(row): row for row in read_rows(results)}.values():
        of_suite.setdefault(row["suite"], []).append(row)
    layer, lines = timed(of_suite.get("layer", [])), []
    if layer:
        has_triton = any(row["contender"].endswith("triton") for row in layer)
        lines += [summary_table(layer, "triton" if has_triton else "torch"), ""]
    lines += [table(of_suite[name]) + "\n" for name, table in
              (("design", design_table), ("tuning", tuning_table)) if timed(of_suite.get(name, []))]  # fmt: skip
    passes = [row for row in timed(of_suite.get("kernels", [])) if row["contender"] != "base"]
    for row in sorted(passes, key=lambda row: row["roofline_percent"])[:5]:
        at = f"{row['residual']} T={row['T']} {row['N']}->{row['M']} R={row['R']}"
        lines.append(f"{row['roofline_percent']:4.0f} % of the roofline: {row['pass']}, {row['contender']}, {at}")
    failed = sum("failed" in row for rows in of_suite.values() for row in rows)
    return [*lines, f"{failed} rows say that something failed"]


def main(arguments: list[str] | None = None) -> int:
    """Make a visit; 0 if every step that ran ended well."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_visit", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (%(default)s)")
    parser.add_argument("--out", required=True, metavar="DIR", help="where everything goes; the same one goes on")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on any machine, to see that the visit works")
    options = parser.parse_args(arguments)
    folder = Path(options.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    device, state = device_name(), read_state(folder)
    outcomes = state.setdefault(device, {})
    steps = plan(folder, quick=options.quick)

    with (folder / "log.txt").open("a", encoding="utf-8") as log:

        def run(command: Sequence[str], limit_s: float) -> int | None:
            log.write(f"\n===== at most {limit_s:.0f} s: {' '.join(command)}\n")
            log.flush()
            return run_process(command, limit_s, log)

        def report(step: Step, outcome: Outcome) -> None:
            print(f"{step.name:22} {outcome.seconds:6.1f} s  {outcome.verdict}", flush=True)
            write_state(folder, state)

        Visit(steps, outcomes, start + 60 * options.minutes - RESERVE_S, report, run).make()
    text = f"{device}\n\n{summary(steps, outcomes, folder / 'results.jsonl')}"
    (folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return 0 if all(one.exit_code == 0 for one in outcomes.values() if one.skipped is None) else 1


if __name__ == "__main__":
    sys.exit(main())
