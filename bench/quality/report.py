"""docs/quality.md's blocks by name, from the results alone (``bench/report.py`` puts them in)."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from bench.quality.contenders import ABLATION_TASK, ABLATIONS, MAIN
from bench.quality.runs import RESULTS_FOLDER, chosen_rate, rows_of_task
from bench.quality.tasks import METRICS, TASKS
from bench.tables import markdown
from goat_kernels.finetuning.methods import METHODS

#: What the paper reports for the same methods (Tables 2 and 3 there): image average of 7 sets, GLUE average of 7 tasks.
PAPER = pd.DataFrame(
    {
        "paper, 7 image sets": {
            **{"full": 82.25, "lora": 77.09, "pissa": 76.85, "milora": 76.68},
            **{"molora": 80.26, "hydralora": 79.58, "goat": 81.49},
        },
        "paper, 7 GLUE tasks": {"full": 89.47, "lora": 88.46, "molora": 89.52, "goat": 89.76},
    }
)

RowsOfTask = dict[str, list[dict]]


def read(root: Path) -> RowsOfTask:
    """Task -> its rows, for tasks that have any, in the table's order."""
    found = {task: rows_of_task(root / RESULTS_FOLDER, task) for task in TASKS}
    return {task: rows for task, rows in found.items() if rows}


# --- statistics -----------------------------------------------------------------------------------------------------


def scores_of(rows: list[dict], contender: str, metric: str) -> dict[int, float]:
    """Seed -> score of a contender's test runs at its chosen rate; nan where the run diverged."""
    key = (contender, "test", chosen_rate(rows, contender, TASKS[rows[0]["task"]].metric))
    of_rate = [row for row in rows if (row["contender"], row["stage"], row["learning_rate"]) == key]
    scores = {row["seed"]: row["scores"][metric] for row in of_rate}
    return {seed: math.nan if score is None else score for seed, score in scores.items()}


def paired_difference(one: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float, float, float]:
    """one - other (seed -> score) over the seeds that both have, by Student's t; nan for what needs two seeds.

    Returns:
        The mean, its 95 % interval's ends, and the two-sided p-value of the paired t-test.
    """
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if len(differences) < 2:
        return (*differences, math.nan, math.nan, math.nan)
    test = stats.ttest_1samp(differences, 0.0)
    return (float(np.mean(differences)), *map(float, test.confidence_interval(0.95)), float(test.pvalue))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: name -> p-value corrected for all of them; without those that are nan."""
    ordered = pd.Series(p_values, dtype=float).dropna().sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1.0).to_dict()


# --- tables ---------------------------------------------------------------------------------------------------------


def _by_method(corner: str, columns: Mapping[str, Mapping[str, str]]) -> str:
    """A table of methods, from heading -> method -> cell; empty methods and columns are left out, as is "" whole."""
    table = pd.DataFrame(columns, index=list(MAIN)).dropna(how="all").dropna(how="all", axis=1).fillna("-")
    lines = [[METHODS[name].meaning, *cells] for name, *cells in table.itertuples()]
    return markdown([corner, *table.columns], lines) if lines else ""


def _spread(scores: Mapping[int, float], metric: str) -> str:
    """Mean and the sample's standard deviation, which is nan for a single value; both are nan where a run diverged."""
    _, factor, digits, _ = METRICS[metric]
    mean, std = statistics.fmean(scores.values()), statistics.stdev(scores.values()) if len(scores) > 1 else math.nan
    return f"{factor * mean:.{digits}f} ± {factor * std:.{digits}f}"


def _differences(
    pairs: Mapping[str, tuple[dict[int, float], dict[int, float]]], metric: str, *, stars: bool = True
) -> dict[str, str]:
    """Name -> one - other with its interval, and a star where Holm's correction over the pairs leaves less than 5 %."""
    _, factor, digits, _ = METRICS[metric]
    found = {name: paired_difference(*pair) for name, pair in pairs.items() if pair[0].keys() & pair[1].keys()}
    corrected = holm({name: p for name, (*_, p) in found.items()}) if stars else {}
    cells = {}
    for name, (*numbers, _) in found.items():
        mean, low, high = (f"{factor * value:+.{digits}f}" for value in numbers)
        cells[name] = f"{mean} [{low}, {high}]" + (" *" if corrected.get(name, 1.0) < 0.05 else "")
    return cells


def _tasks_table(_: RowsOfTask) -> str:
    lines = [
        [name, task.domain, task.summary, f"{task.steps} x {task.batch_size}", ", ".join(f"{r:g}" for r in task.rates)]
        for name, task in TASKS.items()
    ]
    return markdown(["task", "domain", "what", "steps x examples", "learning rates"], lines)


def main_table(rows_of: RowsOfTask) -> str:
    """Methods x tasks: mean and standard deviation over the seeds; of generation tasks the accuracy too."""
    columns = {}
    for task, rows in rows_of.items():
        for metric in dict.fromkeys((TASKS[task].metric, "accuracy")):
            scores = {name: scores_of(rows, name, metric) for name in MAIN}
            cells = {name: _spread(of_name, metric) for name, of_name in scores.items() if of_name}
            columns[f"{task}, {METRICS[metric].heading}"] = cells
    return _by_method("method", columns)


def difference_table(rows_of: RowsOfTask) -> str:
    """Methods x tasks: GOAT minus the method, with the interval and Holm's star over the methods."""
    columns = {}
    for task, rows in rows_of.items():
        metric = TASKS[task].metric
        scores = {name: scores_of(rows, name, metric) for name in MAIN if name != "head"}
        goat = scores.pop("goat")
        cells = _differences({name: (goat, of_name) for name, of_name in scores.items()}, metric)
        columns[f"{task}, {METRICS[metric].heading}"] = cells
    return _by_method("GOAT minus", columns)


def _settings_table(rows_of: RowsOfTask) -> str:
    """Methods x tasks: rank, trainable parameters, chosen learning rate; ! where it is at the grid's edge."""
    columns = {}
    for task, rows in rows_of.items():
        cells = columns[f"{task}: R, trainable, rate"] = {}
        for name in MAIN:
            tuning = [row for row in rows if row["contender"] == name and row["stage"] == "validation"]
            if tuning:
                rate, tried = chosen_rate(rows, name, TASKS[task].metric), [row["learning_rate"] for row in tuning]
                edge = "!" if len(tried) > 1 and rate in (min(tried), max(tried)) else ""
                rank = "" if tuning[0]["rank"] is None else f"{tuning[0]['rank']}, "
                cells[name] = f"{rank}{tuning[0]['trainable_parameters']:,}, {rate:g}{edge}"
    return _by_method("method", columns)


def _paper_table(rows_of: RowsOfTask) -> str:
    """Beside the paper: GOAT minus the method, the paper's averages and our mean over a domain's tasks, in points."""
    columns = {}
    domains = (("image classification", "here, images"), ("language understanding", "here, texts"))
    for (theirs, paper), (domain, ours) in zip(PAPER.items(), domains, strict=True):
        columns[theirs] = (paper["goat"] - paper.dropna().drop("goat")).map("{:+.1f}".format)
        # Of each method the mean over the tasks for every seed that all of them have.
        of_domain = [rows for task, rows in rows_of.items() if TASKS[task].domain == domain]
        scores = {name: pd.DataFrame([scores_of(rows, name, "accuracy") for rows in of_domain]) for name in MAIN}
        means = {name: of_name.mean(skipna=False).dropna().to_dict() for name, of_name in scores.items()}
        pairs = {name: (means["goat"], means[name]) for name in MAIN if name not in ("goat", "head")}
        columns[ours] = _differences(pairs, "accuracy", stars=False)
    return _by_method("GOAT minus", columns) if rows_of else ""


def _ablation_table(ablation: str, task: str, rows_of: RowsOfTask) -> str:
    """Variants that were run on a task: score, and the difference to GOAT as it is."""
    rows, metric = rows_of.get(task, []), TASKS[task].metric
    trainable = {row["contender"]: row["trainable_parameters"] for row in rows}
    names = {label: one.name for label, one in ABLATIONS[ablation].items() if one.name in trainable}
    scores = {label: of_label for label, name in names.items() if (of_label := scores_of(rows, name, metric))}
    others = {label: of_label for label, of_label in scores.items() if names[label] != "goat"}
    if not others:
        return ""
    goat = scores_of(rows, "goat", metric)
    differences = _differences({label: (of_label, goat) for label, of_label in others.items()}, metric)
    lines = [
        [label, f"{trainable[names[label]]:,}", _spread(of_label, metric), differences.get(label, "GOAT")]
        for label, of_label in scores.items()
    ]
    return markdown([ablation, "trainable", METRICS[metric].heading, "minus GOAT"], lines)


def _provenance(rows_of: RowsOfTask) -> str:
    """What was run, on what, with which versions: one line."""
    rows = [row for rows in rows_of.values() for row in rows]
    if not rows:
        return ""
    machines = sorted({row["gpu"] or row["cpu"] for row in rows})
    dates, hours = sorted(row["date"][:10] for row in rows), sum(row["time_s"] for row in rows) / 3600
    versions = [f"{name} {rows[-1]['versions'][name]}" for name in ("python", "torch", "transformers", "peft")]
    return (
        f"{len(rows)} runs, {hours:.1f} hours of one process with {rows[-1]['threads']} thread(s), "
        f"{', '.join(machines)}, {dates[0]} to {dates[-1]}; {', '.join(versions)}."
    )


#: Block -> what makes it of the results; empty where there are none.
BLOCKS: dict[str, Callable[[RowsOfTask], str]] = {
    "tasks": _tasks_table,
    "main": main_table,
    "differences": difference_table,
    "settings": _settings_table,
    "paper": _paper_table,
    "provenance": _provenance,
    **{f"ablation-{name}": functools.partial(_ablation_table, name, ABLATION_TASK) for name in ABLATIONS},
    "second-ablation-experts": functools.partial(_ablation_table, "experts", "python-to-prose"),
}
