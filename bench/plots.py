"""Figures from rows of results: ratio to the frozen layer by shape, and as one size grows.

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
from matplotlib.ticker import LogLocator
from PIL import Image

from bench.tables import adapters, by_shape, by_varied, commit_of, in_mode

#: Colour-blind safe (Okabe and Ito). A contender has its colour in every figure, however it is launched.
_COLOURS = {
    "frozen linear": "#999999",
    "PEFT LoRA": "#0072B2",
    "PEFT LoRA, adapter in x's dtype": "#56B4E9",
    "expert loop": "#E69F00",
    "GOAT fold, torch": "#009E73",
    "GOAT path, torch": "#CC79A7",
    "GOAT fold, triton": "#D55E00",
    "GOAT path, triton": "#000000",
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


def _title(drawn: Figure, rows: list[dict]) -> None:
    """What was measured on."""
    drawn.set_size_inches(10, 5.5)
    row = max(rows, key=lambda row: row["date"])
    drawn.suptitle(f"{row['gpu'] or row['cpu']}, {row['date'][:10]}, {commit_of(row)}", fontsize=9)


def _style(name: str) -> dict:
    """Colour and marker of a contender; a CUDA graph or compiled layer has the colour of the eager one."""
    ending = next(ending for ending in _MARKERS if name.endswith(ending))
    return {"color": _COLOURS.get(name.removesuffix(ending), "#777777"), "marker": _MARKERS[ending]}


def _ratio_axis(axes) -> None:
    """Logarithmic, with a line at the frozen layer's time."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 6, 8)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.axhline(1, color="#999999", linewidth=1)
    axes.grid(True, axis="y", alpha=0.3)


def _layer(drawn: Figure, rows: list[dict]) -> None:
    _title(drawn, rows)
    rows = [row for row in in_mode(rows, "both") if "ratio_p50" in row]
    grouped, axes, handles, names = by_shape(rows), drawn.subplots(), [], adapters(rows)
    for place, name in enumerate(names):
        at = 0.8 * ((place + 0.5) / len(names) - 0.5)
        found = [(index + at, of[name]) for index, of in enumerate(grouped.values()) if name in of]
        low, middle, high = (np.array([row[f"ratio_p{p}"] for _, row in found]) for p in (20, 50, 80))
        style = {"linestyle": "none", "markersize": 5, "capsize": 2, "label": name, **_style(name)}
        handles.append(axes.errorbar([x for x, _ in found], middle, yerr=[middle - low, high - middle], **style))
    for index in range(1, len(grouped)):
        axes.axvline(index - 0.5, color="#dddddd", linewidth=0.8)
    labels = [f"T={T}\n{N}->{M}\nR={R}" for T, N, M, R, _, _ in grouped]
    axes.set_xticks(range(len(labels)), labels, fontsize=8 if len(labels) < 10 else 7)
    axes.set(ylabel="time / frozen nn.Linear, p50 with p20-p80", title="Forward and backward of one layer")
    _ratio_axis(axes)
    legend(drawn, handles)


def _scaling(drawn: Figure, rows: list[dict]) -> None:
    _title(drawn, rows)
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


#: Suite -> what draws its figure of its rows.
FIGURES: dict[str, Draw] = {
    "layer": _layer,
    "scaling": _scaling,
}
