"""results.png: the loss of every method, and how GOAT's layers use their experts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from goat_kernels.cli.report import MethodResult
from goat_kernels.files import atomic_path
from goat_kernels.finetuning.methods import METHODS

#: Colour-blind safe, after Okabe and Ito.
COLOURS = {
    "head": "#999999",
    "full": "#0072B2",
    "lora": "#E69F00",
    "rslora": "#D55E00",
    "dora": "#F0E442",
    "pissa": "#CC79A7",
    "milora": "#882255",
    "molora": "#56B4E9",
    "hydralora": "#332288",
    "goat": "#009E73",
    "goat_s": "#000000",
}

#: More layers than this are named by their first and last, and those in between.
_NAMED_LAYERS = 40


def write_figure(path: Path, results: Sequence[MethodResult], title: str) -> None:
    """Write the figure as PNG."""
    routed = next((result for result in results if result.load_by_layer), None)
    layers = len(routed.load_by_layer) if routed else 0
    height = min(max(4.5, 1.6 + 0.17 * layers), 9)
    figure = Figure(figsize=(12 if routed else 7, height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    if routed:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_load(right, routed)
    else:
        left = figure.subplots()
    _draw_losses(left, results)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _draw_losses(axes: Axes, results: Sequence[MethodResult]) -> None:
    for result in results:
        losses = np.asarray(result.losses, dtype=float)
        colour = COLOURS[result.method]
        smooth = _running_mean(losses, max(5, len(losses) // 25))
        axes.plot(result.loss_steps, losses, color=colour, alpha=0.15, linewidth=0.8)
        label = METHODS[result.method].meaning
        if result.diverged_at_step is not None:
            label += f" (diverged at step {result.diverged_at_step})"
            axes.axvline(result.diverged_at_step, color=colour, linestyle=":", linewidth=1.2)
        axes.plot(result.loss_steps, smooth, color=colour, linewidth=1.8, label=label)
    finite = [loss for result in results for loss in result.losses if np.isfinite(loss) and loss > 0]
    if finite and max(finite) > 20 * min(finite):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="training loss (thick: running mean)", title="Training loss")
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_load(axes: Axes, result: MethodResult) -> None:
    load = np.array(list(result.load_by_layer.values()))  # [layers, E]
    even = load.sum(axis=1).mean() / load.shape[1]
    image = axes.imshow(load, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2 * even, interpolation="nearest")
    axes.set(xlabel="expert", title="Experts' load by layer, on the held-out data")
    axes.set_xticks(range(load.shape[1]) if load.shape[1] <= 16 else range(0, load.shape[1], 4))
    names = _short_names(list(result.load_by_layer))
    every = max(1, -(-len(names) // _NAMED_LAYERS))
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
    bar = axes.figure.colorbar(image, ax=axes, extend="max")
    bar.set_label(f"share of tokens that use the expert (even: {even:.3g}, white)")


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last ``window`` values, over fewer at the start."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _short_names(names: list[str]) -> list[str]:
    """Layer names without the parts that all of them start with."""
    parts = [name.split(".") for name in names]
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))
    return [".".join(part[min(shared, len(part) - 1) :]) for part in parts]
