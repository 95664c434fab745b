"""Each pass alone: its time, its floor from the machine's ceilings, and what it asks memory for.

The floor counts each tensor once: what a pass must read and write, whoever implements it. What our Triton kernels ask
for, re-reads included, is beside it, from the plans that ``goat-kernels check --traffic`` proves. On a GPU a pass is a
CUDA graph, so that its launches' host time drops out.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from goat_kernels.backends import get_backend, why_not_auto
from goat_kernels.backends.base import Adapter, Passes
from goat_kernels.benchmarking.cases import Case
from goat_kernels.benchmarking.machine import cache_bytes
from goat_kernels.benchmarking.settings import BenchSettings
from goat_kernels.benchmarking.timing import Step, copies_for, step_of, time_interleaved
from goat_kernels.checks.correctness import Comparison, compare
from goat_kernels.checks.problem import LayerCase, Problem, make_problem, run_passes
from goat_kernels.kernels.configs import Target, current_target, forced_target
from goat_kernels.numerics import TOLERANCES, relative_error

#: A pass of the interface -> the lines of ``goat-kernels check`` that it has to pass before it is timed.
CHECKED_BY = {
    "prefill": ("prefill", "gate and balance loss"),
    "hidden_gradient": ("hidden gradient",),
    "lora_B_gradient": ("lora_B gradient",),
    "input_prefill": ("input gradient",),
    "lora_A_router_gradient": ("lora_A and router gradient",),
}

BASE_FORWARD, BASE_BACKWARD = "base product", "base product of dX"
_ONTO = ", onto what is there"


@dataclass(frozen=True)
class Work:
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
    rides = (M * R * a, 2 * T * M * R) if lora_B_rides else (0, 0)
    product = 2 * T * N * M
    base = (T * (N + M) + M * N) * b
    return {
        "prefill": Work(
            T * (N + M) * b + adapter_in + adapter_out + onto_bias + hidden + statistics,
            2 * T * ((R + E + R0) * N + (R + R0) * M),
        ),
        "hidden_gradient": Work(
            T * M * b + adapter_out + hidden + statistics + dh_bytes + rides[0], 2 * T * (R + R0) * M + rides[1]
        ),
        "lora_B_gradient": Work(T * M * b + hidden + M * R * a, 2 * T * M * R),
        "input_prefill": Work(T * N * b + dh_bytes + adapter_in, 2 * T * (R + E + R0) * N),
        "lora_A_router_gradient": Work(T * N * b + hidden + 4 * T * E + (R + E) * N * a, 2 * T * (R + E) * N),
        BASE_FORWARD: Work(base + M * b, product),
        BASE_FORWARD + _ONTO: Work(base + T * M * b, product),
        BASE_BACKWARD: Work(base, product),
        BASE_BACKWARD + _ONTO: Work(base + T * N * b, product),
    }


def copy_problem(problem: Problem) -> Problem:
    """The same values in other memory."""
    fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    adapter = Adapter(*(_cloned(value) for value in fields.pop("adapter")))
    return Problem(**{name: _cloned(value) for name, value in fields.items()}, adapter=adapter)


def _cloned(value):
    return value.clone() if isinstance(value, Tensor) else value


def problem_bytes(problem: Problem) -> int:
    """Of the smallest wide tensor that a pass reads."""
    wide = (problem.x_TN, problem.grad_y_TM)
    return min(tensor.numel() * tensor.element_size() for tensor in wide)


def pass_calls(passes: Passes, problem: Problem) -> dict[str, Callable[[], object]]:
    """Pass -> a call of it, handed what the passes before it gave. The conditions are those of ``run_passes``."""
    p, adapter = problem, problem.adapter

    def prefill():
        return passes.prefill(p.x_TN, adapter, p.bias_M, p.base_output_TM)

    _, _, routing = prefill()

    def hidden_gradient():
        return passes.hidden_gradient(p.grad_y_TM, p.grad_balance, adapter, routing, with_residual=True, needs_B=True)

    gradient = hidden_gradient()
    calls = {
        "prefill": prefill,
        "hidden_gradient": hidden_gradient,
        "lora_B_gradient": lambda: passes.lora_B_gradient(p.grad_y_TM, adapter, routing),
        "input_prefill": lambda: passes.input_prefill(adapter, routing, gradient),
        "lora_A_router_gradient": lambda: passes.lora_A_router_gradient(
            p.x_TN, adapter, routing, gradient, needs_A=True, needs_router=True
        ),
    }
    if gradient.lora_B is not None:
        del calls["lora_B_gradient"]
    return calls


def base_calls(problem: Problem) -> dict[str, Callable[[], object]]:
    """The frozen layer's two products, each into a new tensor and onto one that is there, in place."""
    x, weight, bias, grad_y = problem.x_TN, problem.weight_MN, problem.bias_M, problem.grad_y_TM
    y, grad_x = torch.randn_like(grad_y), torch.randn_like(x)
    return {
        BASE_FORWARD: lambda: torch.nn.functional.linear(x, weight, bias),
        BASE_FORWARD + _ONTO: lambda: torch.addmm(y, x, weight.t(), out=y),
        BASE_BACKWARD: lambda: grad_y @ weight,
        BASE_BACKWARD + _ONTO: lambda: torch.addmm(grad_x, grad_y, weight, out=grad_x),
    }


def requested_bytes(case: LayerCase, target: Target) -> dict[str, int]:
    """Pass -> bytes that the Triton kernels' programs load and store, re-reads included, by their plans.

    ``target``: the GPU whose tiles are taken; none has to be here.
    """
    from goat_kernels.backends.triton_backend.passes import TritonPasses
    from goat_kernels.checks.traffic_plans import planned
    from goat_kernels.kernels.launch import observed

    moved = Counter()

    def around(name: str):
        return observed(lambda launch: moved.update({name: sum(sum(both) for both in planned(launch).values())}))

    with forced_target(target):
        run_passes(TritonPasses(), make_problem(case, "meta"), around=around)
    return dict(moved)


def kernel_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Every pass of every backend in every form, and the base products, beside one another."""
    for form in case.forms:
        layer = case.layer(settings.dtype, form)
        common = {**case.row(), **settings.dtypes(), "residual": form}
        yield from ({**common, **row} for row in _form_rows(layer, settings, f"{case}, {form}"))


def _form_rows(layer: LayerCase, settings: BenchSettings, label: str) -> Iterator[dict]:
    device, cuda = settings.device, settings.device.type == "cuda"
    problem = make_problem(layer, device)
    copies = copies_for(problem_bytes(problem), 0 if settings.quick else cache_bytes(device))
    problems = [problem, *(copy_problem(problem) for _ in range(copies - 1))]
    names = ["torch"]
    reason = why_not_auto("triton", device, layer.dtype)
    if reason is None:
        names.insert(0, "triton")
    else:
        yield {"contender": "triton", "skipped": reason}
    comparisons = compare(layer, names[0], device)
    steps: dict[tuple[str, str], Step] = {}
    rides = dict.fromkeys(names, False)
    for name in names:
        calls = [pass_calls(get_backend(name), p) for p in problems]
        rides[name] = "lora_B_gradient" not in calls[0]
        for pass_name in calls[0]:
            failure = _failure(pass_name, name, names, comparisons)
            if failure is not None:
                yield {"contender": name, "pass": pass_name, "failed": failure}
                continue
            steps[name, pass_name] = step_of(lambda i, c=calls, n=pass_name: c[i][n], copies, graph=cuda)
    base = [base_calls(p) for p in problems]
    wrong = _wrong_base(base[0], problem)
    for pass_name in base[0]:
        if pass_name in wrong:
            yield {"contender": "base", "pass": pass_name, "failed": wrong[pass_name]}
            continue
        steps["base", pass_name] = step_of(lambda i, n=pass_name: base[i][n], copies, graph=cuda)
    timings = time_interleaved(steps, device=device, copies=copies, rounds=settings.rounds, label=label)
    requested = requested_bytes(layer, current_target(device)) if "triton" in names else {}
    for (name, pass_name), timing in timings.items():
        work = pass_work(layer, lora_B_rides=rides.get(name, False))[pass_name]
        row = {"contender": name, "pass": pass_name, "copies": copies, **timing.row()}
        row |= _against_floor(work, row["time_ms_p50"], settings)
        if name == "triton":
            row["requested_bytes"] = requested[pass_name]
        yield row


def _against_floor(work: Work, time_ms: float, settings: BenchSettings) -> dict:
    floor_ms = settings.roofline.floor_ms(work.moved_bytes, work.flops)
    return {
        "floor_bytes": work.moved_bytes,
        "flops": work.flops,
        "gb_per_s": work.moved_bytes / time_ms / 1e6,
        "tflops": work.flops / time_ms / 1e9,
        "floor_ms": floor_ms,
        "roofline_percent": 100 * floor_ms / time_ms,
        **settings.roofline.row(),
    }


def _failure(pass_name: str, backend: str, backends: list[str], comparisons: list[Comparison]) -> str | None:
    """None, or which line of the check the pass fails; the second backend's errors stand beside the first's."""
    for row in comparisons:
        if row.what in CHECKED_BY[pass_name]:
            error = row.error if backend == backends[0] else row.torch_error
            if not error <= row.bound:
                return f"{row.what} is {error:.1e} away from float64, allowed is {row.bound:.0e}; not timed"
    return None


def _wrong_base(calls: dict[str, Callable[[], Tensor]], problem: Problem) -> dict[str, str]:
    """Base product -> why it is wrong, on the values that its accumulator has at the time."""
    exact = problem.double()
    forward = exact.x_TN @ exact.weight_MN.t()
    backward = exact.grad_y_TM @ exact.weight_MN
    bound, wrong = TOLERANCES[problem.x_TN.dtype].relative, {}
    for name, call in calls.items():
        expected = forward if name.startswith(BASE_FORWARD) and not name.startswith(BASE_BACKWARD) else backward
        if name == BASE_FORWARD:
            expected = expected + exact.bias_M
        if name.endswith(_ONTO):
            before = call().clone()  # the accumulator after one call, and then after another
            result, expected = call(), expected + before.double()
        else:
            result = call()
        error = relative_error(result, expected)
        if not error <= bound:
            wrong[name] = f"{error:.1e} away from float64, allowed is {bound:.0e}; not timed"
    return wrong
