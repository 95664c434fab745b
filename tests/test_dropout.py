"""Dropout by slot: the masks are fair coins, and the layer applies them as an independent dropout per expert.

The statistics hold the counter hash to what a random mask would give (four standard deviations); the layer is held to
the oracle, which is given the masks expert by expert.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from goat_problems import (
    TRAINABLE,
    assert_close,
    assert_outcomes_agree,
    assert_outcomes_identical,
    evaluate_oracle,
    fast_selection,
    keep_mask,
    make_problem,
    output_weights,
    run_goat,
)
from torch.utils.checkpoint import checkpoint

from goat_kernels import GoatLinear, goat_linear
from goat_kernels.dropout import draw_seed, expert_slots, keep_scale
from goat_kernels.functional import routed_linear

SIGMAS = 4.0
CPU = torch.device("cpu")


def seed_of(s0: int, s1: int) -> torch.Tensor:
    return torch.tensor([s0, s1], dtype=torch.int32)


SEEDS = [(0, 0), (1, 0), (0, 1), (-1, -1), (-(2**31), 2**31 - 1), (123456789, -987654321)]


def centred(mask: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Entries of mean 0 and variance 1 for a fair mask."""
    kept = 1 / keep_scale(dropout_p)
    return (mask.double() - kept) / math.sqrt(kept * (1 - kept))


def deviation(products: torch.Tensor) -> float:
    """How many standard deviations the mean of independent entries of variance 1 is from 0."""
    return abs(float(products.mean())) * math.sqrt(products.numel())


# --- the masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS, ids=str)
@pytest.mark.parametrize("dropout_p", [0.01, 0.05, 0.3, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_p(dropout_p, seed):
    for slot in range(4):
        mask = keep_mask(seed_of(*seed), 300, 257, slot, dropout_p)
        assert mask.shape == (300, 257) and mask.dtype == torch.bool
        assert deviation(centred(mask, dropout_p)) < SIGMAS
        assert abs(float(mask.double().mean()) - (1 - dropout_p)) < SIGMAS / math.sqrt(300 * 257) + 2**-16


@pytest.mark.parametrize("dropout_p", [0.05, 0.5, 1 / 3])
def test_rows_and_columns_are_evenly_dropped(dropout_p):
    z = centred(keep_mask(seed_of(5, 6), 400, 500, 0, dropout_p), dropout_p)
    for axis in (0, 1):
        squares = (z.mean(dim=axis) * math.sqrt(z.shape[axis])).square()  # chi-squared
        assert abs(float(squares.sum()) - len(squares)) < SIGMAS * math.sqrt(2 * len(squares))
        assert float(squares.max()) < (SIGMAS + 1) ** 2


@pytest.mark.parametrize("dropout_p", [0.05, 0.5])
def test_slots_and_seeds_are_independent(dropout_p):
    masks = {
        (*seed, slot): centred(keep_mask(seed_of(*seed), 300, 200, slot, dropout_p), dropout_p)
        for seed in SEEDS
        for slot in range(5)
    }
    worst = max(deviation(masks[a] * masks[b]) for a, b in itertools.combinations(masks, 2))
    assert worst < SIGMAS + 1  # 435 pairs: the largest of them may pass four


@pytest.mark.parametrize("dropout_p", [0.05, 0.5])
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 128])
def test_neighbours_in_rows_and_columns_are_uncorrelated(lag, dropout_p):
    for slot in (0, 1, 2):
        z = centred(keep_mask(seed_of(17, -4), 300, 301, slot, dropout_p), dropout_p)
        assert deviation(z[lag:] * z[:-lag]) < SIGMAS
        assert deviation(z[:, lag:] * z[:, :-lag]) < SIGMAS
        assert deviation(z[lag:, lag:] * z[:-lag, :-lag]) < SIGMAS


@pytest.mark.parametrize(("T", "N"), [(70_000, 8), (8, 70_000)], ids=["many-tokens", "wide"])
def test_masks_do_not_repeat_beyond_two_to_the_sixteen(T, N):
    z = centred(keep_mask(seed_of(9, 9), T, N, 0, 0.5), 0.5)
    assert deviation(z) < SIGMAS
    first, second = (z[: T - 65_536], z[65_536:]) if T > N else (z[:, : N - 65_536], z[:, 65_536:])
    assert deviation(first * second) < SIGMAS
    assert len(z.unique(dim=0 if T < N else 1).flatten()) == z.numel()


def test_a_mask_is_a_function_of_its_arguments():
    a = keep_mask(seed_of(1, 2), 40, 30, 1, 0.3)
    assert torch.equal(a, keep_mask(seed_of(1, 2), 40, 30, 1, 0.3))
    assert torch.equal(a[:20, :10], keep_mask(seed_of(1, 2), 20, 10, 1, 0.3)), "no element depends on T or N"
    higher = keep_mask(seed_of(1, 2), 40, 30, 1, 0.6)
    assert not bool((higher & ~a).any()), "what a higher p keeps, a lower one keeps too"


def test_the_mask_is_the_documented_hash():
    def mix(v, k):
        v ^= v >> 16
        v = v * 0x7FEB352D % 2**32
        v ^= k
        v ^= v >> 15
        v = v * 0x846CA68B % 2**32
        return v ^ (v >> 16)

    s0, s1 = -123456789, 2**31 - 5
    for slot in range(5):
        mask = keep_mask(seed_of(s0, s1), 6, 7, slot, 0.4)
        for t, n in itertools.product(range(6), range(7)):
            key = mix((t ^ s0) % 2**32, s1 % 2**32)
            bits = mix(n * 0x9E3779B1 % 2**32 ^ key, (s1 + (slot // 2) * 0x85EBCA77) % 2**32)
            half = bits >> 16 if slot % 2 else bits & 0xFFFF
            assert bool(mask[t, n]) == (half >= round(0.4 * 65536)), (slot, t, n)


@pytest.mark.parametrize("dropout_p", [1e-9, 1e-5, 0.05, 1 / 3, 0.5, 0.9, 0.999999])
def test_the_scale_is_one_over_the_share_really_kept(dropout_p):
    scale = keep_scale(dropout_p)
    assert math.isfinite(scale) and scale >= 1
    kept = round(65536 / scale)
    assert 65536 / kept == scale, "the share is a whole number of 65536ths"
    assert abs(kept / 65536 - (1 - dropout_p)) <= 2**-16
    mask = keep_mask(seed_of(3, 4), 500, 500, 0, dropout_p)
    if kept == 65536:
        assert bool(mask.all())
    else:
        assert deviation(centred(mask, dropout_p)) < SIGMAS


def test_seeds_come_from_the_global_generator():
    torch.manual_seed(3)
    first, second = draw_seed(CPU), draw_seed(CPU)
    assert first.shape == (2,) and first.dtype == torch.int32
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw_seed(CPU), first)


def test_slots_number_the_active_experts_in_index_order():
    gate = torch.tensor([[0.0, 0.3, 0.0, 0.7], [0.5, 0.5, 0.0, 0.0], [0.2, 0.3, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0]])
    assert expert_slots(gate).tolist() == [[-1, 0, -1, 1], [0, 1, -1, -1], [0, 1, 2, -1], [-1, -1, 0, -1]]


# --- the layer ----------------------------------------------------------------------------------------------------


def expert_masks(problem, seed: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """[E, T, N]: what x is multiplied by in front of each expert, from the documented slots."""
    selection = fast_selection(problem)
    T, E = selection.shape
    N = problem.x.shape[-1]
    masks = torch.zeros(E, T, N, dtype=torch.float64)
    for t in range(T):
        for slot, expert in enumerate(selection[t].nonzero().flatten().tolist()):
            masks[expert, t] = keep_mask(seed, T, N, slot, dropout_p)[t].double() * keep_scale(dropout_p)
    return masks


LAYER_CASES = {
    "typical": {"T": 17},
    "residual": {"T": 17, "R0": 8},
    "residual-of-other-rank": {"T": 15, "R0": 3, "per_expert": True, "bias": False},
    "one-slot": {"T": 9, "K": 1},
    "three-slots": {"T": 9, "R": 6, "E": 6, "K": 3},
    "every-expert": {"T": 9, "K": 4, "R0": 2},
    "one-expert": {"T": 9, "R": 3, "E": 1, "K": 1},
    "one-token": {"T": 1},
    "no-token": {"T": 0},
    "batch": {"leading": (2, 3, 2)},
}


@pytest.mark.parametrize("dropout_p", [0.1, 0.6])
@pytest.mark.parametrize("case", LAYER_CASES.values(), ids=LAYER_CASES.keys())
def test_forward_and_gradients_equal_the_oracle_with_the_same_masks(case, dropout_p):
    problem = make_problem(**case, seed=21)
    torch.manual_seed(77)
    seed = draw_seed(CPU)
    torch.manual_seed(77)
    result = run_goat(problem, dropout_p=dropout_p, training=True)
    oracle = evaluate_oracle(problem, dropout_masks=expert_masks(problem, seed, dropout_p))
    assert_outcomes_agree(result, oracle, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision_equals_the_oracle_with_the_same_masks(dtype):
    problem = make_problem(T=40, R0=5, dtype=dtype, adapter_dtype=torch.float32, seed=22)
    torch.manual_seed(78)
    masks = expert_masks(problem, draw_seed(CPU), 0.3)
    torch.manual_seed(78)
    result = run_goat(problem, dropout_p=0.3, training=True)
    oracle = evaluate_oracle(problem, selection=fast_selection(problem), dropout_masks=masks)
    assert_outcomes_agree(result, oracle, dtype)


@pytest.mark.parametrize("needs", [(name,) for name in TRAINABLE], ids="+".join)
def test_single_gradients_under_dropout_equal_those_of_all(needs):
    problem = make_problem(R0=3)
    torch.manual_seed(5)
    everything = run_goat(problem, dropout_p=0.3, training=True)
    torch.manual_seed(5)
    result = run_goat(problem, needs=needs, dropout_p=0.3, training=True)
    expected = {name: everything.gradients[name] if name in needs else None for name in TRAINABLE}
    assert_outcomes_agree(result, replace(everything, gradients=expected), torch.float64)


@pytest.mark.parametrize(
    "options", [{"dropout_p": 0.5, "training": False}, {"dropout_p": 0.0, "training": True}], ids=["eval", "p-is-zero"]
)
def test_without_dropout_nothing_changes_and_no_seed_is_drawn(options):
    problem = make_problem(R0=3)
    plain = run_goat(problem)
    before = torch.get_rng_state()
    assert_outcomes_identical(run_goat(problem, **options), plain)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_router_and_the_residual_see_x_without_dropout():
    problem = make_problem(R0=3)
    silent = replace(problem, lora_B=torch.zeros_like(problem.lora_B))
    plain, dropped = run_goat(silent), run_goat(silent, dropout_p=0.7, training=True)
    assert_outcomes_agree(replace(dropped, gradients={}), replace(plain, gradients={}), torch.float64)


def test_dropout_is_unbiased_in_the_mean_over_seeds():
    problem = make_problem(T=4, N=7, M=3, seed=1)
    tensors = (problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.router)
    plain = goat_linear(*tensors, scaling=1.0, top_k=2).output
    draws = torch.stack(
        [goat_linear(*tensors, scaling=1.0, top_k=2, dropout_p=0.4, training=True).output for _ in range(600)]
    )
    deviations = (draws.mean(dim=0) - plain) / (draws.std(dim=0) / math.sqrt(len(draws)))
    assert float(deviations.abs().max()) < SIGMAS


def test_two_calls_draw_two_masks_and_one_seed_gives_one():
    problem = make_problem()
    torch.manual_seed(1)
    first = run_goat(problem, dropout_p=0.5, training=True)
    second = run_goat(problem, dropout_p=0.5, training=True)
    torch.manual_seed(1)
    again = run_goat(problem, dropout_p=0.5, training=True)
    assert not torch.equal(first.output, second.output)
    assert_outcomes_identical(first, again)


def test_dropout_works_onto_a_base_output():
    problem = make_problem(R0=3)
    tensors = (problem.x, problem.lora_A, problem.lora_B, problem.router)
    options = {"scaling": 1.7, "top_k": 2, "dropout_p": 0.4, "residual": problem.residual}
    torch.manual_seed(2)
    by_weight = routed_linear(*tensors, weight=problem.weight, **options).output
    torch.manual_seed(2)
    base = torch.nn.functional.linear(problem.x, problem.weight)
    by_base = routed_linear(*tensors, base_output=base, **options).output
    assert_close("output", by_base, by_weight, torch.float64)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("balance_coefficient", [0.0, 0.5])
def test_activation_checkpointing_sees_the_same_mask(use_reentrant, balance_coefficient):
    torch.manual_seed(0)
    options = {"r": 8, "num_experts": 4, "dropout": 0.4, "balance_coefficient": balance_coefficient}
    layer = GoatLinear(13, 11, dtype=torch.float64, **options)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(9, 13, dtype=torch.float64)

    def run(checkpointed):
        layer.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(6)
        output = checkpoint(layer, leaf, use_reentrant=use_reentrant) if checkpointed else layer(leaf)
        torch.rand(3)  # the generator moves on before the recomputation
        (output * output_weights(output)).sum().backward()
        return [output.detach(), leaf.grad, *(p.grad for p in (layer.lora_A, layer.lora_B, layer.router))]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))
