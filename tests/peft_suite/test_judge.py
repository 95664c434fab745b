"""The verdict on PEFT's own tests is strict in both directions. The suite itself takes minutes: run.py runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from judge import judge, read_expectations

EXPECTED = {
    "failure": [{"kind": "merging", "test": r"::test_merge", "message": "cannot be merged", "reason": "per token"}],
    "skip": [{"message": "not for GOAT", "reason": "others' tests"}],
}
GOOD = [
    {"test": "a.py::test_save", "outcome": "passed", "message": ""},
    {"test": "a.py::test_merge[x]", "outcome": "failed", "message": "ValueError: cannot be merged"},
    {"test": "a.py::test_prompt", "outcome": "skipped", "message": "Skipped: not for GOAT"},
]


def test_as_expected():
    verdict = judge(GOOD, EXPECTED)
    assert verdict.problems == []
    assert verdict.passed == 1
    assert dict(verdict.failed_as_expected) == {("merging", "per token"): 1}
    assert dict(verdict.skipped) == {"others' tests": 1}
    assert "1 failed as expected (merging): per token" in str(verdict)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"test": "a.py::test_other", "outcome": "failed", "message": "boom"}, "failed: a.py::test_other: boom"),
        ({"test": "a.py::test_merge[y]", "outcome": "failed", "message": "boom"}, "failed: a.py::test_merge"),
        ({"test": "a.py::test_other", "outcome": "failed", "message": "cannot be merged"}, "failed: a.py::test_other"),
        ({"test": "a.py::test_merge[y]", "outcome": "passed", "message": ""}, "passed, but is expected to fail"),
        ({"test": "a.py::test_new", "outcome": "skipped", "message": "no GPU"}, "for a reason that is not listed"),
    ],
)
def test_not_as_expected(change, problem):
    (found,) = judge([*GOOD, change], EXPECTED).problems
    assert problem in found


@pytest.mark.parametrize("missing", [1, 2])
def test_an_expectation_that_nothing_met(missing):
    records = [record for i, record in enumerate(GOOD) if i != missing]
    (found,) = judge(records, EXPECTED).problems
    assert "no test met this expectation" in found


def test_a_suite_that_did_not_run():
    assert "no test passed: the suite did not run" in judge([], EXPECTED).problems


def test_every_expectation_has_a_reason():
    expectations = read_expectations(Path(__file__).with_name("expectations.toml"))
    assert set(expectations) == {"versions", "failure", "skip"}
    entries = expectations["failure"] + expectations["skip"]
    assert all(entry["reason"] and entry["message"] for entry in entries)
    assert {entry["kind"] for entry in expectations["failure"]} == {
        "merging",
        "identity at initialisation",
        "one active adapter",
        "fold under FSDP",
    }, "no defect of ours is expected"
