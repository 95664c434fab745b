"""Figures from rows of results: ratio to the frozen layer by shape, roofline, scaling curves, memory."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

from goat_kernels.benchmarking.layers import FROZEN
from goat_kernels.benchmarking.results import timed
from goat_kernels.benchmarking.tables import by_shape, commit_of, contenders, scaling_groups

#: Colour-blind safe (Okabe and Ito); a contender keeps its colour in every figure.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#000000", "#F0E442")

#: Raised when a figure is drawn otherwise from the same rows, so that those on disk count as out of date.
_DRAWING = 2

_DIGEST = "goat-kernels-rows"


def figure(suite: str, rows: list[dict]) -> bytes:
    """The PNG of a suite; it carries a digest of the rows that it was drawn from."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 5), layout="constrained")
    FIGURES[suite](drawn, timed(rows))
    row = max(rows, key=lambda row: row["date"])
    drawn.suptitle(f"{row['gpu'] or row['cpu']}, {row['date'][:10]}, {commit_of(row)}", fontsize=9)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=110, metadata={_DIGEST: digest(rows), "Software": None})
    return buffer.getvalue()


def digest(rows: list[dict]) -> str:
    """Of everything that a figure is drawn from."""
    return hashlib.sha256(json.dumps([_DRAWING, rows], sort_keys=True).encode()).hexdigest()


def digest_in(path: Path) -> str | None:
    """The digest that a PNG carries; None where there is no such file or it carries none."""
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(_DIGEST)


def _colours(names: list[str]) -> dict[str, str]:
    return {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}


def _layer(drawn, rows: list[dict]) -> None:
    rows = [row for row in rows if row["mode"] == "both" and "ratio_p50" in row]
    grouped = by_shape(rows)
    names = [name for name in contenders(rows) if not name.startswith(FROZEN)]
    colours, axes = _colours(names), drawn.subplots()
    for place, name in enumerate(names):
        at = [
            index + 0.8 * ((place + 0.5) / len(names) - 0.5) for index, of in enumerate(grouped.values()) if name in of
        ]
        of_name = [of[name] for of in grouped.values() if name in of]
        middle = [row["ratio_p50"] for row in of_name]
        spread = [
            [row["ratio_p50"] - row["ratio_p20"] for row in of_name],
            [row["ratio_p80"] - row["ratio_p50"] for row in of_name],
        ]
        axes.errorbar(at, middle, yerr=spread, fmt="o", markersize=5, color=colours[name], label=name, capsize=2)
    axes.axhline(1, color="#999999", linewidth=1)
    labels = [f"{T}\n{N}->{M}\nR={R}" for T, N, M, R, _, _ in grouped]
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set(ylabel="time / frozen nn.Linear, p50 with p20-p80", title="Forward and backward of one layer")
    axes.set_yscale("log")
    ticks = [1, 1.1, 1.2, 1.4, 1.7, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    highest = max((row["ratio_p80"] for row in rows), default=2)
    kept = [tick for tick in ticks if tick <= highest * 1.1]
    axes.set_yticks(kept, [f"{tick:g}" for tick in kept])
    axes.minorticks_off()
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def _kernels(drawn, rows: list[dict]) -> None:
    axes = drawn.subplots()
    names = contenders(rows)
    colours, first = _colours(names), rows[0]
    intensity = [row["flops"] / row["floor_bytes"] for row in rows]
    bandwidth = max(first["machine_read_gb_per_s"], first["machine_copy_gb_per_s"])
    line = sorted({0.5 * min(intensity), 1e3 * first["machine_tflops"] / bandwidth, 2 * max(intensity)})
    roof = [min(first["machine_tflops"], x * bandwidth / 1e3) for x in line]
    axes.plot(line, roof, color="#000000", linewidth=1.2, label="measured roofline")
    for name in names:
        of_name = [row for row in rows if row["contender"] == name]
        x = [row["flops"] / row["floor_bytes"] for row in of_name]
        axes.plot(x, [row["tflops"] for row in of_name], "o", markersize=5, color=colours[name], label=name, alpha=0.8)
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s", title="Each pass alone")
    axes.set_xlabel("operations per byte that the pass must move, each tensor once")
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def _scaling(drawn, rows: list[dict]) -> None:
    names = [name for name in contenders(rows) if not name.startswith(FROZEN)]
    colours, groups = _colours(names), scaling_groups(rows)
    all_axes = drawn.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (letter, of_letter) in zip(all_axes, groups.items(), strict=True):
        for name in names:
            points = [
                (value, of[name]["ratio_p50"])
                for value, of in sorted(of_letter.items())
                if "ratio_p50" in of.get(name, {})
            ]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", markersize=4, color=colours[name], label=name)
        axes.set(xscale="log", yscale="log", xlabel=f"{letter} (= M)" if letter == "N" else letter)
        axes.set_xticks(sorted(of_letter), [str(value) for value in sorted(of_letter)], fontsize=7)
        axes.minorticks_off()
        axes.axhline(1, color="#999999", linewidth=1)
        axes.grid(True, alpha=0.3)
    all_axes[0].set_ylabel("time / frozen nn.Linear, forward and backward")
    all_axes[0].yaxis.set_major_formatter("{x:g}")
    all_axes[0].legend(frameon=False, fontsize=7)


def _memory(drawn, rows: list[dict]) -> None:
    grouped, names = by_shape(rows), contenders(rows)
    colours, both = _colours(names), drawn.subplots(1, 2)
    labels = [f"{T}\n{N}->{M}\nR={R}" for T, N, M, R, _, _ in grouped]
    for axes, field, scale, title in (
        (both[0], "saved_for_backward_bytes", 2**20, "saved for backward beside x and the parameters"),
        (both[1], "peak_mib", 1, "peak of a forward and backward, results included"),
    ):
        for place, name in enumerate(names):
            at = [index + 0.8 * ((place + 0.5) / len(names) - 0.5) for index in range(len(grouped))]
            values = [of[name][field] / scale if name in of else 0 for of in grouped.values()]
            axes.bar(at, values, width=0.8 / len(names), color=colours[name], label=name)
        axes.set_xticks(range(len(labels)), labels, fontsize=6)
        axes.set(ylabel="MiB", title=title)
        axes.title.set_fontsize(9)
    both[0].legend(frameon=False, fontsize=7)


#: Suite -> what draws its figure.
FIGURES: dict[str, Callable] = {"layer": _layer, "kernels": _kernels, "scaling": _scaling, "memory": _memory}
