"""What is timed, and the one loop that checks and times it: every suite but ``host`` and ``memory`` is a list for it.

A candidate runs eagerly or, so that the host's time drops out, as one CUDA graph for all copies of the inputs.
``torch.cuda.graph`` collects garbage and empties the allocator's cache for every graph, which takes longer than the
measurement. Here the stream is captured directly, garbage is collected once before, and one graph holds one call on
each copy, one after the other: a replay rotates through the copies by itself.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bench.cases import BenchSettings
from bench.timing import in_words, time_interleaved, timing_row
from goat_kernels.numerics import TOLERANCES


@dataclass(frozen=True)
class Step:
    """What is timed.

    Attributes:
        calls: one for each copy of the inputs.
        graph: None, or a CUDA graph of all of them, one after the other.
        results: what the calls of the graph write.
    """

    calls: tuple[Callable[[], object], ...]
    graph: torch.cuda.CUDAGraph | None = None
    results: tuple[object, ...] = ()

    @property
    def calls_at_once(self) -> int:
        """How many calls running it makes."""
        return 1 if self.graph is None else len(self.calls)

    def __call__(self, copy: int) -> object:
        return self.calls[copy]() if self.graph is None else self.graph.replay()


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all captures: what autograd keeps of a parameter remembers the stream that it was made on."""
    return torch.cuda.Stream(device)


def step_of(make: Callable[[int], Callable[[], object]], copies: int, *, graph: bool) -> Step:
    """What ``make(0)``, ..., ``make(copies - 1)`` return, as calls or (``graph``) as one CUDA graph.

    ``make`` runs on the stream of the capture, so that a backward is captured on the stream of its forward.
    """
    if not graph:
        return Step(tuple(make(copy) for copy in range(copies)))
    gc.collect()  # graphs of autograd that ran on another stream would be waited for, which a capture refuses
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = tuple(make(copy) for copy in range(copies))
        for call in calls:
            for _ in range(3):  # the capture must not compile, fill caches or find workspaces
                call()
        torch.cuda.synchronize()
        cuda_graph = torch.cuda.CUDAGraph()
        cuda_graph.capture_begin()
        try:
            results = tuple(_detached(call()) for call in calls)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error says more than that the capture is invalid
                cuda_graph.capture_end()
            raise
        cuda_graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return Step(calls, cuda_graph, results)


def _detached(results: object) -> object:
    """Without what a backward would need: a kept graph of autograd keeps its stream too."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, results)


def worst_error(step: Step, error: Callable[[int, object], float]) -> float:
    """Run the step on every copy; the largest ``error(copy, what it gave)``; NaN where one is."""
    results = (_detached(call()) for call in step.calls)
    if step.graph is not None:
        step(0)
        torch.cuda.synchronize()
        results = step.results
    return worst(error(copy, result) for copy, result in enumerate(results))


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN where one is."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


# --- checked and timed ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """One thing to time beside others.

    Attributes:
        row: the fields of a result that name it: "contender", and what else tells it from the others.
        make: copy -> the call that is timed on that copy of the inputs.
        error: (copy, what a call gave) -> its relative error against float64; None where there is nothing to check.
        graph: whether a CUDA graph of it is replayed.
        ratios: quantity -> contender, of the same fields otherwise, that its time is divided by.
    """

    row: dict
    make: Callable[[int], Callable[[], object]]
    error: Callable[[int, object], float] | None = None
    graph: bool = False
    ratios: Mapping[str, str] = field(default_factory=dict)

    def key(self, contender: str) -> tuple:
        """What ``contender`` in its place is called among the candidates."""
        return contender, self.row.get("pass")


def measured(candidates: Iterable[Candidate], copies: int, settings: BenchSettings) -> Iterator[dict]:
    """Check every candidate on every copy of the inputs, then time those that are right beside one another.

    One that is wrong, or raises, is a row that says so, and the others go on.
    """
    ready: dict[tuple, tuple[Candidate, Step, dict]] = {}
    for candidate in candidates:
        try:
            step = step_of(candidate.make, copies, graph=candidate.graph)
            fields = {} if candidate.error is None else checked(worst_error(step, candidate.error), settings.dtype)
        except Exception as failure:  # what a peer, a compiler or a driver refuses is a result, and others follow
            fields = {"failed": in_words(failure)}
        if "failed" in fields:
            yield {**candidate.row, **fields}
        else:
            ready[candidate.key(candidate.row["contender"])] = candidate, step, fields
    steps = {key: step for key, (_, step, _) in ready.items()}
    samples = time_interleaved(steps, device=settings.device, copies=copies, rounds=settings.rounds)
    for key, (candidate, _, fields) in ready.items():
        row = timing_row(key, samples, {quantity: candidate.key(base) for quantity, base in candidate.ratios.items()})
        yield {**candidate.row, **row, **fields}


def checked(error: float, dtype: torch.dtype) -> dict:
    """A relative error against float64 beside its bound or, where it is beyond that, why there is no time."""
    bound = TOLERANCES[dtype].relative
    if not error <= bound:
        return {"failed": f"{error:.1e} away from float64, allowed is {bound:.0e}; not timed"}
    return {"relative_error": error, "relative_error_bound": bound}
