"""The design's bet: the adapter's share is written first and the base product accumulates onto it, in place.

Against it: the base product first, which the adapter then reads and writes again; and both into tensors of their own,
which are then added. The ratios are to the base product alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from goat_kernels.backends import get_backend, why_not_auto
from goat_kernels.backends.base import Passes
from goat_kernels.benchmarking.cases import Case
from goat_kernels.benchmarking.machine import cache_bytes
from goat_kernels.benchmarking.passes import copy_problem, problem_bytes
from goat_kernels.benchmarking.settings import BenchSettings
from goat_kernels.benchmarking.timing import copies_for, step_of, time_interleaved
from goat_kernels.checks.problem import Problem, make_problem
from goat_kernels.numerics import TOLERANCES, relative_error

_ALONE = "base product alone"


def design_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Every order in both directions; on a GPU as CUDA graphs."""
    for form in case.forms:
        problem = make_problem(case.layer(settings.dtype, form), settings.device)
        copies = copies_for(problem_bytes(problem), 0 if settings.quick else cache_bytes(settings.device))
        problems = [problem, *(copy_problem(problem) for _ in range(copies - 1))]
        backend = "triton" if why_not_auto("triton", settings.device, settings.dtype) is None else "torch"
        common = {**case.row(), **settings.dtypes(), "residual": form, "backend": backend, "copies": copies}
        for direction, orders in (("forward", _forward_orders), ("backward", _backward_orders)):
            calls = [orders(get_backend(backend), p) for p in problems]
            expected = {name: call() for name, call in orders(get_backend("torch"), problem.double()).items()}
            label = f"{case}, {form}, {direction}"
            for row in _direction_rows(calls, expected, settings, label):
                yield {**common, "mode": direction, **row}


def _direction_rows(
    calls: list[dict[str, Callable[[], Tensor]]], expected: dict[str, Tensor], settings: BenchSettings, label: str
) -> Iterator[dict]:
    bound, copies, steps, errors = TOLERANCES[settings.dtype].relative, len(calls), {}, {}
    for name, call in calls[0].items():
        errors[name] = relative_error(call(), expected[name])
        if errors[name] <= bound:
            graph = settings.device.type == "cuda"
            steps[name] = step_of(lambda copy, name=name: calls[copy][name], copies, graph=graph)
        else:
            failure = f"{errors[name]:.1e} away from float64, allowed is {bound:.0e}; not timed"
            yield {"contender": name, "failed": failure}
    bases = dict.fromkeys(steps, _ALONE) if _ALONE in steps else {}
    timings = time_interleaved(
        steps, device=settings.device, copies=copies, rounds=settings.rounds, bases=bases, label=label
    )
    for name, timing in timings.items():
        error = {"relative_error": errors[name], "relative_error_bound": bound}
        yield {"contender": name, **timing.row(), "ratio_to": _ALONE, **error}


def _forward_orders(passes: Passes, p: Problem) -> dict[str, Callable[[], Tensor]]:
    linear = torch.nn.functional.linear

    def in_place() -> Tensor:
        y, _, _ = passes.prefill(p.x_TN, p.adapter, p.bias_M, None)
        return torch.addmm(y, p.x_TN, p.weight_MN.t(), out=y)

    def read_modify_write() -> Tensor:
        return passes.prefill(p.x_TN, p.adapter, None, linear(p.x_TN, p.weight_MN, p.bias_M))[0]

    def add() -> Tensor:
        y = linear(p.x_TN, p.weight_MN, p.bias_M)
        return y.add_(passes.prefill(p.x_TN, p.adapter, None, None)[0])

    return {
        _ALONE: lambda: linear(p.x_TN, p.weight_MN, p.bias_M),
        "adapter, then base product in place (ours)": in_place,
        "base product, then adapter reads and writes": read_modify_write,
        "base product, adapter apart, then add": add,
    }


def _backward_orders(passes: Passes, p: Problem) -> dict[str, Callable[[], Tensor]]:
    _, _, routing = passes.prefill(p.x_TN, p.adapter, p.bias_M, None)
    gradient = passes.hidden_gradient(p.grad_y_TM, p.grad_balance, p.adapter, routing, with_residual=True)

    def in_place() -> Tensor:
        grad_x = passes.input_prefill(p.adapter, routing, gradient)
        return torch.addmm(grad_x, p.grad_y_TM, p.weight_MN, out=grad_x)

    return {
        _ALONE: lambda: p.grad_y_TM @ p.weight_MN,
        "adapter, then base product in place (ours)": in_place,
        "base product, adapter apart, then add": lambda: (p.grad_y_TM @ p.weight_MN).add_(
            passes.input_prefill(p.adapter, routing, gradient)
        ),
    }
