"""Compile what a suite will launch on a GPU, on all processors at once: one after the other would take minutes.

``goat-kernels check`` does the same for its own layers, whose scaling is one number with "fold" and one per expert
with "path"; here layers have one number in either form, and both kernels are compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from goat_kernels.backends import why_not_auto
from goat_kernels.benchmarking.cases import Case
from goat_kernels.benchmarking.settings import BenchSettings
from goat_kernels.checks.ahead import compiling
from goat_kernels.checks.problem import Problem, make_problem, run_passes


def compile_ahead(cases: Iterable[Case], settings: BenchSettings) -> None:
    """Compile every launch of a forward and backward of ``cases``; what does not compile raises when it is launched.

    The passes run on tensors without values, and their launches are compiled in place of being made.
    """
    device = settings.device
    if device.type != "cuda" or why_not_auto("triton", device, settings.dtype) is not None:
        return
    from goat_kernels.kernels.passes import TritonPasses

    with compiling(device):
        for problem in _problems(cases, settings.dtype):
            run_passes(TritonPasses(), problem)


def _problems(cases: Iterable[Case], dtype: torch.dtype) -> Iterator[Problem]:
    for case in cases:
        for form in case.forms:
            problem = make_problem(case.layer(dtype, form), "meta")
            yield problem
            if problem.adapter.scaling_E is not None:
                adapter = problem.adapter._replace(scaling_E=None)
                yield Problem(**{**vars(problem), "adapter": adapter})
