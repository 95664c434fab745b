"""Two files of results against each other: what became slower, or needs more memory?

Compared is the ratio to the base of the same run where there is one, because it does not depend on how busy or how
warm the machine was; else time or memory. A change counts where the two runs' p20..p80 do not touch; memory, which
is exact, where it differs by :data:`MEMORY_SHARE`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from goat_kernels.benchmarking.results import KEY_FIELDS, key_of, timed

#: Memory that differs by less is alignment.
MEMORY_SHARE = 0.01

_MEMORY = ("saved_for_backward_bytes", "peak_mib")


@dataclass(frozen=True)
class Change:
    """One quantity in two runs; ``verdict`` is "slower", "faster", "more", "less" or ""."""

    what: str
    quantity: str
    old: float
    new: float
    verdict: str

    @property
    def percent(self) -> float:
        return 100 * (self.new / self.old - 1) if self.old else 0.0

    @property
    def regressed(self) -> bool:
        return self.verdict in ("slower", "more")


def compare_rows(old: Iterable[dict], new: Iterable[dict]) -> list[Change]:
    """What both hold, in the order of the new one; of several measurements of one thing the last counts."""
    before = {key_of(row): row for row in timed(old)}
    changes = []
    for key, row in _last(new).items():
        if key in before and _was_measured(row):
            changes += _changes(before[key], row)
    return changes


@dataclass(frozen=True)
class Lost:
    """A measurement of the old run that the new one does not have; ``why`` is "missing", or what failed."""

    suite: str
    what: str
    why: str


def lost_rows(old: Iterable[dict], new: Iterable[dict]) -> list[Lost]:
    """What OLD measured and NEW did not, or could not; in the order of the old one."""
    after = _last(new)
    skipped = {(row["suite"], row["contender"]): row["skipped"] for row in after.values() if "skipped" in row}
    lost = []
    for key, row in _last(old).items():
        if not _was_measured(row) or (key in after and _was_measured(after[key])):
            continue
        why = "missing"
        if key in after and "failed" in after[key]:
            why = f"failed: {after[key]['failed']}"
        elif (row["suite"], row["contender"]) in skipped:
            why = f"skipped: {skipped[row['suite'], row['contender']]}"
        lost.append(Lost(row["suite"], ", ".join(_described(row)), why))
    return lost


def _last(rows: Iterable[dict]) -> dict[tuple, dict]:
    return {key_of(row): row for row in rows}


def _was_measured(row: dict) -> bool:
    return "skipped" not in row and "failed" not in row


def _changes(old: dict, new: dict) -> Iterable[Change]:
    what = ", ".join(_described(new))
    quantity = next((q for q in ("ratio", "time_ms") if f"{q}_p50" in old and f"{q}_p50" in new), None)
    if quantity == "ratio" and old.get("contender") == old.get("ratio_to"):
        quantity = "time_ms"  # the base's ratio is 1
    if quantity is not None:
        yield _time_change(what, quantity, old, new)
    for name in _MEMORY:
        if name in old and name in new:
            share = new[name] / old[name] - 1 if old[name] else 0.0
            verdict = "" if abs(share) < MEMORY_SHARE else ("more" if share > 0 else "less")
            yield Change(what, name, old[name], new[name], verdict)


def _time_change(what: str, quantity: str, old: dict, new: dict) -> Change:
    low, high = f"{quantity}_p20", f"{quantity}_p80"
    verdict = ""
    if all(name in row for name in (low, high) for row in (old, new)):
        verdict = "slower" if new[low] > old[high] else ("faster" if new[high] < old[low] else "")
    return Change(what, quantity, old[f"{quantity}_p50"], new[f"{quantity}_p50"], verdict)


def _described(row: dict) -> Iterable[str]:
    """The key in words, without what a reader of two files of one machine knows."""
    for name in KEY_FIELDS:
        value = row.get(name)
        if value is None or name in ("device", "gpu", "cpu", "threads", "dtype", "adapter_dtype"):
            continue
        yield f"{name}={value}" if len(name) == 1 or name in ("batch", "length") else str(value)
