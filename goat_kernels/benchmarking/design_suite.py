"""The design's bet: the adapter's share is written first and the base product accumulates onto it, in place.

Against it: the base product first, which the adapter then reads and writes again; both into tensors of their own,
which are then added; and one matmul of our own with the rank as more of its K. The ratios are to the base product
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from goat_kernels.backends import get_backend, why_not_auto
from goat_kernels.benchmarking.capture import Captured, Eager, step_of, worst_error
from goat_kernels.benchmarking.cases import Case
from goat_kernels.benchmarking.failures import in_words, too_far
from goat_kernels.benchmarking.machine import cache_bytes
from goat_kernels.benchmarking.passes import copy_problem, problem_bytes
from goat_kernels.benchmarking.settings import BenchSettings
from goat_kernels.benchmarking.timing import copies_for, time_interleaved
from goat_kernels.checks.problem import Problem, make_problem
from goat_kernels.numerics import TOLERANCES, relative_error
from goat_kernels.passes import Passes

_ALONE = "base product alone"
OURS = "adapter, then base product in place (ours)"
_READ_WRITE = "base product, then adapter reads and writes"
_ADD = "base product, adapter apart, then add"
EXTRA_K = "one Triton matmul, the rank as extra K"

Orders = dict[str, Callable[[], Tensor]]


def design_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Every order in both directions; on a GPU as CUDA graphs."""
    for form in case.forms:
        problem = make_problem(case.layer(settings.dtype, form), settings.device)
        copies = copies_for(problem_bytes(problem), 0 if settings.quick else cache_bytes(settings.device))
        problems = [problem, *(copy_problem(problem) for _ in range(copies - 1))]
        backend = "triton" if why_not_auto("triton", settings.device, settings.dtype) is None else "torch"
        common = {**case.row(), **settings.dtypes(), "residual": form, "backend": backend, "copies": copies}
        for direction, orders in (("forward", forward_orders), ("backward", backward_orders)):
            row = {**common, "mode": direction}
            if backend == "torch":
                yield {**row, "contender": EXTRA_K, "skipped": "a kernel of Triton's, which runs on a GPU"}
            elif form == "path":
                yield {**row, "contender": EXTRA_K, "skipped": "written for folded layers"}
            label = f"{case}, {form}, {direction}"
            try:
                calls = [orders(backend, p) for p in problems]
                exact = orders("torch", problem.double())
                expected = {name: exact[name]() for name in (_ALONE, OURS)}
                for of_order in _direction_rows(calls, expected, settings, label):
                    yield {**row, **of_order}
            except Exception as failure:
                yield {**row, "contender": "every order", "failed": in_words(failure)}


def _direction_rows(
    calls: list[Orders], expected: dict[str, Tensor], settings: BenchSettings, label: str
) -> Iterator[dict]:
    bound, steps, errors = TOLERANCES[settings.dtype].relative, {}, {}
    for name in calls[0]:
        exact = expected[_ALONE if name == _ALONE else OURS]
        step, error, failure = _checked([of[name] for of in calls], exact, settings, bound)
        if failure is not None:
            yield {"contender": name, "failed": failure}
            continue
        steps[name], errors[name] = step, error
    timings = time_interleaved(
        steps,
        device=settings.device,
        copies=len(calls),
        rounds=settings.rounds,
        ratios={"ratio": dict.fromkeys(steps, _ALONE)},
        label=label,
    )
    for name, timing in timings.items():
        error = {"relative_error": errors[name], "relative_error_bound": bound}
        yield {"contender": name, **timing.row(), "ratio_to": _ALONE, **error}


def _checked(
    calls: list[Callable[[], Tensor]], expected: Tensor, settings: BenchSettings, bound: float
) -> tuple[Captured | Eager | None, float, str | None]:
    """(what is timed, its error on the worst copy, None), or why it gets no time."""
    try:
        step = step_of(lambda copy: calls[copy], len(calls), graph=settings.device.type == "cuda")
        error = worst_error(step, lambda _, result: relative_error(result, expected))
    except Exception as failure:
        return None, float("nan"), in_words(failure)
    return (step, error, None) if error <= bound else (None, error, too_far(error, bound))


def forward_orders(backend: str, p: Problem) -> Orders:
    """Order -> a call that gives y."""
    passes: Passes = get_backend(backend)
    linear = torch.nn.functional.linear

    def in_place() -> Tensor:
        y, _, _ = passes.prefill(p.x_TN, p.adapter, p.bias_M, None)
        return torch.addmm(y, p.x_TN, p.weight_MN.t(), out=y)

    def read_modify_write() -> Tensor:
        return passes.prefill(p.x_TN, p.adapter, None, linear(p.x_TN, p.weight_MN, p.bias_M))[0]

    def add() -> Tensor:
        y = linear(p.x_TN, p.weight_MN, p.bias_M)
        return y.add_(passes.prefill(p.x_TN, p.adapter, None, None)[0])

    orders = {
        _ALONE: lambda: linear(p.x_TN, p.weight_MN, p.bias_M),
        OURS: in_place,
        _READ_WRITE: read_modify_write,
        _ADD: add,
    }
    if backend == "triton" and p.adapter.residual_A is None:
        from goat_kernels.benchmarking import extra_k

        orders[EXTRA_K] = lambda: extra_k.forward(passes, p)
    return orders


def backward_orders(backend: str, p: Problem) -> Orders:
    """Order -> a call that gives dX, from the gradients of the hidden columns."""
    passes: Passes = get_backend(backend)
    _, _, routing = passes.prefill(p.x_TN, p.adapter, p.bias_M, None)
    gradient = passes.hidden_gradient(p.grad_y_TM, p.grad_balance, p.adapter, routing, with_residual=True)

    def in_place() -> Tensor:
        grad_x = passes.input_prefill(p.adapter, routing, gradient)
        return torch.addmm(grad_x, p.grad_y_TM, p.weight_MN, out=grad_x)

    orders = {
        _ALONE: lambda: p.grad_y_TM @ p.weight_MN,
        OURS: in_place,
        _ADD: lambda: (p.grad_y_TM @ p.weight_MN).add_(passes.input_prefill(p.adapter, routing, gradient)),
    }
    if backend == "triton" and p.adapter.residual_A is None:
        from goat_kernels.benchmarking import extra_k

        orders[EXTRA_K] = lambda: extra_k.input_gradient(p, gradient.hidden_TR, gradient.logits_ET)
    return orders
