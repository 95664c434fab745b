"""Launching a kernel: the one place through which every launch goes.

A launch is described by a :class:`Launch` before it happens, so that others can look at it: the compile gate records
launches and compiles them for GPUs that are not there, the traffic count runs them one by one in the interpreter, the
tests poison what they are about to write. ``observed`` puts such an observer in place; without one a launch goes
straight to Triton. ``watched`` is the same for one thread: ``backends/triton_backend/watching.py`` remembers launches.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

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

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs it, which wants tensors where a compiled kernel takes addresses."""
        import triton  # not above: `goat-kernels check` describes launches where Triton is not installed

        return not isinstance(self.kernel, triton.JITFunction)

    def run(self) -> Any:
        """Launch, and return the compiled kernel; None from the interpreter."""
        return self.kernel[self.grid](
            **self.arguments, **self.constants, num_warps=self.tile.warps, num_stages=self.tile.stages
        )

    def in_order(self) -> list[Any]:
        """Arguments and constants as the kernel lists them."""
        given = {**self.arguments, **self.constants}
        return [given[name] for name in self.kernel.arg_names]

    def runner(self, compiled: Any) -> Callable[..., None]:
        """``runner(*in_order)`` launches once more, with other addresses: of ``compiled``, which :meth:`run` returned,
        without looking it up again. An address may be an integer; a compiled kernel's runner takes ``stream=`` too."""
        if self.interpreted:
            return functools.partial(self.kernel[self.grid], num_warps=self.tile.warps, num_stages=self.tile.stages)
        return compiled[(*self.grid, 1, 1)[:3]]


def current_stream(device: torch.device) -> int:
    """The handle of the stream that compiled kernels are launched on, as Triton would ask for it at each launch."""
    return _driver().active.get_current_stream(device.index)


@functools.cache
def _driver():
    from triton.runtime import driver

    return driver


_observer: Callable[[Launch], None] | None = None


class _OfThread(threading.local):
    watcher: Callable[[Launch], None] | None = None


_of_thread = _OfThread()


@contextlib.contextmanager
def observed(observer: Callable[[Launch], None]) -> Iterator[None]:
    """Hand every launch of this process to ``observer``, which runs it with ``launch.run()``, or does not."""
    global _observer
    previous, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = previous


def is_observed() -> bool:
    """Whether somebody looks at the launches of this process."""
    return _observer is not None


@contextlib.contextmanager
def watched(watcher: Callable[[Launch], None]) -> Iterator[None]:
    """As :func:`observed`, for the launches of this thread alone."""
    previous, _of_thread.watcher = _of_thread.watcher, watcher
    try:
        yield
    finally:
        _of_thread.watcher = previous


def launch(kernel, grid: tuple[int, ...], tile: Tile, arguments: dict[str, Any], constants: dict[str, Any]) -> None:
    """Launch ``kernel``; see :class:`Launch`. Does nothing for an empty grid."""
    if 0 in grid:
        return
    described = Launch(kernel, grid, arguments, constants, tile)
    observer = _of_thread.watcher or _observer
    if observer is not None:
        observer(described)
    else:
        described.run()


def blocks(extent: int, block: int) -> int:
    """How many blocks cover ``extent``."""
    return -(-extent // block)
