"""CUDA graphs of what is timed, so that the host's time drops out: one graph for all copies of the inputs.

``torch.cuda.graph`` collects garbage and empties the allocator's cache for every graph, which takes longer than the
measurement. Here the stream is captured directly, garbage is collected once before, and one graph holds one call on
each copy, one after the other: a replay rotates through the copies by itself.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Step = Callable[[int], object]

#: Calls on each copy before the capture, which must not compile, fill caches or find workspaces.
_WARMING_CALLS = 3


@dataclass(frozen=True)
class Captured:
    """A step whose every run is a call on each copy; ``results`` of copy i are what that call wrote."""

    graph: torch.cuda.CUDAGraph
    calls: tuple[Callable[[], object], ...]
    results: tuple[object, ...]

    @property
    def calls_at_once(self) -> int:
        return len(self.calls)

    def __call__(self, copy: int) -> None:
        self.graph.replay()

    def replayed(self) -> tuple[object, ...]:
        """What one replay writes, for each copy."""
        self.graph.replay()
        torch.cuda.synchronize()
        return self.results


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all captures: what autograd keeps of a parameter remembers the stream that it was made on."""
    return torch.cuda.Stream(device)


def captured(make: Callable[[int], Callable[[], object]], copies: int) -> Captured:
    """One CUDA graph of what ``make(0)``, ..., ``make(copies - 1)`` return.

    ``make`` runs on the stream of the capture, so that a backward is captured on the stream of its forward.
    """
    gc.collect()  # graphs of autograd that ran on another stream would be waited for, which a capture refuses
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = tuple(make(copy) for copy in range(copies))
        for call in calls:
            for _ in range(_WARMING_CALLS):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            results = tuple(_detached(call()) for call in calls)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error says more than that the capture is invalid
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return Captured(graph, calls, results)


def _detached(results: object) -> object:
    """Without what a backward would need: a kept graph of autograd keeps its stream too."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, results)


@dataclass(frozen=True)
class Eager:
    """A step that calls what was made for a copy."""

    calls: tuple[Callable[[], object], ...]

    calls_at_once = 1

    def __call__(self, copy: int) -> object:
        return self.calls[copy]()


def step_of(make: Callable[[int], Callable[[], object]], copies: int, *, graph: bool) -> Captured | Eager:
    """``make(copy)`` returns what is timed on that copy; ``graph``: replayed, so that the host's time drops out."""
    return captured(make, copies) if graph else Eager(tuple(make(copy) for copy in range(copies)))


def worst_error(step: Captured | Eager, error: Callable[[int, object], float]) -> float:
    """Run the step on every copy; the largest ``error(copy, what it gave)``; NaN where one is."""
    if isinstance(step, Captured):
        errors = [error(copy, results) for copy, results in enumerate(step.replayed())]
    else:
        errors = [error(copy, _detached(call())) for copy, call in enumerate(step.calls)]
    return max(errors, key=lambda one: float("inf") if one != one else one)
