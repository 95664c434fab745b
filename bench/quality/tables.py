"""Tables in Markdown from rows of results."""

from __future__ import annotations

import math
from collections.abc import Iterable

from bench.quality.contenders import ABLATIONS, MAIN
from bench.quality.runs import chosen_rate
from bench.quality.statistics import Summary, holm, paired_difference, summary
from bench.quality.tasks import METRICS, TASKS
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
            cells.append(_spread(summary(list(scores.values())), metric) if scores else "-")
        if set(cells) != {"-"}:
            lines.append([METHODS[name].meaning, *cells])
    return table(head, lines)


def difference_table(rows_of: dict[str, list[dict]]) -> str:
    """Methods x tasks: GOAT minus the method, with the interval; * where Holm's correction over the methods leaves
    less than 5 %."""
    head = ["GOAT minus", *(f"{task}, {_SHOWN[TASKS[task].metric][2]}" for task in rows_of)]
    columns = {}
    for task, rows in rows_of.items():
        metric = TASKS[task].metric
        goat = scores_of(rows, "goat", metric)
        others = {name: scores_of(rows, name, metric) for name in MAIN if name not in ("goat", "head")}
        columns[task] = _differences(goat, {name: scores for name, scores in others.items() if scores}, metric)
    names = [name for name in MAIN if any(name in column for column in columns.values())]
    return table(head, [[METHODS[name].meaning, *(columns[task].get(name, "-") for task in rows_of)] for name in names])


def _differences(goat: dict[int, float], others: dict[str, dict[int, float]], metric: str) -> dict[str, str]:
    found = {name: paired_difference(goat, scores) for name, scores in others.items() if goat.keys() & scores.keys()}
    tested = {name: one.p for name, one in found.items() if not math.isnan(one.p)}
    corrected = holm(tested)
    factor, digits, _ = _SHOWN[metric]
    cells = {}
    for name, one in found.items():
        star = " *" if corrected.get(name, 1.0) < 0.05 else ""
        low, high = sorted((factor * one.low, factor * one.high))
        cells[name] = f"{factor * one.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{star}"
    return cells


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
    return table(head, lines)


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
    return table(head, lines)


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
    one = paired_difference(*means)
    return f"{100 * one.mean:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"


def ablation_table(rows: list[dict], ablation: str, task: str) -> str:
    """Variants that were run on a task: score, and the difference to GOAT as it is."""
    metric = TASKS[task].metric
    goat = scores_of(rows, "goat", metric)
    scores = {label: scores_of(rows, contender.name, metric) for label, contender in ABLATIONS[ablation].items()}
    scores = {label: of_label for label, of_label in scores.items() if of_label}
    others = {label: of_label for label, of_label in scores.items() if ABLATIONS[ablation][label].name != "goat"}
    differences = _differences(goat, others, metric)
    trainable = {row["contender"]: row["trainable_parameters"] for row in rows}
    head = [ablation, "trainable", _SHOWN[metric][2], "minus GOAT"]
    lines = []
    for label, of_label in scores.items():
        name = ABLATIONS[ablation][label].name
        difference = (
            "GOAT" if name == "goat" else _turned(paired_difference(of_label, goat), metric, differences[label])
        )
        lines.append([label, f"{trainable[name]:,}", _spread(summary(list(of_label.values())), metric), difference])
    return table(head, lines)


def _turned(one, metric: str, cell: str) -> str:
    """variant - GOAT, with the star of GOAT - variant."""
    factor, digits, _ = _SHOWN[metric]
    star = " *" if cell.endswith("*") else ""
    return f"{factor * one.mean:+.{digits}f} [{factor * one.low:+.{digits}f}, {factor * one.high:+.{digits}f}]{star}"


def provenance(rows: Iterable[dict]) -> str:
    """What was run, on what, with which versions: one line."""
    rows = list(rows)
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


def _spread(one: Summary, metric: str) -> str:
    factor, digits, _ = _SHOWN[metric]
    return f"{factor * one.mean:.{digits}f} ± {factor * one.std:.{digits}f}"


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


#: Whether more is better, for captions.
BETTER = {name: "higher" if more else "lower" for name, more in METRICS.items()}
