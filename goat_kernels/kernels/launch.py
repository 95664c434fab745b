"""Launching a kernel: the one place through which every launch goes.

A launch is described by a :class:`Launch` before it happens, so that others can look at it: the compile gate records
launches and compiles them for GPUs that are not there, the traffic count runs them one by one in the interpreter, the
tests poison what they are about to write. ``observed`` puts such an observer in place; without one a launch goes
straight to Triton.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from goat_kernels.kernels.tiles import Tile


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: one to three program counts.
        arguments: the kernel's run-time arguments by name: tensors, None for an absent one, integers, floats.
        constants: its ``tl.constexpr`` arguments by name.
        tile: warps, stages, and the tile the constants were made from.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tile: Tile

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def run(self) -> None:
        self.kernel[self.grid](
            **self.arguments, **self.constants, num_warps=self.tile.warps, num_stages=self.tile.stages
        )


_observer: Callable[[Launch], None] | None = None


@contextlib.contextmanager
def observed(observer: Callable[[Launch], None]) -> Iterator[None]:
    """Hand every launch of this process to ``observer``, which runs it with ``launch.run()``, or does not."""
    global _observer
    previous, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = previous


def launch(kernel, grid: tuple[int, ...], tile: Tile, arguments: dict[str, Any], constants: dict[str, Any]) -> None:
    """Launch ``kernel``; see :class:`Launch`. Does nothing for an empty grid."""
    if 0 in grid:
        return
    described = Launch(kernel, grid, arguments, constants, tile)
    if _observer is not None:
        _observer(described)
    else:
        described.run()


def blocks(extent: int, block: int) -> int:
    """How many blocks cover ``extent``."""
    return -(-extent // block)
