"""Everything that a GPU has to answer, in one call that ends in time, from a checkout without an installation.

    python -m bench.gpu_visit --minutes 9 --out visit

The steps run one after the other, what is worth most first, each as a process of its own with a limit; what time is
left at the end goes to the suites that were cut off. Run again with the same folder, the visit goes on where it
stopped: a finished step is not repeated, and a suite leaves out the shapes that it has. The folder belongs to one state
of the code and one GPU. In it: log.txt (what every step printed, the suites' tables among it), state.json (step -> exit
code, null where it was cut off), check.jsonl and results.jsonl (rows as in bench/results).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from goat_kernels.files import write_json

ROOT = Path(__file__).resolve().parents[1]

#: Kept back for a step that does not stop at once; no step starts with less than ``LEAST_S`` left.
RESERVE_S, GRACE_S, LEAST_S = 15, 5, 10

#: Run under compute-sanitizer: every pass of small layers, fused, in stages with dropout, decoding.
_SMALL_CASES = """
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


class Step(NamedTuple):
    """One process: its name, its command, the most seconds it may take, whether it goes on where it was cut off."""

    name: str
    command: tuple[str, ...]
    most_s: int
    resumes: bool = False


def steps_of_visit(folder: Path, *, quick: bool) -> list[Step]:
    """The steps of a visit, what is worth most first; ``quick``: tiny sizes and no tests, on any machine."""
    goat = (sys.executable, "-m", "goat_kernels")
    bench = (*goat, "bench", "--resume", "--output", str(folder / "results.jsonl"))
    check = (*goat, "check", "--json", str(folder / "check.jsonl"))
    tiny = ("--quick",) if quick else ()
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    # Without the project's own options, which are those of plugins that a GPU machine may not have.
    tests = (sys.executable, "-m", "pytest", "-q", "-o", "addopts=-ra --strict-markers", "--maxfail=20", *workers)
    kernels = ("tests/kernels/test_triton_gpu.py", "tests/kernels/test_triton_plans.py")

    def suite(name: str, most_s: int) -> Step:
        # Compiled layers, which take seconds each to compile, have a step of their own.
        return Step(name, (*bench, "--suite", name, "--without", "compiled", *tiny), most_s, resumes=True)

    steps = [
        Step("check", (*check, "--dtype", "float32") if quick else check, 90),
        Step("tests of the kernels", (*tests, *kernels), 70),
        suite("layer", 160),
        suite("kernels", 80),
        suite("host", 30),
        suite("model", 60),
        suite("memory", 20),
        suite("tuning", 60),
        suite("scaling", 60),
        Step("other tests on the GPU", (*tests, "-m", "gpu", "tests/kernels", "tests"), 150),
        Step("compiled layers", (*bench, "--shape", "8192,4096,4096,32", "--without", "loop", "lora", "graph"), 60),
    ]
    if quick:
        steps = [step for step in steps if "tests" not in step.name and step.name != "compiled layers"]
    if shutil.which("compute-sanitizer"):  # without torch's caching every tensor has bounds that the tool knows
        sanitizer = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "1")
        steps.insert(6, Step("compute-sanitizer", (*sanitizer, sys.executable, "-c", _SMALL_CASES), 60))
    return steps


def run(command: Sequence[str], limit_s: float, log: TextIO) -> int | None:
    """Run a command, its output into ``log``; the exit code, or None where it had to be ended at its limit."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; children would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    log.write(f"\n===== at most {limit_s:.0f} s: {' '.join(command)}\n")
    log.flush()
    output = {"stdout": log, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **output)
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then says what failed so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the session that was started for it, and what it left there
        process.wait()
        return None


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
    state = folder / "state.json"
    codes: dict[str, int | None] = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    deadline, tried = start + 60 * options.minutes - RESERVE_S, set()
    steps = steps_of_visit(folder, quick=options.quick)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        for step in [*steps, *(step for step in steps if step.resumes)]:
            left_s = deadline - time.monotonic()
            finished = codes.get(step.name) in (0, 1)  # 1: a test failed, or a contender was wrong
            if finished or left_s < LEAST_S:
                continue
            begun = time.monotonic()
            codes[step.name] = run(step.command, left_s if step.name in tried else min(step.most_s, left_s), log)
            tried.add(step.name)
            verdict = {0: "ok", 1: "ended, with failures: see the log", None: "OUT OF TIME"}
            said = verdict.get(codes[step.name], f"EXIT CODE {codes[step.name]}")
            print(f"{step.name:24} {time.monotonic() - begun:6.1f} s  {said}", flush=True)
            write_json(state, codes)
    for step in steps:
        if step.name not in codes:
            print(f"{step.name:24} not run, no time was left")
    return 0 if all(code == 0 for code in codes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
