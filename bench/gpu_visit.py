"""Everything that a GPU has to answer, in one call that ends in time, from a checkout without an installation.

    python -m bench.gpu_visit --minutes 9 --out visit

The steps run in the order of what their results are worth, each as a process of its own with a share of the time that
is left; what one does not use goes to those after it, and what is left at the end to suites that were cut off.
Benchmarks write every row as soon as it is measured. Run again with the same folder, the visit goes on where it
stopped: finished steps are not repeated, and a suite that was cut off leaves out the shapes that it has. A folder
belongs to one state of the code: take another one for other code.

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
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from goat_kernels.files import write_json

ROOT = Path(__file__).resolve().parents[1]

#: A step that would get less time than this is not started.
LEAST_S = 10

#: A step may take so many times its share: those that are worth most come first, and most take less than they may.
GENEROSITY = 2.0

#: Kept back for the table at the end, and for a step that does not stop at once; what such a step may still say.
_RESERVE_S, _GRACE_S = 15, 5

#: The step of what only a GPU can show of the kernels, and its files; and the step of every other test that uses one.
KERNEL_TESTS, OTHER_TESTS = "tests of the kernels", "other tests on the GPU"
_KERNEL_TESTS = ("tests/kernels/test_triton_gpu.py", "tests/kernels/test_triton_plans.py")

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


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: in the log and the state.
        command: its arguments.
        weight: its share of the time that is left is its weight over that of all steps that are left.
        resumes: whether it goes on where it was cut off; such steps get what time is left at the end.
        needs: a program that has to be on the PATH, or None.
    """

    name: str
    command: tuple[str, ...]
    weight: int
    resumes: bool = False
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a step; ``exit_code`` is None where it was cut off, ``skipped`` says why it did not run."""

    command: str
    seconds: float = 0.0
    exit_code: int | None = None
    skipped: str | None = None

    @property
    def finished(self) -> bool:
        """Whether it ran to its end: the exit code is 1 where a test failed or a contender was wrong."""
        return self.exit_code in (0, 1)

    def line(self, name: str) -> str:
        """In the table at the end."""
        verdict = {0: "ok", 1: "ended, with failures: see the log", None: "OUT OF TIME"}
        said = verdict.get(self.exit_code, f"EXIT CODE {self.exit_code}")
        return f"{name:22} {self.seconds:6.1f} s  {said if self.skipped is None else f'skipped: {self.skipped}'}"


def plan(folder: Path, *, quick: bool) -> list[Step]:
    """The steps of a visit, what is worth most first; ``quick``: at tiny sizes, on any machine, as a trial."""
    python = (sys.executable, "-m", "goat_kernels")
    bench = (*python, "bench", "--resume", "--output", str(folder / "results.jsonl"))
    check = (*python, "check", "--json", str(folder / "check.jsonl"))

    def suite(name: str, weight: int) -> Step:
        # Compiled layers, which take seconds each to compile, have a step of their own.
        tiny = ("--quick",) if quick else ()
        return Step(name, (*bench, "--suite", name, "--without", "compiled", *tiny), weight, resumes=True)

    # Without torch's caching every tensor has bounds that the tool knows.
    sanitizer = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "1")
    compiled = ("--suite", "layer", "--shape", "8192,4096,4096,32", "--without", "loop", "lora", "graph", "unsloth")
    steps = [
        Step("check", (*check, "--dtype", "float32") if quick else check, 70),
        Step(KERNEL_TESTS, _pytest(*_KERNEL_TESTS), 60),
        suite("layer", 220),
        suite("kernels", 130),  # which measures the roofline first
        suite("host", 25),
        suite("model", 90),
        Step("compute-sanitizer", (*sanitizer, sys.executable, "-c", _SMALL_CASE), 50, needs="compute-sanitizer"),
        suite("memory", 20),
        suite("tuning", 70),
        # Hundreds of kernels to compile, in shapes of no use: after what the targets are read from.
        Step(OTHER_TESTS, _pytest("-m", "gpu and not slow", *_other_tests()), 100),
        suite("scaling", 50),
        Step("compiled layers", (*bench, *compiled), 40),
    ]
    on_gpu_alone = (KERNEL_TESTS, OTHER_TESTS, "compiled layers")
    return [step for step in steps if not (quick and step.name in on_gpu_alone)]


def _pytest(*arguments: str) -> tuple[str, ...]:
    """pytest with the project's options, less those of plugins; on several processors if it can."""
    options = ("-q", "-p", "no:cacheprovider", "--maxfail=20", "-o", "addopts=-ra --strict-markers --strict-config")
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") is not None else ()
    return (sys.executable, "-m", "pytest", *options, *workers, *arguments)


def _other_tests() -> list[str]:
    """Files with tests that run on a GPU where there is one, the backend's before PEFT's; to collect all takes long."""
    paths = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")]
    found = [path for path in paths if _ON_GPU.search((ROOT / path).read_text(encoding="utf-8"))]
    found.sort(key=lambda path: (len(path.parts), not path.name.startswith("test_triton_"), path))
    return [str(path) for path in found if str(path) not in _KERNEL_TESTS]


# --- the visit ------------------------------------------------------------------------------------------------------


def visit(
    steps: Sequence[Step],
    outcomes: dict[str, Outcome],
    deadline_s: float,
    report: Callable[[Step, Outcome], None],
    run: Callable[[Sequence[str], float], int | None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run what is not finished, each step once; then go on with those that were cut off, while there is time.

    Args:
        steps: of ``plan``.
        outcomes: of what has run, by name; those of an earlier call too.
        deadline_s: on ``clock``; no step runs beyond it.
        report: called after every step that ran or was skipped.
        run: (command, limit in seconds) -> exit code, or None where it was cut off.
        clock: seconds.
    """
    tried: set[str] = set()
    waiting = [step for step in steps if step.name not in outcomes or not outcomes[step.name].finished]
    while waiting:
        for index, step in enumerate(waiting):
            share = min(1.0, GENEROSITY * step.weight / sum(one.weight for one in waiting[index:]))
            limit_s, start = (deadline_s - clock()) * share, clock()
            outcome = Outcome(" ".join(part if len(part) < 80 else "..." for part in step.command))
            if step.needs is not None and shutil.which(step.needs) is None:
                outcome = Outcome(outcome.command, skipped=f"{step.needs} is not here")
            elif limit_s >= LEAST_S:
                tried.add(step.name)
                exit_code = run(step.command, limit_s)
                outcome = Outcome(outcome.command, round(clock() - start, 1), exit_code)
            elif step.name in tried:
                continue
            else:
                outcome = Outcome(outcome.command, skipped="no time was left")
            outcomes[step.name] = outcome
            report(step, outcome)
        if deadline_s - clock() < LEAST_S:
            return
        cut_off = [step for step in steps if step.name in tried and outcomes[step.name].exit_code is None]
        waiting = [step for step in cut_off if step.resumes]


def run_process(command: Sequence[str], limit_s: float, log: TextIO) -> int | None:
    """Run a command, its output into ``log``; the exit code, or None where it had to be ended at its limit."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; children would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then says what failed so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the session that was started for it, and what it left there
        process.wait()
        return None


# --- what is kept ---------------------------------------------------------------------------------------------------


def device_name() -> str:
    """The first GPU, without importing torch; "no GPU" where there is none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.splitlines()[0].strip()
    return "no GPU"


def summary(steps: Sequence[Step], outcomes: dict[str, Outcome], results: Path) -> str:
    """The table at the end: what became of each step, and what the benchmarks say in a few lines."""
    lines = [outcomes[step.name].line(step.name) for step in steps if step.name in outcomes]
    try:
        lines += ["", *_headlines(results)]
    except Exception as failure:  # the rows are in the file, whatever is wrong with reading them here
        lines += ["", f"no table: {type(failure).__name__}: {failure}"]
    return "\n".join(lines)


def _headlines(results: Path) -> list[str]:
    """The layer beside the frozen one and LoRA; tiles; the extra K; the passes furthest from the roofline."""
    if not results.exists():
        return ["no results"]
    from bench.results import key_of, read_rows, timed
    from bench.tables import summary_table, tuning_table

    rows = list({key_of(row): row for row in read_rows(results)}.values())
    layer, tuning, kernels = (
        timed(row for row in rows if row["suite"] == suite) for suite in ("layer", "tuning", "kernels")
    )
    lines = []
    if layer:
        has_triton = any(row["contender"].endswith("triton") for row in layer)
        lines += [summary_table(layer, "triton" if has_triton else "torch"), ""]
    if tuning:
        lines += [tuning_table(tuning), ""]
    for row in kernels:
        row["at"] = (
            f"{row['pass']}, {row['contender']}, {row['residual']} T={row['T']} {row['N']}->{row['M']} R={row['R']}"
        )
    lines += [f"{row['ratio_p50']:.3f} of ours: {row['at']}" for row in kernels if row.get("ratio_p50", 1.0) != 1.0]
    passes = [row for row in kernels if row["contender"] != "base"]
    worst = sorted(passes, key=lambda row: row["roofline_percent"])[:5]
    lines += [f"{row['roofline_percent']:4.0f} % of the roofline: {row['at']}" for row in worst]
    return [*lines, f"{sum('failed' in row for row in rows)} rows say that something failed"]


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
    kept, device, steps = folder / "state.json", device_name(), plan(folder, quick=options.quick)
    state = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    outcomes = {name: Outcome(**one) for name, one in state.get(device, {}).items()}

    with (folder / "log.txt").open("a", encoding="utf-8") as log:

        def run(command: Sequence[str], limit_s: float) -> int | None:
            log.write(f"\n===== at most {limit_s:.0f} s: {' '.join(command)}\n")
            log.flush()
            return run_process(command, limit_s, log)

        def report(step: Step, outcome: Outcome) -> None:
            print(outcome.line(step.name), flush=True)
            write_json(kept, {**state, device: {name: asdict(one) for name, one in outcomes.items()}})

        visit(steps, outcomes, start + 60 * options.minutes - _RESERVE_S, report, run)
    text = f"{device}\n\n{summary(steps, outcomes, folder / 'results.jsonl')}"
    (folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return 0 if all(one.exit_code == 0 for one in outcomes.values() if one.skipped is None) else 1


if __name__ == "__main__":
    sys.exit(main())
