"""Tables in Markdown from rows of results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from bench.quality.contenders import ABLATIONS, MAIN
from bench.quality.runs import chosen_rate
from bench.quality.tasks import TASKS
from bench.tables import markdown
from goat_kernels.finetuning.methods import METHODS

#: Metric -> (factor, digits, heading) in tables.
_SHOWN = {"accuracy": (100, 1, "accuracy, %"), "perplexity": (1, 2, "perplexity")}

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


# --- statistics -----------------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """Of one contender's test runs: ``std`` is the sample's standard deviation, nan for a single run."""

    mean: float
    std: float


class Difference(NamedTuple):
    """A mean paired difference, its 95 % interval, and the two-sided p-value of the paired t-test."""

    mean: float
    low: float
    high: float
    p: float
    count: int


def summary(values: Sequence[float]) -> Summary:
    """Mean and standard deviation; nan where a run diverged."""
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)


def paired_difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """one - other over the seeds that both have, by Student's t; the interval is nan for fewer than two.

    Args:
        one, other: seed -> score.
    """
    seeds = sorted(one.keys() & other.keys())
    pairs = [[scores[seed] for seed in seeds] for scores in (one, other)]
    differences = np.subtract(*pairs)
    mean = statistics.fmean(differences)
    if len(seeds) < 2:
        return Difference(mean, math.nan, math.nan, math.nan, len(seeds))
    if np.ptp(differences) == 0:  # Student's t divides by the spread
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, len(seeds))
    test = stats.ttest_rel(*pairs)
    return Difference(mean, *map(float, test.confidence_interval(0.95)), float(test.pvalue), len(seeds))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: name -> p-value corrected for all of them."""
    names = sorted(p_values, key=p_values.__getitem__)
    steps = [min(1.0, (len(names) - place) * p_values[name]) for place, name in enumerate(names)]
    corrected = dict(zip(names, np.maximum.accumulate(steps).tolist(), strict=True))
    return {name: corrected[name] for name in p_values}


# --- tables ---------------------------------------------------------------------------------------------------------


def scores_of(rows: list[dict], contender: str, metric: str) -> dict[int, float]:
    """Seed -> score of a contender's test runs at its chosen rate; nan where the run diverged."""
    if not any(row["contender"] == contender and row["stage"] == "validation" for row in rows):
        return {}
    rate = chosen_rate(rows, contender, TASKS[rows[0]["task"]].metric)
    found = {}
    for row in rows:
        if (row["contender"], row["stage"], row["learning_rate"]) == (contender, "test", rate):
            score = row["scores"][metric]
            found[row["seed"]] = math.nan if score is None else score
    return found


def metrics_of(task: str) -> tuple[str, ...]:
    """The metric that rates are chosen by, and the accuracy beside a perplexity."""
    return ("accuracy",) if TASKS[task].metric == "accuracy" else ("perplexity", "accuracy")


def main_table(rows_of: dict[str, list[dict]]) -> str:
    """Methods x tasks: mean and standard deviation over the seeds."""
    columns = [(task, metric) for task in rows_of for metric in metrics_of(task)]
    head = ["method", *(f"{task}, {_SHOWN[metric][2]}" for task, metric in columns)]
    lines = []
    for name in MAIN:
        cells = []
        for task, metric in columns:
            scores = scores_of(rows_of[task], name, metric)
            cells.append(_spread(scores, metric) if scores else "-")
        if set(cells) != {"-"}:
            lines.append([METHODS[name].meaning, *cells])
    return markdown(head, lines)


def difference_table(rows_of: dict[str, list[dict]]) -> str:
    """Methods x tasks: GOAT minus the method, with the interval; * where Holm's correction over the methods leaves
    less than 5 %."""
    head = ["GOAT minus", *(f"{task}, {_SHOWN[TASKS[task].metric][2]}" for task in rows_of)]
    columns = {}
    for task, rows in rows_of.items():
        metric = TASKS[task].metric
        goat = scores_of(rows, "goat", metric)
        others = {name: scores_of(rows, name, metric) for name in MAIN if name not in ("goat", "head")}
        columns[task] = _differences({name: (goat, scores) for name, scores in others.items()}, metric)
    names = [name for name in MAIN if any(name in column for column in columns.values())]
    return markdown(
        head, [[METHODS[name].meaning, *(columns[task].get(name, "-") for task in rows_of)] for name in names]
    )


def _differences(pairs: Mapping[str, tuple[dict[int, float], dict[int, float]]], metric: str) -> dict[str, str]:
    """Name -> one - other with its interval, and a star where Holm's correction over the pairs leaves less than 5 %."""
    found = {name: paired_difference(*pair) for name, pair in pairs.items() if pair[0].keys() & pair[1].keys()}
    corrected = holm({name: one.p for name, one in found.items() if not math.isnan(one.p)})
    return {
        name: _interval(one, metric) + (" *" if corrected.get(name, 1.0) < 0.05 else "") for name, one in found.items()
    }


def _interval(one: Difference, metric: str) -> str:
    factor, digits, _ = _SHOWN[metric]
    mean, low, high = (f"{factor * value:+.{digits}f}" for value in (one.mean, one.low, one.high))
    return f"{mean} [{low}, {high}]"


def settings_table(rows_of: dict[str, list[dict]]) -> str:
    """Methods x tasks: rank, trainable parameters, chosen learning rate; ! where it is at the grid's edge."""
    head = ["method", *(f"{task}: R, trainable, rate" for task in rows_of)]
    lines = []
    for name in MAIN:
        cells = []
        for task, rows in rows_of.items():
            of_name = [row for row in rows if row["contender"] == name and row["stage"] == "validation"]
            if not of_name:
                cells.append("-")
                continue
            rate = chosen_rate(rows, name, TASKS[task].metric)
            tried = [row["learning_rate"] for row in of_name]
            edge = "!" if len(tried) > 1 and rate in (min(tried), max(tried)) else ""
            rank = of_name[0]["rank"]
            parts = [] if rank is None else [str(rank)]
            cells.append(", ".join([*parts, f"{of_name[0]['trainable_parameters']:,}", f"{rate:g}{edge}"]))
        if set(cells) != {"-"}:
            lines.append([METHODS[name].meaning, *cells])
    return markdown(head, lines)


def paper_table(rows_of: dict[str, list[dict]]) -> str:
    """Beside the paper: GOAT minus the method, the paper's averages and our mean over a domain's tasks, in points."""
    domains = ("image classification", "language understanding")
    head = ["GOAT minus", "paper, 7 image sets", "here, images", "paper, 7 GLUE tasks", "here, texts"]
    lines = []
    for name in MAIN:
        if name in ("goat", "head"):
            continue
        cells = []
        for column, domain in enumerate(domains):
            theirs = PAPER.get(name, (None, None))[column]
            cells.append("-" if theirs is None else f"{PAPER['goat'][column] - theirs:+.1f}")
            cells.append(_mean_over(rows_of, domain, name))
        if set(cells) != {"-"}:
            lines.append([METHODS[name].meaning, *cells])
    return markdown(head, lines)


def _mean_over(rows_of: dict[str, list[dict]], domain: str, name: str) -> str:
    """GOAT - method, averaged over the domain's tasks for every seed, with the interval over the seeds."""
    tasks = [task for task in rows_of if TASKS[task].domain == domain]
    both = [
        (scores_of(rows_of[task], "goat", "accuracy"), scores_of(rows_of[task], name, "accuracy")) for task in tasks
    ]
    if not both or not all(goat and other for goat, other in both):
        return "-"
    seeds = set.intersection(*(goat.keys() & other.keys() for goat, other in both))
    means = [{seed: sum(pair[side][seed] for pair in both) / len(both) for seed in seeds} for side in (0, 1)]
    return _interval(paired_difference(*means), "accuracy")


def ablation_table(rows: list[dict], ablation: str, task: str) -> str:
    """Variants that were run on a task: score, and the difference to GOAT as it is."""
    metric = TASKS[task].metric
    goat = scores_of(rows, "goat", metric)
    scores = {label: scores_of(rows, contender.name, metric) for label, contender in ABLATIONS[ablation].items()}
    scores = {label: of_label for label, of_label in scores.items() if of_label}
    names = {label: ABLATIONS[ablation][label].name for label in scores}
    pairs = {label: (of_label, goat) for label, of_label in scores.items() if names[label] != "goat"}
    differences = _differences(pairs, metric)
    trainable = {row["contender"]: row["trainable_parameters"] for row in rows}
    lines = [
        [
            *(label, f"{trainable[names[label]]:,}", _spread(of_label, metric)),
            "GOAT" if names[label] == "goat" else differences[label],
        ]
        for label, of_label in scores.items()
    ]
    return markdown([ablation, "trainable", _SHOWN[metric][2], "minus GOAT"], lines)


def provenance(rows: list[dict]) -> str:
    """What was run, on what, with which versions: one line."""
    machines = sorted({row["gpu"] or row["cpu"] for row in rows})
    versions = rows[-1]["versions"]
    names = ("python", "torch", "transformers", "peft")
    dates = sorted(row["date"][:10] for row in rows)
    hours = sum(row["time_s"] for row in rows) / 3600
    return (
        f"{len(rows)} runs, {hours:.1f} hours of one process with {rows[-1]['threads']} thread(s), "
        f"{', '.join(machines)}, "
        f"{dates[0]} to {dates[-1]}; {', '.join(f'{name} {versions[name]}' for name in names)}."
    )


def _spread(scores: Mapping[int, float], metric: str) -> str:
    factor, digits, _ = _SHOWN[metric]
    one = summary(list(scores.values()))
    return f"{factor * one.mean:.{digits}f} ± {factor * one.std:.{digits}f}"
