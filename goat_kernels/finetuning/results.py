"""One row per method: the table, results.json and results.png.

A row is a dict, the content of the method's ``result.json``. JSON has no NaN and no infinity: a number that is one is
None. A method that diverged has no saved model and no held-out metric.

    method                  a key of ``methods.METHODS``
    learning_rate           the highest of the schedule
    trainable_parameters    numbers that the optimiser updated
    saved_in                where the trained model is, inside the output folder; None where the method diverged
    reload_bit_equal        whether the saved model, loaded back, gave the same outputs bit for bit; None likewise
    steps                   optimiser steps done; fewer than planned where the run diverged
    diverged_at_step        the step whose loss was NaN or infinite, after which the run was stopped, or that left
                            trained parameters so; None where all is finite
    loss_steps, losses      the training loss, and the steps at which it was taken: the mean since the previous entry
    time_per_step_ms        median since the run was started or resumed, from the batch being there to the weights
                            being updated; None where no step was left to do
    peak_memory_mib         how far memory rose above where it stood before the model was loaded
    peak_memory_source      what ``peak_memory_mib`` measures, in words
    metric                  accuracy or perplexity
    held_out                accuracy in 0..1 (an output that is NaN counts as wrong), or perplexity
    held_out_standard_error sqrt(p (1 - p) / n) of an accuracy p; of a perplexity, from the spread of the blocks'
                            losses, None where there is too little data to tell
    held_out_examples       n
    load_by_layer           layer name -> share of the tokens that use each expert (sums to K); empty without routers
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from goat_kernels.files import atomic_path
from goat_kernels.finetuning.methods import METHODS
from goat_kernels.finetuning.options import FinetuneOptions
from goat_kernels.training.report import RouterStatistics, draw_load


def format_table(rows: Sequence[dict], title: str) -> str:
    """The table in plain text, with what its columns mean underneath."""
    first = next((row for row in rows if row["held_out"] is not None), rows[0])
    cells = []
    for row in rows:
        time = "-" if row["time_per_step_ms"] is None else f"{row['time_per_step_ms']:.1f}"
        numbers = [_with_error(row), f"{row['trainable_parameters']:,}", time, f"{row['peak_memory_mib']:.0f}"]
        cells.append([METHODS[row["method"]].meaning, *numbers])
    headers = ["method", f"held-out {first['metric']}", "trainable", "ms/step", "peak MiB"]
    table = tabulate(cells, headers, colalign=["left", *["right"] * 4], disable_numparse=True)
    lines = [title, "", table, ""]
    if first["held_out"] is not None:
        examples = "blocks" if first["metric"] == "perplexity" else "examples"
        lines += [
            f"± one standard error over the {first['held_out_examples']} held-out {examples}, one seed: this does not "
            "rank",
            "  methods that are closer than two or three of them.",
        ]
    lines += [
        "trainable: parameters updated. ms/step: median, from the batch being ready to the weights being updated.",
        f"peak MiB: rise of the {first['peak_memory_source']}, from before the method's model was loaded",
        "  to the peak of its training.",
    ]
    return "\n".join(lines)


def _with_error(row: dict) -> str:
    if row["diverged_at_step"] is not None:
        return f"diverged at step {row['diverged_at_step']}"
    if row["held_out"] is None:
        return "not finite"
    scale, digits, unit = (100, 1, " %") if row["metric"] == "accuracy" else (1, 2, "")
    error = row["held_out_standard_error"]
    after = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{scale * row['held_out']:.{digits}f}{after}{unit}"


def results_json(description: str, options: FinetuneOptions, rows: Sequence[dict]) -> dict:
    """The content of results.json."""
    return {
        "description": description,
        "options": options.fingerprint(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "methods": list(rows),
    }


def write_figure(path: Path, rows: Sequence[dict], title: str) -> None:
    """Write results.png: the loss of every method, and how GOAT's layers use their experts."""
    load = next((row["load_by_layer"] for row in rows if row["load_by_layer"]), {})
    layers = {name: RouterStatistics(math.nan, tuple(shares)) for name, shares in load.items()}
    height = min(max(4.5, 1.6 + 0.17 * len(load)), 9)
    figure = Figure(figsize=(12 if load else 7, height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, *right = figure.subplots(1, 2 if load else 1, squeeze=False, width_ratios=(3, 2) if load else None)[0]
    draw_losses(left, rows)
    if load:
        draw_load(right[0], layers, "Experts' load by layer, on the held-out data")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def draw_losses(axes: Axes, rows: Sequence[dict]) -> None:
    """Each method's training loss: thin as it is, thick its running mean."""
    finite = []
    for row in rows:
        losses = np.asarray(row["losses"], dtype=float)  # None becomes NaN
        finite += losses[np.isfinite(losses) & (losses > 0)].tolist()
        method = METHODS[row["method"]]
        axes.plot(row["loss_steps"], losses, color=method.colour, alpha=0.15, linewidth=0.8)
        label = method.meaning
        if row["diverged_at_step"] is not None:
            label += f" (diverged at step {row['diverged_at_step']})"
            axes.axvline(row["diverged_at_step"], color=method.colour, linestyle=":", linewidth=1.2)
        window = max(5, len(losses) // 25)
        smooth = np.convolve(losses, np.ones(window))[: len(losses)] / np.minimum(np.arange(len(losses)) + 1, window)
        axes.plot(row["loss_steps"], smooth, color=method.colour, linewidth=1.8, label=label)
    if finite and max(finite) > 20 * min(finite):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="training loss (thick: running mean)", title="Training loss")
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
