"""Timing: every contender once a round, so that whatever the machine does to one of them it does to all.

A *step* is called with the number of a copy of the inputs; consecutive calls take different copies, so that none finds
its inputs in the cache (:func:`copies_for`). A sample is as many calls as fill :data:`MIN_SAMPLE_MS`, one after the
other: on a GPU between two device events and without a synchronisation in between, so that the host runs ahead
as it does in training; on a CPU between two readings of ``perf_counter``. What a sample gives is time per call.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

Step = Callable[[int], object]

#: A sample lasts at least so long, by device: shorter ones would measure the events and the first launch.
MIN_SAMPLE_MS = {"cuda": 4.0, "cpu": 1.0}

#: And has at most so many calls.
MAX_CALLS = 256

#: Copies of the inputs together are this many times the last-level cache; and no more copies than that.
CACHE_TIMES, MAX_COPIES = 2, 16


@dataclass
class Samples:
    """Times of one contender.

    Attributes:
        calls: in a sample.
        time_ms: per call, one for each round.
        failed: None, or what it raised while it was timed.
    """

    calls: int
    time_ms: list[float] = field(default_factory=list)
    failed: str | None = None


def timing_row(name: object, samples: Mapping[object, Samples], ratios: Mapping[str, object]) -> dict:
    """The fields of a result; ``ratios``: quantity -> the contender that its time is divided by, round by round."""
    own = samples[name]
    if own.failed is not None:
        return {"failed": own.failed}
    values, row = {"time_ms": own.time_ms}, {"rounds": len(own.time_ms), "calls_per_sample": own.calls}
    for quantity, base in ratios.items():
        if base in samples and samples[base].failed is None:
            values[quantity] = [ms / of for ms, of in zip(own.time_ms, samples[base].time_ms, strict=True)]
    return row | {f"{name}_p{p}": float(np.percentile(of, p)) for name, of in values.items() for p in (20, 50, 80)}


def copies_for(input_bytes: int, cache_bytes: int) -> int:
    """How many copies of inputs of ``input_bytes`` a step rotates through, so that it never finds them cached."""
    return max(1, min(MAX_COPIES, math.ceil(CACHE_TIMES * cache_bytes / max(input_bytes, 1))))


def time_interleaved(
    steps: Mapping[object, Step], *, device: torch.device, copies: int, rounds: int, warmup: int = 3
) -> dict[object, Samples]:
    """Time every contender once per round, in an order that rotates from round to round.

    A contender that raises is out, and the others go on.

    Args:
        steps: name -> what is timed.
        device: where it runs.
        copies: numbers that a step may be called with: 0..copies-1.
        rounds: how many rounds are timed.
        warmup: rounds before that, the first through all copies; the number of calls is found in them too.
    """
    samples = {name: Samples(calls=copies) for name in steps}
    with no_collection():
        for round_, name in rotating(steps, range(-warmup, rounds)):
            step, own = steps[name], samples[name]
            if own.failed is not None:
                continue
            try:
                elapsed_ms = sample_ms(step, device, copies, own.calls, (round_ + warmup) * own.calls)
            except Exception as failure:
                own.failed = in_words(failure)
                continue
            if round_ >= 0:
                own.time_ms.append(elapsed_ms)
            else:
                own.calls = _calls_to_fill(step, elapsed_ms, device)
    return samples


def rotating(names: Iterable, rounds: Iterable[int]) -> Iterator[tuple[int, object]]:
    """(round, name) of every name once a round, in an order that rotates."""
    names = list(names)
    for round_ in rounds if names else ():
        start = round_ % len(names)
        yield from ((round_, name) for name in names[start:] + names[:start])


def _calls_to_fill(step: Step, elapsed_ms: float, device: torch.device) -> int:
    at_once = getattr(step, "calls_at_once", 1)
    wanted = min(MAX_CALLS, max(1, math.ceil(MIN_SAMPLE_MS[device.type] / max(elapsed_ms, 1e-6))))
    return at_once * math.ceil(wanted / at_once)


def sample_ms(step: Step, device: torch.device, copies: int, calls: int, first: int = 0) -> float:
    """Time per call of ``calls`` consecutive calls, each on the next copy, from call number ``first`` on.

    ``calls`` is a multiple of what the step does at once.
    """
    numbers = range(first, first + calls, getattr(step, "calls_at_once", 1))
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        # Keeps the GPU busy while the host gets to the first timed call: else the sample begins with an idle GPU.
        step((first - 1) % copies)
        start.record()
        for call in numbers:
            step(call % copies)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls
    before = time.perf_counter()
    for call in numbers:
        step(call % copies)
    return (time.perf_counter() - before) * 1e3 / calls


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection inside a sample."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def in_words(failure: BaseException) -> str:
    """What was raised, on one line; a compiler's message would go on for pages."""
    return f"raised {type(failure).__name__}: {' '.join(str(failure).split())[:300]}".removesuffix(": ")
