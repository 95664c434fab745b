"""A visit: steps, each a process of its own, that share a time which none of them may exceed.

Each step may use a part of the time that is left; what it does not use goes to those after it. Steps that can go on
where they were cut off get what is left at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]

#: A step that would get less time than this is not started.
LEAST_S = 10

#: A step may take so many times its share: those that are worth most come first, and most take less than they may.
GENEROSITY = 2.0

#: What a step that is out of time may still say, before it is killed.
_GRACE_S = 5

#: Exit codes of a step that ran to its end: 1 where a test failed or a contender was wrong.
_FINISHED = (0, 1)


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
        return self.exit_code in _FINISHED

    @property
    def verdict(self) -> str:
        if self.skipped is not None:
            return f"skipped: {self.skipped}"
        if self.exit_code is None:
            return "OUT OF TIME"
        return {0: "ok", 1: "ended, with failures: see the log"}.get(self.exit_code, f"EXIT CODE {self.exit_code}")


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


@dataclass
class Visit:
    """The steps that are left, and the time.

    Attributes:
        steps: of ``plan``.
        outcomes: of what has run, by name; those of an earlier call too.
        deadline_s: on ``clock``; no step runs beyond it.
        report: called after every step that ran or was skipped.
        clock: seconds.
        run: (command, limit in seconds) -> exit code, or None where it was cut off.
    """

    steps: Sequence[Step]
    outcomes: dict[str, Outcome]
    deadline_s: float
    report: Callable[[Step, Outcome], None]
    run: Callable[[Sequence[str], float], int | None]
    clock: Callable[[], float] = time.monotonic
    _tried: set[str] = field(default_factory=set)

    def make(self) -> None:
        """Run what is not finished, each step once; then go on with those that were cut off, while there is time."""
        self._round([step for step in self.steps if not self._is_finished(step)])
        while again := [step for step in self.steps if step.resumes and step.name in self._tried]:
            again = [step for step in again if self.outcomes[step.name].exit_code is None]
            if not again or self._left_s() < LEAST_S:
                return
            self._round(again)

    def _round(self, steps: Sequence[Step]) -> None:
        for index, step in enumerate(steps):
            weights = [one.weight for one in steps[index:]]
            share = min(1.0, GENEROSITY * weights[0] / sum(weights))
            self._one(step, self._left_s() * share)

    def _one(self, step: Step, limit_s: float) -> None:
        shown = " ".join(part if len(part) < 80 else "..." for part in step.command)
        if step.needs is not None and shutil.which(step.needs) is None:
            self._note(step, Outcome(shown, skipped=f"{step.needs} is not here"))
            return
        if limit_s < LEAST_S:
            if step.name not in self._tried:
                self._note(step, Outcome(shown, skipped="no time was left"))
            return
        start = self.clock()
        self._tried.add(step.name)
        exit_code = self.run(step.command, limit_s)
        self._note(step, Outcome(shown, round(self.clock() - start, 1), exit_code))

    def _note(self, step: Step, outcome: Outcome) -> None:
        self.outcomes[step.name] = outcome
        self.report(step, outcome)

    def _is_finished(self, step: Step) -> bool:
        return step.name in self.outcomes and self.outcomes[step.name].finished

    def _left_s(self) -> float:
        return self.deadline_s - self.clock()
