"""docs/quality.md's blocks, by name: tables and figures from the results alone (``bench/report.py`` puts them in)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.quality.contenders import ABLATION_TASK, ABLATIONS, MAIN, SECOND_ABLATION_TASK
from bench.quality.figures import FIGURES
from bench.quality.runs import RESULTS_FOLDER, rows_of_task
from bench.quality.tables import (
    ablation_table,
    difference_table,
    main_table,
    paper_table,
    provenance,
    settings_table,
)
from bench.quality.tasks import TASKS
from bench.tables import markdown

RowsOfTask = dict[str, list[dict]]


def read(root: Path) -> RowsOfTask:
    """Task -> its rows, for tasks that have any, in the table's order; quick rows are none."""
    found = {task: rows_of_task(root / RESULTS_FOLDER, task) for task in TASKS}
    kept = {task: [row for row in rows if not row["quick"]] for task, rows in found.items()}
    return {task: rows for task, rows in kept.items() if rows}


def _tasks_block(_: RowsOfTask) -> str:
    lines = [
        [name, task.domain, task.summary, f"{task.steps} x {task.batch_size}", ", ".join(f"{r:g}" for r in task.rates)]
        for name, task in TASKS.items()
    ]
    return markdown(["task", "domain", "what", "steps x examples", "learning rates"], lines)


def _from_main(make: Callable[[RowsOfTask], str]) -> Callable[[RowsOfTask], str]:
    def block(rows_of: RowsOfTask) -> str:
        kept = {task: [row for row in rows if row["contender"] in MAIN] for task, rows in rows_of.items()}
        kept = {task: rows for task, rows in kept.items() if any(row["stage"] == "test" for row in rows)}
        return make(kept) if kept else ""

    return block


def _ablation(name: str, task: str) -> Callable[[RowsOfTask], str]:
    names = {one.name for one in ABLATIONS[name].values()} - {"goat"}

    def block(rows_of: RowsOfTask) -> str:
        rows = rows_of.get(task, [])
        found = any(row["contender"] in names and row["stage"] == "test" for row in rows)
        return ablation_table(rows, name, task) if found else ""

    return block


def _figure(name: str) -> Callable[[RowsOfTask], str]:
    words = FIGURES[name].__doc__.rstrip(".")
    return lambda rows_of: f"![{words}](figures/{name})" if rows_of else ""


#: Block -> what makes it of the results; empty where there are none.
BLOCKS: dict[str, Callable[[RowsOfTask], str]] = {
    "tasks": _tasks_block,
    "main": _from_main(main_table),
    "differences": _from_main(difference_table),
    "settings": _from_main(settings_table),
    "paper": _from_main(paper_table),
    "provenance": lambda rows_of: provenance([row for rows in rows_of.values() for row in rows]) if rows_of else "",
    **{f"ablation-{name}": _ablation(name, ABLATION_TASK) for name in ABLATIONS},
    **{f"second-ablation-{name}": _ablation(name, SECOND_ABLATION_TASK) for name in ABLATIONS},
    **{f"figure-{name.removeprefix('quality-').removesuffix('.png')}": _figure(name) for name in FIGURES},
}
