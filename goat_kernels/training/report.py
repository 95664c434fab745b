"""What the routers of a model did in its last forward: as numbers, and for people a table and a heatmap of the load."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from goat_kernels.files import atomic_path
from goat_kernels.routed_module import routed_modules

#: With more experts than this the table names the most and least used alone.
_LISTED_EXPERTS = 16
#: More layers than this are not all named in the heatmap.
_NAMED_LAYERS = 40


@dataclass(frozen=True)
class RouterStatistics:
    """The routing of one layer's last forward.

    Attributes:
        balance_loss: E * sum_i f_i P_i; K when the load is even.
        load: f_i, the share of tokens that used expert i; sums to K.
    """

    balance_loss: float
    load: tuple[float, ...]

    @property
    def relative_load(self) -> tuple[float, ...]:
        """The load over an even load, E f_i / K: 1 is even; zeros for a batch without tokens."""
        total = sum(self.load) or 1.0
        return tuple(share * len(self.load) / total for share in self.load)

    @property
    def load_entropy(self) -> float:
        """-sum_i p_i ln p_i / ln E, p_i = f_i / K: 1 is even, 0 is one expert for all; 1 where there is only one."""
        if len(self.load) == 1:
            return 1.0
        shares = [relative / len(self.load) for relative in self.relative_load]
        return sum(-share * math.log(share) for share in shares if share > 0) / math.log(len(shares))


def router_statistics(model: nn.Module) -> dict[str, RouterStatistics]:
    """The routing statistics of every layer that has run, by its name in ``model``; one transfer per layer."""
    statistics = {}
    for name, module in routed_modules(model):
        if (balance_loss := module.balance_loss) is not None:
            loss, *load = torch.cat((balance_loss.reshape(1).double(), module.expert_load.double())).tolist()
            statistics[name] = RouterStatistics(loss, tuple(load))
    return statistics


@dataclass(frozen=True)
class RouterReport:
    """The routing of a model's last forward: of the ``layers`` that have run, by name; ``idle`` names the others."""

    layers: dict[str, RouterStatistics]
    idle: tuple[str, ...] = ()

    @property
    def table(self) -> str:
        """One line per layer: balance loss, entropy (1 is even), the least and most used expert as a multiple of an
        even load, and with up to 16 experts the percentage of tokens that used each."""
        experts = max(len(layer.load) for layer in self.layers.values())
        listed = experts if experts <= _LISTED_EXPERTS else 0
        head = ["layer", "balance loss", "entropy", "least used", "most used", *(f"{i}, %" for i in range(listed))]
        rows = [head]
        for name, layer in zip(_short_names(list(self.layers)), self.layers.values(), strict=True):
            relative = layer.relative_load
            row = [name or "(the model)", f"{layer.balance_loss:.4f}", f"{layer.load_entropy:.4f}"]
            row += [f"{relative.index(share)}: {share:.2f}x" for share in (min(relative), max(relative))]
            row += [f"{100 * share:.1f}" for share in layer.load[:listed]]
            rows.append(row + [""] * (len(head) - len(row)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * width for width in widths])
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        if self.idle:
            lines.append(f"{len(self.idle)} routed layers have not run: {', '.join(self.idle)}")
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        return self.table

    def save_heatmap(self, path: str | os.PathLike) -> Path:
        """Write the load, layers x experts, to ``path`` as PNG; an existing file is replaced at once.

        Raises:
            ImportError: matplotlib is missing.
            FileNotFoundError, IsADirectoryError: ``path`` lies in a folder that does not exist, or is one.
        """
        path = _writable(path)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the heatmap needs matplotlib: pip install matplotlib") from error

        figure = Figure(figsize=(7, min(max(3.0, 1.6 + 0.17 * len(self.layers)), 12)), layout="constrained")
        draw_load(figure.subplots(), self.layers, "Experts' load by layer, in the last forward")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
        return path


def draw_load(axes, layers: dict[str, RouterStatistics], title: str) -> None:
    """Draw the load over an even load, layers x experts, into matplotlib's ``axes``."""
    names, experts = _short_names(list(layers)), max(len(layer.load) for layer in layers.values())
    relative = [[*layer.relative_load, *[math.nan] * (experts - len(layer.load))] for layer in layers.values()]
    image = axes.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    axes.set(xlabel="expert", title=title)
    axes.set_xticks(range(0, experts, 1 if experts <= _LISTED_EXPERTS else 4))
    every = -(-len(names) // _NAMED_LAYERS)
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
    axes.figure.colorbar(image, ax=axes, extend="max").set_label("load over an even load (1: even, white)")


def router_report(model: nn.Module, heatmap: str | os.PathLike | None = None) -> RouterReport:
    """How the experts of every routed layer in ``model`` were used in its last forward.

    Args:
        model: a PEFT model with a GOAT adapter, or any module with :class:`goat_kernels.GoatLinear` inside, that has
            run at least once.
        heatmap: where to write a picture of the load (PNG), layers x experts; None writes none.

    Returns:
        A report whose ``str`` is a table.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no routed layer, or none of them has run.
        FileNotFoundError, IsADirectoryError: ``heatmap`` lies in a folder that does not exist, or is one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    names = [name for name, _ in routed_modules(model)]
    if not names:
        raise ValueError(f"model ({type(model).__name__}) has no GOAT layer; it needs a GOAT adapter or a GoatLinear")
    if heatmap is not None:
        _writable(heatmap)
    layers = router_statistics(model)
    if not layers:
        raise ValueError(
            f"none of the {len(names)} GOAT layers of model ({type(model).__name__}) has run with its adapter on; run "
            "a forward first"
        )
    report = RouterReport(layers, tuple(name for name in names if name not in layers))
    if heatmap is not None:
        report.save_heatmap(heatmap)
    return report


def _writable(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"the heatmap needs the name of a file; {str(path)!r} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the heatmap {str(path)!r} needs a folder that exists; {str(path.parent)!r} does not")
    return path


def _short_names(names: list[str]) -> list[str]:
    """Layer names without the parts that all of them start with."""
    parts = [name.split(".") for name in names]
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))
    return [".".join(part[min(shared, len(part) - 1) :]) for part in parts]
