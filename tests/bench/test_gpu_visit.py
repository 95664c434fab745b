"""A visit to a GPU machine, rehearsed: the order and the time of its steps on a clock of its own, and going on."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from bench import gpu_visit, suites
from bench.gpu_visit import LEAST_S, Outcome, Step, run_process, visit

ROOT = Path(__file__).parents[2]


class Rehearsal:
    """A clock, and steps that take as long as they are told to, on it.

    Attributes:
        takes_s: name -> how long the step takes in all; what is cut off of a step that resumes is not done again.
        ran: (name, its limit) in order.
    """

    def __init__(self, steps: list[Step], takes_s: dict[str, float], exit_codes: dict[str, int] | None = None):
        self.now, self.ran, self.outcomes = 0.0, [], {}
        self.steps, self.left_s, self.exit_codes = steps, dict(takes_s), exit_codes or {}
        self.reported: list[str] = []

    def visit(self, minutes: float) -> None:
        self.ran.clear()
        deadline = self.now + 60 * minutes
        visit(self.steps, self.outcomes, deadline, self._report, self._run, clock=lambda: self.now)
        assert self.now <= deadline

    def _report(self, step: Step, outcome: Outcome) -> None:
        self.reported.append(step.name)

    def _run(self, command: tuple[str, ...], limit_s: float) -> int | None:
        (step,) = (step for step in self.steps if step.command == command)
        self.ran.append((step.name, limit_s))
        took = min(self.left_s[step.name], limit_s)
        self.now += took
        if self.left_s[step.name] <= limit_s:
            return self.exit_codes.get(step.name, 0)
        if step.resumes:
            self.left_s[step.name] -= took
        return None


@pytest.fixture
def standard(monkeypatch) -> list[Step]:
    monkeypatch.setattr(gpu_visit.shutil, "which", lambda program: program)
    return gpu_visit.plan(Path("out"), quick=False)


def test_a_visit_covers_every_suite_in_the_order_of_worth_and_writes_few_files(standard):
    commands = [" ".join(step.command) for step in standard]
    for name in set(suites.SUITES) - {"roofline"}:  # which is measured by "kernels", first
        assert any(f"--suite {name} " in command for command in commands)
    assert len({step.name for step in standard}) == len(standard)
    order = [step.name for step in standard]
    wanted = ["check", gpu_visit.KERNEL_TESTS, "layer", "kernels", "host", "model", "tuning"]
    wanted += [gpu_visit.OTHER_TESTS, "scaling"]
    assert sorted(wanted, key=order.index) == wanted
    files = {part for step in standard for part in step.command if part.startswith("out")}
    assert len(files) + 3 <= 8  # and the log, the state and the summary


def test_the_kernels_own_tests_come_before_all_others(standard):
    commands = {step.name: step.command for step in standard}
    files = {name: [part for part in command if part.endswith(".py")] for name, command in commands.items()}
    first, others = files[gpu_visit.KERNEL_TESTS], files[gpu_visit.OTHER_TESTS]
    assert first == ["tests/kernels/test_triton_gpu.py", "tests/kernels/test_triton_plans.py"]
    assert "-m" not in commands[gpu_visit.KERNEL_TESTS][3:]  # all of them: each may launch a kernel
    assert "gpu and not slow" in commands[gpu_visit.OTHER_TESTS] and not set(first) & set(others)
    assert "tests/kernels/test_triton_kernels.py" in others and "tests/bench/test_benchmark_suites.py" in others
    depth = [len(Path(file).parts) for file in others]
    assert depth == sorted(depth)  # PEFT's last
    assert all("--maxfail=20" in commands[name] for name in (gpu_visit.KERNEL_TESTS, gpu_visit.OTHER_TESTS))


def test_every_step_runs_where_there_is_time(standard):
    rehearsal = Rehearsal(standard, {step.name: 20 for step in standard})
    rehearsal.visit(minutes=9)
    assert [name for name, _ in rehearsal.ran] == [step.name for step in standard]
    assert all(outcome.finished for outcome in rehearsal.outcomes.values())


def test_what_a_step_does_not_use_goes_to_those_after_it(standard):
    limits = []
    for takes_s in (1.0, 1e6):
        rehearsal = Rehearsal(standard, {step.name: takes_s for step in standard})
        rehearsal.visit(minutes=9)
        limits.append(dict(rehearsal.ran[: len(standard)]))
    after_quick, after_slow = limits
    assert after_quick["check"] == after_slow["check"]
    assert after_quick["model"] > 3 * after_slow["model"]


def test_a_visit_of_steps_that_hang_ends_in_time_and_what_is_worth_most_has_run(standard):
    rehearsal = Rehearsal(standard, {step.name: 1e6 for step in standard})
    rehearsal.visit(minutes=9)
    assert rehearsal.now > 530
    limits = dict(reversed(rehearsal.ran))  # of the first try
    assert {"check", "layer", "kernels", "model"} <= set(limits)
    assert all(limit >= LEAST_S for limit in limits.values())
    # What the targets are read from: about a minute and a half of samples, and the compilation before it.
    assert limits["layer"] > 150 and limits["kernels"] > 70


def test_a_visit_whose_tests_take_long_still_has_time_for_the_targets(standard):
    takes = {step.name: 1e6 for step in standard if "test" in step.name or step.name == "check"}
    rehearsal = Rehearsal(standard, {**{step.name: 1.0 for step in standard}, "layer": 180.0, **takes})
    rehearsal.visit(minutes=9)
    assert rehearsal.outcomes["layer"].finished and rehearsal.outcomes["model"].finished


def test_time_that_is_left_goes_to_what_was_cut_off_and_can_go_on(standard):
    takes = {step.name: 5.0 for step in standard} | {"layer": 300.0, "check": 200.0}
    rehearsal = Rehearsal(standard, takes)
    rehearsal.visit(minutes=9)
    names = [name for name, _ in rehearsal.ran]
    assert names.count("check") == 1 and names.count("layer") == 2  # the check would begin anew
    assert rehearsal.outcomes["layer"].finished and not rehearsal.outcomes["check"].finished


def test_a_second_visit_does_what_the_first_did_not(standard):
    takes = {step.name: 40.0 for step in standard}
    rehearsal = Rehearsal(standard, takes, exit_codes={"check": 1, "kernels": -11})
    rehearsal.visit(minutes=5)
    done = {name for name, outcome in rehearsal.outcomes.items() if outcome.finished}
    assert "check" in done and "kernels" not in done and len(done) < len(standard)
    rehearsal.exit_codes.clear()
    rehearsal.visit(minutes=14)
    assert {name for name, _ in rehearsal.ran} == {step.name for step in standard} - done
    assert all(outcome.finished for outcome in rehearsal.outcomes.values())
    rehearsal.visit(minutes=9)
    assert not rehearsal.ran


def test_no_step_is_started_without_time_for_it(standard):
    rehearsal = Rehearsal(standard, {step.name: 1e6 for step in standard})
    rehearsal.visit(minutes=0.1)
    assert not rehearsal.ran
    assert {outcome.skipped for outcome in rehearsal.outcomes.values()} == {"no time was left"}


def test_a_program_that_is_absent_is_no_failure():
    step = Step("absent", ("true",), 1, needs="no-such-program")
    rehearsal = Rehearsal([step], {})
    rehearsal.visit(minutes=1)
    assert not rehearsal.ran and "no-such-program" in rehearsal.outcomes["absent"].line("absent")


def test_a_process_that_hangs_is_ended_and_may_say_what_it_had(tmp_path):
    hanging = "import time\nprint('began', flush=True)\ntry:\n    time.sleep(600)\nfinally:\n    print('so far')"
    with (tmp_path / "log").open("w") as log:
        assert run_process((sys.executable, "-c", hanging), 1, log) is None
        assert run_process((sys.executable, "-c", "raise SystemExit(3)"), 60, log) == 3
    assert {"began", "so far"} <= set((tmp_path / "log").read_text().split("\n"))


def test_a_visit_keeps_what_became_of_its_steps_and_goes_on(tmp_path, monkeypatch, capsys):
    code = "print('here')"
    steps = [Step("fine", (sys.executable, "-c", code), 1), Step("wrong", (sys.executable, "-c", "1 / 0"), 1)]
    monkeypatch.setattr(gpu_visit, "plan", lambda folder, quick: steps)
    arguments = ["--out", str(tmp_path / "out"), "--minutes", "1"]
    assert gpu_visit.main(arguments) == 1
    assert "no results" in capsys.readouterr().out
    log, state = (tmp_path / "out/log.txt").read_text(), json.loads((tmp_path / "out/state.json").read_text())
    assert "here" in log and "ZeroDivisionError" in log
    (of_device,) = state.values()
    assert [of_device[name]["exit_code"] for name in ("fine", "wrong")] == [0, 1]
    assert gpu_visit.main(arguments) == 1  # nothing runs again
    assert (tmp_path / "out/log.txt").read_text() == log
    monkeypatch.setattr(gpu_visit, "device_name", lambda: "another GPU")
    gpu_visit.main(arguments)
    assert (tmp_path / "out/log.txt").read_text().count("here") > log.count("here")


def test_the_table_at_the_end_is_made_of_whatever_there_is(tmp_path):
    results = tmp_path / "results.jsonl"
    row = {"suite": "kernels", "contender": "triton", "pass": "prefill", "residual": "fold", "roofline_percent": 71.4}
    rows = [{**row, "T": 8, "N": 8, "M": 8, "R": 8}, {"suite": "layer", "contender": "x", "failed": "raised"}]
    results.write_text("".join(json.dumps(one) + "\n" for one in rows))
    text = gpu_visit.summary([], {}, results)
    assert "71 % of the roofline: prefill, triton" in text and "1 rows say that something failed" in text
    results.write_text("nonsense\n")
    assert "no table: ResultsError" in gpu_visit.summary([], {}, results)


def test_a_visit_does_without_plugins_of_pytest(monkeypatch):
    monkeypatch.setattr(gpu_visit.importlib.util, "find_spec", lambda name: None)
    command = gpu_visit._pytest("tests")
    assert "-n" not in command and "addopts=-ra --strict-markers --strict-config" in command


def test_the_options_of_pytest_that_a_visit_repeats_are_the_projects():
    assert "-ra --strict-markers --strict-config" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_a_quick_visit_runs_here(tmp_path, monkeypatch):
    wanted = ("kernels", "compute-sanitizer")
    steps = [step for step in gpu_visit.plan(tmp_path, quick=True) if step.name in wanted]
    monkeypatch.setattr(gpu_visit, "plan", lambda folder, quick: steps)
    assert gpu_visit.main(["--out", str(tmp_path), "--minutes", "5", "--quick"]) == 0
    text = (tmp_path / "summary.txt").read_text()
    assert "ok" in text and "% of the roofline: prefill, torch" in text
    assert shutil.which("compute-sanitizer") or "compute-sanitizer is not here" in text
