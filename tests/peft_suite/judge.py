"""Which outcomes of PEFT's tests are as expected: strict in both directions."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Verdict:
    """What came of a run.

    Attributes:
        passed: number of tests that passed.
        failed_as_expected: (kind, reason) -> number of tests.
        skipped: reason -> number of tests.
        problems: what was not as expected, one line each; empty for a good run.
    """

    passed: int = 0
    failed_as_expected: Counter = field(default_factory=Counter)
    skipped: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.passed} passed"]
        lines += [f"{n} failed as expected ({kind}): {reason}" for (kind, reason), n in self.failed_as_expected.items()]
        lines += [f"{n} skipped: {reason}" for reason, n in self.skipped.items()]
        if self.problems:
            lines += ["", f"{len(self.problems)} PROBLEMS", *self.problems]
        return "\n".join(lines)


def read_expectations(path: Path) -> dict[str, list]:
    """The entries of expectations.toml: ``failure`` and ``skip``, and the ``versions`` that they are written for."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def judge(records: list[dict[str, str]], expectations: dict[str, list]) -> Verdict:
    """Compare ``records`` (test, outcome, message) with what is expected."""
    verdict = Verdict()
    met: set[int] = set()
    failures, skips = expectations.get("failure", []), expectations.get("skip", [])
    for record in records:
        test, outcome, message = record["test"], record["outcome"], record["message"]
        first_line = message.partition("\n")[0][:200]
        if outcome == "passed":
            verdict.passed += 1
            # "merging" is recognised by its message alone; an entry that names tests names all that must fail.
            for entry in failures:
                if entry["test"] != ".*" and re.search(entry["test"], test):
                    verdict.problems.append(f"passed, but is expected to fail ({entry['kind']}): {test}")
        elif outcome == "failed":
            entry = _matching(failures, record)
            if entry is None:
                verdict.problems.append(f"failed: {test}: {first_line}")
            else:
                met.add(id(entry))
                verdict.failed_as_expected[entry["kind"], entry["reason"]] += 1
        else:
            entry = next((entry for entry in skips if re.search(entry["message"], message)), None)
            if entry is None:
                verdict.problems.append(f"skipped for a reason that is not listed: {test}: {first_line}")
            else:
                met.add(id(entry))
                verdict.skipped[entry["reason"]] += 1
    for entry in (*failures, *skips):
        if id(entry) not in met:
            verdict.problems.append(
                f"no test met this expectation: {entry['message']!r} on {entry.get('test', '.*')!r}"
            )
    if not verdict.passed:
        verdict.problems.append("no test passed: the suite did not run")
    return verdict


def _matching(failures: list[dict[str, str]], record: dict[str, str]) -> dict[str, str] | None:
    return next(
        (e for e in failures if re.search(e["test"], record["test"]) and re.search(e["message"], record["message"])),
        None,
    )
