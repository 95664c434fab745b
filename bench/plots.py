"""Figures from rows of results: ratio to the frozen layer by shape, roofline, scaling curves, memory.

A figure is a function that draws data onto a matplotlib figure; the PNG carries a digest of the data, by which a report
that is out of date is found.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from PIL import Image

from bench.results import timed
from bench.tables import adapters, by_shape, by_varied, commit_of, contenders, in_mode

#: Colour-blind safe (Okabe and Ito). A contender has its colour in every figure, however it is launched.
_COLOURS = {
    "frozen linear": "#999999",
    "base": "#999999",
    "PEFT LoRA": "#0072B2",
    "PEFT LoRA, adapter in x's dtype": "#56B4E9",
    "expert loop": "#E69F00",
    "GOAT fold, torch": "#009E73",
    "GOAT path, torch": "#CC79A7",
    "GOAT fold, triton": "#D55E00",
    "GOAT path, triton": "#000000",
    "torch": "#009E73",
    "triton": "#D55E00",
}

#: How it is launched -> marker.
_MARKERS = {", compiled": "s", ", CUDA graph": "^", "": "o"}

#: Raised when a figure is drawn otherwise from the same data, so that those on disk count as out of date.
_DRAWING = 3

_DIGEST = "goat-kernels-rows"

Draw = Callable[[Figure, object], None]


def png(draw: Draw, data: object) -> bytes:
    """What ``draw`` makes of ``data``, with a digest of it."""
    drawn = Figure(layout="constrained")
    draw(drawn, data)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=110, metadata={_DIGEST: digest(data), "Software": None})
    return buffer.getvalue()


def digest(data: object) -> str:
    """Of everything that a figure is drawn from."""
    return hashlib.sha256(json.dumps([_DRAWING, data], sort_keys=True).encode()).hexdigest()


def digest_in(path: Path) -> str | None:
    """The digest that a PNG carries; None where there is no such file or it carries none."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(_DIGEST)


def legend(drawn: Figure, handles: list) -> None:
    """Below everything, where it hides nothing."""
    columns = len(handles) if len(handles) < 6 else 4
    drawn.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _of_suite(draw: Draw) -> Draw:
    """With a title that says what was measured on; ``draw`` gets the rows that have a time."""

    def figure(drawn: Figure, rows: list[dict]) -> None:
        drawn.set_size_inches(10, 7 if draw is _memory else 5.5)
        draw(drawn, timed(rows))
        row = max(rows, key=lambda row: row["date"])
        drawn.suptitle(f"{row['gpu'] or row['cpu']}, {row['date'][:10]}, {commit_of(row)}", fontsize=9)

    return figure


def _style(name: str) -> dict:
    """Colour and marker of a contender; a CUDA graph or compiled layer has the colour of the eager one."""
    ending = next(ending for ending in _MARKERS if name.endswith(ending))
    return {"color": _COLOURS.get(name.removesuffix(ending), "#777777"), "marker": _MARKERS[ending]}


def _places(count: int, place: int, of: int) -> list[float]:
    """x of the contender ``place`` of ``of`` in each of ``count`` groups."""
    return [index + 0.8 * ((place + 0.5) / of - 0.5) for index in range(count)]


def _shape_labels(axes, grouped: dict[tuple, dict]) -> None:
    labels = [f"T={T}\n{N}->{M}\nR={R}" for T, N, M, R, _, _ in grouped]
    axes.set_xticks(range(len(labels)), labels, fontsize=8 if len(labels) < 10 else 7)


def _ratio_axis(axes) -> None:
    """Logarithmic, with a line at the frozen layer's time."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 6, 8)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.axhline(1, color="#999999", linewidth=1)
    axes.grid(True, axis="y", alpha=0.3)


def _layer(drawn: Figure, rows: list[dict]) -> None:
    rows = [row for row in in_mode(rows, "both") if "ratio_p50" in row]
    grouped, axes, handles, names = by_shape(rows), drawn.subplots(), [], adapters(rows)
    for place, name in enumerate(names):
        at = _places(len(grouped), place, len(names))
        found = [(x, of[name]) for x, of in zip(at, grouped.values(), strict=True) if name in of]
        low, middle, high = (np.array([row[f"ratio_p{p}"] for _, row in found]) for p in (20, 50, 80))
        style = {"linestyle": "none", "markersize": 5, "capsize": 2, "label": name, **_style(name)}
        handles.append(axes.errorbar([x for x, _ in found], middle, yerr=[middle - low, high - middle], **style))
    for index in range(1, len(grouped)):
        axes.axvline(index - 0.5, color="#dddddd", linewidth=0.8)
    _shape_labels(axes, grouped)
    axes.set(ylabel="time / frozen nn.Linear, p50 with p20-p80", title="Forward and backward of one layer")
    _ratio_axis(axes)
    legend(drawn, handles)


def _kernels(drawn: Figure, rows: list[dict]) -> None:
    axes, first = drawn.subplots(), rows[0]
    intensity = [row["flops"] / row["floor_bytes"] for row in rows]
    bandwidth, peak = max(first["machine_read_gb_per_s"], first["machine_copy_gb_per_s"]), first["machine_tflops"]
    ridge = 1e3 * peak / bandwidth
    line = sorted({0.5 * min(*intensity, ridge), ridge, 1.5 * max(*intensity, ridge)})
    axes.plot(line, [min(peak, x * bandwidth / 1e3) for x in line], color="#000000", linewidth=1.2)
    passes = dict(zip(dict.fromkeys(row["pass"] for row in rows), "osD^vP*Xpd", strict=False))
    plain = {"linestyle": "none", "markersize": 6, "markeredgewidth": 0}
    for row, x in zip(rows, intensity, strict=True):
        colour = _style(row["contender"])["color"]
        axes.plot([x], [row["tflops"]], alpha=0.75, color=colour, marker=passes[row["pass"]], **plain)
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s", title="Each pass alone, under the measured roofline")
    axes.set_xlabel("operations per byte that the pass must move, each tensor once")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.grid(True, which="both", alpha=0.2)
    handles = [Line2D([], [], color="#000000", linewidth=1.2, label="roofline")]
    for name in contenders(rows):
        handles.append(Line2D([], [], marker="o", color=_style(name)["color"], label=name, **plain))
    for name, marker in passes.items():
        handles.append(Line2D([], [], marker=marker, color="#777777", label=name.replace("_", " "), **plain))
    legend(drawn, handles)


def _scaling(drawn: Figure, rows: list[dict]) -> None:
    names, varied, handles = adapters(rows), by_varied(rows), {}
    letters = dict.fromkeys(letter for letter, _ in varied)
    all_axes = drawn.subplots(1, len(letters), sharey=True, squeeze=False)[0]
    for axes, letter in zip(all_axes, letters, strict=True):
        of_letter = sorted((value, of) for (one, value), of in varied.items() if one == letter)
        for name in names:
            found = [(value, of[name]["ratio_p50"]) for value, of in of_letter if "ratio_p50" in of.get(name, {})]
            if found:
                (handles[name],) = axes.plot(*zip(*found, strict=True), markersize=4, label=name, **_style(name))
        axes.set(xscale="log", xlabel=f"{letter} (= M)" if letter == "N" else letter)
        axes.set_xticks([value for value, _ in of_letter], [str(value) for value, _ in of_letter], fontsize=7)
        _ratio_axis(axes)
    all_axes[0].set_ylabel("time / frozen nn.Linear, forward and backward")
    legend(drawn, list(handles.values()))


def _memory(drawn: Figure, rows: list[dict]) -> None:
    grouped, names = by_shape(rows), contenders(rows)
    both = drawn.subplots(2, 1, sharex=True)
    for axes, field, scale, title in (
        (both[0], "saved_for_backward_bytes", 2**20, "saved for backward beside x and the parameters"),
        (both[1], "peak_mib", 1, "peak of a forward and backward, results included"),
    ):
        handles = []
        for place, name in enumerate(names):
            values = [of[name][field] / scale if name in of else 0 for of in grouped.values()]
            style = {"width": 0.8 / len(names), "color": _style(name)["color"], "label": name}
            handles.append(axes.bar(_places(len(grouped), place, len(names)), values, **style))
        axes.set_ylabel("MiB")
        axes.set_title(title, fontsize=10)
        axes.grid(True, axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    _shape_labels(both[1], grouped)
    legend(drawn, handles)


#: Suite -> what draws its figure.
FIGURES: dict[str, Draw] = {
    "layer": _of_suite(_layer),
    "kernels": _of_suite(_kernels),
    "scaling": _of_suite(_scaling),
    "memory": _of_suite(_memory),
}
