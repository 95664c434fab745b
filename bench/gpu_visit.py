"""Everything that needs a GPU, in one call of under ten minutes, from a checkout without an installation.

    python3 bench/gpu_visit.py --output visit          (or with the folder in $OUT)

Each step is a process of its own with a time limit of its own, so that one that fails or hangs does not take the
others' results along; benchmarks write every row as soon as it is measured. In the folder:

    log.txt           what every step printed
    summary.json      each step: command, seconds, exit code (null: out of time); written after every step
    check.jsonl       goat-kernels check, row by row
    results.jsonl     the benchmarks' rows, as for bench/results
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Of the whole visit, in seconds; what a step leaves of its limit goes to those after it.
TOTAL_S = 570

#: A step with less time left than this is not started.
_LEAST_S = 5

#: Run under compute-sanitizer: every pass of small layers in both forms: fused, in stages with dropout, decoding.
_SMALL_CASE = """
import torch
from goat_kernels.backends.triton_backend.passes import TritonPasses
from goat_kernels.checks.problem import LayerCase, make_problem, run_passes
for T, E, K, dropout_p in ((1100, 8, 2, 0.0), (75, 6, 3, 0.1), (16, 6, 3, 0.0)):
    for path in (False, True):
        case = LayerCase(T=T, N=200, M=328, R=24, E=E, K=K, path=path, dropout_p=dropout_p)
        run_passes(TritonPasses(), make_problem(case, "cuda"))
torch.cuda.synchronize()
print("every pass ran")
"""

_MACHINE = """
import torch
from goat_kernels import available_backends
from goat_kernels.benchmarking.machine import describe, measure_roofline
device = torch.device("cuda", torch.cuda.current_device())
print(describe(device))
print(available_backends())
for dtype in (torch.bfloat16, torch.float32):
    print(measure_roofline(device, dtype))
"""


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: in the log and the summary.
        command: its arguments.
        limit_s: it is ended after so many seconds.
        needs: a program that has to be on the PATH, or None.
    """

    name: str
    command: tuple[str, ...]
    limit_s: int
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a step; ``exit_code`` is None where it ran out of time, ``skipped`` why it did not run."""

    name: str
    command: str
    seconds: float = 0.0
    exit_code: int | None = None
    skipped: str | None = None

    @property
    def verdict(self) -> str:
        if self.skipped is not None:
            return f"skipped: {self.skipped}"
        if self.exit_code is None:
            return "OUT OF TIME"
        return "ok" if self.exit_code == 0 else f"FAILED with exit code {self.exit_code}"


def steps(folder: Path, *, quick: bool) -> list[Step]:
    """What a visit does, what matters most first; ``quick``: some of it at tiny sizes, on any machine, as a trial."""
    python, tiny = sys.executable, (("--quick",) if quick else ())
    kernels = (python, "-m", "goat_kernels")
    results = ("--output", str(folder / "results.jsonl"))
    # Standard shapes; compiled layers, which take seconds each to compile, are left to a step of their own.
    layers = (*kernels, "bench", *results, *tiny, "--without", "compiled")
    plan = [
        Step("machine", (python, "-c", _MACHINE), 40),
        Step("tests on the GPU", _pytest("-m", "gpu", "tests"), 110),
        Step("check", (*kernels, "check", "--json", str(folder / "check.jsonl")), 90),
        Step("design", (*layers, "--suite", "design"), 45),
        Step("layer", (*layers, "--suite", "layer"), 110),
        Step("kernels", (*layers, "--suite", "kernels"), 90),
        Step(
            "compute-sanitizer",
            # Without torch's caching every tensor has bounds that the tool knows.
            ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *_SANITIZER, python, "-c", _SMALL_CASE),
            60,
            needs="compute-sanitizer",
        ),
        Step("triton tests", _pytest("-x", "-m", "not gpu", *_triton_tests()), 120),
        Step("memory", (*layers, "--suite", "memory"), 40),
        Step("model", (*layers, "--suite", "model"), 60),
        Step("scaling", (*layers, "--suite", "scaling"), 80),
        Step("startup", (*layers, "--suite", "startup"), 40),
        Step("compiled", (*kernels, "bench", *results, *tiny, *_COMPILED, *(() if quick else _ONE_SHAPE)), 60),
    ]
    return [step for step in plan if not quick or step.name in ("design", "layer", "compute-sanitizer")]


_SANITIZER = ("compute-sanitizer", "--error-exitcode", "1")
_COMPILED = ("--suite", "layer", "--without", "loop", "lora", "graph", "unsloth")
_ONE_SHAPE = ("--shape", "8192,4096,4096,32")


def _pytest(*arguments: str) -> tuple[str, ...]:
    """pytest with the project's options, less those of a plugin that is not here; on several processors if it can."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_benchmark") is None:
        command += ["-o", "addopts=-ra --strict-markers --strict-config"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    return (*command, *arguments)


def _triton_tests() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_triton_*.py"))


def run_step(step: Step, limit_s: float, log) -> Outcome:
    """Run one step, its output into ``log``; end it, and everything that it started, at its limit."""
    shown = " ".join(part if len(part) < 80 else "..." for part in step.command)
    if step.needs is not None and shutil.which(step.needs) is None:
        return Outcome(step.name, shown, skipped=f"{step.needs} is not here")
    if limit_s < _LEAST_S:
        return Outcome(step.name, shown, skipped="no time was left")
    log.write(f"\n===== {step.name}: {shown} (at most {limit_s:.0f} s)\n")
    log.flush()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        exit_code = process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the session that was started for it
        process.wait()
        exit_code = None
    return Outcome(step.name, shown, round(time.perf_counter() - start, 1), exit_code)


def main(arguments: list[str] | None = None) -> int:
    """Run all steps; 0 if every one that ran ended well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=os.environ.get("OUT"), metavar="FOLDER", help="default: $OUT")
    parser.add_argument("--total", type=int, default=TOTAL_S, metavar="SECONDS", help="for all steps (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps at tiny sizes, to see that the script works")
    options = parser.parse_args(arguments)
    if not options.output:
        parser.error("--output needs a folder, or OUT in the environment")
    folder = Path(options.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    start, outcomes = time.perf_counter(), []
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        for step in steps(folder, quick=options.quick):
            left_s = options.total - (time.perf_counter() - start)
            outcomes.append(run_step(step, min(step.limit_s, left_s), log))
            print(f"{outcomes[-1].name:20} {outcomes[-1].seconds:6.1f} s  {outcomes[-1].verdict}", flush=True)
            (folder / "summary.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=2) + "\n")
    return 0 if all(o.exit_code == 0 or o.skipped for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
