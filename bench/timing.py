"""Interleaved timing: every contender once a round, so that whatever the machine does hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Timing:
    """Times of one contender over the rounds, and its ratio to the base contender of the same round.

    Attributes:
        time_ms: one per round.
        ratio: time / time of the base in the same round, one per round.
    """

    time_ms: tuple[float, ...]
    ratio: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.time_ms)

    @property
    def median_ratio(self) -> float:
        return statistics.median(self.ratio)

    def ratio_quantile(self, share: float) -> float:
        """The ``share`` quantile of the ratios, nearest rank."""
        ordered = sorted(self.ratio)
        return ordered[min(round(share * (len(ordered) - 1)), len(ordered) - 1)]


def time_interleaved(
    contenders: Mapping[str, Callable[[], None]], *, base: str, rounds: int, warmup: int = 3, label: str = ""
) -> dict[str, Timing]:
    """Time every contender once per round, in an order that rotates from round to round.

    Args:
        contenders: name -> a step without arguments.
        base: the contender that ratios refer to.
        rounds: how many rounds are timed; the median is taken over them.
        warmup: rounds before that are not.
        label: of the progress bar.
    """
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in tqdm(range(-warmup, rounds), desc=label, unit="round", leave=False):
        start = round_ % len(names)
        for name in names[start:] + names[:start]:
            before = time.perf_counter()
            contenders[name]()
            elapsed_ms = (time.perf_counter() - before) * 1e3
            if round_ >= 0:
                times[name].append(elapsed_ms)
    return {
        name: Timing(tuple(values), tuple(t / b for t, b in zip(values, times[base], strict=True)))
        for name, values in times.items()
    }


def machine_and_versions() -> str:
    """One line: processor, threads, and the versions that matter."""
    import peft
    import transformers

    return (
        f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"peft {peft.__version__}, transformers {transformers.__version__}"
    )


def processor_name() -> str:
    """The processor's name as the kernel gives it, with its family and model where the name alone says little."""
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        import platform

        return platform.processor() or platform.machine()
    wanted = {key.strip(): value.strip() for key, value in fields.items()}
    name = wanted.get("model name", "unknown processor")
    return f"{name} (family {wanted.get('cpu family', '?')}, model {wanted.get('model', '?')})"
