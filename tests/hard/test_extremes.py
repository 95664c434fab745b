"""Values at the ends of their formats, on both backends: they come out right, or as inf and NaN where they belong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from drawn_layers import BF16, F16, F32, observed_routing, selection_of
from goat_problems import Problem, assert_outcomes_agree, evaluate, evaluate_oracle, make_problem
from torch import Tensor
from triton_cases import MANY_PROCESSORS, ONE_PROCESSOR, Recorder, audited, forced_tiles, goat_on, route_rows

from goat_kernels.backends.torch_backend import _route
from goat_kernels.kernels.common import INTERPRETED
from goat_kernels.kernels.tiles import Tile
from goat_kernels.numerics import TOLERANCES, relative_error
from goat_kernels.reference import select_top_k

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter


def agree(problem: Problem, backend: str, device: torch.device, dtype: torch.dtype | None = None, **options) -> Tensor:
    """Output and gradients are the oracle's on the same selection, which is returned."""
    with observed_routing(backend) as routings:
        outcome = evaluate(goat_on(device, backend), problem, **options)
    selection = selection_of(routings[0], problem)
    oracle = evaluate_oracle(problem, selection=selection, **options)
    assert_outcomes_agree(outcome, oracle, dtype or problem.x.dtype)
    return selection


def with_logits(logits_TE: Tensor, dtype: torch.dtype, K: int, **options) -> Problem:
    """A layer whose logits are exactly those: x is the unit matrix, of T = N tokens."""
    T, E = logits_TE.shape
    problem = make_problem(T, N=T, M=19, R=2 * E, E=E, K=K, dtype=dtype, adapter_dtype=F32, **options)
    return replace(problem, x=torch.eye(T, dtype=dtype), router=logits_TE.t().contiguous())


# --- logits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_logits_of_ten_thousand(backend, dtype, device):
    """Beside logits that differ by quarters: the router's two bfloat16 parts hold 17 bits (docs/numerics.md)."""
    logits = torch.randn(17, 4) + torch.randint(-1, 2, (17, 4)) * 1e4
    logits[0], logits[1] = torch.tensor([1e4, -1e4, 1e4 - 0.5, -1e4]), torch.tensor([-1e4, -1e4, -1e4, 1e4])
    agree(with_logits((4 * logits).round() / 4, dtype, 2), backend, device)


@pytest.mark.parametrize("value", [0.0, 1.0, -1e4, 1e4, 6e4])
def test_equal_logits_of_any_size_give_equal_gates_to_the_first_experts(backend, value, device):
    needs = ("weight", "lora_A", "lora_B", "router")  # the gradient of x is the difference of large equal terms
    for dtype in (F32, BF16, F16):
        problem = with_logits(torch.full((9, 6), value), dtype, 4)
        with observed_routing(backend) as routings:
            outcome = evaluate(goat_on(device, backend), problem, needs=needs)
        assert torch.equal(routings[0].gate_ET.t().cpu(), torch.tensor([0.25] * 4 + [0.0] * 2).expand(9, 6))
        assert_outcomes_agree(outcome, evaluate_oracle(problem, needs=needs), dtype)


def test_softmax_never_overflows(device):
    """Whatever finite float32 the logits are, gates and probabilities lie in [0, 1] and sum to 1."""
    largest = torch.finfo(F32).max
    values = torch.tensor([largest, -largest, largest / 2, 3e38, -3e38, 1e30, 1e4, 88.8, -104.0, 1.0, 1e-45, 0.0, -0.0])
    logits_TE = values[torch.randint(len(values), (256, 5))]
    selection = select_top_k(logits_TE, 3)
    for gate, probs in (
        [part.t() for part in _route(logits_TE.t().contiguous(), 3, in_place=True)[:2]],
        [part.cpu() for part in route_rows(logits_TE.to(device), 3)[:2]],
    ):
        oracle = torch.softmax(logits_TE.double().masked_fill(~selection, -torch.inf), dim=1)
        assert relative_error(gate, oracle) <= TOLERANCES[F32].relative
        assert relative_error(probs, torch.softmax(logits_TE.double(), dim=1)) <= TOLERANCES[F32].relative
        for share in (gate, probs):
            assert bool(((share >= 0) & (share <= 1)).all())
            assert float((share.sum(dim=1) - 1).abs().max()) <= 4 * torch.finfo(F32).eps


# --- the smallest numbers -----------------------------------------------------------------------------------------


def subnormals(like: Tensor) -> Tensor:
    """Multiples of the smallest number of its dtype, of either sign, none of them normal."""
    steps = round(1 / torch.finfo(like.dtype).eps)
    return (torch.randint(-steps + 1, steps, like.shape).double() * smallest(like.dtype)).to(like.dtype)


def smallest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_subnormal_input_is_not_lost(backend, dtype, device):
    """The adapter term of x among the smallest numbers, to half of one a rounding; bfloat16 units skip them."""
    problem = make_problem(33, 16, 9, R0=3, bias=False, dtype=dtype, adapter_dtype=F32)
    weight = torch.zeros_like(problem.weight)
    problem = replace(problem, x=subnormals(problem.x), lora_A=problem.lora_A * 16, weight=weight)
    outcome = evaluate(goat_on(device, backend), problem, needs=())
    expected = evaluate_oracle(problem, needs=(), selection=select_top_k(problem.logits_TE, 2)).output
    exact = dtype == F16 or device.type == "cpu"  # a GPU may take float32's for 0
    step = smallest(dtype) if exact else torch.finfo(dtype).tiny
    # h~ and h0 are rounded to a step each, then weighted; so is y0, once more with the base product.
    rounded = 2 * step * (1 + float(problem.lora_B.double().norm()) + float(problem.residual[1].double().norm()))
    error = (outcome.output.double() - expected).abs()
    assert bool((error <= TOLERANCES[dtype].relative * expected.abs().max() + rounded).all())
    assert bool(outcome.output.any()) or not exact


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_subnormal_logits_still_choose_the_largest(backend, dtype, device):
    if device.type == "cuda":
        pytest.skip("GPUs may take subnormal products for 0, and then these logits tie")
    logits = torch.stack([torch.randperm(6) for _ in range(12)]).float() * 1e-40
    problem = with_logits(logits, dtype, 2)
    with observed_routing(backend) as routings:
        evaluate(goat_on(device, backend), problem, needs=())
    assert torch.equal(routings[0].gate_ET.t() > 0, select_top_k(logits, 2))


# --- the largest numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_values_near_the_limit_of_half_precision(backend, dtype, device):
    """x, h~ and y up to half of the largest number: nothing in between overflows."""
    largest = torch.finfo(dtype).max / 2
    problem = make_problem(33, 16, 16, R=8, R0=8, bias=False, dtype=dtype, adapter_dtype=F32)
    problem = replace(problem, scaling=1.0, router=problem.router / largest, x=problem.x.clamp(-1, 1) * largest)
    # One large number a row keeps every sum within one term.
    pick = torch.eye(16).roll(3, 0)
    problem = replace(
        problem, weight=pick.to(dtype), lora_A=pick[:8], lora_B=pick[:, :8], residual=(pick[8:], pick[:, 8:] / 2)
    )
    with observed_routing(backend) as routings:
        outcome = evaluate(goat_on(device, backend), problem, needs=())
    assert bool(torch.isfinite(outcome.output).all()) and float(outcome.output.abs().max()) > largest / 2
    oracle = evaluate_oracle(problem, needs=(), selection=selection_of(routings[0], problem))
    assert relative_error(outcome.output / largest, oracle.output / largest) <= TOLERANCES[dtype].relative


def test_what_does_not_fit_float16_spoils_its_token_alone(backend, device):
    problem = make_problem(33, 16, 9, R=8, bias=False, dtype=F16, adapter_dtype=F32)
    problem = replace(problem, lora_B=problem.lora_B.abs() + 1, lora_A=problem.lora_A.abs() + 1)
    x = problem.x.clone()
    x[7] = 6e4
    clean = evaluate(goat_on(device, backend), problem, needs=()).output
    output = evaluate(goat_on(device, backend), replace(problem, x=x), needs=()).output
    assert not bool(torch.isfinite(output[7]).any())
    others = torch.arange(33) != 7
    assert torch.equal(output[others], clean[others])


@pytest.mark.parametrize(
    ("backend", "dtype", "target"),
    [
        *(("torch", F32, None), ("torch", BF16, None), ("torch", F16, None)),
        *(("triton", F32, ONE_PROCESSOR), ("triton", F16, MANY_PROCESSORS)),
    ],
    ids=["torch-float32", "torch-bfloat16", "torch-float16", "triton-fused", "triton-staged"],
)
def test_tokens_that_are_not_finite_keep_to_their_rows(backend, dtype, target, device):
    """Of the output and, where the balance loss is left out, of the gradient of x; other rows keep their bits."""
    problem = make_problem(66, 17, 9, R0=3, dtype=dtype, adapter_dtype=F32)
    x, bad = problem.x.clone(), {3: math.nan, 40: math.inf, 65: -math.inf}
    for row, value in bad.items():
        x[row, row % 17] = value
    pair = []
    for each in (problem, replace(problem, x=x)):
        with audited(target, Recorder()):
            pair.append(evaluate(goat_on(device, backend), each, needs=("x",), balance_share=0.0))
    others = [row for row in range(66) if row not in bad]
    assert not bool(torch.isfinite(pair[1].output[list(bad)]).all(dim=1).any())
    for clean, result in ((p.output for p in pair), (p.gradients["x"] for p in pair)):
        assert bool(torch.isfinite(clean).all()) and torch.equal(result[others], clean[others])


# --- long sums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("target", [ONE_PROCESSOR, MANY_PROCESSORS], ids=["fused", "staged"])
def test_sums_that_half_precision_would_lose_are_exact(backend, target, dtype, device):
    """4096 + 1 + 1 + ... - 4096 is 0 in half precision. Over N and M: hidden columns, y, dX; over T: the gradients."""
    terms = torch.ones(130)
    terms[0], terms[-1] = 4096, -4096
    lost = torch.zeros((), dtype=dtype)
    for term in terms.to(dtype):
        lost = lost + term
    assert float(lost) == 0, "half precision would do"

    def layer(T, N, M, x, lora_B=1.0):
        problem = make_problem(T, N, M, R=4, E=2, K=2, bias=False, dtype=dtype, adapter_dtype=F32).map(torch.ones_like)
        leaves = replace(problem, x=x.to(dtype), lora_B=problem.lora_B * lora_B, scaling=1.0)
        leaves = leaves.leaves(("x", "weight", "lora_A", "lora_B"))
        with audited(target, Recorder()):
            tensors = (leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.router)
            return leaves, goat_on(device, backend)(*tensors, scaling=1.0, top_k=2).output

    leaves, output = layer(70, 130, 130, terms.expand(70, 130))
    assert bool((output == 128 + 4 * 64).all())  # the base, and four columns at a gate of a half
    with audited(target, Recorder()):
        output.backward(terms.expand(70, 130).to(dtype))
    assert bool((leaves.x.grad == 128 + 4 * 64).all())
    leaves, output = layer(130, 2, 64, terms[:, None].expand(130, 2), lora_B=1 / 64)
    with audited(target, Recorder()):
        output.backward(torch.ones_like(output))
    assert bool((leaves.weight.grad == 128).all())
    assert bool((leaves.lora_B.grad == 128).all())  # h~ is half of 2 * terms
    assert bool((leaves.lora_A.grad == 64).all())  # dh is half of 64 / 64


#: A walk over N in few steps: the interpreter takes a millisecond for each.
_LONG_STEPS = {"project": Tile(16, 1024, 4, 1, 16)}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_error_grows_with_n_no_faster_than_its_root(backend, dtype, device):
    """Up to N = 65536, where float32 sums have lost a few of their 24 bits and half precision shows nothing of it."""
    found = {}
    for N in (64, 2048, 65536):
        problem = make_problem(8, N, 8, R=4, E=2, bias=False, dtype=dtype, adapter_dtype=F32)
        problem = replace(problem, weight=torch.zeros_like(problem.weight))
        with observed_routing(backend) as routings, forced_tiles(_LONG_STEPS if INTERPRETED else {}):
            output = evaluate(goat_on(device, backend), problem, needs=()).output
        expected = evaluate_oracle(problem, needs=(), selection=selection_of(routings[0], problem)).output
        found[N] = relative_error(output, expected)
        rounding = 0.0 if dtype == F32 else 2 * torch.finfo(dtype).eps
        assert found[N] <= rounding + torch.finfo(F32).eps / 2 * N**0.5, found
        assert found[N] <= TOLERANCES[dtype].relative, found
    assert dtype == F32 or found[65536] <= 2 * found[64], "half precision's own roundings are all there is"
