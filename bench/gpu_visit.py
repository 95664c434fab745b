"""Everything that a GPU has to answer, in one call that ends in time, from a checkout without an installation.

    python -m bench.gpu_visit --minutes 9 --out visit

The steps run one after the other, what is worth most first, each as a process of its own with a limit; what time is
left at the end goes to the suites that were cut off. Run again with the same folder, the visit goes on where it
stopped: a finished step is not repeated, and a suite leaves out the shapes that it has. The folder belongs to one state
of the code and one GPU. In it: log.txt (what every step printed), state.json (step -> exit code, null where it was cut
off), check.jsonl, results.jsonl (rows as in bench/results) and summary.txt.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from goat_kernels.files import write_json

ROOT = Path(__file__).resolve().parents[1]

#: Kept back for the summary and for a step that does not stop at once; no step starts with less than ``LEAST_S`` left.
RESERVE_S, GRACE_S, LEAST_S = 15, 5, 10


class Step(NamedTuple):
    """One process: its name, its command, the most seconds it may take, whether it goes on where it was cut off."""

    name: str
    command: tuple[str, ...]
    most_s: int
    resumes: bool = False


def plan(folder: Path) -> list[Step]:
    """The steps of a visit, what is worth most first."""
    goat = (sys.executable, "-m", "goat_kernels")
    bench = (*goat, "bench", "--resume", "--output", str(folder / "results.jsonl"))
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    # Without the project's own options, which are those of plugins that a GPU machine may not have.
    tests = (sys.executable, "-m", "pytest", "-q", "-o", "addopts=-ra --strict-markers", "--maxfail=20", *workers)
    kernels = ("tests/kernels/test_triton_gpu.py", "tests/kernels/test_triton_plans.py")

    def suite(name: str, most_s: int) -> Step:
        # Compiled layers, which take seconds each to compile, have a step of their own.
        return Step(name, (*bench, "--suite", name, "--without", "compiled"), most_s, resumes=True)

    return [
        Step("check", (*goat, "check", "--json", str(folder / "check.jsonl")), 90),
        Step("tests of the kernels", (*tests, *kernels), 70),
        suite("layer", 160),
        suite("kernels", 80),  # which measures the roofline first
        suite("host", 30),
        suite("model", 60),
        suite("memory", 20),
        suite("tuning", 60),
        suite("scaling", 60),
        Step("other tests on the GPU", (*tests, "-m", "gpu and not slow", "tests/kernels", "tests"), 150),
        Step(
            "compiled layers",
            (*bench, "--suite", "layer", "--shape", "8192,4096,4096,32", "--without", "loop", "lora", "graph"),
            60,
        ),
    ]


def run(command: Sequence[str], limit_s: float, log: TextIO) -> int | None:
    """Run a command, its output into ``log``; the exit code, or None where it had to be ended at its limit."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; children would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    log.write(f"\n===== at most {limit_s:.0f} s: {' '.join(command)}\n")
    log.flush()
    # At its limit the process and what it started get SIGINT, upon which pytest says what failed so far.
    limited = ("timeout", "--signal=INT", f"--kill-after={GRACE_S}", f"{limit_s:.0f}", *command)
    code = subprocess.run(limited, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    return None if code in (124, 137, -signal.SIGKILL) else code


def headlines(results: Path) -> list[str]:
    """The layer beside the frozen one and LoRA, and how many rows say that something failed."""
    if not results.exists():
        return ["no results"]
    from bench.results import KEY_FIELDS, part_of, read_rows, timed
    from bench.tables import summary_table

    rows = list({part_of(row, KEY_FIELDS): row for row in read_rows(results)}.values())
    layer = timed(row for row in rows if row["suite"] == "layer")
    table = summary_table(layer, "triton") if layer else "no layer was timed"
    return [table, f"{sum('failed' in row for row in rows)} rows say that something failed"]


def main(arguments: list[str] | None = None) -> int:
    """Make a visit; 0 if every step that ran ended well."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_visit", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (%(default)s)")
    parser.add_argument("--out", required=True, metavar="DIR", help="where everything goes; the same one goes on")
    options = parser.parse_args(arguments)
    folder = Path(options.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.json"
    codes: dict[str, int | None] = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    deadline, steps, tried = start + 60 * options.minutes - RESERVE_S, plan(folder), set()
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
    lines = [f"{step.name}: not run, no time was left" for step in steps if step.name not in codes]
    lines += headlines(folder / "results.jsonl")
    (folder / "summary.txt").write_text("\n".join([json.dumps(codes), *lines]) + "\n", encoding="utf-8")
    print("\n" + "\n".join(lines))
    return 0 if all(code == 0 for code in codes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
