"""docs/quality.md's tables and figures, generated from the results alone.

The document holds blocks, ``<!-- quality:NAME -->`` up to ``<!-- /quality -->``; what is between is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bench.quality.contenders import ABLATION_TASK, ABLATIONS, MAIN, SECOND_ABLATION_TASK
from bench.quality.figures import FIGURES, digest, digest_in, draw
from bench.quality.results import RESULTS_FOLDER, Results
from bench.quality.tables import (
    ablation_table,
    difference_table,
    main_table,
    paper_table,
    provenance,
    settings_table,
    table,
)
from bench.quality.tasks import TASKS

DOCUMENT = Path("docs/quality.md")
FIGURES_FOLDER = Path("docs/figures")

_BLOCK = re.compile(r"(<!-- quality:([\w-]+) -->\n).*?(<!-- /quality -->)", re.S)

_NOTHING = "No results yet: `python -m bench.quality`."


def _tasks_block() -> str:
    lines = [
        [name, task.domain, task.summary, f"{task.steps} x {task.batch_size}", ", ".join(f"{r:g}" for r in task.rates)]
        for name, task in TASKS.items()
    ]
    return table(["task", "domain", "what", "steps x examples", "learning rates"], lines)


def _from_main(make: Callable[[dict[str, list[dict]]], str]) -> Callable[[dict[str, list[dict]]], str]:
    def block(rows_of: dict[str, list[dict]]) -> str:
        kept = {task: [row for row in rows if row["contender"] in MAIN] for task, rows in rows_of.items()}
        kept = {task: rows for task, rows in kept.items() if any(row["stage"] == "test" for row in rows)}
        return make(kept) if kept else _NOTHING

    return block


def _ablation(name: str, task: str) -> Callable[[dict[str, list[dict]]], str]:
    def block(rows_of: dict[str, list[dict]]) -> str:
        rows, names = rows_of.get(task, []), {one.name for one in ABLATIONS[name].values()} - {"goat"}
        found = [row for row in rows if row["contender"] in names and row["stage"] == "test"]
        return (
            ablation_table(rows, name, task) if found else "No results yet: `python -m bench.quality --suite ablation`."
        )

    return block


def _figure(name: str) -> Callable[[dict[str, list[dict]]], str]:
    words = FIGURES[name].__doc__.rstrip(".")
    return lambda rows_of: f"![{words}](figures/{name})" if rows_of else _NOTHING


BLOCKS: dict[str, Callable[[dict[str, list[dict]]], str]] = {
    "tasks": lambda rows_of: _tasks_block(),
    "main": _from_main(main_table),
    "differences": _from_main(difference_table),
    "settings": _from_main(settings_table),
    "paper": _from_main(paper_table),
    "provenance": lambda rows_of: provenance(r for rows in rows_of.values() for r in rows) if rows_of else _NOTHING,
    **{f"ablation-{name}": _ablation(name, ABLATION_TASK) for name in ABLATIONS},
    **{f"second-ablation-{name}": _ablation(name, SECOND_ABLATION_TASK) for name in ABLATIONS},
    **{f"figure-{name.removeprefix('quality-').removesuffix('.png')}": _figure(name) for name in FIGURES},
}


def read(root: Path) -> dict[str, list[dict]]:
    """Task -> its rows, for tasks that have any, in the table's order; quick rows are none."""
    results = Results(root / RESULTS_FOLDER)
    rows_of = {task: [row for row in results.rows(task) if not row["quick"]] for task in TASKS}
    return {task: rows for task, rows in rows_of.items() if rows}


def document(root: Path) -> str:
    """The text of ``DOCUMENT`` with every block as the results have it."""
    rows_of = read(root)

    def block(match: re.Match) -> str:
        opening, name, closing = match.groups()
        return f"{opening}\n{BLOCKS[name](rows_of)}\n\n{closing}"

    return _BLOCK.sub(block, (root / DOCUMENT).read_text(encoding="utf-8"))


def out_of_date(root: Path) -> list[Path]:
    """The document and the figures that do not say what the results say."""
    stale = [] if (root / DOCUMENT).read_text(encoding="utf-8") == document(root) else [DOCUMENT]
    rows_of = read(root)
    if rows_of:
        wanted = digest(rows_of)
        stale += [FIGURES_FOLDER / name for name in FIGURES if digest_in(root / FIGURES_FOLDER / name) != wanted]
    return stale


def write(root: Path) -> list[Path]:
    """Bring everything up to date; returns what was written."""
    stale, rows_of = out_of_date(root), read(root)
    (root / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
    for path in stale:
        if path == DOCUMENT:
            (root / path).write_text(document(root), encoding="utf-8")
        else:
            (root / path).write_bytes(draw(path.name, rows_of))
    return stale
