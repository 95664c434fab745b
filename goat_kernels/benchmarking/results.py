"""Results: one JSON object per line, written as they come and never changed afterwards, so that regressions show."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

#: Where a checkout keeps them.
RESULTS_FOLDER = Path("bench/results")

#: Fields that say which measurement a row is; the rest is what was measured, and on what.
KEY_FIELDS = (
    *("suite", "device", "gpu", "cpu", "threads", "dtype", "adapter_dtype"),
    *("model", "batch", "length", "T", "N", "M", "R", "E", "K", "varied", "residual", "backend"),
    *("mode", "pass", "contender"),
)

#: Significant digits of a number.
_DIGITS = 6


class ResultsError(ValueError):
    """A file that does not hold results; the message names it, the line and what is wrong."""


def writer(path: Path) -> Callable[[dict], None]:
    """A function that appends a row to ``path`` at once, so that what was measured survives an interruption."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(row: dict) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_rounded(row), allow_nan=False) + "\n")

    return write


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
    """The rows of one file.

    Raises:
        ResultsError: a line that is not a result.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ResultsError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict) or "suite" not in row:
            raise ResultsError(f"{path}, line {number}: not a result of goat-kernels bench")
        rows.append(row)
    return rows


def read_folder(folder: Path) -> list[dict]:
    """All rows of all files of a folder."""
    return [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]


def newest(rows: Iterable[dict], suite: str, device: str) -> list[dict]:
    """The rows of the last run of a suite on the standard shapes on that type of device; empty where there is none."""
    fitting = [r for r in rows if (r["suite"], r["device"], r["cases"]) == (suite, device, "standard")]
    last = max((row["date"] for row in fitting), default=None)
    return [row for row in fitting if row["date"] == last]


def timed(rows: Iterable[dict]) -> list[dict]:
    """Without those that were skipped or failed."""
    return [row for row in rows if "skipped" not in row and "failed" not in row]


def key_of(row: dict) -> tuple:
    """Equal for two measurements of the same thing."""
    return tuple(row.get(name) for name in KEY_FIELDS)
