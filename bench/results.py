"""Results: one JSON object per line, written as they come and never changed afterwards."""

from __future__ import annotations

import fcntl
import json
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from goat_kernels.command_errors import CommandError

#: Where a checkout keeps them; those of ``bench.quality`` are in a folder ``quality`` in there.
RESULTS_FOLDER = Path("bench/results")

#: Fields that say which machine it was: numbers of two of them do not belong in one table.
MACHINE_FIELDS = ("device", "gpu", "cpu", "threads")

#: Fields that say which case of its suite a row belongs to.
CASE_FIELDS = ("model", "batch", "length", "T", "N", "M", "R", "E", "K", "varied", "dropout_p")

#: Fields that say which measurement a row is; the rest is what was measured.
KEY_FIELDS = (
    *("suite", *MACHINE_FIELDS, "dtype", "adapter_dtype"),
    *(*CASE_FIELDS, "residual", "backend", "size", "mode", "pass", "contender"),
)

#: Fields that have to agree for a run to go on where another one stopped.
_SAME_RUN = (*MACHINE_FIELDS, "commit", "versions", "cases", "dtype")


def append(path: Path, row: dict) -> None:
    """Write one row at the end of ``path``, at once; several processes may do so at the same time.

    Numbers are rounded to six digits; NaN and infinity, which JSON does not have, become null. What an interrupted
    process left of a line at the end is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(_clean(row), allow_nan=False) + "\n").encode()
    with path.open("ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            warnings.warn(f"{path}: the last line is incomplete and is removed", stacklevel=2)
            file.truncate(whole)
        file.write(line)


def _clean(value):
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _clean(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(one) for one in value]
    return value


def read_rows(path: Path) -> list[dict]:
    """The rows of one file; a last line that an interrupted run did not finish is left out, with a warning.

    Raises:
        CommandError: a line that is not a result.
    """
    rows, lines = [], path.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines.pop():
        warnings.warn(f"{path}, line {len(lines) + 1}: incomplete, and left out", stacklevel=2)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CommandError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict) or not {"suite", "task"} & row.keys():
            raise CommandError(f"{path}, line {number}: not a result of goat-kernels bench")
        rows.append(row)
    return rows


def read_folder(folder: Path) -> list[dict]:
    """All rows of all files of a folder."""
    return [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]


def file_name(machine: dict, suites: Iterable[str]) -> str:
    """A name for a run's file: when, on what kind of device, which suites."""
    when = re.sub(r"[^0-9T]", "", machine["date"][:19])
    device = re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or "cpu").lower()).strip("-")
    return f"{when}-{device}-{'-'.join(suites)}.jsonl"


def newest(rows: Iterable[dict], suite: str, device: str) -> list[dict]:
    """Of each measurement of a suite on the standard shapes the newest row, on the machine of the newest one of all.

    Row by row, so that a run of a part does not hide what it did not measure. Empty where there is none.
    """
    fitting = [r for r in rows if (r["suite"], r["device"], r["cases"]) == (suite, device, "standard")]
    fitting.sort(key=lambda row: row["date"])
    machine = part_of(fitting[-1], MACHINE_FIELDS) if fitting else ()
    return list({part_of(row, KEY_FIELDS): row for row in fitting if part_of(row, MACHINE_FIELDS) == machine}.values())


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
    of_suite = [row for row in rows if row["suite"] == suite and "skipped" not in row]
    cases = [part_of(row, CASE_FIELDS) for row in of_suite if part_of(row, _SAME_RUN) == part_of(run, _SAME_RUN)]
    return set(cases) - set(cases[-1:])


def part_of(row: dict, fields: tuple[str, ...]) -> tuple:
    """The values of some fields; None for one that a row does not have."""
    return tuple(row.get(name) for name in fields)
