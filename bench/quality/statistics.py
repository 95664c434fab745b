"""Means, paired differences with confidence intervals, and Holm's correction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

#: Of every interval.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Of one contender's test runs: ``std`` is the sample's standard deviation, nan for a single run."""

    mean: float
    std: float
    count: int


@dataclass(frozen=True)
class Difference:
    """A mean paired difference, its ``CONFIDENCE`` interval, and the two-sided p-value of the paired t-test."""

    mean: float
    low: float
    high: float
    p: float
    count: int


def summary(values: Sequence[float]) -> Summary:
    """Mean and standard deviation; nan where a run diverged."""
    std = statistics.stdev(values) if len(values) > 1 else math.nan
    return Summary(statistics.fmean(values), std, len(values))


def paired_difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """one - other over the seeds that both have, by Student's t; the interval is nan for fewer than two.

    Args:
        one, other: seed -> score.
    """
    seeds = sorted(one.keys() & other.keys())
    differences = [one[seed] - other[seed] for seed in seeds]
    count = len(differences)
    mean = statistics.fmean(differences)
    if count < 2:
        return Difference(mean, math.nan, math.nan, math.nan, count)
    error = statistics.stdev(differences) / math.sqrt(count)
    half = student.ppf((1 + CONFIDENCE) / 2, count - 1) * error
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, count)
    return Difference(mean, mean - half, mean + half, 2 * student.sf(abs(mean) / error, count - 1), count)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: name -> p-value corrected for all of them."""
    ordered = sorted(p_values, key=p_values.__getitem__)
    corrected, so_far = {}, 0.0
    for place, name in enumerate(ordered):
        so_far = max(so_far, min(1.0, (len(ordered) - place) * p_values[name]))
        corrected[name] = so_far
    return {name: corrected[name] for name in p_values}
