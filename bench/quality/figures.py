"""The figures of docs/quality.md, from rows of results."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from bench.plots import Draw, legend
from bench.quality.contenders import ABLATION_TASK, ABLATIONS, MAIN
from bench.quality.tables import scores_of, summary
from bench.quality.tasks import TASKS
from goat_kernels.finetuning.methods import METHODS


def _losses(drawn: Figure, rows_of: dict[str, list[dict]]) -> None:
    """Training loss: the mean over the test runs, smoothed."""
    axes = _grid(drawn, len(rows_of))
    for axis, (task, rows) in zip(axes, rows_of.items(), strict=True):
        for name in MAIN:
            runs = [r for r in rows if (r["contender"], r["stage"]) == (name, "test") and r["losses"]]
            runs = [row for row in runs if None not in row["losses"]]
            if runs:
                mean = np.mean([row["losses"] for row in runs], axis=0)
                smooth = np.convolve(np.pad(mean, 2, mode="edge"), np.ones(5) / 5, mode="valid")
                method = METHODS[name]
                axis.plot(runs[0]["loss_steps"], smooth, color=method.colour, linewidth=1.3, label=method.meaning)
        axis.set_title(task, fontsize=9)
        axis.set(xlabel="step", ylabel="training loss")
        axis.grid(True, alpha=0.3)
    legend(drawn, axes[0].get_legend_handles_labels()[0])


def _parameters(drawn: Figure, rows_of: dict[str, list[dict]]) -> None:
    """Test score against trainable parameters, in all tasks."""
    axes = _grid(drawn, len(rows_of))
    for axis, (task, rows) in zip(axes, rows_of.items(), strict=True):
        metric = TASKS[task].metric
        for name in MAIN:
            scores = list(scores_of(rows, name, metric).values())
            if scores:
                count = next(row["trainable_parameters"] for row in rows if row["contender"] == name)
                one = summary(scores)
                method = METHODS[name]
                axis.errorbar(max(count, 1), one.mean, yerr=one.std, fmt="o", color=method.colour, label=method.meaning)
        axis.set_title(task, fontsize=9)
        axis.set(xscale="log", xlabel="trainable parameters", ylabel=metric)
        axis.grid(True, alpha=0.3)
    legend(drawn, axes[0].get_legend_handles_labels()[0])


def _rank(drawn: Figure, rows_of: dict[str, list[dict]]) -> None:
    """Test score against R, GOAT and LoRA."""
    drawn.set_size_inches(11, 5)
    axis, rows, metric = drawn.subplots(), rows_of.get(ABLATION_TASK, []), TASKS[ABLATION_TASK].metric
    for method in ("GOAT", "LoRA"):
        points = []
        for label, contender in ABLATIONS["rank"].items():
            scores = list(scores_of(rows, contender.name, metric).values()) if label.startswith(method) else []
            if scores:
                points.append((int(label.rpartition(" ")[2]), summary(scores)))
        if points:
            ranks, found = zip(*points, strict=True)
            axis.errorbar(
                ranks,
                [one.mean for one in found],
                yerr=[one.std for one in found],
                fmt="o-",
                capsize=3,
                color=METHODS[method.lower()].colour,
                label=method,
            )
            axis.legend(frameon=False)
    axis.set(xlabel="R", ylabel=metric, title=f"{ABLATION_TASK}: mean and standard deviation over the seeds")
    axis.grid(True, alpha=0.3)


def _experts(drawn: Figure, rows_of: dict[str, list[dict]]) -> None:
    """Load of GOAT's experts, layers x experts, on the test data of each task."""
    axes = _grid(drawn, len(rows_of))
    for axis, (task, rows) in zip(axes, rows_of.items(), strict=True):
        found = [row for row in rows if row["contender"] == "goat" and row["load_by_layer"]]
        axis.set_title(task, fontsize=9)
        if not found:
            axis.set_axis_off()
            continue
        load = np.array(list(found[0]["load_by_layer"].values()))  # [layers, E]
        even = load.sum(axis=1).mean() / load.shape[1]
        image = axis.imshow(load / even, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        axis.set(xlabel="expert", ylabel="layer")
        drawn.colorbar(image, ax=axis, extend="max")
    drawn.suptitle("Share of tokens that use an expert, as a multiple of an even load", fontsize=10)


def _grid(drawn: Figure, count: int):
    columns = min(count, 4)
    rows = -(-count // columns)
    drawn.set_size_inches(3.2 * columns + 1, 3 * rows + 0.8)
    axes = drawn.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_axis_off()
    return axes[:count]


#: File name in docs/figures -> what draws it.
FIGURES: dict[str, Draw] = {
    "quality-losses.png": _losses,
    "quality-parameters.png": _parameters,
    "quality-rank.png": _rank,
    "quality-experts.png": _experts,
}
