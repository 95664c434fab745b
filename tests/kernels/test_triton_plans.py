"""Plans: a repeated call of the Triton backend replays what it launched, on the new addresses and values, bit for bit.

And it does not where anything that a pass looks at has changed, where a pass did more than allocate, view and launch,
or where somebody watches. On a machine without a GPU the replay goes through Triton's interpreter; that compiled
kernels get the right addresses is shown with a driver that launches nothing (``planned_addresses.py``).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from goat_problems import Outcome, Problem, assert_outcomes_identical, evaluate, make_problem
from triton_cases import FOUR_PROCESSORS, MANY_PROCESSORS, ONE_PROCESSOR, goat_on, matmul_precision, onto_base_output

from goat_kernels import forward_backward as operators
from goat_kernels.checks import correctness as check_module
from goat_kernels.checks.problem import LayerCase
from goat_kernels.kernels import passes as passes_module
from goat_kernels.kernels import replay as plans_module
from goat_kernels.kernels.configs import forced_target
from goat_kernels.kernels.launch import observed
from goat_kernels.kernels.passes import TritonPasses
from goat_kernels.kernels.replay import Place, Plan, laid_out, rebuilder

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class WithoutPlans(TritonPasses):
    def call(self, function, *arguments, **options):
        return function(self, *arguments, **options)


@pytest.fixture
def passes(monkeypatch) -> TritonPasses:
    """The passes that calls in this test take, with no plan yet."""
    fresh = TritonPasses()
    monkeypatch.setattr(operators, "get_backend", lambda name: fresh)
    return fresh


def without_plans(monkeypatch, call, *arguments, **options) -> Outcome:
    with monkeypatch.context() as patch:
        patch.setattr(operators, "get_backend", lambda name: WithoutPlans())
        return call(*arguments, **options)


def plans_of(passes: TritonPasses) -> list[Plan]:
    return [plan for plan in passes.plans._plans.values() if type(plan) is Plan]


def moved_in_memory(problem: Problem) -> Problem:
    """The same values, each tensor behind a gap of its own: other addresses, the same alignment."""

    def move(tensor):
        padded = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
        return padded[64:].as_strided(tensor.shape, tensor.contiguous().stride()).copy_(tensor)

    return problem.map(move)


DROPOUT = {"dropout_p": 0.3, "training": True}

CASES = {
    "few": ({"T": 30, "R0": 8}, ONE_PROCESSOR, {}),
    "fused": ({"T": 70, "R0": 8, "dtype": BF16}, ONE_PROCESSOR, {}),
    "fused-splits": ({"T": 260, "N": 16, "M": 16, "R": 8, "R0": 8}, FOUR_PROCESSORS, {}),
    "staged": ({"T": 70, "R0": 8, "per_expert": True}, MANY_PROCESSORS, {}),
    "plain": ({"T": 70, "bias": False, "dtype": BF16, "adapter_dtype": BF16}, ONE_PROCESSOR, {}),
    "fused-dropout": ({"T": 40, "R0": 8, "dtype": BF16}, ONE_PROCESSOR, DROPOUT),
    "staged-dropout": ({"T": 40, "K": 3}, ONE_PROCESSOR, DROPOUT),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_replay_gives_what_the_passes_give(case, passes, device, monkeypatch):
    shape, target, options = CASES[case]
    shape = {"dtype": F32, "adapter_dtype": F32, **shape}
    with forced_target(target):
        for seed in range(4):
            arguments = (goat_on(device), moved_in_memory(make_problem(**shape, seed=seed)))
            torch.manual_seed(seed)  # of the dropout
            fresh = without_plans(monkeypatch, evaluate, *arguments, **options)
            torch.manual_seed(seed)
            assert_outcomes_identical(evaluate(*arguments, **options), fresh)
    assert len(plans_of(passes)) == 2 and not passes.plans.refusals()


@pytest.mark.long
@pytest.mark.parametrize("needs", [("x",), ("lora_A",), ("lora_B", "bias"), ("router",), ("x", "weight"), ()], ids=str)
def test_a_replay_computes_what_is_needed(needs, passes, device, monkeypatch):
    for seed in range(3):
        arguments = (goat_on(device), make_problem(T=20, R0=4, dtype=F32, seed=seed))
        fresh = without_plans(monkeypatch, evaluate, *arguments, needs=needs)
        assert_outcomes_identical(evaluate(*arguments, needs=needs), fresh)
    assert plans_of(passes)


@pytest.mark.long
def test_a_replay_adds_onto_the_output_of_a_base_that_ran_elsewhere(passes, device, monkeypatch):
    for seed in range(4):
        arguments = (onto_base_output(device), make_problem(T=70, R0=4, dtype=F32, seed=seed))
        fresh = without_plans(monkeypatch, evaluate, *arguments)
        assert_outcomes_identical(evaluate(*arguments), fresh)
    assert len(plans_of(passes)) == 2


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, not at a multiple of 16 bytes."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return storage[1:].view(tensor.shape).copy_(tensor)


CHANGES = {
    "T": lambda p: replace(p, x=p.x[:-1].contiguous()),
    "strides of x": lambda p: replace(p, x=p.x.repeat(1, 2)[:, : p.x.shape[1]]),
    "alignment of x": lambda p: replace(p, x=shifted(p.x)),
    "alignment of lora_B": lambda p: replace(p, lora_B=shifted(p.lora_B)),
    "dtype of the adapter": lambda p: replace(p, lora_A=p.lora_A.half()),
    "top_k": lambda p: replace(p, top_k=3),
    "scaling": lambda p: replace(p, scaling=0.3),
    "scaling per expert": lambda p: replace(p, scaling=torch.full((4,), 1.7)),
    "residual": lambda p: replace(p, residual=None),
    "bias": lambda p: replace(p, bias=None),
}


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_pass_looks_at_has_a_plan_of_its_own(change, passes, device, monkeypatch):
    problem = make_problem(T=70, R0=4, dtype=F32)
    for _ in range(3):
        evaluate(goat_on(device), problem, needs=())
    (known,) = plans_of(passes)
    monkeypatch.setattr(Plan, "replay", lambda *_: pytest.fail("the plan of another call was replayed"))
    changed = CHANGES[change](problem)
    with torch.no_grad():
        found = _on(device, changed)
    with monkeypatch.context() as patch:
        patch.setattr(operators, "get_backend", lambda name: WithoutPlans())
        with torch.no_grad():
            expected = _on(device, changed)
    assert torch.equal(found, expected)
    assert plans_of(passes) == [known]


def _on(device, problem: Problem) -> torch.Tensor:
    """The output alone, from tensors exactly as they lie in memory."""
    from goat_kernels import goat_linear

    tensors = (problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.router)
    options = {"bias": problem.bias, "scaling": problem.scaling, "residual": problem.residual}
    if device.type == "cuda":
        pytest.skip("moving to the GPU aligns them")
    return goat_linear(*tensors, **options, top_k=problem.top_k, backend="triton").output


@pytest.mark.parametrize("other", [forced_target(FOUR_PROCESSORS), matmul_precision("tf32")], ids=["GPU", "precision"])
def test_another_gpu_or_precision_has_a_plan_of_its_own(other, passes, device):
    problem = make_problem(T=70, dtype=F32)
    for _ in range(2):
        evaluate(goat_on(device), problem, needs=())
    with other:
        evaluate(goat_on(device), problem, needs=())
    assert len(passes.plans._plans) == 2


def test_a_pass_that_copies_has_no_plan(passes, device, monkeypatch):
    def transposed_A(*tensors, **options):
        x, weight, lora_A, *rest = tensors
        return goat_on(device)(x, weight, lora_A.t().contiguous().t(), *rest, **options)

    problem = make_problem(T=70, dtype=F32)
    fresh = without_plans(monkeypatch, evaluate, goat_on(device), problem)
    for _ in range(4):
        assert_outcomes_identical(evaluate(transposed_A, problem), fresh)
    assert len(passes.plans.refusals()) == 2 and not plans_of(passes)
    assert all("it calls aten.clone" in refusal for refusal in passes.plans.refusals())


def test_two_arguments_at_one_address_have_no_plan(passes, device, monkeypatch):
    def shared(*tensors, **options):
        x, weight, lora_A, lora_B, router = tensors
        return goat_on(device)(x, weight, lora_A, lora_B, lora_A[: router.shape[0]], **options)

    problem = make_problem(T=70, N=16, dtype=F32)
    if device.type == "cuda":
        pytest.skip("moving to the GPU parts them")
    fresh = without_plans(monkeypatch, evaluate, shared, problem, needs=("x",))
    for _ in range(4):
        assert_outcomes_identical(evaluate(shared, problem, needs=("x",)), fresh)
    assert any("same address" in refusal for refusal in passes.plans.refusals())


def test_observers_see_every_launch(passes, device):
    problem = make_problem(T=70, dtype=F32)
    for _ in range(3):
        evaluate(goat_on(device), problem)
    seen = []

    def observer(launch):
        seen.append(launch.name)
        launch.run()

    with observed(observer):
        evaluate(goat_on(device), problem)
    assert {"fused_forward", "project"} & set(seen) and "weight_gradient" in seen


@pytest.mark.long
@pytest.mark.parametrize("value", ["0", "1", ""])
def test_the_switch_decides_whether_the_code_of_the_passes_runs_at_every_call(value, device, monkeypatch):
    monkeypatch.setenv("GOAT_KERNELS_REPLAY", value)
    passes, ran = TritonPasses(), []
    monkeypatch.setattr(operators, "get_backend", lambda name: passes)
    for name in ("prefill", "hidden_gradient", "weight_gradients", "input_prefill"):
        pass_ = getattr(passes_module, name)

        def noted(*arguments, pass_=pass_, name=name, **needs):
            ran.append(name)
            return pass_(*arguments, **needs)

        monkeypatch.setattr(passes_module, name, noted)
    problem = make_problem(T=70, R0=4, dtype=F32)
    outcomes = [evaluate(goat_on(device), problem) for _ in range(5)]
    for outcome in outcomes[1:]:
        assert_outcomes_identical(outcome, outcomes[0])
    is_off = value == "0"
    assert len(ran) == 4 * (5 if is_off else 2)
    assert (passes.plans.is_on, passes.plans.calls, passes.plans.replayed) == (not is_off, 10, 0 if is_off else 6)


@pytest.mark.parametrize("value", ["off", "2", "false"])
def test_an_unknown_value_of_the_switch_is_named(value, monkeypatch):
    monkeypatch.setenv("GOAT_KERNELS_REPLAY", value)
    with pytest.raises(ValueError, match=f"GOAT_KERNELS_REPLAY='{value}' is unknown; it must be 0"):
        TritonPasses()


@pytest.mark.parametrize("is_on", [True, False], ids=["on", "off"])
def test_the_check_counts_replayed_calls_and_names_what_is_wrong(is_on, device, monkeypatch):
    monkeypatch.setenv("GOAT_KERNELS_REPLAY", str(int(is_on)))
    passes = TritonPasses()
    for module in (operators, check_module):
        monkeypatch.setattr(module, "get_backend", lambda name: passes)
    case = LayerCase(T=20, N=24, M=20, R=8, E=4, dtype=F32, target=ONE_PROCESSOR)
    told, fault = check_module.check_replay(case, device)
    assert f"{2 if is_on else 0} of 6 calls replayed, with the bits of the first" in told and fault is None
    assert told.startswith("on (GOAT_KERNELS_REPLAY=0 turns it off)" if is_on else "off (GOAT_KERNELS_REPLAY=0)")
    assert check_module.check_replay(case, device) == (told, None) and passes.plans.calls == 0
    with observed(lambda launch: launch.run()):
        told, fault = check_module.check_replay(case, device)
    assert "0 of 6 calls replayed" in told and bool(fault) == is_on
    monkeypatch.setattr(check_module, "_bits", lambda tensor: torch.rand(4))
    assert "other bits" in check_module.check_replay(case, device)[1]


def test_the_number_of_plans_is_bounded(passes, device, monkeypatch):
    monkeypatch.setattr(plans_module, "MOST_PLANS", 8)
    for T in range(1, 14):
        evaluate(goat_on(device), make_problem(T=T, dtype=F32), needs=())
    assert 0 < len(passes.plans._plans) <= 8


def test_a_plan_keeps_no_tensor(passes, device):
    for seed in range(3):
        evaluate(goat_on(device), make_problem(T=70, R0=4, dtype=F32, seed=seed))

    def tensors_in(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            for part in value:
                yield from tensors_in(part)

    assert len(plans_of(passes)) == 2
    for key, plan in passes.plans._plans.items():
        assert not list(tensors_in(key)) and not list(tensors_in(plan))


@pytest.mark.gpu  # Triton's interpreter is not for several threads
def test_threads_share_plans(passes, device, monkeypatch):
    problems = [make_problem(T=70, R0=4, dtype=F32, seed=seed) for seed in range(4)]
    expected = [without_plans(monkeypatch, evaluate, goat_on(device), problem) for problem in problems]
    failures = []

    def work(problem, fresh):
        try:
            for _ in range(6):
                assert_outcomes_identical(evaluate(goat_on(device), problem), fresh)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(problems, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_scratch_that_is_not_used_at_the_same_time_shares_its_place():
    size, offsets = laid_out([(1000, 0, 1), (3000, 1, 2), (500, 2, 4), (100, 3, 3), (1024, 4, 4)])
    assert offsets == (0, 1024, 0, 512, 512)
    assert size == 4096
    assert laid_out([]) == (0, ())


def test_scratch_never_overlaps_while_both_are_in_use():
    rng = random.Random(5)
    for _ in range(200):
        parts = []
        for _ in range(rng.randint(1, 12)):
            first = rng.randint(0, 8)
            parts.append((rng.randint(1, 5000), first, rng.randint(first, 9)))
        size, offsets = laid_out(parts)
        for i, (start, (bytes_, first, last)) in enumerate(zip(offsets, parts, strict=True)):
            assert start % 512 == 0 and start + bytes_ <= size
            for other, (other_bytes, other_first, other_last) in zip(offsets[:i], parts[:i], strict=True):
                together = first <= other_last and other_first <= last
                assert not together or start + bytes_ <= other or other + other_bytes <= start


@pytest.mark.long
def test_compiled_kernels_get_the_right_addresses():
    script = Path(__file__).with_name("planned_addresses.py")
    with_bench = {**os.environ, "PYTHONPATH": str(script.parents[2])}  # bench/ is part of the checkout, never installed
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=with_bench, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "launches replayed" in done.stdout


def test_a_result_of_any_nesting_is_rebuilt():
    a, b, part = torch.zeros(2), torch.zeros(3), torch.zeros(1)
    places = {id(a): Place(0, 0, None), id(b): Place(1, 0, None), id(part): Place(1, 4, ((1,), (1,), 1))}
    build = rebuilder((a, (b, a), (part, b), (b,), None), lambda tensor: places[id(tensor)])
    x, y = torch.ones(2), torch.arange(3.0)
    first, second, third, fourth, nothing = build([x, y])
    assert first is x and second[0] is y and second[1] is x and third[1] is y and fourth[0] is y and nothing is None
    assert torch.equal(third[0], y[1:2])
