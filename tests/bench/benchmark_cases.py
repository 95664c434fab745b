"""Sizes and settings at which the tests of the benchmarks run in no time."""

from __future__ import annotations

import torch

from bench.cases import BenchSettings, Case

CPU = torch.device("cpu")
SMALL = Case(48, 32, 40, 16)


def quick(device: torch.device = CPU, dtype: torch.dtype = torch.float32, **changes) -> BenchSettings:
    return BenchSettings(device, dtype, rounds=2, quick=True, **changes)
