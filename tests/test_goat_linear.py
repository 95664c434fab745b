"""``goat_linear`` and ``routed_linear`` on the torch backend compute the oracle's function and its gradients.

Agreement in every dtype over a wide set of shapes, routing at ties and infinities, every subset of gradients and the
work it leaves out, and what is saved for backward. ``test_goat_linear_calls.py`` has the ways of calling it.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from goat_problems import (
    BALANCE_SHARE,
    TRAINABLE,
    assert_close,
    assert_outcomes_agree,
    evaluate,
    evaluate_oracle,
    fast_selection,
    make_problem,
    output_weights,
    run_goat,
    selection_mismatch,
)

from goat_kernels import goat_linear, goat_reference
from goat_kernels.backends import get_backend
from goat_kernels.forward_backward import Layer
from goat_kernels.functional import routed_linear
from goat_kernels.numerics import SELECTION_GAP
from goat_kernels.operators import flattened
from goat_kernels.passes import Adapter
from goat_kernels.reference import select_top_k

HALVES = (torch.float16, torch.bfloat16)


def random_cases(count: int) -> list[dict]:
    """Shapes and options: every value of each list is used, in random company."""
    rng = random.Random(2502)
    tokens = (0, 1, 2, 15, 17, 129)
    experts = (1, 2, 3, 4, 5, 8, 16)
    cases = []
    for i in range(count):
        E = experts[i % len(experts)]
        D = rng.choice((1, 1, 2, 3, 4))
        R = E * D
        cases.append(
            {
                "T": tokens[i % len(tokens)],
                "N": rng.choice((1, 5, 16, 33)),
                "M": rng.choice((1, 7, 16, 29)),
                "R": R,
                "E": E,
                "K": (1, E, rng.randint(1, E))[i % 3],
                "R0": (None, R, rng.choice((1, R + 3)))[(i // 2) % 3],
                "bias": rng.random() < 0.5,
                "per_expert": rng.random() < 0.5,
                "seed": i,
            }
        )
    return cases


CASES = random_cases(84)
CASE_IDS = ["-".join(f"{key}{value}" for key, value in case.items()) for case in CASES]


# --- agreement with the oracle ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_output_balance_loss_and_gradients_equal_the_oracle_in_float64(case):
    problem = make_problem(**case)
    needs = problem.present() if case["seed"] % 4 else tuple(n for n in problem.present() if n != "x")
    assert_outcomes_agree(run_goat(problem, needs=needs), evaluate_oracle(problem, needs=needs), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", CASES[::3], ids=CASE_IDS[::3])
def test_lower_precision_agrees_with_the_float64_oracle_on_the_same_selection(case, dtype):
    problem = make_problem(**case, dtype=dtype)
    selection = fast_selection(problem)
    assert bool((selection.sum(dim=1) == case["K"]).all())
    result = run_goat(problem)
    assert_outcomes_agree(result, evaluate_oracle(problem, selection=selection), dtype)
    assert result.output.dtype == dtype
    assert result.balance_loss.dtype == torch.float32
    assert {gradient.dtype for gradient in result.gradients.values()} == {dtype}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("R0", [None, 5])
def test_float32_adapters_over_a_half_precision_base_get_float32_gradients(dtype, R0):
    problem = make_problem(T=129, N=33, M=29, R=16, E=8, dtype=dtype, adapter_dtype=torch.float32, R0=R0)
    result = run_goat(problem)
    assert_outcomes_agree(result, evaluate_oracle(problem, selection=fast_selection(problem)), dtype)
    assert result.output.dtype == dtype
    for name, gradient in result.gradients.items():
        expected = torch.float32 if name in ("lora_A", "lora_B", "router") else dtype
        assert gradient.dtype == expected, name


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_input_keeps_the_residual_beside_the_weight(dtype):
    """W0 - W_res in half precision is W0 where W_res is small; here W0 x is exactly 0, so W_res x is all of y."""
    T, N, M, R0 = 200, 8, 6, 2
    weight = torch.tensor([512.0, -512.0]).repeat(M, N // 2).to(dtype)
    x = torch.randn(T, 1).expand(T, N).to(dtype)
    residual = (torch.randn(R0, N), 1e-3 * torch.randn(M, R0))
    adapter = (torch.randn(4, N), torch.zeros(M, 4), torch.randn(4, N))
    output = goat_linear(x, weight, *adapter, scaling=1.0, top_k=2, residual=residual, backend="torch").output
    expected = -(x.double() @ residual[0].double().t()) @ residual[1].double().t()
    assert_close("y", output, expected, dtype)


def test_the_router_works_in_float32_for_half_precision_input():
    problem = make_problem(T=2000, N=64, E=8, K=2, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    float32_logits = problem.x.float() @ problem.router.t()
    assert torch.equal(fast_selection(problem), select_top_k(float32_logits, 2))
    rounded = select_top_k(float32_logits.bfloat16().double(), 2)
    assert not torch.equal(rounded, fast_selection(problem)), "the test would not notice a bfloat16 router"


def test_float32_selects_other_experts_only_within_the_documented_gap():
    problem = make_problem(T=4000, N=256, R=8, E=8, K=3, dtype=torch.float32)
    selection = fast_selection(problem)
    assert bool((selection.sum(dim=1) == 3).all())
    assert selection_mismatch(problem.logits_TE, selection, 3) <= SELECTION_GAP[torch.float32]
    corrupted = selection.clone()
    corrupted[7] = ~select_top_k(problem.logits_TE[7:8], 5)[0]
    assert selection_mismatch(problem.logits_TE, corrupted, 3) > SELECTION_GAP[torch.float32]


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("R0", [None, 3])
def test_gradcheck(K, R0):
    problem = make_problem(T=3, N=5, M=3, R=4, E=4, K=K, R0=R0, per_expert=True, seed=11)

    def function(x, weight, bias, lora_A, lora_B, router):
        result = goat_linear(
            *(x, weight, lora_A, lora_B, router),
            bias=bias,
            scaling=problem.scaling,
            top_k=K,
            residual=problem.residual,
            backend="torch",
        )
        return result.output, result.balance_loss

    leaves = problem.leaves(TRAINABLE)
    assert torch.autograd.gradcheck(function, tuple(getattr(leaves, name) for name in TRAINABLE))


@pytest.mark.parametrize(("use_output", "balance_share"), [(True, 0.0), (False, 1.0)], ids=["output", "balance"])
def test_each_result_differentiates_alone(use_output, balance_share):
    problem = make_problem(R0=3, seed=2)
    options = {"use_output": use_output, "balance_share": balance_share}
    result, oracle = run_goat(problem, **options), evaluate_oracle(problem, **options)
    for name, gradient in oracle.gradients.items():
        # A tensor that the loss does not depend on may get None or zeros.
        expected = torch.zeros_like(getattr(problem, name)) if gradient is None else gradient
        found = result.gradients[name]
        assert_close(name, torch.zeros_like(expected) if found is None else found, expected, torch.float64)


def test_the_residual_pair_and_the_scaling_get_no_gradient():
    problem = make_problem(R0=3)
    A0, B0 = (part.requires_grad_() for part in problem.residual)
    leaves = problem.leaves(TRAINABLE)
    result = goat_linear(
        *(leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.router),
        scaling=2.0,
        top_k=2,
        residual=(A0, B0),
    )
    result.output.sum().backward()
    assert A0.grad is None and B0.grad is None


def test_an_empty_residual_pair_is_no_residual():
    problem = make_problem(R0=0)
    assert_outcomes_agree(run_goat(problem), evaluate_oracle(replace(problem, residual=None)), torch.float64)


def test_one_expert_is_a_plain_lora():
    problem = make_problem(R=4, E=1, K=1)
    expected = F.linear(problem.x, problem.weight, problem.bias)
    expected = expected + problem.scaling * (problem.x @ problem.lora_A.t()) @ problem.lora_B.t()
    result = run_goat(problem)
    assert_close("output", result.output, expected, torch.float64)
    assert float(result.balance_loss) == 1.0
    assert not bool(result.gradients["router"].any())


def test_an_expert_without_tokens_gets_zero_gradients_rather_than_none():
    problem = make_problem(T=9, N=6, R=8, E=4, K=1)
    problem = replace(problem, x=problem.x.abs(), router=torch.tensor([1.0, -1, -1, -1]).double()[:, None].expand(4, 6))
    result = run_goat(problem)
    assert bool(fast_selection(problem)[:, 0].all())
    assert not bool(result.gradients["lora_A"][2:].any()) and not bool(result.gradients["lora_B"][:, 2:].any())
    assert bool(result.gradients["lora_A"][:2].any())
    assert_outcomes_agree(result, evaluate_oracle(problem), torch.float64)


# --- routing at the edges -----------------------------------------------------------------------------------------


def tied_routers() -> dict[str, torch.Tensor]:
    # Multiples of 1/32: products with small integers are exact in any order, and so are the ties.
    row = torch.linspace(-6, 6, 13).double() / 32
    integers = torch.randint(-1, 2, (4, 13), generator=torch.Generator().manual_seed(0)).double() / 8
    return {
        "zero": torch.zeros(4, 13).double(),
        "equal-rows": row.repeat(4, 1),
        "pairs-of-equal-rows": torch.stack([row, -row, row, -row]),
        "integers": integers,
    }


@pytest.mark.parametrize("K", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", tied_routers())
def test_ties_go_to_the_lower_index(name, dtype, K):
    x = torch.randint(-2, 3, (40, 13), generator=torch.Generator().manual_seed(1)).to(dtype)
    adapter_dtype = torch.promote_types(dtype, torch.float32)
    problem = make_problem(T=40, K=K, dtype=dtype, adapter_dtype=adapter_dtype)
    problem = replace(problem, x=x, router=tied_routers()[name].to(adapter_dtype))
    logits = problem.logits_TE
    expected = select_top_k(logits, K)
    assert torch.equal(fast_selection(problem), expected)
    sorted_logits = logits.sort(dim=1, descending=True).values
    if K < 4:
        assert bool((sorted_logits[:, K - 1] == sorted_logits[:, K]).any()), "no tie at the K-th place"
    assert_outcomes_agree(run_goat(problem), evaluate_oracle(problem, selection=expected), dtype)


def test_a_zero_router_uses_the_first_experts_with_equal_gates():
    problem = replace(make_problem(K=3), router=torch.zeros(4, 13).double())
    routed = routed_linear(
        *(problem.x, problem.lora_A, problem.lora_B, problem.router), weight=problem.weight, scaling=1.0, top_k=3
    )
    assert routed.load.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert float(routed.balance_loss) == pytest.approx(3.0)


@pytest.mark.parametrize("K", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_logits_of_minus_infinity_choose_k_experts_and_keep_gradients_finite(dtype, K):
    huge = torch.finfo(dtype).max / 4
    problem = make_problem(T=6, K=K, dtype=dtype)
    router = torch.full((4, 13), -huge, dtype=dtype)
    router[2] = problem.router[2]  # the only finite logit
    problem = replace(problem, x=problem.x.abs() + 1, router=router)
    assert torch.isneginf(problem.x @ router.t()).sum(dim=1).tolist() == [3] * 6

    routed = routed_linear(
        *(problem.x, problem.lora_A, problem.lora_B, router), weight=problem.weight, scaling=1.0, top_k=K
    )
    expected = select_top_k(problem.x @ router.t(), K)
    assert torch.equal(routed.load, expected.to(dtype).mean(dim=0)), "the chosen experts, ties at -inf included"
    assert routed.load.sum() == K
    result = run_goat(problem)
    oracle = evaluate(goat_reference, problem)
    assert_outcomes_agree(result, replace(oracle, gradients=result.gradients), dtype)
    for name, gradient in result.gradients.items():
        assert bool(torch.isfinite(gradient).all()), name
        if bool(torch.isfinite(oracle.gradients[name]).all()):
            assert_close(name, gradient, oracle.gradients[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_a_nan_logit_counts_as_the_largest(dtype):
    problem = make_problem(T=5, K=2, dtype=dtype)
    router = problem.router.clone()
    router[3] = math.nan
    routed = routed_linear(
        *(problem.x, problem.lora_A, problem.lora_B, router), weight=problem.weight, scaling=1.0, top_k=2
    )
    assert routed.load[3] == 1 and routed.load.sum() == 2
    assert bool(torch.isnan(routed.output).any()), "a NaN must not be hidden"


def test_a_nan_token_spoils_its_own_output_alone():
    problem = make_problem(T=5, R0=3)
    x = problem.x.clone()
    x[2, 4] = math.nan
    clean = run_goat(problem, needs=()).output
    output = run_goat(replace(problem, x=x), needs=()).output
    assert bool(torch.isnan(output[2]).all())
    others = [0, 1, 3, 4]
    assert_close("other tokens", output[others], clean[others], torch.float64)


@pytest.mark.parametrize("size", [60.0, 2000.0])
def test_large_logits_do_not_overflow(size):
    problem = make_problem(T=40, K=2, seed=9)
    problem = replace(problem, router=problem.router * size)
    needs = tuple(name for name in TRAINABLE if name != "router")  # the router's gradient is all cancellation here
    assert bool(torch.isfinite(run_goat(problem).gradients["router"]).all())
    assert_outcomes_agree(run_goat(problem, needs=needs), evaluate_oracle(problem, needs=needs), torch.float64)


def test_the_load_counts_tokens_and_sums_to_k():
    problem = make_problem(T=33, E=4, K=3)
    routed = routed_linear(
        *(problem.x, problem.lora_A, problem.lora_B, problem.router), weight=problem.weight, scaling=1.0, top_k=3
    )
    expected = select_top_k(problem.logits_TE, 3).double().mean(dim=0)
    assert_close("load", routed.load, expected, torch.float64)
    assert not routed.load.requires_grad


def test_an_expert_without_tokens_has_a_load_of_exactly_zero(backend, device):
    for T in (1, 41, 47, 55):  # T * (1 / T) is not 1 in float32 for the last three
        problem = replace(make_problem(T, K=1, dtype=torch.float32), router=torch.zeros(4, 13))
        problem = problem.map(lambda t: t.to(device))
        tensors = (problem.x, problem.lora_A, problem.lora_B, problem.router)
        routed = routed_linear(*tensors, weight=problem.weight, scaling=1.0, top_k=1, backend=backend)
        assert routed.load.tolist() == [1, 0, 0, 0]


# --- only the gradients asked for ---------------------------------------------------------------------------------

SUBSETS = [s for size in range(len(TRAINABLE) + 1) for s in itertools.combinations(TRAINABLE, size)]


@pytest.mark.parametrize("R0", [None, 3], ids=["fold", "path"])
@pytest.mark.parametrize("needs", SUBSETS, ids=lambda s: "+".join(s) or "none")
def test_every_subset_of_gradients_equals_those_of_all(needs, R0):
    problem = make_problem(T=15, R0=R0, seed=8)
    everything = run_goat(problem)
    result = run_goat(problem, needs=needs)
    assert_close("output", result.output, everything.output, torch.float64)
    for name in TRAINABLE:
        if name in needs:
            assert_close(name, result.gradients[name], everything.gradients[name], torch.float64)
        else:
            assert result.gradients[name] is None, name


def passes_run(monkeypatch, needs, R0=3) -> set[str]:
    """The names of the backward passes that differentiating with respect to ``needs`` calls."""
    passes = get_backend("torch")
    called = set()

    def counted(name, original):
        def run(*arguments, **options):
            called.add(name)
            return original(*arguments, **options)

        return run

    for name in ("hidden_gradient", "weight_gradients", "input_prefill"):
        monkeypatch.setattr(passes, name, counted(name, getattr(passes, name)))
    run_goat(make_problem(R0=R0), needs=needs)
    return called


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (("lora_B",), {"weight_gradients"}),
        (("bias",), set()),
        (("weight", "bias"), set()),
        (("lora_A",), {"hidden_gradient", "weight_gradients"}),
        (("router",), {"hidden_gradient", "weight_gradients"}),
        (("x",), {"hidden_gradient", "input_prefill"}),
        (("lora_A", "lora_B", "router"), {"hidden_gradient", "weight_gradients"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_passes_that_no_gradient_needs_do_not_run(monkeypatch, needs, expected):
    assert passes_run(monkeypatch, needs) == expected


def product_flops(problem, needs) -> tuple[int, int]:
    """(forward, backward) FLOPs of the matrix products that really ran, from the shapes that the profiler saw."""

    def count(run):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            result = run()
        operands = {"aten::mm": slice(0, 2), "aten::addmm": slice(1, 3), "aten::addmm_": slice(1, 3)}
        flops = 0
        for event in profile.events():
            assert event.name not in ("aten::bmm", "aten::baddbmm"), "a product that this test does not count"
            if event.name in operands:
                left, right = event.input_shapes[operands[event.name]]
                flops += 2 * left[0] * left[1] * right[1]
        return result, flops

    leaves = problem.leaves(needs)
    tensors = (leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.router)
    result, forward = count(
        lambda: goat_linear(*tensors, bias=leaves.bias, scaling=1.7, top_k=2, residual=leaves.residual)
    )
    loss = (result.output * output_weights(result.output)).sum() + BALANCE_SHARE * result.balance_loss
    _, backward = count(loss.backward)
    return forward, backward


def test_each_subset_of_gradients_runs_only_its_own_products():
    T, N, M, R, E, R0 = 64, 160, 96, 8, 4, 6
    problem = make_problem(T, N, M, R, E, R0=R0)
    base, lora_A, router, adapter_out = 2 * T * N * M, 2 * T * N * R, 2 * T * N * E, 2 * T * M * R
    adapter_in = lora_A + router
    path_in, path_out = 2 * T * N * R0, 2 * T * M * R0
    cases = {
        ("bias",): 0,
        ("lora_B",): adapter_out,
        ("lora_A",): adapter_out + lora_A,
        ("router",): adapter_out + router,
        ("lora_A", "lora_B", "router"): 2 * adapter_out + adapter_in,
        ("x",): adapter_out + path_out + adapter_in + path_in + base,
        ("x", "lora_A", "lora_B", "router"): 2 * (adapter_out + adapter_in) + path_out + path_in + base,
        ("weight",): base,
    }
    slack = 3 * 2 * T * E * (R + E)  # products of [T, E] with small constants: gates repeated, the balance loss
    assert slack < min(path_in, path_out)
    for needs, expected in cases.items():
        forward, backward = product_flops(problem, needs)
        assert 0 <= forward - (base + adapter_in + adapter_out + path_in + path_out) <= slack, (needs, forward)
        assert 0 <= backward - expected <= slack, (needs, backward, expected)


@pytest.mark.parametrize("needs", [("lora_B",), ("lora_A", "router"), ("x",), TRAINABLE], ids="+".join)
def test_the_flop_counts_of_the_operators_report_the_products_that_run(needs):
    from torch.utils.flop_counter import FlopCounterMode

    T, R, E = 64, 8, 4
    problem = make_problem(T, 160, 96, R, E, R0=6)
    real = product_flops(problem, needs)
    leaves = problem.leaves(needs)
    with FlopCounterMode(display=False) as forward:  # as compiled code calls it
        adapter = Adapter(leaves.lora_A, leaves.lora_B, leaves.router, *leaves.residual, 1.7, None, 2, 0.0, None)
        layer = Layer(leaves.weight, None, leaves.bias, adapter)
        output, balance_loss, *_ = torch.ops.goat_kernels.forward(leaves.x, *flattened(layer), "torch")
    loss = output.sum() + balance_loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    slack = 3 * 2 * T * E * (R + E)
    for counted, ran in zip((forward, backward), real, strict=True):
        assert 0 <= ran - counted.get_total_flops() <= slack


# --- what is saved ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("R0", [None, 8], ids=["fold", "path"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_saved_for_backward_is_the_input_and_little_more(dtype, R0, dropout_p):
    T, R, E = 512, 8, 4
    problem = make_problem(T, 64, 48, R, E, dtype=dtype, adapter_dtype=torch.promote_types(dtype, torch.float32), R0=R0)
    leaves = problem.leaves(TRAINABLE)
    known = [getattr(leaves, name) for name in TRAINABLE] + list(leaves.residual or ())
    known = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        goat_linear(
            *(leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.router),
            bias=leaves.bias,
            scaling=1.7,
            top_k=2,
            residual=leaves.residual,
            dropout_p=dropout_p,
            training=True,
        )
    stats_size = torch.promote_types(dtype, torch.float32).itemsize
    seed_bytes = 8 if dropout_p else 0
    assert sum(saved.values()) <= T * R * dtype.itemsize + (2 * T * E + E) * stats_size + seed_bytes
