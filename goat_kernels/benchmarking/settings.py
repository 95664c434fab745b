"""What a run of the benchmarks is given."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from goat_kernels.benchmarking.cases import Case
from goat_kernels.benchmarking.machine import Roofline, measure_roofline
from goat_kernels.checks.problem import name_of


@dataclass
class BenchSettings:
    """Settings of one run.

    Attributes:
        device, dtype: where, and of x and the base weight; adapters are float32.
        rounds: timed rounds of each comparison.
        quick: tiny sizes, which say nothing about speed; for tests.
        shapes: in place of the suites' own; empty for these.
        without: kinds of contenders to leave out.
        profile: whether the host suite prints where its time goes.
    """

    device: torch.device
    dtype: torch.dtype
    rounds: int
    quick: bool = False
    shapes: tuple[Case, ...] = ()
    without: frozenset[str] = frozenset()
    profile: bool = False
    _measured: dict[str, Roofline] = field(default_factory=dict, repr=False)  # shared by copies of these settings

    @property
    def cases(self) -> str:
        """What a result says about its shapes: only "standard" ones enter the tables."""
        if self.quick:
            return "quick"
        return "custom" if self.shapes else "standard"

    @property
    def roofline(self) -> Roofline:
        """The machine's ceilings, measured when first asked for: a run asks before it times anything."""
        if "roofline" not in self._measured:
            self._measured["roofline"] = measure_roofline(self.device, self.dtype, quick=self.quick)
        return self._measured["roofline"]

    def dtypes(self) -> dict:
        return {"dtype": name_of(self.dtype), "adapter_dtype": "float32"}
