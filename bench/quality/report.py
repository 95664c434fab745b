"""docs/quality.md's blocks and figures by name, from the results alone (``bench/report.py`` puts them in)."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from bench.plots import Draw, legend
from bench.quality.contenders import ABLATION_TASK, ABLATIONS, MAIN, SECOND_ABLATION_TASK
from bench.quality.runs import RESULTS_FOLDER, chosen_rate, rows_of_task
from bench.quality.tasks import METRICS, TASKS
from bench.tables import markdown
from goat_kernels.finetuning.methods import METHODS

#: What the paper reports for the same methods (Tables 2 and 3 there): image average of 7 sets, GLUE average of 7 tasks.
PAPER = {
    "full": (82.25, 89.47),
    "lora": (77.09, 88.46),
    "pissa": (76.85, None),
    "milora": (76.68, None),
    "molora": (80.26, 89.52),
    "hydralora": (79.58, None),
    "goat": (81.49, 89.76),
}

RowsOfTask = dict[str, list[dict]]


def read(root: Path) -> RowsOfTask:
    """Task -> its rows, for tasks that have any, in the table's order; quick rows are left out."""
    found = {task: rows_of_task(root / RESULTS_FOLDER, task) for task in TASKS}
    kept = {task: [row for row in rows if not row["quick"]] for task, rows in found.items()}
    return {task: rows for task, rows in kept.items() if rows}


# --- statistics -----------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A mean paired difference, its 95 % interval, and the two-sided p-value of the paired t-test."""

    mean: float
    low: float
    high: float
    p: float


def summary(values: Collection[float]) -> tuple[float, float]:
    """Mean and the sample's standard deviation, which is nan for a single value; both are nan where a run diverged."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def scores_of(rows: list[dict], contender: str, metric: str) -> dict[int, float]:
    """Seed -> score of a contender's test runs at its chosen rate; nan where the run diverged."""
    if not rows:
        return {}
    rate = chosen_rate(rows, contender, TASKS[rows[0]["task"]].metric)
    key = (contender, "test", rate)
    found = {
        row["seed"]: row["scores"][metric]
        for row in rows
        if (row["contender"], row["stage"], row["learning_rate"]) == key
    }
    return {seed: math.nan if score is None else score for seed, score in found.items()}


def paired_difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """one - other (seed -> score) over the seeds that both have, by Student's t; nan for what needs two seeds."""
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if len(differences) < 2:
        return Difference(float(np.mean(differences)), math.nan, math.nan, math.nan)
    test = stats.ttest_1samp(differences, 0.0)
    return Difference(float(np.mean(differences)), *map(float, test.confidence_interval(0.95)), float(test.pvalue))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: name -> p-value corrected for all of them; without those that are nan."""
    ordered = pd.Series(p_values, dtype=float).dropna().sort_values()
    return (ordered * range(len(ordered), 0, -1)).cummax().clip(upper=1.0).to_dict()


# --- tables ---------------------------------------------------------------------------------------------------------


def _by_method(corner: str, columns: Mapping[str, Mapping[str, str]]) -> str:
    """A table of methods, from heading -> method -> cell; empty methods and columns are left out, as is "" whole."""
    table = pd.DataFrame(columns, index=list(MAIN)).dropna(how="all").dropna(how="all", axis=1).fillna("-")
    lines = [[METHODS[name].meaning, *cells] for name, *cells in table.itertuples()]
    return markdown([corner, *table.columns], lines) if lines else ""


def _spread(scores: Mapping[int, float], metric: str) -> str:
    _, factor, digits, _ = METRICS[metric]
    mean, std = summary(scores.values())
    return f"{factor * mean:.{digits}f} ± {factor * std:.{digits}f}"


def _interval(one: Difference, metric: str) -> str:
    _, factor, digits, _ = METRICS[metric]
    mean, low, high = (f"{factor * value:+.{digits}f}" for value in (one.mean, one.low, one.high))
    return f"{mean} [{low}, {high}]"


def _differences(pairs: Mapping[str, tuple[dict[int, float], dict[int, float]]], metric: str) -> dict[str, str]:
    """Name -> one - other with its interval, and a star where Holm's correction over the pairs leaves less than 5 %."""
    found = {name: paired_difference(*pair) for name, pair in pairs.items() if pair[0].keys() & pair[1].keys()}
    corrected = holm({name: one.p for name, one in found.items()})
    return {
        name: _interval(one, metric) + (" *" if corrected.get(name, 1.0) < 0.05 else "") for name, one in found.items()
    }


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
    """Methods x tasks: GOAT minus the method, with the interval; * where Holm's correction over the methods leaves
    less than 5 %."""
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
    for place, (domain, theirs, ours) in enumerate(
        (
            ("image classification", "paper, 7 image sets", "here, images"),
            ("language understanding", "paper, 7 GLUE tasks", "here, texts"),
        )
    ):
        goat, others = PAPER["goat"][place], {name: both[place] for name, both in PAPER.items() if name != "goat"}
        columns[theirs] = {name: f"{goat - other:+.1f}" for name, other in others.items() if other is not None}
        columns[ours] = {}
        # Of each method the mean over the tasks for every seed that all of them have; a test run of each must be there.
        of_domain = [rows for task, rows in rows_of.items() if TASKS[task].domain == domain]
        means = {}
        for name in MAIN:
            scores = [scores_of(rows, name, "accuracy") for rows in of_domain]
            if scores and all(scores):
                seeds = set.intersection(*(set(of_task) for of_task in scores))
                means[name] = {seed: sum(of_task[seed] for of_task in scores) / len(scores) for seed in seeds}
        for name in means.keys() - {"goat", "head"} if "goat" in means else ():
            columns[ours][name] = _interval(paired_difference(means["goat"], means[name]), "accuracy")
    return _by_method("GOAT minus", columns) if rows_of else ""


def _ablation_table(ablation: str, task: str, rows_of: RowsOfTask) -> str:
    """Variants that were run on a task: score, and the difference to GOAT as it is."""
    rows, metric, variants = rows_of.get(task, []), TASKS[task].metric, ABLATIONS[ablation]
    scores = {label: scores_of(rows, variant.name, metric) for label, variant in variants.items()}
    scores = {label: of_label for label, of_label in scores.items() if of_label}
    others = {label: of_label for label, of_label in scores.items() if variants[label].name != "goat"}
    if not others:
        return ""
    goat = scores_of(rows, "goat", metric)
    differences = _differences({label: (of_label, goat) for label, of_label in others.items()}, metric)
    trainable = {row["contender"]: row["trainable_parameters"] for row in rows}
    lines = [
        [label, f"{trainable[variants[label].name]:,}", _spread(of_label, metric), differences.get(label, "GOAT")]
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


# --- figures --------------------------------------------------------------------------------------------------------


def _panels(drawn: Figure, rows_of: RowsOfTask, **settings: str) -> Iterator[tuple[Axes, str, list[dict]]]:
    """(axes, task, rows) of each task, four in a row; ``settings`` are those of all axes."""
    columns = min(len(rows_of), 4)
    lines = math.ceil(len(rows_of) / columns)
    drawn.set_size_inches(3.2 * columns + 1, 3 * lines + 0.8)
    axes = drawn.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[len(rows_of) :]:
        axis.set_axis_off()
    for axis, (task, rows) in zip(axes, rows_of.items(), strict=False):
        axis.set_title(task, fontsize=9)
        axis.set(**settings)
        yield axis, task, rows


def _losses(drawn: Figure, rows_of: RowsOfTask) -> None:
    """Training loss: the mean over the test runs, smoothed."""
    for axis, _, rows in _panels(drawn, rows_of, xlabel="step", ylabel="training loss"):
        for name in MAIN:
            runs = [r for r in rows if (r["contender"], r["stage"]) == (name, "test") and r["losses"]]
            runs = [row for row in runs if None not in row["losses"]]
            if runs:
                mean = np.mean([row["losses"] for row in runs], axis=0)
                smooth = np.convolve(np.pad(mean, 2, mode="edge"), np.ones(5) / 5, mode="valid")
                method = METHODS[name]
                axis.plot(runs[0]["loss_steps"], smooth, color=method.colour, linewidth=1.3, label=method.meaning)
        axis.grid(True, alpha=0.3)
    legend(drawn, drawn.axes[0].get_legend_handles_labels()[0])


def _parameters(drawn: Figure, rows_of: RowsOfTask) -> None:
    """Test score against trainable parameters, in all tasks."""
    for axis, task, rows in _panels(drawn, rows_of, xscale="log", xlabel="trainable parameters"):
        for name in MAIN:
            scores = scores_of(rows, name, TASKS[task].metric)
            if scores:
                count = next(row["trainable_parameters"] for row in rows if row["contender"] == name)
                (mean, std), method = summary(scores.values()), METHODS[name]
                axis.errorbar(max(count, 1), mean, yerr=std, fmt="o", color=method.colour, label=method.meaning)
        axis.set_ylabel(TASKS[task].metric)
        axis.grid(True, alpha=0.3)
    legend(drawn, drawn.axes[0].get_legend_handles_labels()[0])


def _rank(drawn: Figure, rows_of: RowsOfTask) -> None:
    """Test score against R, GOAT and LoRA."""
    drawn.set_size_inches(11, 5)
    axis, rows, metric = drawn.subplots(), rows_of.get(ABLATION_TASK, []), TASKS[ABLATION_TASK].metric
    for method in ("GOAT", "LoRA"):
        variants = {label: one for label, one in ABLATIONS["rank"].items() if label.startswith(method)}
        scores = {int(label.split()[-1]): scores_of(rows, one.name, metric) for label, one in variants.items()}
        points = [(rank, *summary(of_rank.values())) for rank, of_rank in scores.items() if of_rank]
        if points:
            ranks, means, stds = zip(*points, strict=True)
            colour = METHODS[method.lower()].colour
            axis.errorbar(ranks, means, yerr=stds, fmt="o-", capsize=3, color=colour, label=method)
            axis.legend(frameon=False)
    axis.set(xlabel="R", ylabel=metric, title=f"{ABLATION_TASK}: mean and standard deviation over the seeds")
    axis.grid(True, alpha=0.3)


def _experts(drawn: Figure, rows_of: RowsOfTask) -> None:
    """Load of GOAT's experts, layers x experts, on the test data of each task."""
    for axis, _, rows in _panels(drawn, rows_of, xlabel="expert", ylabel="layer"):
        found = [row for row in rows if row["contender"] == "goat" and row["load_by_layer"]]
        if not found:
            axis.set_axis_off()
            continue
        load = np.array(list(found[0]["load_by_layer"].values()))  # [layers, E]
        even = load.sum(axis=1).mean() / load.shape[1]
        image = axis.imshow(load / even, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        drawn.colorbar(image, ax=axis, extend="max")
    drawn.suptitle("Share of tokens that use an expert, as a multiple of an even load", fontsize=10)


#: File name in docs/figures -> what draws it.
FIGURES: dict[str, Draw] = {
    "quality-losses.png": _losses,
    "quality-parameters.png": _parameters,
    "quality-rank.png": _rank,
    "quality-experts.png": _experts,
}


def _figure(name: str, rows_of: RowsOfTask) -> str:
    return f"![{FIGURES[name].__doc__.rstrip('.')}](figures/{name})" if rows_of else ""


#: Block -> what makes it of the results; empty where there are none.
BLOCKS: dict[str, Callable[[RowsOfTask], str]] = {
    "tasks": _tasks_table,
    "main": main_table,
    "differences": difference_table,
    "settings": _settings_table,
    "paper": _paper_table,
    "provenance": _provenance,
    **{f"ablation-{name}": functools.partial(_ablation_table, name, ABLATION_TASK) for name in ABLATIONS},
    **{f"second-ablation-{name}": functools.partial(_ablation_table, name, SECOND_ABLATION_TASK) for name in ABLATIONS},
    **{f"figure-{name[8:-4]}": functools.partial(_figure, name) for name in FIGURES},
}
