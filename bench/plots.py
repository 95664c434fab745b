"""Figures: a function draws data onto a matplotlib figure; the PNG carries a digest of the data, by which a report that
is out of date is found."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.style import library
from matplotlib.ticker import LogLocator
from PIL import Image

from bench.tables import adapters, by_varied

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


def scaling(drawn: Figure, rows: list[dict]) -> None:
    """Ratio to the frozen layer as one size grows."""
    drawn.set_size_inches(10, 5.5)
    names, varied = adapters(rows), by_varied(rows)
    letters = dict.fromkeys(letter for letter, _ in varied)
    all_axes = drawn.subplots(1, len(letters), sharey=True, squeeze=False)[0]
    for axes, letter in zip(all_axes, letters, strict=True):
        of_letter = sorted((value, of) for (one, value), of in varied.items() if one == letter)
        values = [value for value, _ in of_letter]
        axes.set_prop_cycle(library["tableau-colorblind10"]["axes.prop_cycle"])
        for name in names:
            ratios = [of.get(name, {}).get("ratio_p50", float("nan")) for _, of in of_letter]
            axes.plot(values, ratios, marker="^" if "graph" in name else "o", markersize=4, label=name)
        axes.set(xscale="log", xlabel=f"{letter} (= M)" if letter == "N" else letter, yscale="log")
        axes.set_xticks(values, [str(value) for value in values], fontsize=7)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 6, 8)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.axhline(1, color="#999999", linewidth=1)
        axes.grid(True, axis="y", alpha=0.3)
    all_axes[0].set_ylabel("time / frozen nn.Linear, forward and backward")
    legend(drawn, all_axes[0].get_legend_handles_labels()[0])
