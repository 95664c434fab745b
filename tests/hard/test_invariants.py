"""What must hold of any GOAT layer without an oracle, each on both backends.

A token's adapter term stands alone, bit for bit (Triton); experts may change places; K = E is a soft mixture; E = 1 is
LoRA; without a router the adapter is linear, to the bit for powers of two; the gradient of a softmax sums to zero.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from drawn_layers import BF16, F16, F32, F64, few, observed_routing, selection_of
from goat_problems import assert_outcomes_agree, evaluate, make_problem
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import MANY_PROCESSORS, ONE_PROCESSOR, Recorder, audited, goat_on

from goat_kernels.checks.problem import LayerCase, run_passes
from goat_kernels.checks.problem import make_problem as make_layer
from goat_kernels.functional import GoatOutput
from goat_kernels.kernels.configs import KNOWN_TARGETS, Target, forced_target
from goat_kernels.kernels.launch import Launch, observed
from goat_kernels.kernels.passes import TritonPasses
from goat_kernels.numerics import SELECTION_GAP, TOLERANCES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter

NUMERICS = Path(__file__).parents[2] / "docs" / "numerics.md"

#: Sizes at which norms are those of many elements, so that chance cancels nowhere.
sizes = st.fixed_dictionaries(
    {
        "T": st.sampled_from((9, 33, 65)),
        "N": st.integers(8, 40),
        "M": st.integers(8, 40),
        "bias": st.booleans(),
        "per_expert": st.booleans(),
        "dtype": st.sampled_from((F32, BF16, F16)),
        "seed": st.integers(0, 2**31),
    }
)


# --- a token stands alone -----------------------------------------------------------------------------------------

#: The kernels whose programs compute tokens; the others sum over tokens.
_OF_TOKENS = {
    *("pack_adapter", "fused_forward", "project", "route_and_prefill", "dropped_hidden", "expand_columns"),
    *("fused_hidden_gradient", "finish_hidden_gradient"),
}


def order_of_sums(launches: list[Launch]) -> list[tuple]:
    """What decides the bits of a token: which kernels compute it, in tiles of what shape, in how many splits."""
    described = []
    for launch in launches:
        if launch.name in _OF_TOKENS:
            constants = {name: value for name, value in launch.constants.items() if name != "BALANCE"}
            described.append((launch.name, constants, *map(launch.arguments.get, ("splits", "split_steps"))))
    return described


#: (tokens of the whole batch, of the part of it, the GPU, x's dtype): every form of the passes, in one bucket each.
BATCHES = {
    "decoding-16": (16, 1, KNOWN_TARGETS["sm_90"], BF16),
    "decoding-32": (32, 17, KNOWN_TARGETS["sm_90"], F32),
    "decoding-64": (64, 40, KNOWN_TARGETS["sm_90"], BF16),
    "staged": (150, 65, MANY_PROCESSORS, BF16),
    "fused": (150, 65, ONE_PROCESSOR, F32),
}


@pytest.mark.long
@pytest.mark.parametrize("batch", BATCHES)
def test_a_tokens_adapter_term_depends_on_neither_its_place_nor_the_batch(batch, device):
    """To the bit, forward and backward. The base product, whose vendor promises no such thing, is silenced."""
    T, part, target, dtype = BATCHES[batch]
    problem = make_problem(T, N=300, M=9, R=12, E=4, R0=5, bias=False, dtype=dtype, adapter_dtype=F32)
    problem = replace(problem, weight=torch.zeros_like(problem.weight))
    grad_y = torch.randn(T, 9).to(dtype)
    chosen = torch.randperm(T)[:part]

    def run(rows) -> tuple[Tensor, Tensor, list]:
        x = problem.x[rows].requires_grad_()
        tensors = (problem.weight, problem.lora_A, problem.lora_B, problem.router)
        with audited(target, Recorder()) as recorder:
            result = goat_on(device)(x, *tensors, scaling=1.7, top_k=2, residual=problem.residual)
            (grad_x,) = torch.autograd.grad(result.output, x, grad_y[rows])
        return result.output.detach(), grad_x, order_of_sums(recorder.launches)

    y, grad_x, order = run(torch.arange(T))
    y_of_part, grad_of_part, order_of_part = run(chosen)
    assert order == order_of_part, "the two batches are not of one bucket"
    # The interpreter multiplies tiles with NumPy, whose float32 product may round a row by its place in the tile.
    exact = device.type == "cuda" or dtype == BF16
    for found, expected in ((y_of_part, y[chosen]), (grad_of_part, grad_x[chosen])):
        assert bool(expected.any())
        assert torch.equal(found, expected) if exact else torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def buckets_in_the_document() -> list[tuple[str, list[int]]]:
    """The rows of the table of bucket ends: (layer, ends)."""
    rows = re.findall(r"^\| `LayerCase\((.*?)\)` \| ([\d, ]+) \|$", NUMERICS.read_text(), re.M)
    return [(arguments, [int(end) for end in ends.split(",")]) for arguments, ends in rows]


@pytest.mark.parametrize(("arguments", "ends"), buckets_in_the_document())
def test_buckets_of_tokens_end_where_the_document_says(arguments, ends):
    options = eval(f"dict({arguments})", {"torch": torch})

    def order(T: int, target: Target = KNOWN_TARGETS["sm_90"]) -> list[tuple]:
        launches: list[Launch] = []
        with observed(launches.append), forced_target(target):
            run_passes(TritonPasses(), make_layer(LayerCase(T=T, **options), "meta"))
        return order_of_sums(launches)

    first, before = 1, None
    for end in [*ends, 4 * ends[-1]]:
        of_bucket = order(first)
        assert of_bucket != before, f"no bucket ends at {first - 1}"
        inside = (first + (end - first) // 2, end)
        assert all(order(T) == of_bucket for T in inside), f"a bucket ends between {first} and {end}"
        first, before = end + 1, of_bucket


def test_the_document_has_buckets():
    assert len(buckets_in_the_document()) >= 3


# --- experts ------------------------------------------------------------------------------------------------------


def is_clear(problem) -> bool:
    """Whether every K-th logit is clear of the next."""
    ordered = problem.logits_TE.sort(dim=1, descending=True).values
    E, K = ordered.shape[1], problem.top_k
    gap = ordered[:, K - 1] - ordered[:, K] if K < E else ordered.new_ones(1)
    return bool((gap > 10 * SELECTION_GAP[F32] * ordered.abs().max()).all())


@pytest.mark.long
@few
@given(case=sizes, data=st.data())
def test_experts_may_change_places(backend, case, data, device):
    E, D = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 3))
    problem = make_problem(
        **case, E=E, R=E * D, K=data.draw(st.integers(1, E)), R0=data.draw(st.sampled_from((None, 3)))
    )
    assume(is_clear(problem))
    places = torch.tensor(data.draw(st.permutations(range(E))))
    columns = (places[:, None] * D + torch.arange(D)).flatten()
    moved = replace(
        problem,
        lora_A=problem.lora_A[columns],
        lora_B=problem.lora_B[:, columns],
        router=problem.router[places],
        scaling=problem.scaling[places] if isinstance(problem.scaling, Tensor) else problem.scaling,
    )
    function = goat_on(device, backend)
    expected, outcome = evaluate(function, problem), evaluate(function, moved)
    gradients = expected.gradients
    gradients["lora_A"], gradients["router"] = gradients["lora_A"][columns], gradients["router"][places]
    gradients["lora_B"] = gradients["lora_B"][:, columns]
    assert_outcomes_agree(outcome, expected, problem.x.dtype)


def soft_mixture(x, weight, lora_A, lora_B, router, *, bias, scaling, top_k, residual) -> GoatOutput:
    """Every expert, weighted by the softmax over all of them; nothing is selected and the load is even."""
    E = router.shape[0]
    gate = torch.softmax(x @ router.t(), dim=1) * scaling
    h = (x @ lora_A.t()).view(len(x), E, -1) * gate[:, :, None]
    return GoatOutput(F.linear(x, weight, bias) + h.flatten(1) @ lora_B.t(), torch.tensor(float(E), dtype=F64))


@few
@given(case=sizes, E=st.integers(2, 9), D=st.integers(1, 3))
def test_all_experts_chosen_are_a_soft_mixture(backend, case, E, D, device):
    problem = make_problem(**case, E=E, R=E * D, K=E)
    expected = evaluate(soft_mixture, problem.double(), balance_share=0.0)
    outcome = evaluate(goat_on(device, backend), problem, balance_share=0.0)
    assert_outcomes_agree(outcome, expected, problem.x.dtype)


def lora(x, weight, lora_A, lora_B, router, *, bias, scaling, top_k, residual) -> GoatOutput:
    y = F.linear(x, weight, bias) + scaling * (x @ lora_A.t()) @ lora_B.t()
    return GoatOutput(y + 0 * router.sum(), torch.ones((), dtype=F64))


@few
@given(case=sizes, R=st.integers(1, 20))
def test_one_expert_is_lora(backend, case, R, device):
    problem = make_problem(**case, E=1, R=R, K=1)
    outcome = evaluate(goat_on(device, backend), problem)
    assert_outcomes_agree(outcome, evaluate(lora, problem.double(), balance_share=0.0), problem.x.dtype)
    assert not bool(outcome.gradients["router"].any())


# --- the router ---------------------------------------------------------------------------------------------------


@few
@given(case=sizes, K=st.integers(1, 4), power=st.integers(-6, 6), path=st.booleans())
def test_without_a_router_a_power_of_two_passes_through_exactly(backend, case, K, power, path, device):
    """Of the adapter term alone. float16 would underflow where terms cancel, so that nothing does there."""
    problem = make_problem(**{**case, "bias": False}, K=K, R0=3 if path and case["dtype"] != F16 else None)
    problem = replace(problem, weight=torch.zeros_like(problem.weight), router=torch.zeros_like(problem.router))
    if case["dtype"] == F16:
        problem = problem.map(torch.abs)
    factor = 2.0**power
    results = []
    for x in (problem.x, problem.x * factor):
        options = {"scaling": problem.scaling, "top_k": K, "residual": problem.residual}
        tensors = (problem.weight, problem.lora_A, problem.lora_B, problem.router)
        results.append(goat_on(device, backend)(x, *tensors, **options).output)
    assert bool(results[0].any()) and torch.equal(results[0] * factor, results[1])


@few
@given(case=sizes, E=st.integers(2, 9), data=st.data())
def test_the_balance_losss_gradient_of_the_logits_sums_to_zero_over_experts(backend, case, E, data, device):
    """Seen through x = 1: the router's gradient is then that of the logits, token by token."""
    K = data.draw(st.integers(1, E - 1))  # with K = E the balance loss is constant
    problem = make_problem(**{**case, "T": case["N"]}, E=E, R=2 * E, K=K)
    problem = replace(problem, x=torch.eye(case["N"], dtype=case["dtype"]))
    with observed_routing(backend) as routings:
        outcome = evaluate(goat_on(device, backend), problem, use_output=False, needs=("router",), balance_share=1.0)
    grad_logits_ET, (routing,) = outcome.gradients["router"], routings
    terms_ET = E / case["N"] * routing.load_E[:, None] * routing.probs_ET  # dL/dp times p, of which the mean is taken
    bound = TOLERANCES[case["dtype"]].relative * terms_ET.double().sum(dim=0).cpu()
    assert bool((grad_logits_ET.double().sum(dim=0).abs() <= bound).all())
    uneven = len(selection_of(routing, problem).sum(dim=0).unique()) > 1
    assert bool(grad_logits_ET.any()) or not uneven
