"""Timing: every contender once a round, so that whatever the machine does to one of them it does to all.

A *step* is called with the number of a copy of the inputs; consecutive calls take different copies, so that none finds
its inputs in the cache (:func:`copies_for`). A sample is as many calls as fill :data:`MIN_SAMPLE_MS`, one after the
other: on a GPU between two device events and without a synchronisation in between, so that the host runs ahead
as it does in training; on a CPU between two readings of ``perf_counter``. What a sample gives is time per call.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

Step = Callable[[int], object]

#: A sample lasts at least so long, by device: shorter ones would measure the events and the first launch.
MIN_SAMPLE_MS = {"cuda": 4.0, "cpu": 1.0}

#: And has at most so many calls.
MAX_CALLS = 256

#: Copies of the inputs together are this many times the last-level cache; and no more copies than that.
CACHE_TIMES, MAX_COPIES = 2, 16


@dataclass(frozen=True)
class Timing:
    """Times of one contender.

    Attributes:
        time_ms: per call, one for each round.
        ratio: time / time of the base in the same round, one for each round; empty where there is no base.
        calls: in a sample.
    """

    time_ms: tuple[float, ...]
    ratio: tuple[float, ...]
    calls: int

    def row(self) -> dict:
        """The fields of a result."""
        row = {"rounds": len(self.time_ms), "calls_per_sample": self.calls}
        for name, values in (("time_ms", self.time_ms), ("ratio", self.ratio)):
            if values:
                row |= {f"{name}_p{p}": quantile(values, p / 100) for p in (20, 50, 80)}
        return row


def quantile(values: tuple[float, ...], share: float) -> float:
    """The ``share`` quantile, linear between neighbours; share 0.5 is the median."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def copies_for(input_bytes: int, cache_bytes: int) -> int:
    """How many copies of inputs of ``input_bytes`` a step rotates through, so that it never finds them cached."""
    return max(1, min(MAX_COPIES, math.ceil(CACHE_TIMES * cache_bytes / max(input_bytes, 1))))


def time_interleaved(
    steps: Mapping[str, Step],
    *,
    device: torch.device,
    copies: int,
    rounds: int,
    bases: Mapping[str, str] | None = None,
    warmup: int = 3,
    label: str = "",
) -> dict[str, Timing]:
    """Time every contender once per round, in an order that rotates from round to round.

    Args:
        steps: name -> what is timed.
        device: where it runs.
        copies: numbers that a step may be called with: 0..copies-1.
        rounds: how many rounds are timed.
        bases: name -> the contender that its ratio refers to; none by default.
        warmup: rounds before that, the first through all copies; the number of calls is found in them too.
        label: of the progress bar.
    """
    if not steps:
        return {}
    names, bases = list(steps), bases or {}
    calls = dict.fromkeys(names, copies)
    times: dict[str, list[float]] = {name: [] for name in names}
    with _no_collection():
        for round_ in tqdm(range(-warmup, rounds), desc=label, unit="round", leave=False, disable=None):
            start = round_ % len(names)
            for name in names[start:] + names[:start]:
                first = (round_ + warmup) * calls[name]
                elapsed_ms = sample_ms(steps[name], device, copies, calls[name], first)
                if round_ >= 0:
                    times[name].append(elapsed_ms)
                else:
                    calls[name] = min(MAX_CALLS, max(1, math.ceil(MIN_SAMPLE_MS[device.type] / max(elapsed_ms, 1e-6))))
    return {
        name: Timing(
            tuple(times[name]),
            tuple(t / b for t, b in zip(times[name], times[bases[name]], strict=True)) if name in bases else (),
            calls[name],
        )
        for name in names
    }


def sample_ms(step: Step, device: torch.device, copies: int, calls: int, first: int = 0) -> float:
    """Time per call of ``calls`` consecutive calls, each on the next copy, from call number ``first`` on."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for call in range(first, first + calls):
            step(call % copies)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls
    before = time.perf_counter()
    for call in range(first, first + calls):
        step(call % copies)
    return (time.perf_counter() - before) * 1e3 / calls


def median_ms(step: Step, device: torch.device, copies: int = 1, rounds: int = 11) -> float:
    """Median time of one step on its own: for the machine's ceilings, which have nobody beside them."""
    timing = time_interleaved({"": step}, device=device, copies=copies, rounds=rounds)[""]
    return statistics.median(timing.time_ms)


@dataclass(frozen=True)
class Captured:
    """A step that replays CUDA graphs, one for each copy; ``results`` are what the graph of copy 0 writes."""

    graphs: tuple[torch.cuda.CUDAGraph, ...]
    kept: tuple[object, ...]

    def __call__(self, copy: int) -> None:
        self.graphs[copy].replay()

    def results(self) -> object:
        """Replay copy 0 and return what it wrote."""
        self(0)
        torch.cuda.synchronize()
        return self.kept[0][1]


def captured(make: Callable[[int], Callable[[], object]], copies: int) -> Captured:
    """CUDA graphs of what ``make(copy)`` returns.

    ``make`` runs on the stream of the capture, so that a backward is captured on the stream of its forward.
    """
    stream, graphs, kept = torch.cuda.Stream(), [], []
    stream.wait_stream(torch.cuda.current_stream())
    for copy in range(copies):
        with torch.cuda.stream(stream):
            call = make(copy)
            for _ in range(3):  # compiles, fills caches and workspaces: nothing of that may happen in a capture
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = call()
        graphs.append(graph)
        kept.append((call, results))  # the graph reads and writes memory that these own
    torch.cuda.current_stream().wait_stream(stream)
    return Captured(tuple(graphs), tuple(kept))


def step_of(make: Callable[[int], Callable[[], object]], copies: int, *, graph: bool) -> Step:
    """``make(copy)`` returns what is timed on that copy; ``graph``: replayed, so that the host's time drops out."""
    if graph:
        return captured(make, copies)
    calls = [make(copy) for copy in range(copies)]
    return lambda copy: calls[copy]()


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside a sample."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
