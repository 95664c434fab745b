"""The results: one JSON object per line and run, one file per task, appended at once and never changed afterwards."""

from __future__ import annotations

import fcntl
import json
import math
import os
from pathlib import Path

#: Where a checkout keeps them.
RESULTS_FOLDER = Path("bench/results/quality")

#: Fields that say which run a row is.
KEY_FIELDS = ("task", "contender", "stage", "learning_rate", "seed", "steps", "batch_size", "quick", "data")

#: Significant digits of a number.
_DIGITS = 6


def key_of(row: dict) -> tuple:
    """Equal for two runs of the same thing."""
    return tuple(row[name] for name in KEY_FIELDS)


class Results:
    """The rows of a folder.

    A line that was cut off while it was written, by a power cut or a full disk, counts as not written; the next row
    takes its place. Several processes may write at once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def rows(self, task: str) -> list[dict]:
        """Of one task, in the order in which they were written; where two processes did the same run, the first."""
        path = self._path(task)
        if not path.is_file():
            return []
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
        first: dict[tuple, dict] = {}
        for line in whole.splitlines():
            row = json.loads(line)
            first.setdefault(key_of(row), row)
        return list(first.values())

    def append(self, row: dict) -> None:
        """Write one row; what is not a finite number becomes null."""
        path = self._path(row["task"])
        path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(_clean(row), allow_nan=False) + "\n").encode()
        with path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(_whole_bytes(file))
            file.seek(0, os.SEEK_END)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _path(self, task: str) -> Path:
        return self._folder / f"{task}.jsonl"


def _whole_bytes(file) -> int:
    """Length of the file without a last line that lacks its end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        file.seek(max(0, end - 4096))
        start = file.tell()
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _clean(value):
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _clean(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(one) for one in value]
    return value
