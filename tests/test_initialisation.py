"""Initialisation puts the singular triples that each rule names into each expert, at the scaling the rules give.

Weights are built from known U, S, V, so that "which triples" is a comparison with numbers that were put in. Every rule
keeps the pretrained layer at gates of 1/E; s * B0_i A0_i does not depend on s; failures name the module.
"""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from goat_problems import assert_close

from goat_kernels import AdapterSettings, goat_linear, goat_reference
from goat_kernels.initialisation import (
    adapter_scaling,
    check_weight,
    initialise_adapter,
    randomized_svd,
)
from goat_kernels.numerics import TOLERANCES, relative_error

SVD_RULES = ("goat", "goat_mini", "pissa", "milora", "pissa_milora", "random")
ALL_RULES = (*SVD_RULES, "lora", "hydralora")
SCALINGS = ("goat", "goat_s", "lora", "rslora", 7.5)

#: Experts and rank of one expert, the triples [E][D] of each rule from h = 19 singular values in descending order,
#: written out by hand from goat.md: chunks of t = 19 // 4 = 4.
E, D, H = 4, 2, 19
SEGMENTS = {
    "goat": [[0, 1], [4, 5], [8, 9], [12, 13]],
    "goat_mini": [[2, 3], [6, 7], [10, 11], [14, 15]],
    "pissa": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "milora": [[11, 12], [13, 14], [15, 16], [17, 18]],
    "pissa_milora": [[0, 1], [2, 3], [15, 16], [17, 18]],
}


def settings(**options) -> AdapterSettings:
    return AdapterSettings(**{"r": E * D, "num_experts": E, "top_k": 2, **options})


def weight_with_spectrum(M: int, N: int, S: torch.Tensor, seed: int = 0):
    """(W, U, S, Vt) with W = U diag(S) Vt, float64."""
    generator = torch.Generator().manual_seed(seed)
    h = len(S)
    U = torch.linalg.qr(torch.randn(M, h, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(N, h, generator=generator, dtype=torch.float64)).Q
    return U @ torch.diag(S.double()) @ V.T, U, S.double(), V.T


def known_weight(M: int = 23, N: int = H):
    """Distinct singular values 19, 18, ... 1."""
    return weight_with_spectrum(M, N, torch.arange(min(M, N), 0, -1))


def expert(initial, i: int):
    return initial.lora_A[i * D : (i + 1) * D], initial.lora_B[:, i * D : (i + 1) * D]


def scaling_of(initial) -> torch.Tensor:
    """s per expert [E], float64."""
    return torch.as_tensor(initial.scaling, dtype=torch.float64).expand(E)


# --- segments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize(("M", "N"), [(23, 19), (19, 23), (19, 19)])
@pytest.mark.parametrize("init", SEGMENTS)
def test_each_expert_holds_the_segment_that_the_rule_names(init, M, N, scaling):
    W, U, S, Vt = weight_with_spectrum(M, N, torch.arange(H, 0, -1))
    rho = 20.0
    initial = initialise_adapter(W, settings(init=init, scaling=scaling, rho=rho))
    s = scaling_of(initial)
    for i, triples in enumerate(SEGMENTS[init]):
        A, B = expert(initial, i)
        segment = U[:, triples] @ torch.diag(S[triples]) @ Vt[triples]
        assert_close(f"s B A of expert {i}", s[i] * B @ A, segment / rho, torch.float64)
        for j, triple in enumerate(triples):  # rank by rank: column j of B and row j of A are triple j, evenly split
            size = (S[triple] / (s[i] * rho)).sqrt()
            assert_close("size of A's row", A[j].norm(), size, torch.float64)
            assert_close("size of B's column", B[:, j].norm(), size, torch.float64)
            assert_close("A's direction", (A[j] @ Vt[triple]).abs(), size, torch.float64)
            assert_close("B's direction", (B[:, j] @ U[:, triple]).abs(), size, torch.float64)


def test_random_draws_distinct_triples_by_its_seed_alone():
    W, _, _, Vt = known_weight()

    def drawn(seed):
        torch.manual_seed(seed + 100)  # the global generator must not matter
        initial = initialise_adapter(W, settings(init="random", seed=seed))
        matches = ((initial.lora_A @ Vt.T).abs() / initial.lora_A.norm(dim=1, keepdim=True)).max(dim=1)
        assert_close("each row is one triple", matches.values, torch.ones(E * D).double(), torch.float64)
        return matches.indices.tolist()

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert first == again != other
    assert len(set(first)) == E * D
    assert {i for seed in range(20) for i in drawn(seed)} == set(range(H)), "every triple can be drawn"


@pytest.mark.parametrize(("init", "rows"), [("lora", E * D), ("hydralora", D)])
def test_zero_rules_start_at_b_zero_with_kaiming_a(init, rows):
    N = 64
    W = torch.randn(48, N)
    initial = initialise_adapter(W, settings(init=init))
    assert initial.lora_A.shape == (rows, N), "hydralora shares one A among its experts"
    assert initial.lora_B.shape == (48, E * D) and not bool(initial.lora_B.any())
    assert initial.residual is None
    bound = 1 / math.sqrt(N)  # Kaiming-uniform with a = sqrt(5)
    assert bound / 2 < float(initial.lora_A.abs().max()) <= bound
    assert len(initial.lora_A.unique()) > rows * N / 2


@pytest.mark.parametrize("init", ALL_RULES)
def test_the_router_starts_as_nn_linear_does(init):
    W = torch.randn(48, 64)
    torch.manual_seed(4)
    initial = initialise_adapter(W, settings(init=init))
    assert initial.router.shape == (E, 64)
    assert 0.5 / 8 < float(initial.router.abs().max()) <= 1 / 8
    if init in SVD_RULES:  # the router is then the one draw from the generator
        torch.manual_seed(4)
        assert torch.equal(initial.router, torch.nn.Linear(64, E, bias=False).weight)


# --- scaling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "rank", "listed"), [(4096, 1, 110.9), (768, 1, 48.0), (1024, 4, 27.7)])
def test_the_listed_values_of_s(N, rank, listed):
    s = adapter_scaling(AdapterSettings(r=8 * rank), N, None)
    assert round(s, 1) == listed


def test_every_scaling_rule_is_its_formula():
    W, _, S, _ = known_weight(M=23, N=19)

    def s(**options):
        return scaling_of(initialise_adapter(W, settings(**options)))

    eta, alpha = 0.1, 24.0
    theorem = math.sqrt(3 * eta * 19 / D)
    assert_close("goat", s(eta=eta), torch.full((E,), theorem).double(), torch.float32)
    assert_close("lora", s(scaling="lora", lora_alpha=alpha), torch.full((E,), alpha / D).double(), torch.float64)
    expected = torch.full((E,), alpha / math.sqrt(D), dtype=torch.float64)
    assert_close("rslora", s(scaling="rslora", lora_alpha=alpha), expected, torch.float64)
    assert s(scaling=3).tolist() == [3.0] * E

    sums = torch.stack([S[triples].sum() for triples in SEGMENTS["goat"]])
    expected = theorem * (sums[0] / sums).sqrt()
    found = s(scaling="goat_s", eta=eta)
    assert_close("goat_s", found, expected, torch.float32)
    assert len(found.unique()) == E


@pytest.mark.parametrize("init", SVD_RULES)
def test_s_times_b_a_does_not_depend_on_s(init):
    W = torch.randn(23, 19, dtype=torch.float64)
    products = []
    for scaling in SCALINGS:
        initial = initialise_adapter(W, settings(init=init, scaling=scaling))
        s = scaling_of(initial)
        products.append(torch.stack([s[i] * expert(initial, i)[1] @ expert(initial, i)[0] for i in range(E)]))
    for product in products[1:]:
        assert_close("s B A", product, products[0], torch.float64)


# --- the residual -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["path", "fold"])
@pytest.mark.parametrize(
    ("init", "scaling"),
    [(i, s) for i in ALL_RULES for s in SCALINGS if i in SVD_RULES or s != "goat_s"],  # goat_s compares segments
)
def test_with_all_gates_at_one_over_e_the_layer_is_the_pretrained_layer(init, scaling, form):
    W = torch.randn(23, 19, dtype=torch.float64)
    bias = torch.randn(23, dtype=torch.float64)
    x = torch.randn(9, 19, dtype=torch.float64)
    initial = initialise_adapter(W, settings(init=init, scaling=scaling))
    base, residual = W, initial.residual
    if form == "fold" and residual is not None:
        base, residual = W - residual[1] @ residual[0], None
    lora_A = initial.lora_A.repeat(E, 1) if init == "hydralora" else initial.lora_A
    router = torch.zeros_like(initial.router)  # with K = E every gate is 1/E
    shared = {"bias": bias, "scaling": initial.scaling, "top_k": E, "residual": residual}
    for function in (goat_linear, goat_reference):
        output = function(x, base, lora_A, initial.lora_B, router, **shared).output
        assert_close(function.__name__, output, F.linear(x, W, bias), torch.float64)


@pytest.mark.parametrize("scaling", ["goat", "goat_s"])
@pytest.mark.parametrize("coefficient", [None, 0.25, 1.0, 0.0])
def test_the_residual_coefficient_scales_w_res(coefficient, scaling):
    W = torch.randn(23, 19, dtype=torch.float64)
    initial = initialise_adapter(W, settings(residual_coefficient=coefficient, scaling=scaling))
    s = scaling_of(initial)
    total = sum(s[i] * expert(initial, i)[1] @ expert(initial, i)[0] for i in range(E))
    if coefficient == 0.0:
        assert initial.residual is None
    else:
        A0, B0 = initial.residual
        assert_close("W_res", B0 @ A0, (1 / E if coefficient is None else coefficient) * total, torch.float64)


def test_the_residual_pair_shares_no_memory_with_the_trainable_pair():
    initial = initialise_adapter(torch.randn(23, 19), settings())
    kept = [part.clone() for part in initial.residual]
    initial.lora_A.zero_()
    initial.lora_B.zero_()
    assert all(torch.equal(a, b) for a, b in zip(initial.residual, kept, strict=True))


# --- dtypes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_svd_runs_in_float32_or_better(monkeypatch, dtype):
    W = torch.randn(23, 19).to(dtype)
    seen = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda matrix, **kw: seen.append(matrix.dtype) or svd(matrix, **kw))
    initial = initialise_adapter(W, settings())
    wide = torch.promote_types(dtype, torch.float32)
    assert seen == [wide]
    tensors = (initial.lora_A, initial.lora_B, initial.router, *initial.residual)
    assert {tensor.dtype for tensor in tensors} == {wide}
    exact = initialise_adapter(W.double(), settings())
    assert_close("A^T A", initial.lora_A.T @ initial.lora_A, exact.lora_A.T @ exact.lora_A, wide)
    assert_close("B B^T", initial.lora_B @ initial.lora_B.T, exact.lora_B @ exact.lora_B.T, wide)


def test_the_result_takes_the_dtype_asked_for():
    initial = initialise_adapter(torch.randn(23, 19), settings(scaling="goat_s"), dtype=torch.bfloat16)
    tensors = (initial.lora_A, initial.lora_B, initial.router, *initial.residual)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert initial.scaling.dtype == torch.float32


def test_the_weight_is_not_changed_and_may_require_grad_and_have_any_strides():
    W = torch.randn(19, 23).t().requires_grad_()
    kept = W.detach().clone()
    initial = initialise_adapter(W, settings())
    assert torch.equal(W, kept) and W._version == 0
    assert not any(t.requires_grad for t in (initial.lora_A, initial.lora_B, initial.router, *initial.residual))
    contiguous = initialise_adapter(kept.contiguous(), settings())
    assert_close("B A", initial.lora_B @ initial.lora_A, contiguous.lora_B @ contiguous.lora_A, torch.float32)


# --- failures and warnings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", SVD_RULES)
def test_too_few_singular_values_name_the_module_and_the_way_out(init):
    too_much = settings(init=init, r=20, num_experts=4)  # 5 triples for each of 4 experts out of 19
    with pytest.raises(ValueError, match=r"blocks\.3\.mlp.*\(23, 19\).*19 singular values.*r=20") as error:
        initialise_adapter(torch.randn(23, 19), too_much, name="blocks.3.mlp")
    for word in ("rank_pattern", "exclude_modules", repr(init), "at most 16"):
        assert word in str(error.value)
    initialise_adapter(torch.randn(23, 19), settings(init=init, r=16, num_experts=4))  # the stated maximum works


def test_zero_rules_have_no_limit_on_the_rank():
    for init in ("lora", "hydralora"):
        assert initialise_adapter(torch.randn(3, 2), settings(init=init)).lora_B.shape == (3, E * D)


BAD_WEIGHTS = {
    "integer": (torch.ones(23, 19, dtype=torch.int8), TypeError, "layer.1 must be floating-point.*torch.int8"),
    "three-dimensional": (torch.ones(2, 23, 19), ValueError, r"layer.1 must be a matrix.*\(2, 23, 19\)"),
    "vector": (torch.ones(23), ValueError, r"layer.1 must be a matrix.*\(23,\)"),
    "not-finite": (torch.full((23, 19), math.nan), ValueError, "layer.1.*not finite"),
}


@pytest.mark.parametrize(("weight", "error", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_a_bad_weight_is_named(weight, error, message):
    with pytest.raises(error, match=message):
        initialise_adapter(weight, settings(), name="layer.1")


def test_a_segment_of_zero_singular_values_warns_by_name():
    S = torch.zeros(H)
    S[:10] = torch.arange(10, 0, -1)  # rank 10: the chunks of experts 0..2 start at 0, 4, 8; that of 3 at 12
    W, *_ = weight_with_spectrum(23, 19, S)
    with pytest.warns(UserWarning, match=r"head\.0.*experts \[3\].*never learn"):
        initialise_adapter(W, settings(), name="head.0")
    with pytest.warns(UserWarning, match=r"experts \[3\]"):
        initialise_adapter(W.float(), settings())
    with pytest.raises(ValueError, match=r"goat_s.*\[0, 1, 2, 3\]"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        initialise_adapter(torch.zeros(23, 19), settings(scaling="goat_s"))


def test_a_full_rank_weight_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initialise_adapter(torch.randn(23, 19), settings())
        initialise_adapter(torch.randn(23, 19), settings(init="lora"))


# --- the randomised decomposition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "goat"])
def test_the_randomised_svd_matches_the_full_one_on_a_decaying_spectrum(init):
    W, *_ = weight_with_spectrum(90, 70, 0.9 ** torch.arange(70.0))
    options = {"init": init, "r": 8, "num_experts": 1, "top_k": 1}
    full = initialise_adapter(W, AdapterSettings(**options))
    partial = initialise_adapter(W, AdapterSettings(**options, svd="randomized"))
    assert full.svd_error == 0.0
    error = relative_error(partial.lora_B @ partial.lora_A, full.lora_B @ full.lora_A)
    # svd_error is ||W V - U S|| over ||S||: a subspace is off by that residual over the gap to the next triple, twice.
    S = 0.9 ** torch.arange(70.0, dtype=torch.float64)
    over_the_gap = 2 * partial.svd_error * float(S[:8].norm() / (S[7] - S[8]))
    assert partial.svd_error > 0 and error <= over_the_gap + TOLERANCES[torch.float64].relative


def test_the_stated_error_is_the_one_measured():
    W = torch.randn(60, 50, dtype=torch.float64)  # a flat spectrum, where it is not negligible
    U, S, Vt, error = randomized_svd(W, 6)
    measured = float((W @ Vt.T - U * S).norm() / S.norm())
    assert error == pytest.approx(measured)
    assert U.shape == (60, 6) and S.shape == (6,) and Vt.shape == (6, 50)
    assert bool((S[:-1] >= S[1:]).all())
    assert_close("U^T U", U.T @ U, torch.eye(6).double(), torch.float64)
    assert_close("V^T V", Vt @ Vt.T, torch.eye(6).double(), torch.float64)


@pytest.mark.parametrize("init", [rule for rule in SVD_RULES if rule != "pissa"])
def test_the_randomised_svd_refuses_rules_that_need_other_triples(init):
    with pytest.raises(ValueError, match=rf"svd='randomized'.*init='{init}'.*svd='full'"):
        initialise_adapter(torch.randn(23, 19), settings(init=init, svd="randomized"))


# --- random numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("init", "svd"), [*((init, "full") for init in ALL_RULES), ("pissa", "randomized")])
def test_a_generator_makes_the_draws_reproducible_and_leaves_the_global_one_alone(init, svd):
    W = torch.randn(23, 19)
    chosen = settings(init=init, svd=svd)

    def draw(seed, global_seed):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        initial = initialise_adapter(W, chosen, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        return initial

    first, again, other = draw(1, 10), draw(1, 20), draw(2, 10)
    assert torch.equal(first.router, again.router) and torch.equal(first.lora_A, again.lora_A)
    assert not torch.equal(first.router, other.router)
    if init in ("lora", "hydralora"):
        assert not torch.equal(first.lora_A, other.lora_A)


def test_check_weight_reads_no_values():
    check_weight(torch.empty(23, 19, device="meta"), settings())
    with pytest.raises(ValueError, match="singular values"):
        check_weight(torch.empty(3, 3, device="meta"), settings())


def test_every_rule_uses_each_triple_at_most_once():
    shapes = ((2, 1, 1), (19, 4, 2), (16, 4, 4), (7, 1, 7), (33, 8, 4))
    for init, (h, experts, rank) in itertools.product(SVD_RULES, shapes):
        W, _, _, Vt = weight_with_spectrum(h, h, torch.arange(h, 0, -1))
        initial = initialise_adapter(W, AdapterSettings(init=init, r=experts * rank, num_experts=experts, top_k=1))
        used = (initial.lora_A @ Vt.T).abs().argmax(dim=1).tolist()
        assert len(set(used)) == experts * rank, (init, h, experts, rank)
