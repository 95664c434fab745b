"""Results: one JSON object per line, written as they come and never changed afterwards, so that regressions show."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

#: Where a checkout keeps them.
RESULTS_FOLDER = Path("bench/results")

#: Fields that say which machine it was: numbers of two of them do not belong in one table.
MACHINE_FIELDS = ("device", "gpu", "cpu", "threads")

#: Fields that say which measurement a row is; the rest is what was measured, and on what.
KEY_FIELDS = (
    *("suite", *MACHINE_FIELDS, "dtype", "adapter_dtype"),
    *("model", "batch", "length", "T", "N", "M", "R", "E", "K", "varied", "dropout_p", "residual", "backend"),
    *("size", "mode", "pass", "contender"),
)

#: Those of them that say which case of its suite a row belongs to.
CASE_FIELDS = ("model", "batch", "length", "T", "N", "M", "R", "E", "K", "varied", "dropout_p")

#: Fields that have to agree for a run to go on where another one stopped.
_SAME_RUN = (*MACHINE_FIELDS, "commit", "versions", "cases")

#: Significant digits of a number.
_DIGITS = 6


class ResultsError(ValueError):
    """A file that does not hold results; the message names it, the line and what is wrong."""


def writer(path: Path) -> Callable[[dict], None]:
    """A function that appends a row to ``path`` at once, in a single write, so that a crash leaves whole lines.

    What an interrupted run left of a line at the end is cut off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _cut_torn_line(path)

    def write(row: dict) -> None:
        line = json.dumps(_rounded(row), allow_nan=False) + "\n"
        with path.open("ab", buffering=0) as file:
            file.write(line.encode())
            os.fsync(file.fileno())

    return write


def _cut_torn_line(path: Path) -> None:
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n") and content:
        warnings.warn(f"{path}: the last line is incomplete and is removed", stacklevel=3)
        os.truncate(path, content.rfind(b"\n") + 1)


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return value


def file_name(row_fields: dict, suites: Iterable[str]) -> str:
    """A name for a run's file: when, on what kind of device, which suites."""
    when = re.sub(r"[^0-9T]", "", row_fields["date"][:19])
    device = re.sub(r"[^a-z0-9]+", "-", (row_fields["gpu"] or "cpu").lower()).strip("-")
    return f"{when}-{device}-{'-'.join(suites)}.jsonl"


def read_rows(path: Path) -> list[dict]:
    """The rows of one file; a last line that an interrupted run did not finish is left out, with a warning.

    Raises:
        ResultsError: a line that is not a result.
    """
    rows, text = [], path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not text.endswith("\n"):
                warnings.warn(f"{path}, line {number}: incomplete, and left out", stacklevel=2)
                break
            raise ResultsError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict) or "suite" not in row:
            raise ResultsError(f"{path}, line {number}: not a result of goat-kernels bench")
        rows.append(row)
    return rows


def read_folder(folder: Path) -> list[dict]:
    """All rows of all files of a folder."""
    return [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]


def newest(rows: Iterable[dict], suite: str, device: str) -> list[dict]:
    """Of each measurement of a suite on the standard shapes the newest row, on the machine of the newest one of all.

    Row by row, so that a run of a part does not hide what it did not measure. Empty where there is none.
    """
    fitting = [r for r in rows if (r["suite"], r["device"], r["cases"]) == (suite, device, "standard")]
    last = max(fitting, key=lambda row: row["date"], default=None)
    found: dict[tuple, dict] = {}
    for row in sorted(fitting, key=lambda row: row["date"]):
        if all(row.get(name) == last.get(name) for name in MACHINE_FIELDS):
            found[key_of(row)] = row
    return list(found.values())


def timed(rows: Iterable[dict]) -> list[dict]:
    """Without those that were skipped or failed."""
    return [row for row in rows if "skipped" not in row and "failed" not in row]


def finished_cases(rows: Iterable[dict], suite: str, run: dict) -> set[tuple]:
    """The cases of a suite that ``rows`` have whole: all but the last one, in which the run may have stopped.

    Args:
        rows: in the order in which they were written.
        suite: its name.
        run: the fields of the run that goes on; rows of another machine, commit or dtype do not count.
    """
    same = (*_SAME_RUN, "dtype")
    of_suite = [row for row in rows if row["suite"] == suite and "skipped" not in row]
    cases = [case_of(row) for row in of_suite if all(row.get(name) == run.get(name) for name in same)]
    return set(cases) - set(cases[-1:])


def case_of(row: dict) -> tuple:
    """Which case of its suite a row, or what ``Case.row`` gives, belongs to."""
    return tuple(row.get(name) for name in CASE_FIELDS)


def key_of(row: dict) -> tuple:
    """Equal for two measurements of the same thing."""
    return tuple(row.get(name) for name in KEY_FIELDS)
