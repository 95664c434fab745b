"""Each pass alone: its time, and its floor from the machine's ceilings.

The floor counts each tensor once: what a pass must read and write, whoever implements it. On a GPU a pass is a CUDA
graph, so that its launches' host time drops out. Beside the passes stand the frozen layer's own products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.cases import BenchSettings, Case, copies_of
from bench.machine import ceilings, floor_ms
from bench.steps import Candidate, measured, worst
from goat_kernels.backends import get_backend, why_not_auto
from goat_kernels.checks.correctness import gradient_parts
from goat_kernels.checks.problem import LayerCase, Problem, make_problem, run_passes
from goat_kernels.numerics import TOLERANCES, relative_error
from goat_kernels.passes import Routing

PASSES = ("prefill", "hidden_gradient", "weight_gradients", "input_prefill")
BASE_FORWARD, BASE_BACKWARD = "base product", "base product of dX"
_ONTO = ", onto what is there"


class Work(NamedTuple):
    """The least that a pass has to move, each tensor once, and its operations."""

    moved_bytes: int
    flops: int


def pass_work(case: LayerCase, *, lora_B_rides: bool) -> dict[str, Work]:
    """Of each pass and of the base products; ``lora_B_rides``: its gradient comes with the hidden gradient."""
    T, N, M, R, E = case.T, case.N, case.M, case.R, case.E
    R0 = R if case.path else 0
    b, a = case.dtype.itemsize, case.adapter_dtype.itemsize
    hidden, statistics = T * R * b, 2 * 4 * T * E  # h~ or dh; gate and probs in float32
    adapter_in, adapter_out = (R + E + R0) * N * a, (R + R0) * M * a
    dh_bytes = T * (R + R0) * b + 4 * T * E
    onto_bias = 0 if case.onto_base else M * b
    of_B = 2 * T * M * R  # operations; and another read of dY and of h~, unless it rides
    first, second, again = (of_B, 0, 0) if lora_B_rides else (0, of_B, T * M * b + hidden)
    product = 2 * T * N * M
    base = (T * (N + M) + M * N) * b
    return {
        "prefill": Work(
            T * (N + M) * b + adapter_in + adapter_out + onto_bias + hidden + statistics,
            2 * T * ((R + E + R0) * N + (R + R0) * M),
        ),
        "hidden_gradient": Work(T * M * b + adapter_out + hidden + statistics + dh_bytes, 2 * T * (R + R0) * M + first),
        "weight_gradients": Work(
            again + T * N * b + hidden + 4 * T * E + ((R + E) * N + M * R) * a,
            second + 2 * T * (R + E) * N,
        ),
        "input_prefill": Work(T * N * b + dh_bytes + adapter_in, 2 * T * (R + E + R0) * N),
        BASE_FORWARD: Work(base + M * b, product),
        BASE_FORWARD + _ONTO: Work(base + T * M * b, product),
        BASE_BACKWARD: Work(base, product),
        BASE_BACKWARD + _ONTO: Work(base + T * N * b, product),
    }


def pass_calls(backend: str, p: Problem) -> dict[str, Callable[[], object]]:
    """Pass -> a call of it, handed what the passes before it gave."""
    passes, adapter = get_backend(backend), p.adapter

    def prefill():
        return passes.prefill(p.x_TN, adapter, p.bias_M, p.base_output_TM)

    _, _, routing = prefill()

    def hidden_gradient():
        return passes.hidden_gradient(p.grad_y_TM, p.grad_balance, adapter, routing, with_residual=True, needs_B=True)

    gradient = hidden_gradient()
    return {
        "prefill": prefill,
        "hidden_gradient": hidden_gradient,
        "weight_gradients": lambda: passes.weight_gradients(
            p.x_TN, p.grad_y_TM, adapter, routing, gradient, needs_A=True, needs_B=True, needs_router=True
        ),
        "input_prefill": lambda: passes.input_prefill(adapter, routing, gradient),
    }


def base_calls(problem: Problem) -> dict[str, Callable[[], object]]:
    """The frozen layer's two products, each into a new tensor and onto one that is there, in place."""
    x, weight, bias, grad_y = problem.x_TN, problem.weight_MN, problem.bias_M, problem.grad_y_TM
    y, grad_x = torch.zeros_like(grad_y), torch.zeros_like(x)
    return {
        BASE_FORWARD: lambda: torch.nn.functional.linear(x, weight, bias),
        BASE_FORWARD + _ONTO: lambda: torch.addmm(y, x, weight.t(), out=y),
        BASE_BACKWARD: lambda: grad_y @ weight,
        BASE_BACKWARD + _ONTO: lambda: torch.addmm(grad_x, grad_y, weight, out=grad_x),
    }


# --- the check ------------------------------------------------------------------------------------------------------


def expected_of(problem: Problem) -> dict[str, list[Tensor]]:
    """Pass -> its results in float64."""
    exact = problem.double()
    return {name: parts_of(of_pass, exact) for name, of_pass in run_passes(get_backend("torch"), exact).items()}


def parts_of(results: object, problem: Problem) -> list[Tensor]:
    """What a pass gives, in one order for every backend."""
    if isinstance(results, Tensor):
        return [results]
    if hasattr(results, "partial_B"):
        return gradient_parts(results, problem)
    if isinstance(results[2], Routing):
        y, balance, routing = results
        return [y, balance, routing.weighted_TR, routing.gate_ET, routing.probs_ET, routing.load_E]
    return list(results)


def results_error(results: object, expected: list[Tensor], problem: Problem) -> float:
    """The largest relative error of what a pass gives; the router's counts as in float32."""
    is_prefill = isinstance(results, tuple) and len(results) == 3 and isinstance(results[2], Routing)
    of_router = (1, 3, 4, 5) if is_prefill else ()  # in parts_of: balance loss, gate, probs, load
    stricter = max(1.0, TOLERANCES[problem.x_TN.dtype].relative / TOLERANCES[torch.float32].relative)
    pairs = zip(parts_of(results, problem), expected, strict=True)
    return worst(relative_error(*pair) * (stricter if i in of_router else 1.0) for i, pair in enumerate(pairs))


# --- the suite ------------------------------------------------------------------------------------------------------


def kernel_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Every pass of every backend in every form, and the base products, beside one another."""
    machine = ceilings(settings.device, settings.dtype, quick=settings.quick)
    no_triton = why_not_auto("triton", settings.device, settings.dtype)
    backends = ["torch"] if no_triton else ["triton", "torch"]
    if no_triton:
        yield {"contender": "triton", "skipped": no_triton}
    for form in case.forms:
        layer = case.layer(settings.dtype, form)
        problem = make_problem(layer, settings.device)
        problems = copies_of(problem, min(problem.x_TN.nbytes, problem.grad_y_TM.nbytes), settings)
        calls = [
            {(name, one): call for name in backends for one, call in pass_calls(name, p).items()} for p in problems
        ]
        for of_copy, p in zip(calls, problems, strict=True):
            of_copy |= {("base", one): call for one, call in base_calls(p).items()}
        rides = {name: calls[0][name, "hidden_gradient"]().partial_B is not None for name in backends}
        expected = expected_of(problem)
        candidates = [_candidate(key, calls, expected.get(key[1]), problem) for key in calls[0]]
        for row in measured(candidates, len(problems), settings):
            row |= {"residual": form, "copies": len(problems)}
            if "time_ms_p50" in row:
                work = pass_work(layer, lora_B_rides=rides.get(row["contender"], False))[row["pass"]]
                floor, time_ms = floor_ms(machine, *work), row["time_ms_p50"]
                row |= {"floor_bytes": work.moved_bytes, "flops": work.flops, "floor_ms": floor, **machine}
                row |= {"gb_per_s": work.moved_bytes / time_ms / 1e6, "tflops": work.flops / time_ms / 1e9}
                row["roofline_percent"] = 100 * floor / time_ms
            yield row


def _candidate(key: tuple[str, str], calls: list[dict], expected: list[Tensor] | None, problem: Problem) -> Candidate:
    """``expected`` None: PyTorch's own product, which needs no check."""
    return Candidate(
        dict(zip(("contender", "pass"), key, strict=True)),
        lambda copy: calls[copy][key],
        None if expected is None else lambda _, results: results_error(results, expected, problem),
        graph=problem.x_TN.is_cuda,
    )
