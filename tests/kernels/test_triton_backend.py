"""``goat_linear`` and ``routed_linear`` on the Triton backend compute the oracle's function and its gradients.

Agreement in every dtype over a wide set of shapes and in all forms of the passes, never more than twice the error of
torch; routing at ties and infinities and over many tokens; every subset of gradients and the launches it leaves out;
strides; dropout against the torch backend; the ways of calling it. Without a GPU in Triton's interpreter.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from goat_problems import (
    BALANCE_SHARE,
    TRAINABLE,
    Outcome,
    assert_close,
    assert_outcomes_agree,
    assert_outcomes_identical,
    evaluate,
    evaluate_oracle,
    make_problem,
    output_weights,
    selection_mismatch,
)
from torch.utils.checkpoint import checkpoint
from triton_cases import (
    MANY_PROCESSORS,
    ONE_PROCESSOR,
    WEIGHT_OUTPUTS,
    Recorder,
    assert_same_kernels,
    audited,
    errors,
    expert_masks,
    goat_on,
    run_triton,
    selection_of,
)

from goat_kernels import GoatLinear, goat_linear
from goat_kernels.functional import routed_linear
from goat_kernels.kernels.passes import TritonPasses
from goat_kernels.numerics import SELECTION_GAP
from goat_kernels.passes import Adapter
from goat_kernels.reference import select_top_k

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
HALF = {"dtype": BF16, "adapter_dtype": F32}
SEED = torch.tensor([-123456789, 987654321], dtype=torch.int32)

#: Enough tokens for any form; the target decides which.
FORMS = {"few": (30, None), "fused": (70, ONE_PROCESSOR), "staged": (70, MANY_PROCESSORS)}


def random_cases(count: int) -> list[dict]:
    """Shapes and options: every value of each list is used, in random company."""
    rng = random.Random(16894)
    tokens, experts = (0, 1, 15, 17, 64, 65, 129), (1, 2, 3, 5, 8, 16, 17)
    cases = []
    for i in range(count):
        E = experts[(i + i // 7) % 7]
        R = E * rng.choice((1, 1, 2, 3, 5))
        cases.append(
            {
                "T": tokens[i % 7],
                "N": rng.choice((1, 5, 16, 33, 67)),
                "M": rng.choice((1, 7, 16, 29, 65)),
                "R": R,
                "E": E,
                "K": (1, E, rng.randint(1, E))[i % 3],
                "R0": (None, R, rng.choice((1, R + 3)))[(i // 2) % 3],
                "bias": rng.random() < 0.5,
                "per_expert": rng.random() < 0.5,
                "dtype": rng.choice((F32, F16, BF16)),
                "adapter_dtype": rng.choice((F32, None)),
                "seed": i,
            }
        )
    return cases


CASES = random_cases(42)
CASE_IDS = ["-".join(f"{key}{value}" for key, value in case.items()) for case in CASES]


# --- agreement with the oracle ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_output_balance_loss_and_gradients_equal_the_oracle(case, device):
    problem = make_problem(**case)
    target = (None, ONE_PROCESSOR, MANY_PROCESSORS)[case["seed"] % 3]
    outcome, recorder = run_triton(problem, device, target, observer=Recorder(), onto_base=case["seed"] % 4 == 3)
    oracle = evaluate_oracle(problem, selection=selection_of(recorder, problem))
    assert_outcomes_agree(outcome, oracle, problem.x.dtype)
    assert outcome.output.dtype == problem.x.dtype and outcome.balance_loss.dtype == F32
    for name in problem.present():
        assert outcome.gradients[name].dtype == getattr(problem, name).dtype, name


@pytest.mark.long
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [{}, {"R0": 8, "per_expert": True, "K": 3}], ids=["plain", "residual"])
def test_the_error_is_at_most_twice_that_of_torch_in_the_same_dtype(case, form, dtype, device):
    """Where torch makes almost no error (one product, the balance loss), four roundings of float32 are allowed."""
    T, target = FORMS[form]
    case = {"N": 67, "M": 65, "R": 16, "E": 8, **case, "dtype": dtype, "adapter_dtype": F32}
    problem = make_problem(2 * T if form != "few" else T, **case, seed=3)
    outcome, recorder = run_triton(problem, device, target, observer=Recorder())
    selection = select_top_k(problem.logits_TE, problem.top_k)
    assert torch.equal(selection_of(recorder, problem), selection), "a near tie: choose another seed"
    oracle = evaluate_oracle(problem, selection=selection)
    found, torchs = errors(outcome, oracle), errors(evaluate(goat_on(device, "torch"), problem), oracle)
    floor = 4 * torch.finfo(F32).eps
    worse = {name: (found[name], torchs[name]) for name in found if found[name] > max(2 * torchs[name], floor)}
    assert not worse, "name: (error, torch's)"


@pytest.mark.long
def test_one_hot_expert_and_experts_without_tokens(device):
    for T, target in FORMS.values():
        problem = make_problem(T, N=21, M=9, R=8, E=4, K=1, R0=3, **HALF)
        router = torch.tensor([-1.0, -1, 1, -1])[:, None] * problem.router.abs()
        problem = replace(problem, x=problem.x.abs(), router=router)
        outcome, recorder = run_triton(problem, device, target, observer=Recorder())
        selection = selection_of(recorder, problem)
        assert selection.sum(dim=0).tolist() == [0, 0, T, 0]
        assert_outcomes_agree(outcome, evaluate_oracle(problem, selection=selection), BF16)
        unused = torch.tensor([True, True, False, True]).repeat_interleave(2)
        assert not bool(outcome.gradients["lora_A"][unused].any())
        assert not bool(outcome.gradients["lora_B"][:, unused].any())
        assert bool(outcome.gradients["lora_A"][~unused].any())


@pytest.mark.long
@pytest.mark.parametrize(("use_output", "balance_share"), [(True, 0.0), (False, 1.0)], ids=["output", "balance"])
@pytest.mark.parametrize("form", FORMS)
def test_each_result_differentiates_alone(form, use_output, balance_share, device):
    T, target = FORMS[form]
    problem = make_problem(T, N=21, M=9, R0=3, **HALF, seed=2)
    options = {"use_output": use_output, "balance_share": balance_share}
    outcome, recorder = run_triton(problem, device, target, observer=Recorder(), **options)
    oracle = evaluate_oracle(problem, selection=selection_of(recorder, problem), **options)
    for name, gradient in oracle.gradients.items():
        # A tensor that the loss does not depend on may get None or zeros.
        expected = torch.zeros_like(getattr(problem, name)) if gradient is None else gradient
        found = outcome.gradients[name]
        assert_close(name, torch.zeros_like(expected) if found is None else found, expected, BF16)


@pytest.mark.parametrize("form", FORMS)
def test_a_balance_loss_too_small_for_float16_still_reaches_the_router(form, device):
    T, target = FORMS[form]
    problem = make_problem(T, N=21, M=9, dtype=F16, adapter_dtype=F32, seed=2)
    options = {"use_output": False, "balance_share": 1e-5, "needs": ("router",)}
    outcome, recorder = run_triton(problem, device, target, observer=Recorder(), **options)
    oracle = evaluate_oracle(problem, selection=selection_of(recorder, problem), **options)
    assert float(oracle.gradients["router"].abs().max()) < torch.finfo(F16).tiny
    assert_close("router", outcome.gradients["router"], oracle.gradients["router"], F16)


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_an_injected_balance_loss_is_read_in_backward(form, scale, device):
    T, target = FORMS[form]
    problem = make_problem(T, N=21, M=9, R0=3, dtype=F32)
    expected = evaluate_oracle(problem, balance_share=0.5 * (scale or 1.0)).gradients
    leaves = problem.map(lambda t: t.to(device)).leaves(TRAINABLE)
    balance_scale = None if scale is None else torch.tensor(1.0, device=device)
    with audited(target, Recorder()) as recorder:
        routed = routed_linear(
            *(leaves.x, leaves.lora_A, leaves.lora_B, leaves.router),
            weight=leaves.weight,
            bias=leaves.bias,
            scaling=problem.scaling,
            top_k=problem.top_k,
            residual=leaves.residual,
            balance_coefficient=0.5,
            balance_scale=balance_scale,
            backend="triton",
        )
        if scale is not None:
            balance_scale.fill_(scale)  # as a trainer does between forward and backward
        routed.output.backward(output_weights(routed.output).to(routed.output))
    assert recorder.names[-2:] == ["weight_gradient", "expand_columns"]
    for name in TRAINABLE:
        assert_close(name, getattr(leaves, name).grad.cpu(), expected[name], F32)


# --- routing ------------------------------------------------------------------------------------------------------


def forward_of(problem, device, target):
    """(y0 [T, M], routing) of the prefill alone, on the CPU; no residual, no bias."""
    problem = problem.map(lambda t: t.to(device))
    adapter = Adapter(
        *(problem.lora_A, problem.lora_B, problem.router, None, None, problem.scaling, None, problem.top_k, 0.0, None)
    )
    with audited(target, Recorder()):
        y0, _, routing = TritonPasses().prefill(problem.x, adapter, None, None)
    return y0.cpu(), routing._replace(**{name: getattr(routing, name).cpu() for name in routing._fields})


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "dtype"),
    [(ONE_PROCESSOR, F16), (ONE_PROCESSOR, BF16), (MANY_PROCESSORS, BF16)],
    ids=["fused-float16", "fused-bfloat16", "staged-bfloat16"],
)
def test_half_precision_input_selects_as_float32_does(dtype, target, device):
    problem = make_problem(T=2100, N=64, M=3, R=8, E=8, K=2, dtype=dtype, adapter_dtype=F32, seed=22)
    if dtype == F16:  # weights among float16's smallest numbers, whose rounding is coarse
        problem = replace(problem, router=problem.router * 1e-3)
    _, routing = forward_of(problem, device, target)
    logits = problem.logits_TE
    assert selection_mismatch(logits, routing.gate_ET.t() > 0, 2) <= SELECTION_GAP[F32]
    rounded = problem.x.double() @ problem.router.to(dtype).double().t()
    mismatch = selection_mismatch(logits, select_top_k(rounded, 2), 2)
    assert mismatch > 10 * SELECTION_GAP[F32], "the test would not notice a router without its low part"
    assert_close("probs", routing.probs_ET.t(), torch.softmax(logits, dim=1), F32)


def tied_routers() -> dict[str, torch.Tensor]:
    # Multiples of 1/32: products with small integers are exact in any order, and so are the ties.
    row = torch.linspace(-6, 6, 13) / 32
    integers = torch.randint(-1, 2, (4, 13), generator=torch.Generator().manual_seed(0)) / 8.0
    return {
        "zero": torch.zeros(4, 13),
        "equal-rows": row.repeat(4, 1),
        "pairs-of-equal-rows": torch.stack([row, -row, row, -row]),
        "integers": integers,
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", tied_routers())
def test_ties_go_to_the_lower_index_as_in_the_torch_backend(name, form, device):
    T, target = FORMS[form]
    for dtype, K in ((F32, 1), (BF16, 2), (F32, 3)):
        problem = make_problem(T, K=K, M=3, dtype=dtype, adapter_dtype=F32)
        x = torch.randint(-2, 3, (T, 13), generator=torch.Generator().manual_seed(1)).to(dtype)
        problem = replace(problem, x=x, router=tied_routers()[name])
        _, routing = forward_of(problem, device, target)
        expected = select_top_k(problem.logits_TE, K)
        assert torch.equal(routing.gate_ET.t() > 0, expected)
        assert torch.equal(routing.load_E, expected.float().mean(dim=0))
        load = routed_linear(
            *(problem.x, problem.lora_A, problem.lora_B, problem.router),
            **{"weight": problem.weight, "scaling": 1.0, "top_k": K, "backend": "torch"},
        ).load
        assert_close("load", routing.load_E, load, F32)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_logits_of_minus_infinity_choose_k_experts_and_keep_gradients_finite(K, form, device):
    T, target = FORMS[form]
    problem = make_problem(T, K=K, dtype=F32)
    router = torch.full((4, 13), -torch.finfo(F32).max / 4)
    router[2] = problem.router[2]  # the only finite logit
    problem = replace(problem, x=problem.x.abs() + 1, router=router)
    outcome, recorder = run_triton(problem, device, target, observer=Recorder())
    load = [v.arguments["load_ptr"] for v in recorder.launches if "load_ptr" in v.arguments][-1].cpu()
    assert torch.equal(load, select_top_k(problem.x @ router.t(), K).float().mean(dim=0))
    expected = evaluate(goat_on(device, "torch"), problem)
    assert bool(torch.isfinite(outcome.output).all())
    for name in TRAINABLE:
        assert bool(torch.isfinite(outcome.gradients[name]).all()), name
    assert_outcomes_agree(outcome, expected, F32)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_nan_logit_counts_as_the_largest(form, dtype, device):
    T, target = FORMS[form]
    problem = make_problem(T, M=3, K=2, dtype=dtype, adapter_dtype=F32)
    router = problem.router.clone()
    router[3] = math.nan
    y0, routing = forward_of(replace(problem, router=router), device, target)
    others = select_top_k(problem.logits_TE[:, :3], 1).float().mean(dim=0)
    torch.testing.assert_close(routing.load_E, torch.cat([others, torch.ones(1)]))
    assert bool(torch.isnan(y0).any()), "a NaN must not be hidden"


@pytest.mark.long
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("form", FORMS)
def test_a_token_that_is_not_finite_spoils_its_own_output_alone(form, value, device):
    T, target = FORMS[form]
    problem = make_problem(T, N=33, M=19, R0=3, **HALF)
    x = problem.x.clone()
    x[3, 32], x[T - 1, 0] = value, value
    clean, _ = run_triton(problem, device, target, observer=Recorder(), needs=())
    spoilt, _ = run_triton(replace(problem, x=x), device, target, observer=Recorder(), needs=())
    is_finite = torch.isfinite(spoilt.output).all(dim=1)
    assert is_finite.nonzero().flatten().tolist() == [t for t in range(T) if t not in (3, T - 1)]
    assert torch.equal(spoilt.output[is_finite], clean.output[is_finite])


@pytest.mark.long
@pytest.mark.parametrize("size", [60.0, 2000.0])
def test_large_logits_do_not_overflow(size, device):
    problem = make_problem(T=40, K=2, seed=9, dtype=F32)
    problem = replace(problem, router=problem.router * size)
    outcome, recorder = run_triton(problem, device, observer=Recorder())
    assert bool(torch.isfinite(outcome.gradients["router"]).all())
    needs = tuple(name for name in TRAINABLE if name != "router")  # the router's gradient is all cancellation here
    outcome, recorder = run_triton(problem, device, observer=Recorder(), needs=needs)
    oracle = evaluate_oracle(problem, selection=selection_of(recorder, problem), needs=needs)
    # A gate's error is that of the logit, which is some hundreds: so many roundings of it.
    for name, error in errors(outcome, oracle).items():
        assert error < size * 1e-6, name


# --- only the gradients asked for ---------------------------------------------------------------------------------

SUBSETS = [s for size in range(7) for s in itertools.combinations(TRAINABLE, size)]
ADAPTER_SUBSETS = [s for s in SUBSETS if not {"weight", "bias"} & set(s)]


def launches_for(needs: tuple[str, ...], hidden_gradient: list[str], R0: int) -> list[tuple]:
    """(kernel, what tells its launches apart) of a backward, in order."""
    expected = []
    if {"x", "lora_A", "router"} & set(needs):
        expected += [(name, R0 if "x" in needs else 0) for name in hidden_gradient]
    weights = [name in needs for name in ("lora_B", "lora_A", "router")]
    if any(weights):
        expected.append(("weight_gradient", *weights))
    if "x" in needs:
        expected.append(("expand_columns", R0))
    return expected


def described(launch) -> tuple:
    constants = launch.constants
    if launch.name in ("weight_gradient", "add_splits"):
        return (launch.name, *(launch.arguments[name] is not None for name in WEIGHT_OUTPUTS))
    return (launch.name, constants["C2"] if launch.name == "project" else constants.get("R0", 0))


def assert_subset(outcome: Outcome, everything: Outcome, needs: tuple[str, ...]) -> None:
    """Bit for bit what all gradients together give; lora_B's may have been summed in another order."""
    gradients = {name: everything.gradients[name] if name in needs else None for name in TRAINABLE}
    if "lora_B" in needs:
        assert_close("lora_B", outcome.gradients["lora_B"], gradients.pop("lora_B"), F32)
    assert outcome.gradients.keys() == everything.gradients.keys()
    outcome = replace(outcome, gradients={name: outcome.gradients[name] for name in gradients})
    assert_outcomes_identical(outcome, replace(everything, gradients=gradients))


@pytest.mark.long
@pytest.mark.parametrize("R0", [None, 3], ids=["fold", "path"])
@pytest.mark.parametrize("size", range(7))
def test_every_subset_of_gradients_launches_what_it_needs_and_equals_all(size, R0, device):
    problem = make_problem(T=9, R0=R0, dtype=F32, seed=8)
    everything, _ = run_triton(problem, device, observer=Recorder())
    for needs in (s for s in (SUBSETS if R0 else ADAPTER_SUBSETS) if len(s) == size):
        outcome, recorder = run_triton(problem, device, observer=Recorder(), needs=needs)
        assert_subset(outcome, everything, needs)
        assert recorder.names[:2] == ["project", "route_and_prefill"]
        launched = [described(launch) for launch in recorder.launches[2:]]
        assert launched == launches_for(needs, ["project", "finish_hidden_gradient"], R0 or 0)


@functools.cache
def everything_over_a_packed_adapter(device):
    problem = make_problem(T=66, R0=3, **HALF, seed=8)
    return problem, run_triton(problem, device, ONE_PROCESSOR, observer=Recorder())[0]


@pytest.mark.long
@pytest.mark.parametrize("needs", ADAPTER_SUBSETS[1:], ids="+".join)
def test_subsets_of_gradients_over_a_packed_adapter_equal_all(needs, device):
    problem, everything = everything_over_a_packed_adapter(device)
    outcome, recorder = run_triton(problem, device, ONE_PROCESSOR, observer=Recorder(), needs=needs)
    assert_subset(outcome, everything, needs)
    assert recorder.names[:3] == ["pack_adapter", "fused_forward", "finish_balance"]
    launched = [described(launch) for launch in recorder.launches[3:]]
    expected = launches_for(needs, ["fused_hidden_gradient"], 3)
    if "lora_B" in needs and len(needs) > 1:  # it rides in the same read of dY
        of_x = ("weight_gradient", False, "lora_A" in needs, "router" in needs)
        expected[1:2] = [of_x] * any(of_x[2:]) + [("add_splits", True, False, False)]
    assert launched == expected


# --- strides ------------------------------------------------------------------------------------------------------


def strided(kind: str, T: int, columns: int, device, dtype) -> torch.Tensor:
    """[T, columns] (two of them with more dimensions) that is not contiguous."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    return {
        "transposed": lambda: normal(columns, T).t(),
        "every-second-column": lambda: normal(T, 2 * columns)[:, ::2],
        "every-second-row": lambda: normal(2 * T, columns)[::2],
        "row-expanded": lambda: normal(1, columns).expand(T, columns),
        "column-expanded": lambda: normal(T, 1).expand(T, columns),
        "one-number-expanded": lambda: normal(1, 1).expand(T, columns),
        "storage-offset": lambda: normal(T + 1, columns + 1)[1:, 1:],
        "sequence-first": lambda: normal(T // 2, 2, columns).transpose(0, 1),
        "4d-permuted": lambda: normal(columns, 2, T // 2, 1).permute(1, 3, 2, 0),
    }[kind]()


STRIDED = (
    *("transposed", "every-second-column", "every-second-row", "row-expanded", "column-expanded"),
    *("one-number-expanded", "storage-offset", "sequence-first", "4d-permuted"),
)


def run_with_strides(problem, x, grad_like, target, *, base=None, dropout_p=0.0) -> tuple[Outcome, Recorder]:
    """Everything on x's device and with the strides it comes with; ``grad_like`` gives the output's gradient."""
    leaves = problem.map(lambda t: t.detach().to(x.device)).leaves(TRAINABLE)
    x = x.detach().requires_grad_()
    options = {"scaling": problem.scaling, "top_k": problem.top_k, "dropout_p": dropout_p, "backend": "triton"}
    source = {"weight": leaves.weight, "bias": leaves.bias} if base is None else {"base_output": base}
    with audited(target, Recorder()) as recorder:
        routed = routed_linear(
            *(x, leaves.lora_A, leaves.lora_B, leaves.router), **source, residual=leaves.residual, **options
        )
        loss = BALANCE_SHARE * routed.balance_loss
        torch.autograd.backward([routed.output, loss], [grad_like.view(routed.output.shape), torch.ones_like(loss)])
    gradients = {"x": x.grad} | {name: getattr(leaves, name).grad for name in TRAINABLE if name != "x"}
    gradients = {name: None if gradient is None else gradient.cpu() for name, gradient in gradients.items()}
    return Outcome(routed.output.detach().cpu(), routed.balance_loss.detach().cpu(), gradients), recorder


@pytest.mark.long
@pytest.mark.parametrize("form", ["fused", "staged"])
@pytest.mark.parametrize("kind", STRIDED)
def test_any_strides_of_x_give_the_oracles_result(kind, form, device):
    T, target = FORMS[form]
    problem = make_problem(T, R0=3, **HALF)
    x = strided(kind, T, 13, device, BF16)
    assert not x.is_contiguous()
    problem = replace(problem, x=x.cpu().contiguous())
    weights = output_weights(problem.x.new_empty(*x.shape[:-1], 11))
    found, recorder = run_with_strides(problem, x, weights.to(device, BF16), target)
    assert found.output.shape == weights.shape
    if x.ndim == 2:
        assert recorder.of("weight_gradient")[-1].arguments["x_ptr"].stride() == x.stride()
    assert_outcomes_agree(found, evaluate_oracle(problem, selection=selection_of(recorder, problem)), BF16)


@pytest.mark.long
@pytest.mark.parametrize("K", [2, 3], ids=["fused", "staged"])
@pytest.mark.parametrize("kind", ["transposed", "every-second-column"])
def test_any_strides_of_x_give_the_contiguous_result_under_dropout(kind, K, device):
    problem = make_problem(T=34, K=K, **HALF)
    x, grad_y = strided(kind, 34, 13, device, BF16), torch.randn(34, 11).to(device, BF16)
    outcomes = []
    for each in (x, x.contiguous()):
        torch.manual_seed(5)
        outcome, recorder = run_with_strides(problem, each, grad_y, None, dropout_p=0.3)
        assert ("dropped_hidden" if K == 3 else "fused_forward") in recorder.names
        outcomes.append(outcome)
    assert_same_kernels(*outcomes, BF16)


@pytest.mark.long
@pytest.mark.parametrize("form", ["fused", "staged"])
@pytest.mark.parametrize("kind", STRIDED[:6])
def test_a_gradient_and_a_base_output_may_have_any_strides(kind, form, device):
    T, target = FORMS[form]
    problem = make_problem(T, M=18, R0=3, **HALF)
    x = problem.x.to(device)
    grad_y, base = (strided(kind, T, 18, device, BF16) for _ in range(2))
    found, recorder = run_with_strides(problem, x, grad_y, target, base=base)
    if form == "fused":
        read = [recorder.of("fused_hidden_gradient")[0].arguments["grad_y_ptr"]]
    else:
        read = [recorder.of("project")[1].arguments["x_ptr"], recorder.of("weight_gradient")[0].arguments["grad_y_ptr"]]
    assert {tensor.stride() for tensor in read} == {grad_y.stride()}
    expected, _ = run_with_strides(problem, x, grad_y.contiguous(), target, base=base.contiguous())
    assert_same_kernels(found, expected, BF16)


@pytest.mark.long
@pytest.mark.parametrize("form", ["fused", "staged"])
def test_strides_hold_from_block_to_block(form, device):
    """Wider than a program's block of columns: the step from one to the next has the stride in it, too."""
    T, target = FORMS[form]
    problem = make_problem(T, N=150, M=140, R0=3, **HALF)
    x = strided("transposed", T, 150, device, BF16)
    grad_y, base = (strided("transposed", T, 140, device, BF16) for _ in range(2))
    found, recorder = run_with_strides(problem, x, grad_y, target, base=base)
    walks = [v for launch in recorder.launches for v in (launch.constants.get("BN"), launch.constants.get("BM")) if v]
    assert max(walks) < 140
    expected, _ = run_with_strides(problem, x.contiguous(), grad_y.contiguous(), target, base=base.contiguous())
    assert_outcomes_identical(found, expected)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_parameters_may_have_any_strides(form, device):
    T, target = FORMS[form]
    for dtypes in (HALF, {"dtype": F32}):
        problem = make_problem(T, R0=3, per_expert=True, **dtypes).map(lambda t: t.to(device))
        other = problem.map(lambda t: t.t().contiguous().t() if t.ndim == 2 else torch.stack([t, t], 1)[:, 0])
        assert not other.lora_A.is_contiguous() and not other.router.is_contiguous()
        outcomes = []
        for p in (problem, other):
            with audited(target, Recorder()):
                result = goat_linear(
                    *(p.x, p.weight, p.lora_A.requires_grad_(), p.lora_B.requires_grad_(), p.router.requires_grad_()),
                    bias=p.bias,
                    scaling=p.scaling,
                    top_k=2,
                    residual=p.residual,
                    backend="triton",
                )
                (result.output.sum() + result.balance_loss).backward()
            gradients = {name: getattr(p, name).grad for name in ("lora_A", "lora_B", "router")}
            outcomes.append(Outcome(result.output.detach(), result.balance_loss.detach(), gradients))
        assert_same_kernels(*outcomes, dtypes["dtype"])


# --- dropout ------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "K"), [(F32, 2), (F32, 3), (F16, 2), (BF16, 1), (BF16, 3), (BF16, 5)], ids=str)
def test_dropout_equals_the_torch_backend_and_the_oracle_with_the_same_seed(dtype, K, device, monkeypatch):
    monkeypatch.setattr("goat_kernels.functional.draw_seed", lambda device: SEED.to(device))
    for T, target, R0 in ((17, MANY_PROCESSORS, 3), (67, ONE_PROCESSOR, None)):
        problem = make_problem(T, N=33, M=9, R=16, E=8, K=K, R0=R0, dtype=dtype, adapter_dtype=F32)
        options = {"dropout_p": 0.3, "training": True}
        outcome, recorder = run_triton(problem, device, target, observer=Recorder(), **options)
        assert_outcomes_agree(outcome, evaluate(goat_on(device, "torch"), problem, **options), dtype)
        selection = selection_of(recorder, problem)
        masks = expert_masks(selection, 33, SEED, 0.3)
        assert_outcomes_agree(outcome, evaluate_oracle(problem, selection=selection, dropout_masks=masks), dtype)


@pytest.mark.long
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize(("K", "balance_coefficient"), [(2, 0.5), (3, 0.0)])
def test_activation_checkpointing_sees_the_same_mask(K, balance_coefficient, use_reentrant, device, monkeypatch):
    monkeypatch.setenv("GOAT_KERNELS_BACKEND", "triton")
    options = {"r": 8, "num_experts": 4, "top_k": K, "dropout": 0.4, "balance_coefficient": balance_coefficient}
    layer = GoatLinear(13, 11, **options).to(device)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(9, 13, device=device)

    def run(checkpointed):
        layer.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(6)
        output = checkpoint(layer, leaf, use_reentrant=use_reentrant) if checkpointed else layer(leaf)
        torch.rand(3, device=device)  # the generator moves on before the recomputation
        (output * output_weights(output).to(output)).sum().backward()
        return [output.detach(), leaf.grad, *(p.grad for p in (layer.lora_A, layer.lora_B, layer.router))]

    with audited(observer=Recorder()) as recorder:
        plain = run(False)
    assert "dropped_hidden" in recorder.names or "fused_forward" in recorder.names
    assert all(torch.equal(a, b) for a, b in zip(run(True), plain, strict=True))
    torch.manual_seed(7)
    assert not torch.equal(layer(x), plain[0]), "another seed drops something else"
