"""A visit to a GPU machine, rehearsed: the order and the time of its steps, and going on where it stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import gpu_visit, suites
from bench.gpu_visit import Step, run, steps_of_visit

ROOT = Path(__file__).parents[2]


class Rehearsal:
    """A clock, and steps that take as long as they are told to, on it.

    Attributes:
        takes_s: name -> how long the step takes in all; what a suite has done when it is cut off is not done again.
        ran: (name, its limit) in order.
    """

    def __init__(self, monkeypatch, folder: Path, takes_s: dict[str, float], exit_codes: dict[str, int] | None = None):
        self.now, self.ran, self.folder = 0.0, [], folder
        self.steps, self.left_s, self.exit_codes = steps_of_visit(folder, quick=False), dict(takes_s), exit_codes or {}
        monkeypatch.setattr(gpu_visit, "steps_of_visit", lambda folder, quick: self.steps)
        monkeypatch.setattr(gpu_visit, "run", self._run)
        monkeypatch.setattr(gpu_visit.time, "monotonic", lambda: self.now)

    def visit(self, minutes: float) -> dict[str, int | None]:
        self.ran.clear()
        deadline = self.now + 60 * minutes
        gpu_visit.main(["--out", str(self.folder), "--minutes", str(minutes)])
        assert self.now <= deadline
        state = self.folder / "state.json"
        return json.loads(state.read_text()) if state.exists() else {}

    def _run(self, command: tuple[str, ...], limit_s: float, log) -> int | None:
        (step,) = (step for step in self.steps if step.command == command)
        self.ran.append((step.name, limit_s))
        took = min(self.left_s[step.name], limit_s)
        self.now += took
        if self.left_s[step.name] <= limit_s:
            return self.exit_codes.get(step.name, 0)
        if step.resumes:
            self.left_s[step.name] -= took
        return None


STEPS = steps_of_visit(Path("out"), quick=False)


def test_a_visit_covers_every_suite_in_the_order_of_worth_and_writes_few_files():
    commands = [" ".join(step.command) for step in STEPS]
    for name in suites.SUITES:
        assert any(f"--suite {name} " in command for command in commands)
    order = [step.name for step in STEPS]
    assert len(set(order)) == len(order)
    wanted = ["check", "tests of the kernels", "layer", "kernels", "host", "model", "tuning"]
    assert sorted(wanted, key=order.index) == wanted
    assert {part for step in STEPS for part in step.command if part.startswith("out")} == {
        str(Path("out", name)) for name in ("results.jsonl", "check.jsonl")
    }


def test_the_tests_that_a_visit_names_exist_and_its_markers_too():
    named = {part for step in STEPS for part in step.command if part.startswith("tests")}
    assert named and all((ROOT / part).exists() for part in named)
    assert "gpu: " in (ROOT / "pyproject.toml").read_text()


def test_a_visit_whose_steps_take_their_time_runs_them_all(monkeypatch, tmp_path):
    rehearsal = Rehearsal(monkeypatch, tmp_path, {step.name: 20 for step in STEPS})
    assert set(rehearsal.visit(9).values()) == {0}
    assert [name for name, _ in rehearsal.ran] == [step.name for step in STEPS]


def test_a_visit_of_steps_that_hang_ends_in_time_and_what_is_worth_most_has_run(monkeypatch, tmp_path):
    rehearsal = Rehearsal(monkeypatch, tmp_path, {step.name: 1e6 for step in STEPS})
    codes = rehearsal.visit(9)
    assert set(codes.values()) == {None} and {"check", "layer", "kernels", "host", "model"} <= set(codes)
    assert rehearsal.now > 500


def test_time_that_is_left_goes_to_suites_that_were_cut_off(monkeypatch, tmp_path):
    takes = {step.name: 5.0 for step in STEPS} | {"layer": 300.0, "check": 200.0}
    rehearsal = Rehearsal(monkeypatch, tmp_path, takes)
    codes = rehearsal.visit(9)
    names = [name for name, _ in rehearsal.ran]
    assert names.count("check") == 1 and names.count("layer") == 2  # the check would begin anew
    assert codes["layer"] == 0 and codes["check"] is None


def test_a_second_visit_does_what_the_first_did_not(monkeypatch, tmp_path):
    rehearsal = Rehearsal(monkeypatch, tmp_path, {s.name: 40.0 for s in STEPS}, {"check": 1, "kernels": -11})
    first = rehearsal.visit(5)
    done = {name for name, code in first.items() if code in (0, 1)}
    assert "check" in done and "kernels" not in done and len(done) < len(STEPS)
    rehearsal.exit_codes.clear()
    second = rehearsal.visit(14)
    assert {name for name, _ in rehearsal.ran} == {step.name for step in STEPS} - done
    assert set(second) == {step.name for step in STEPS} and None not in second.values()
    rehearsal.visit(9)
    assert not rehearsal.ran


def test_no_step_is_started_without_time_for_it(monkeypatch, tmp_path, capsys):
    rehearsal = Rehearsal(monkeypatch, tmp_path, {step.name: 1e6 for step in STEPS})
    assert rehearsal.visit(0.1) == {} and not rehearsal.ran
    assert any(line.split(" ", 1)[0] == "layer" and "not run" in line for line in capsys.readouterr().out.splitlines())


def test_a_process_that_hangs_is_ended_and_may_say_what_it_had(tmp_path):
    hanging = "import time\nprint('began', flush=True)\ntry:\n    time.sleep(600)\nfinally:\n    print('so far')"
    with (tmp_path / "log").open("w") as log:
        assert run((sys.executable, "-c", hanging), 1, log) is None
        assert run((sys.executable, "-c", "raise SystemExit(3)"), 60, log) == 3
    assert {"began", "so far"} <= set((tmp_path / "log").read_text().split("\n"))


def test_a_visit_says_what_failed_and_runs_nothing_twice(tmp_path, monkeypatch, capsys):
    steps = [Step("fine", (sys.executable, "-c", "print('here')"), 60)]
    steps.append(Step("wrong", (sys.executable, "-c", "1 / 0"), 60))
    monkeypatch.setattr(gpu_visit, "steps_of_visit", lambda folder, quick: steps)
    arguments = ["--out", str(tmp_path / "out"), "--minutes", "1"]
    assert gpu_visit.main(arguments) == 1
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["ok", "log"]
    log = (tmp_path / "out/log.txt").read_text()
    assert "here" in log and "ZeroDivisionError" in log
    assert json.loads((tmp_path / "out/state.json").read_text()) == {"fine": 0, "wrong": 1}
    assert gpu_visit.main(arguments) == 1
    assert (tmp_path / "out/log.txt").read_text() == log


@pytest.mark.long
def test_a_quick_visit_runs_here(tmp_path, monkeypatch):
    steps = [step for step in steps_of_visit(tmp_path, quick=True) if step.name == "kernels"]
    monkeypatch.setattr(gpu_visit, "steps_of_visit", lambda folder, quick: steps)
    assert gpu_visit.main(["--out", str(tmp_path), "--minutes", "5", "--quick"]) == 0
    assert "| prefill | torch |" in (tmp_path / "log.txt").read_text()
