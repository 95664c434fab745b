"""The oracle is the paper's formula: equal to token-by-token arithmetic in plain Python floats, for any shape of x.

Everything fast is tested against the oracle, so the oracle itself is tested against something with no tensor
operation, no broadcasting and no softmax in it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from goat_problems import TRAINABLE, assert_close, make_problem

from goat_kernels import goat_reference
from goat_kernels.reference import select_top_k


def by_hand(problem, selection=None, masks=None) -> tuple[list[list[float]], float, list[list[int]]]:
    """(y, balance loss, chosen experts per token) with loops over Python floats, for a 2-d x."""
    x, W, A, B = (t.tolist() for t in (problem.x, problem.weight, problem.lora_A, problem.lora_B))
    router = problem.router.tolist()
    T, N, M, R, E, K = len(x), len(W[0]), len(W), len(A), len(router), problem.top_k
    D = R // E
    s = problem.scaling.tolist() if isinstance(problem.scaling, torch.Tensor) else [problem.scaling] * E

    y, chosen_of, counts, mean_probs = [], [], [0] * E, [0.0] * E
    for t in range(T):
        logits = [sum(x[t][n] * router[e][n] for n in range(N)) for e in range(E)]
        if selection is None:
            chosen = sorted(range(E), key=lambda e: (-logits[e], e))[:K]
        else:
            chosen = [e for e in range(E) if bool(selection[t, e])]
        exps = [math.exp(logit) for logit in logits]
        probs = [value / sum(exps) for value in exps]
        kept = sum(probs[e] for e in chosen)
        row = [problem.bias[m].item() if problem.bias is not None else 0.0 for m in range(M)]
        for m in range(M):
            row[m] += sum(W[m][n] * x[t][n] for n in range(N))
            for e in chosen:
                gate = probs[e] / kept  # the paper's form: the softmax's K largest, renormalised
                for j in range(e * D, (e + 1) * D):
                    seen = [x[t][n] * (1.0 if masks is None else masks[e, t, n].item()) for n in range(N)]
                    row[m] += s[e] * gate * B[m][j] * sum(A[j][n] * seen[n] for n in range(N))
            if problem.residual is not None:
                A0, B0 = (part.tolist() for part in problem.residual)
                row[m] -= sum(B0[m][j] * sum(A0[j][n] * x[t][n] for n in range(N)) for j in range(len(A0)))
        y.append(row)
        chosen_of.append(sorted(chosen))
        for e in range(E):
            counts[e] += e in chosen
            mean_probs[e] += probs[e] / T
    balance_loss = E * sum(counts[e] / T * mean_probs[e] for e in range(E))
    return y, balance_loss, chosen_of


def call(problem, **options):
    tensors = (problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.router)
    shared = {"bias": problem.bias, "scaling": problem.scaling, "top_k": problem.top_k, "residual": problem.residual}
    return goat_reference(*tensors, **shared, **options)


HAND_CASES = {
    "typical": {"T": 7},
    "one-token": {"T": 1},
    "no-bias": {"T": 5, "bias": False},
    "scaling-per-expert": {"T": 5, "per_expert": True},
    "residual-of-equal-rank": {"T": 5, "R0": 8},
    "residual-of-other-rank": {"T": 5, "R0": 3, "per_expert": True},
    "one-expert": {"T": 4, "R": 3, "E": 1, "K": 1},
    "every-expert": {"T": 4, "K": 4},
    "rank-one-experts": {"T": 4, "R": 5, "E": 5, "K": 3},
}


@pytest.mark.parametrize("case", HAND_CASES.values(), ids=HAND_CASES.keys())
def test_output_balance_loss_and_selection_equal_arithmetic_by_hand(case):
    problem = make_problem(N=6, M=5, seed=3, **case)
    y, balance_loss, chosen = by_hand(problem)
    result = call(problem)
    assert_close("output", result.output, torch.tensor(y, dtype=torch.float64), torch.float64)
    assert_close("balance loss", result.balance_loss, torch.tensor(balance_loss, dtype=torch.float64), torch.float64)
    assert [row.nonzero().flatten().tolist() for row in result.selection] == chosen
    assert_close("gate rows sum", result.gate.sum(dim=1), torch.ones(problem.x.shape[0]).double(), torch.float64)
    assert bool((result.gate[~result.selection] == 0).all())


def test_a_given_selection_replaces_the_top_k():
    problem = make_problem(T=6, N=6, M=5, seed=4)
    selection = ~select_top_k(problem.logits_TE, 2)  # the two that the router likes least
    y, balance_loss, _ = by_hand(problem, selection=selection)
    result = call(problem, selection=selection)
    assert torch.equal(result.selection, selection)
    assert_close("output", result.output, torch.tensor(y, dtype=torch.float64), torch.float64)
    assert_close("balance loss", result.balance_loss, torch.tensor(balance_loss, dtype=torch.float64), torch.float64)


def test_dropout_masks_act_on_each_experts_input_alone():
    problem = make_problem(T=5, N=6, M=5, R0=3, seed=5)
    masks = (torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(1)) > 0.5).double() * 2
    y, balance_loss, chosen = by_hand(problem, masks=masks)
    result = call(problem, dropout_masks=masks)
    assert_close("output", result.output, torch.tensor(y, dtype=torch.float64), torch.float64)
    assert_close("balance loss", result.balance_loss, torch.tensor(balance_loss, dtype=torch.float64), torch.float64)
    assert [row.nonzero().flatten().tolist() for row in result.selection] == chosen


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions_are_tokens(leading):
    problem = make_problem(leading=leading, R0=3, seed=6)
    flat = replace(problem, x=problem.x.reshape(-1, 13))
    result, expected = call(problem), call(flat)
    assert result.output.shape == (*leading, 11)
    assert torch.equal(result.output.reshape(-1, 11), expected.output)
    assert torch.equal(result.balance_loss, expected.balance_loss)
    assert result.gate.shape == result.selection.shape == (flat.x.shape[0], 4)
    assert bool(torch.isfinite(result.balance_loss))


def test_gradients_equal_central_differences():
    problem = make_problem(T=3, N=4, M=3, R=4, E=2, K=1, R0=2, seed=7)

    def function(*tensors):
        result = call(replace(problem, **dict(zip(TRAINABLE, tensors, strict=True))))
        return result.output, result.balance_loss

    leaves = problem.leaves(TRAINABLE)
    assert torch.autograd.gradcheck(function, tuple(getattr(leaves, name) for name in TRAINABLE))


def test_the_residual_pair_gets_no_gradient():
    problem = make_problem(R0=3)
    A0, B0 = (part.requires_grad_() for part in problem.residual)
    call(replace(problem, x=problem.x.requires_grad_())).output.sum().backward()
    assert A0.grad is None and B0.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_a_dtype_below_float32_raises(dtype):
    problem = make_problem()
    with pytest.raises(TypeError, match=rf"x must be float32 or float64.*{dtype}"):
        call(replace(problem, x=problem.x.to(dtype)))


@pytest.mark.parametrize(
    ("logits", "chosen"),
    [
        ([1.0, 1.0, 1.0, 1.0], [0, 1]),
        ([0.0, 2.0, 2.0, 2.0], [1, 2]),
        ([3.0, 1.0, 0.0, 1.0], [0, 1]),
        ([-math.inf, -math.inf, -math.inf, 0.0], [0, 3]),
        ([-math.inf] * 4, [0, 1]),
        ([math.inf, 0.0, math.nan, math.inf], [0, 2]),
        ([0.0, math.nan, -1.0, math.nan], [1, 3]),
        ([-0.0, 0.0, -1.0, 0.0], [0, 1]),
    ],
    ids=str,
)
def test_ties_go_to_the_lower_index_and_nan_counts_as_largest(logits, chosen):
    selection = select_top_k(torch.tensor([logits], dtype=torch.float64), 2)
    assert selection[0].nonzero().flatten().tolist() == chosen


def test_float32_works_and_keeps_its_dtype():
    problem = make_problem(dtype=torch.float32, R0=3)
    result = call(problem)
    assert result.output.dtype == result.balance_loss.dtype == torch.float32
    assert_close("output", result.output, call(problem.double()).output, torch.float32)
