"""What is timed and counted: the instrument, the contenders, their work and memory.

Nothing here asserts how long anything takes.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from benchmark_cases import CPU, SMALL, quick
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import layers, steps, timing
from bench.layers import (
    CONTENDERS,
    FROZEN,
    Contender,
    call_of,
    expected_results,
    folded,
    goat_layer,
    layer_error,
    layer_problem,
)
from bench.machine import floor_ms
from bench.memory import peak_bytes, saved_bytes
from bench.passes import BASE_BACKWARD, BASE_FORWARD, pass_work
from goat_kernels.checks.problem import LayerCase, Problem
from goat_kernels.forward_backward import Layer
from goat_kernels.linear import GoatLinear
from goat_kernels.numerics import TOLERANCES
from goat_kernels.operators import backward_operator, flattened, forward_operator
from goat_kernels.passes import Adapter

# --- timing -------------------------------------------------------------------------------------------------------


def test_every_contender_runs_once_a_round_in_an_order_that_rotates(monkeypatch):
    order = []
    monkeypatch.setattr(timing, "sample_ms", lambda step, *_: order.append(step) or 5.0)
    timing.time_interleaved({"a": "A", "b": "B", "c": "C"}, device=CPU, copies=1, rounds=3, warmup=0)
    assert order == [*"ABC", *"BCA", *"CAB"]


def test_a_ratio_is_taken_round_by_round(monkeypatch):
    # The machine is ten times slower in the second round: no ratio may mix the two.
    times = iter([1.0, 2.0, 30.0, 10.0])
    monkeypatch.setattr(timing, "sample_ms", lambda *_: next(times))
    timed = timing.time_interleaved({"base": None, "other": None}, device=CPU, copies=1, rounds=2, warmup=0)
    row = timing.timing_row("other", timed, {"ratio": "base", "lora_ratio": "absent"})
    assert "lora_ratio_p50" not in row
    assert (row["ratio_p50"], row["time_ms_p50"], row["rounds"]) == (2.5, 16.0, 2)
    assert row["ratio_p20"] < row["ratio_p50"] < row["ratio_p80"]


def test_a_sample_rotates_through_the_copies():
    seen = []
    timing.sample_ms(seen.append, CPU, copies=3, calls=7, first=1)
    assert seen == [1, 2, 0, 1, 2, 0, 1]


def test_samples_of_one_call_rotate_through_the_copies_from_round_to_round(monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "MIN_SAMPLE_MS", {"cpu": 0})
    timing.time_interleaved({"a": seen.append}, device=CPU, copies=3, rounds=4, warmup=1)
    assert seen == [0, 1, 2, *(1, 2, 0, 1)]


def test_short_steps_are_called_often_enough_to_fill_a_sample(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "sample_ms", lambda step, device, copies, count, first: calls.append(count) or 0.01)
    timed = timing.time_interleaved({"a": None}, device=CPU, copies=2, rounds=1, warmup=1)
    assert calls == [2, 100] and timed["a"].calls == 100


def test_a_contender_that_raises_is_out_and_the_others_go_on():
    calls = []

    def raising(copy: int) -> None:
        calls.append(copy)
        if len(calls) > 3:
            raise RuntimeError("out\nof luck")

    timed = timing.time_interleaved({"raising": raising, "base": int, "fine": int}, device=CPU, copies=1, rounds=9)
    assert timing.timing_row("raising", timed, {}) == {"failed": "raised RuntimeError: out of luck"}
    assert len(timed["fine"].time_ms) == 9 and timing.timing_row("fine", timed, {"ratio": "fine"})["ratio_p80"] == 1
    assert "ratio_p50" not in timing.timing_row("base", timed, {"ratio": "raising"})  # which has no times


@pytest.mark.parametrize(("input_bytes", "copies"), [(100, 1), (50, 2), (33, 4), (0, timing.MAX_COPIES)])
def test_copies_together_are_larger_than_the_cache(input_bytes, copies):
    assert timing.copies_for(input_bytes, cache_bytes=50) == copies


# --- contenders ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def tensors(request) -> Problem:
    torch.manual_seed(0)
    return layer_problem(SMALL, request.param, CPU)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_every_contender_that_runs_here_computes_what_it_says(tensors, contender):
    dtype = tensors.x_TN.dtype
    if contender.kind == "compiled" or contender.skipped_reason(CPU, dtype) is not None:
        pytest.skip("not on a CPU, or compiled")
    error = layer_error(contender.make(tensors), tensors, expected_results(contender.computes, tensors))
    assert error <= TOLERANCES[dtype].relative


def test_fold_and_path_are_one_function(tensors):
    exact = {form: expected_results(form, tensors) for form in ("fold", "path")}
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(exact["fold"], exact["path"], strict=True))
    assert error <= TOLERANCES[tensors.x_TN.dtype].relative


def test_goat_layers_are_built_without_a_decomposition_and_take_the_form_asked_for(tensors):
    fold, path = (goat_layer(tensors, form, "torch") for form in ("fold", "path"))
    assert fold.residual_A is None and torch.equal(fold.weight, folded(tensors).weight_MN)
    assert torch.equal(path.residual_B, tensors.adapter.residual_B) and path.weight is not tensors.weight_MN
    assert path.weight.data_ptr() == tensors.weight_MN.data_ptr()  # shared by all contenders
    assert isinstance(fold, GoatLinear) and not fold.weight.requires_grad and fold.lora_A.requires_grad


class _Wrong(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.01


class _Nan(nn.Linear):
    def forward(self, x):
        return super().forward(x) * float("nan")


def _of(kind: type[nn.Linear], name: str) -> Contender:
    def make(t: Problem) -> nn.Module:
        M, N = t.weight_MN.shape
        layer = kind(N, M).requires_grad_(False)
        layer.load_state_dict({"weight": t.weight_MN, "bias": t.bias_M})
        return layer

    return Contender(name, "torch", "frozen", make)


def _raise(t: Problem) -> nn.Module:
    raise RuntimeError("out of luck")


def test_a_wrong_contender_gets_no_time_and_the_others_do(monkeypatch):
    raising = Contender("raising", "torch", "frozen", _raise)
    contenders = (CONTENDERS[0], _of(_Wrong, "wrong"), _of(_Nan, "nan"), raising, _of(nn.Linear, "right"))
    monkeypatch.setattr(layers, "CONTENDERS", contenders)
    rows = list(layers.layer_rows(SMALL, quick()))
    timed = {row["contender"] for row in rows if "time_ms_p50" in row}
    failed = {row["contender"]: row["failed"] for row in rows if "failed" in row}
    assert timed == {FROZEN, "right"}
    assert failed["wrong"].endswith("not timed") and "nan" in failed["nan"] and "out of luck" in failed["raising"]
    assert {row["mode"] for row in rows if "mode" in row} == {"forward", "backward", "both"}


def test_with_dropout_a_contender_that_is_wrong_without_it_gets_no_time(monkeypatch):
    monkeypatch.setattr(layers, "CONTENDERS", (CONTENDERS[0], _of(_Wrong, "wrong"), _of(nn.Linear, "right")))
    case = dataclasses.replace(SMALL, modes=("both",), dropout_p=0.25)
    rows = {row["contender"]: row for row in layers.layer_rows(case, quick())}
    assert {name for name, row in rows.items() if "time_ms_p50" in row} == {FROZEN, "right"}
    assert rows["wrong"]["failed"].endswith("not timed")
    assert {row["checked"] for row in rows.values()} == {"without dropout"}


def test_modes_do_what_they_say(tensors):
    layer = goat_layer(tensors, "fold", "torch")
    arguments = (layer, tensors.x_TN, tensors.grad_y_TM)
    assert not call_of("inference", *arguments)().requires_grad
    assert call_of("forward", *arguments)().requires_grad
    backward = call_of("backward", *arguments)
    once, twice, both = backward(), backward(), call_of("both", *arguments)()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(once, twice, both, strict=True))
    assert [tuple(g.shape) for g in both] == [(48, 32), (16, 32), (40, 16), (8, 32)]


def test_what_is_checked_is_the_step_that_is_timed_on_every_copy():
    eager = steps.step_of(lambda copy: lambda: torch.full((2,), float(copy)), 3, graph=False)
    assert steps.worst_error(eager, lambda copy, result: float(result[0])) == 2.0
    assert math.isnan(steps.worst_error(eager, lambda copy, result: math.nan if copy == 1 else 0.0))


def test_a_step_of_a_layer_has_a_leaf_of_its_own(tensors):
    (grad_x, *_) = call_of("both", goat_layer(tensors, "fold", "torch"), tensors.x_TN, tensors.grad_y_TM)()
    assert grad_x.shape == tensors.x_TN.shape and tensors.x_TN.grad_fn is None and tensors.x_TN.grad is None
    seen = []
    layer = nn.Linear(32, 40)
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    call_of("both", layer, tensors.x_TN.float(), tensors.grad_y_TM.float())()
    assert seen[0] is not tensors.x_TN and seen[0].is_leaf and seen[0].requires_grad


# --- work and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [False, True], ids=["fold", "path"])
def test_the_operations_of_the_passes_add_up_to_those_of_the_operators(path):
    T, N, M, R, E = 64, 48, 80, 16, 8
    work = pass_work(LayerCase(T, N, M, R, dtype=torch.float32, path=path), lora_B_rides=False)
    matrices = [torch.randn(size) for size in ((R, N), (M, R), (E, N))]
    residual = [torch.randn(R, N), torch.randn(M, R)] if path else [None, None]
    x, weight, grad_y = torch.randn(T, N), torch.randn(M, N), torch.randn(T, M)
    layer = Layer(weight, None, torch.randn(M), Adapter(*matrices, *residual, 1.0, None, 2, 0.0, None))
    with FlopCounterMode(display=False) as forward:
        _, _, *routing = forward_operator(x, *flattened(layer), "torch")
    with FlopCounterMode(display=False) as backward:
        needs = [True, False, False, True, True, True]
        backward_operator(grad_y, None, x, routing, *flattened(layer._replace(bias=None)), needs, "torch")
    assert forward.get_total_flops() == work["prefill"].flops + work[BASE_FORWARD].flops
    of_backward = ("hidden_gradient", "weight_gradients", "input_prefill", BASE_BACKWARD)
    assert backward.get_total_flops() == sum(work[name].flops for name in of_backward)


def test_a_riding_gradient_is_counted_with_the_pass_that_it_rides_in():
    case = LayerCase(8192, 4096, 4096, 8)
    alone, riding = (pass_work(case, lora_B_rides=rides) for rides in (False, True))
    extra = riding["hidden_gradient"].flops - alone["hidden_gradient"].flops
    assert extra == 2 * case.T * case.M * case.R == alone["weight_gradients"].flops - riding["weight_gradients"].flops
    read_again = 2 * case.T * (case.M + case.R)  # dY and h~
    assert alone["weight_gradients"].moved_bytes - riding["weight_gradients"].moved_bytes == read_again
    assert alone["hidden_gradient"].moved_bytes == riding["hidden_gradient"].moved_bytes
    assert riding[BASE_BACKWARD] == alone[BASE_BACKWARD]


def test_the_floor_is_the_larger_of_the_two():
    machine = {"machine_read_gb_per_s": 0.5, "machine_copy_gb_per_s": 1.0, "machine_tflops": 1.0}
    assert floor_ms(machine, 10**9, 10**9) == pytest.approx(1000)
    assert floor_ms(machine, 10**6, 10**12) == pytest.approx(1000)


@pytest.mark.parametrize("form", ["fold", "path"])
def test_a_goat_layer_saves_what_the_design_says_and_nothing_else(form):
    t = layer_problem(SMALL, torch.float32, CPU)
    layer = goat_layer(t, form, "torch")
    saved = saved_bytes(lambda: layer(t.x_TN), [*layer.parameters(), *layer.buffers(), t.x_TN])
    assert saved == 4 * (SMALL.T * (SMALL.R + 2 * SMALL.E) + SMALL.E)  # h~, gate, probs; the load


def test_saved_bytes_counts_a_storage_once():
    a, b = torch.randn(10, requires_grad=True), torch.randn(10, requires_grad=True)
    exp = saved_bytes(lambda: a.exp().sin() * b, [a, b])
    assert exp == 2 * 40  # exp(a), which is the sine's argument too; sin(exp(a))


def test_peak_bytes_counts_what_lives_at_one_time():
    def run():
        first = torch.empty(1000)
        second = first.exp()
        del first
        return second.exp()

    assert peak_bytes(run, CPU) == 2 * 4000
