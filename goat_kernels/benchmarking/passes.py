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
from goat_kernels.benchmarking.capture import Captured, Eager, step_of, worst_error
from goat_kernels.benchmarking.cases import Case
from goat_kernels.benchmarking.failures import differs, in_words, too_far
from goat_kernels.benchmarking.machine import cache_bytes
from goat_kernels.benchmarking.settings import BenchSettings
from goat_kernels.benchmarking.timing import copies_for, time_interleaved
from goat_kernels.checks.correctness import compare
from goat_kernels.checks.problem import LayerCase, Problem, make_problem, run_passes
from goat_kernels.kernels.configs import Target, current_target, forced_target
from goat_kernels.numerics import TOLERANCES, relative_error
from goat_kernels.passes import Adapter, Passes, Routing

#: A pass of the interface -> the lines of ``goat-kernels check`` that it has to pass before it is timed.
CHECKED_BY = {
    "prefill": ("prefill", "gate and balance loss"),
    "hidden_gradient": ("hidden gradient",),
    "weight_gradients": ("lora_B gradient", "lora_A and router gradient"),
    "input_prefill": ("input gradient",),
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
    """Pass -> a call of it, handed what the passes before it gave."""
    p, adapter = problem, problem.adapter

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
    from goat_kernels.checks.traffic_plans import planned
    from goat_kernels.kernels.launch import observed
    from goat_kernels.kernels.passes import TritonPasses

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
    steps: dict[tuple[str, str], Captured | Eager] = {}
    rides = dict.fromkeys(names, False)
    errors, unchecked = _pass_errors(layer, names, device)
    for name in names:
        try:
            if name in unchecked:
                raise RuntimeError(unchecked[name])
            calls = [pass_calls(get_backend(name), p) for p in problems]
            rides[name] = calls[0]["hidden_gradient"]().partial_B is not None
        except Exception as failure:
            yield from ({"contender": name, "pass": one, "failed": in_words(failure)} for one in CHECKED_BY)
            continue
        for pass_name in calls[0]:
            failure = _failure(pass_name, errors[name])
            if failure is None:
                step, failure = _pass_step([c[pass_name] for c in calls], graph=cuda)
            if failure is not None:
                yield {"contender": name, "pass": pass_name, "failed": failure}
                continue
            steps[name, pass_name] = step
    base = [base_calls(p) for p in problems]
    expected = _expected_base(problem)
    for pass_name in base[0]:
        step, failure = base_step(pass_name, [of[pass_name] for of in base], expected[pass_name], graph=cuda)
        if failure is not None:
            yield {"contender": "base", "pass": pass_name, "failed": failure}
            continue
        steps["base", pass_name] = step
    del expected
    timings = time_interleaved(steps, device=device, copies=copies, rounds=settings.rounds, label=label)
    requested = requested_bytes(layer, current_target(device)) if "triton" in names else {}
    for (name, pass_name), timing in timings.items():
        work = pass_work(layer, lora_B_rides=rides.get(name, False))[pass_name]
        row = {"contender": name, "pass": pass_name, "copies": copies, **timing.row()}
        if "time_ms_p50" in row:
            row |= _against_floor(work, row["time_ms_p50"], settings)
        if name == "triton":
            row["requested_bytes"] = requested[pass_name]
        yield row


def _pass_step(calls: list[Callable[[], object]], *, graph: bool) -> tuple[Captured | Eager | None, str | None]:
    """(what is timed, None), or (None, why not): on every copy it has to give what a call of the pass gives.

    The passes have been compared with float64 on these values, but the graph's results have not.
    """
    try:
        expected = [t.clone() for t in tensors_of(calls[0]())]
        step = step_of(lambda copy: calls[copy], len(calls), graph=graph)
        error = worst_error(step, lambda _, results: difference(tensors_of(results), expected))
    except Exception as failure:  # what a driver refuses is a result, and others follow
        return None, in_words(failure)
    return (step, None) if error <= 1 else (None, differs(error))


def tensors_of(results: object) -> list[Tensor]:
    """The floating tensors that a pass gives, in its own order, but for the packed adapter."""
    if isinstance(results, Tensor):
        return [results] if results.is_floating_point() and results.numel() else []
    if isinstance(results, Routing):
        results = results._replace(packed=None)
    parts = results if isinstance(results, tuple | list) else vars(results).values() if results is not None else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def difference(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference, in units of what rounding to the tensor's dtype is allowed."""
    pairs = zip(results, expected, strict=True)
    errors = [relative_error(result, oracle) / TOLERANCES[oracle.dtype].relative for result, oracle in pairs]
    return max(errors, key=lambda error: float("inf") if error != error else error)


def base_step(
    name: str, calls: list[Callable[[], Tensor]], expected: Tensor, *, graph: bool
) -> tuple[Captured | Eager | None, str | None]:
    """The same of a base product: ``expected`` in float64 is what it gives, or adds to what is there."""
    bound = TOLERANCES[calls[0]().dtype].relative
    try:
        step = step_of(lambda copy: calls[copy], len(calls), graph=graph)
        if name.endswith(_ONTO):
            accumulators = [call() for call in calls]
            before = [accumulator.double() for accumulator in accumulators]
            for copy in range(0, len(calls), step.calls_at_once):
                step(copy)
            pairs = zip(accumulators, before, strict=True)
            error = max(relative_error(after, was + expected) for after, was in pairs)
        else:
            error = worst_error(step, lambda _, result: relative_error(result, expected))
    except Exception as failure:
        return None, in_words(failure)
    return (step, None) if error <= bound else (None, too_far(error, bound))


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


def _pass_errors(
    layer: LayerCase, backends: list[str], device: torch.device
) -> tuple[dict[str, list[tuple[str, float, float]]], dict[str, str]]:
    """(backend -> (line of the check, error, bound) of each, backend -> why the check itself did not run)."""
    errors, unchecked = {}, {}
    for backend in backends:
        if backend in errors:
            continue  # it stood beside the first one
        try:
            rows = compare(layer, backend, device)
        except Exception as failure:
            unchecked[backend] = in_words(failure)
            continue
        errors[backend] = [(row.what, row.error, row.bound) for row in rows]
        if backend != "torch":
            errors["torch"] = [(row.what, row.torch_error, row.bound) for row in rows]
    return errors, unchecked


def _failure(pass_name: str, errors: list[tuple[str, float, float]]) -> str | None:
    """None, or which line of the check the pass fails."""
    for what, error, bound in errors:
        if what in CHECKED_BY[pass_name] and not error <= bound:
            return f"{what} is {too_far(error, bound)}"
    return None


def _expected_base(problem: Problem) -> dict[str, Tensor]:
    """Base product -> in float64 what it gives, or adds."""
    exact = problem.double()
    forward, backward = exact.x_TN @ exact.weight_MN.t(), exact.grad_y_TM @ exact.weight_MN
    return {
        BASE_FORWARD: forward + exact.bias_M,
        BASE_FORWARD + _ONTO: forward,
        BASE_BACKWARD: backward,
        BASE_BACKWARD + _ONTO: backward,
    }
