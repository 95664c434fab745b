"""A kernel launch: described first, so that others can look at it, and then made.

A pass returns its launches in order, and :func:`launch_all` makes them. The compile gate records launches and compiles
them for GPUs that are not there, the traffic count runs them one by one in the interpreter, the tests poison what they
are about to write: ``observed`` puts such an observer in place of the launch itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from goat_kernels.kernels.tiles import Tile


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: one to three program counts; nothing is launched where one is 0.
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

    def run(self) -> Any:
        """Launch on its tensors' device, and return the compiled kernel; None from the interpreter."""
        with on_device(next(one.device for one in self.arguments.values() if isinstance(one, torch.Tensor))):
            return self.kernel[self.grid](
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


def is_observed() -> bool:
    """Whether an observer is in place."""
    return _observer is not None


def launch_all(launches: Iterable[Launch]) -> None:
    """Make launches, or hand them to the observer."""
    make = _observer or Launch.run
    for launch in launches:
        if 0 not in launch.grid:
            make(launch)


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which launches go to ``device``: Triton launches on the current one."""
    is_current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return contextlib.nullcontext() if is_current else torch.cuda.device(device)


def blocks(extent: int, block: int) -> int:
    """How many blocks cover ``extent``."""
    return -(-extent // block)
