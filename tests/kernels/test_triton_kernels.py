"""Each Triton kernel alone: every launch writes what its float64 meaning in plain torch says, and nothing else.

The launches come from whole layers, so that each kernel sees what it meets in use; ``triton_cases.Audit`` takes them
one by one. The passes are held to the torch backend's in float64 as well, and the routing to the oracle's on every
special value. Without a GPU all of it runs in Triton's interpreter.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from goat_problems import assert_close, assert_outcomes_agree, evaluate_oracle, keep_mask, make_problem
from triton_cases import (
    FOUR_PROCESSORS,
    MANY_PROCESSORS,
    MEANINGS,
    ONE_PROCESSOR,
    Audit,
    Recorder,
    audited,
    expert_masks,
    route_rows,
    run_triton,
    selection_of,
)

from goat_kernels.backends.torch_backend import TorchPasses
from goat_kernels.dropout import _pair_bits, expert_slots, keep_scale
from goat_kernels.kernels.configs import forced_target
from goat_kernels.kernels.hidden_gradient import TritonHiddenGradient
from goat_kernels.kernels.passes import TritonPasses
from goat_kernels.kernels.tiles import Tile
from goat_kernels.passes import Adapter, Routing
from goat_kernels.reference import select_top_k

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SEED = torch.tensor([123456789, -987654321], dtype=torch.int32)

ONE, MANY = {"target": ONE_PROCESSOR}, {"target": MANY_PROCESSORS}
HALF = {"dtype": BF16, "adapter_dtype": F32}
DROPOUT = {"dropout_p": 0.3}

#: Steps so short that small problems are split; few programs for the rest.
SMALL_TILES = {
    "project": Tile(rows=64, features=16, warps=4, stages=2, rank=32),
    "weight_gradient": Tile(rows=16, features=64, warps=4, stages=2, rank=16),
    "route_and_prefill": Tile(rows=64, features=64, warps=4, stages=1),
    "finish_hidden_gradient": Tile(rows=64, features=16, warps=4, stages=1),
    "expand_columns": Tile(rows=64, features=128, warps=4, stages=1, rank=32),
}

#: More programs than add_splits and finish_balance take at once; more than one of the decoding forward.
LOW_TILES = {
    "fused_forward": Tile(rows=16, features=64, warps=4, stages=2),
    "fused_hidden_gradient": Tile(rows=16, features=64, warps=4, stages=2),
    "route_and_prefill": Tile(rows=16, features=64, warps=4, stages=1),
}

#: Several blocks of columns even where there are few.
NARROW = {"expand_columns": Tile(rows=64, features=32, warps=4, stages=2, rank=32)}

#: Layers that between them reach every kernel in every form; ``test_the_cases_reach_...`` says which.
CASES: dict[str, dict] = {
    # Up to 64 tokens: two launches, the adapter read as it is.
    "few-float32-residual": {"T": 20, "N": 40, "M": 39, "R0": 5, "per_expert": True, "dtype": F32},
    "few-bfloat16-split-router": {"T": 33, "N": 37, "M": 150, "E": 8, "bias": False, **HALF},
    "few-float16-onto-base": {"T": 17, "N": 130, "M": 45, "R0": 9, "dtype": F16, "onto_base": True},
    "few-one-token-one-expert": {"T": 1, "N": 35, "M": 7, "R": 3, "E": 1, "K": 1, "dtype": F32},
    "few-64-tokens": {"T": 64, "N": 65, "M": 33, "R": 15, "E": 5, "R0": 20, "tiles": LOW_TILES, **HALF},
    "few-50-tokens": {"T": 50, "N": 20, "M": 19, "R": 8, "E": 4, "dtype": F32, "tiles": LOW_TILES},
    "few-65-experts": {"T": 9, "N": 20, "M": 19, "R": 65, "E": 65, "K": 7, "dtype": F16, "adapter_dtype": F32},
    "few-rank-512": {"T": 17, "N": 24, "M": 70, "R": 512, "E": 8, "K": 2, "R0": 130, "dtype": F32},
    # One program per block of tokens.
    "fused-65-tokens": {"T": 65, "N": 33, "M": 29, "bias": False, "dtype": F32, **ONE},
    "fused-odd-everything": {"T": 129, "N": 131, "M": 141, "R": 15, "E": 5, "K": 3, "R0": 7, **HALF, **ONE},
    "fused-several-walks": {"T": 129, "N": 131, "M": 100, "R0": 7, **HALF, "tiles": NARROW, "target": FOUR_PROCESSORS},
    "fused-even-onto-base": {"T": 128, "N": 128, "M": 128, "R0": 16, "dtype": F16, "onto_base": True, **ONE},
    "fused-even-float32": {"T": 96, "N": 64, "M": 32, "R": 32, "E": 8, "R0": 32, "dtype": F32, **ONE},
    "fused-16-experts-all-used": {"T": 67, "N": 20, "M": 19, "R": 16, "E": 16, "K": 16, **HALF, **ONE},
    "fused-many-splits": {
        "T": 1050,
        "needs": ("lora_A", "lora_B"),
        "N": 20,
        "M": 19,
        "R": 3,
        "E": 3,
        "dtype": F16,
        "tiles": LOW_TILES,
        **ONE,
    },
    "fused-without-x": {"T": 70, "N": 40, "M": 39, "R0": 5, "needs": ("lora_A", "router"), **HALF, **ONE},
    "fused-lora-A-alone": {"T": 70, "N": 20, "M": 19, "needs": ("lora_A",), "balance_share": 0.0, **HALF, **ONE},
    "fused-router-alone": {"T": 70, "N": 20, "M": 19, "R0": 3, "needs": ("router",), "dtype": F16, **ONE},
    # In stages, where the blocks would not fill the GPU or the fused kernel does not serve.
    "staged-65-tokens": {"T": 65, "N": 40, "M": 39, "R0": 5, "per_expert": True, "dtype": F32, **MANY},
    "staged-bfloat16": {"T": 70, "N": 140, "M": 39, "E": 8, "K": 3, "bias": False, **HALF, **MANY},
    "staged-onto-base": {"T": 66, "N": 33, "M": 140, "R0": 17, "dtype": F16, "onto_base": True, **MANY},
    "staged-64-experts": {"T": 66, "N": 20, "M": 19, "R": 64, "E": 64, "K": 5, **HALF, **ONE},
    "staged-rank-136": {"T": 66, "N": 24, "M": 20, "R": 136, "E": 8, "R0": 130, **HALF, **MANY},
    "staged-without-x": {"T": 70, "N": 20, "M": 19, "R0": 3, "needs": ("lora_A",), "dtype": F32, **MANY},
    "staged-splits": {"T": 151, "N": 150, "M": 145, "R0": 3, "dtype": F32, "tiles": SMALL_TILES, **MANY},
    "splits-without-lora-B": {"T": 151, "N": 35, "M": 9, "tiles": SMALL_TILES, "needs": ("lora_A", "router"), **HALF},
    "lora-B-and-router": {
        "T": 70,
        "N": 35,
        "M": 9,
        "R": 40,
        "tiles": SMALL_TILES,
        "needs": ("lora_B", "router"),
        **HALF,
    },
    "staged-splits-of-halves": {"T": 140, "N": 145, "M": 150, "K": 3, "tiles": SMALL_TILES, **HALF, **MANY},
    # Dropout.
    "dropout-fused-one-slot": {"T": 70, "N": 33, "M": 21, "K": 1, "R0": 3, "dropout_p": 0.3, "dtype": F32, **ONE},
    "dropout-fused-two-slots": {"T": 70, "N": 131, "M": 21, "K": 2, "R0": 3, "dropout_p": 0.1, **HALF, **ONE},
    "dropout-fused-few-tokens": {"T": 9, "N": 131, "M": 21, "dropout_p": 0.3, "dtype": F16, "onto_base": True},
    "dropout-fused-one-expert": {"T": 67, "N": 21, "M": 9, "R": 5, "E": 1, "K": 1, "dropout_p": 0.5, **HALF, **ONE},
    "dropout-staged-three-slots": {"T": 20, "N": 35, "M": 21, "K": 3, "dropout_p": 0.3, "dtype": F16, **MANY},
    "dropout-staged-per-expert": {"T": 20, "N": 35, "M": 9, "K": 3, "per_expert": True, **DROPOUT, **HALF, **MANY},
    "dropout-staged-five-slots": {"T": 33, "N": 33, "M": 9, "R": 24, "E": 8, "K": 5, "R0": 7, "dropout_p": 0.2, **HALF},
    "dropout-staged-20-experts": {"T": 40, "N": 20, "M": 9, "R": 20, "E": 20, "K": 1, **DROPOUT, "dtype": F32, **ONE},
    "dropout-rank-68": {"T": 33, "N": 20, "M": 9, "R": 68, "E": 4, "K": 3, "R0": 2, **DROPOUT, **HALF, **ONE},
}
PROBLEM_OPTIONS = ("T", "N", "M", "R", "E", "K", "R0", "bias", "per_expert", "dtype", "adapter_dtype")


def parts_of(case: dict) -> tuple[dict, dict]:
    """(what ``make_problem`` takes, what ``run_triton`` takes)."""
    of_problem = {name: value for name, value in case.items() if name in PROBLEM_OPTIONS}
    return of_problem, {name: value for name, value in case.items() if name not in PROBLEM_OPTIONS}


@pytest.fixture
def fixed_seed(monkeypatch):
    monkeypatch.setattr("goat_kernels.functional.draw_seed", lambda device: SEED.to(device))


@pytest.mark.long
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_launch_of_a_layer_means_what_it_says(case, device, fixed_seed):
    of_problem, options = parts_of(case)
    problem = make_problem(**of_problem, seed=len(CASES))
    outcome, audit = run_triton(problem, device, training=True, **options)
    selection = selection_of(audit, problem)
    for_oracle = {name: options[name] for name in ("needs", "balance_share") if name in options}
    if "dropout_p" in options:
        for_oracle["dropout_masks"] = expert_masks(selection, problem.x.shape[-1], SEED, options["dropout_p"])
    oracle = evaluate_oracle(problem, selection=selection, **for_oracle)
    assert_outcomes_agree(outcome, oracle, problem.x.dtype)


#: Per kernel, what must occur in CASES: conditions on a launch's arguments and constants.
BRANCHES = {
    "pack_adapter": {
        "split router": lambda v: v.PARTS == 2,
        "without residual": lambda v: v.A0_ptr is None,
        "with residual": lambda v: v.A0_ptr is not None,
    },
    "fused_forward": {
        "no residual": lambda v: v.R0 == 0,
        "residual": lambda v: v.R0 > 0,
        "split router": lambda v: v.PARTS == 2,
        "onto nothing": lambda v: v.ONTO == "",
        "onto the bias": lambda v: v.ONTO == "bias",
        "onto a base": lambda v: v.ONTO == "base",
        "even": lambda v: v.EVEN_N and v.EVEN_M,
        "odd": lambda v: not v.EVEN_N and not v.EVEN_M,
        "one slot": lambda v: v.seed_ptr is not None and v.TOP_K == 1,
        "two slots": lambda v: v.seed_ptr is not None and v.TOP_K == 2,
        "D and E padded": lambda v: v.D_PAD > v.D and v.E_PAD > v.E,
        "several steps": lambda v: v.N > v.BN and v.M > v.BM,
    },
    "finish_balance": {
        "several programs": lambda v: 1 < v.programs < v.BLOCK,
        "rounds": lambda v: v.programs > v.BLOCK,
    },
    "project": {
        "router as stored, in two parts": lambda v: v.PARTS == v.STORED_PARTS == 2,
        "router as stored, in one": lambda v: v.PARTS == v.STORED_PARTS == 1,
        "router split here": lambda v: v.PARTS > v.STORED_PARTS,
        "no router": lambda v: v.PARTS == 0 and v.C2 == 0,
        "no router, two matrices": lambda v: v.PARTS == 0 and v.C2 > 0,
        "router alone": lambda v: v.PARTS > 0 and v.C1 == v.C2 == 0,
        "router and residual alone": lambda v: v.PARTS > 0 and v.C1 > 0 and v.C2 == 0 and v.W1_ptr.shape[0] == 7,
        "transposed matrices": lambda v: v.C1 > 0 and v.stride_1n > 1 and v.stride_2n > 1,
        "two matrices in one block": lambda v: v.C2 > 0 and v.C1 % v.BC > 0,
        "several blocks of columns": lambda v: v.C1 + v.C2 > v.BC,
        "several blocks of router columns": lambda v: v.PARTS * v.E > v.BC,
        "splits": lambda v: v.out_ptr.shape[0] > 1,
        "last split shorter": lambda v: v.out_ptr.shape[0] > 1 and v.N % (v.split_steps * v.BN),
    },
    "route_and_prefill": {
        "prefills": lambda v: v.WITH_PREFILL and v.R0 == 0,
        "prefills with residual": lambda v: v.WITH_PREFILL and v.R0 > 0,
        "prefills onto a base": lambda v: v.WITH_PREFILL and v.ONTO == "base",
        "prefills onto nothing": lambda v: v.WITH_PREFILL and v.ONTO == "",
        "several blocks of outputs": lambda v: v.WITH_PREFILL and v.M > v.BM,
        "several blocks of tokens": lambda v: v.WITH_PREFILL and v.BALANCE == "all",
        "several blocks, the last not full": lambda v: v.BALANCE == "all" and v.T < v.MOST_TOKENS,
        "leaves y": lambda v: not v.WITH_PREFILL and v.WITH_HIDDEN,
        "leaves y and h~": lambda v: not v.WITH_HIDDEN and v.BALANCE == "one",
        "leaves y and h~, with residual": lambda v: not v.WITH_HIDDEN and v.R0 > 0,
        "splits": lambda v: v.splits > 1,
        "low part": lambda v: v.PARTS == 2 and v.BALANCE == "all",
        "leaves the balance loss": lambda v: v.BALANCE == "",
    },
    "dropped_hidden": {
        "several blocks of columns": lambda v: v.E * v.D > v.BC,
        "one slot": lambda v: v.TOP_K == 1,
        "scaling per expert": lambda v: v.scaling_E_ptr is not None,
        "several pairs of slots": lambda v: v.TOP_K > 4,
    },
    "fused_hidden_gradient": {
        "no residual": lambda v: v.R0 == 0,
        "residual": lambda v: v.R0 > 0,
        "no balance": lambda v: not v.HAS_BALANCE,
        "scaling by a number": lambda v: v.scaling_E_ptr is None,
        "even": lambda v: v.EVEN_M,
        "several steps": lambda v: v.M > v.BM and not v.EVEN_M,
        "with lora_B": lambda v: v.partial_ptr is not None and v.M > v.BM and v.T % v.BT,
        "without lora_B": lambda v: v.partial_ptr is None,
    },
    "finish_hidden_gradient": {
        "no residual": lambda v: v.R0 == 0,
        "residual": lambda v: v.R0 > 0,
        "splits": lambda v: v.splits > 1,
        "scaling per expert": lambda v: v.scaling_E_ptr is not None,
    },
    "weight_gradient": {
        "all three": lambda v: None not in (v.out_B_ptr, v.out_A_ptr, v.out_router_ptr),
        "lora_B alone": lambda v: v.x_ptr is None,
        "lora_A and router": lambda v: v.out_B_ptr is None and None not in (v.out_A_ptr, v.out_router_ptr),
        "lora_A alone": lambda v: v.out_A_ptr is not None and v.out_router_ptr is None,
        "router alone": lambda v: v.x_ptr is not None and v.out_A_ptr is None,
        "router alone, scaled": lambda v: v.x_ptr is not None and v.out_A_ptr is None and v.x_ptr.dtype == F16,
        "lora_B and router, several blocks of rank": lambda v: (
            v.blocks_M and v.logits_ptr is not None and v.out_A_ptr is None and v.E * v.D > v.BC
        ),
        "several blocks of rank": lambda v: v.blocks_M and v.x_ptr is not None and v.E * v.D > v.BC,
        "dropout": lambda v: v.seed_ptr is not None and v.TOP_K > 2,
        "even": lambda v: v.EVEN_N and v.x_ptr is not None,
        "splits": lambda v: v.blocks_M and v.out_router_ptr is not None and v.split_T < v.T,
    },
    "add_splits": {
        "all three": lambda v: None not in (v.out_B_ptr, v.out_A_ptr, v.out_router_ptr),
        "lora_B alone": lambda v: v.partial_A_ptr is None,
        "lora_A and router": lambda v: v.partial_B_ptr is None and None not in (v.out_A_ptr, v.out_router_ptr),
        "different splits": lambda v: 0 not in (v.splits_A, v.splits_B) and v.splits_A != v.splits_B,
        "rounds to another dtype": lambda v: v.out_A_ptr is not None and v.out_A_ptr.dtype == F16,
        "several rounds": lambda v: max(v.splits_A, v.splits_B) > v.SPLITS,
    },
    "expand_columns": {
        "forward, onto the bias": lambda v: v.logits_ptr is None and v.ONTO == "bias",
        "forward, onto nothing": lambda v: v.logits_ptr is None and v.ONTO == "",
        "forward, onto a base": lambda v: v.ONTO == "base" and v.R0 > 0,
        "forward, several blocks of rank": lambda v: v.logits_ptr is None and v.R > v.BC and v.R0 > v.BC0,
        "backward, several blocks of rank": lambda v: v.logits_ptr is not None and v.R > v.BC and v.R0 > v.BC0,
        "walks": lambda v: v.chunk_steps > 1 and v.chunk_steps * v.BN >= v.N,
        "several walks": lambda v: v.chunk_steps > 1 and v.chunk_steps * v.BN < v.N,
        "last walk shorter": lambda v: v.chunk_steps > 1 and v.N % (v.chunk_steps * v.BN) < v.BN,
        "dropout": lambda v: v.seed_ptr is not None and v.TOP_K > 2,
        "dropout in several blocks": lambda v: v.seed_ptr is not None and v.R > v.BC,
    },
}


def test_the_cases_reach_every_kernel_and_every_branch(device):
    reached = set()
    for case in CASES.values():
        of_problem, options = parts_of(case)
        _, recorder = run_triton(
            make_problem(**of_problem), device, training=True, observer=Recorder(run=False), **options
        )
        for launch in recorder.launches:
            v = SimpleNamespace(**launch.arguments, **launch.constants)
            reached |= {(launch.name, name) for name, holds in BRANCHES[launch.name].items() if holds(v)}
    assert BRANCHES.keys() == MEANINGS.keys()
    assert {(kernel, name) for kernel, branches in BRANCHES.items() for name in branches} - reached == set()


# --- the audit itself ---------------------------------------------------------------------------------------------


class Tampered(Audit):
    """An audit of launches whose arguments one test has changed."""

    def __init__(self, kernel: str, **changes) -> None:
        super().__init__()
        self.kernel, self.changes = kernel, changes

    def __call__(self, launch) -> None:
        if launch.name == self.kernel:
            changed = {name: change(launch.arguments[name]) for name, change in self.changes.items()}
            launch.arguments.update(changed)
        super().__call__(launch)


@pytest.mark.parametrize(
    ("kernel", "changes", "message"),
    [
        ("project", {"T": lambda T: T + 1}, "writes outside"),
        ("project", {"T": lambda T: T - 1}, "left elements of out_ptr unwritten"),
        ("project", {"stride_xt": lambda stride: stride + 1}, "outside|unwritten, or NaN"),
        ("project", {"N": lambda N: N - 1}, "relative error"),
        ("route_and_prefill", {"scaling": lambda s: 1.001 * s}, None),  # does as it is told
    ],
    ids=["too-long", "too-short", "reads-outside", "wrong", "right"],
)
def test_the_audit_notices_what_a_launch_should_not_do(kernel, changes, message, device):
    problem = make_problem(T=20, N=15, M=9, dtype=F32)
    adapter, tensors = adapter_of(problem, device)
    with audited(observer=Tampered(kernel, **changes)):
        if message is None:
            TritonPasses().prefill(tensors.x, adapter, tensors.bias, None)
        else:
            with pytest.raises(AssertionError, match=message):
                TritonPasses().prefill(tensors.x, adapter, tensors.bias, None)


# --- passes against the torch backend's in float64 ------------------------------------------------------------------


def adapter_of(problem, device, dropout_p=0.0) -> tuple[Adapter, SimpleNamespace]:
    """The adapter as the operators hand it to the passes, and the problem's tensors, on ``device``."""
    tensors = problem.map(lambda tensor: tensor.to(device))
    is_tensor = isinstance(tensors.scaling, torch.Tensor)
    adapter = Adapter(
        *(tensors.lora_A, tensors.lora_B, tensors.router, *(tensors.residual or (None, None))),
        scaling=1.0 if is_tensor else tensors.scaling,
        scaling_E=tensors.scaling if is_tensor else None,
        top_k=tensors.top_k,
        dropout_p=dropout_p,
        seed=SEED.to(device) if dropout_p else None,
    )
    return adapter, tensors


def doubled(record):
    """A named tuple of tensors and other things, on the CPU and its floating tensors in float64."""

    def change(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.cpu().double() if value.is_floating_point() else value.cpu()

    return type(record)(*(change(value) for value in record))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("target", "dtype"),
    [(ONE_PROCESSOR, F32), (ONE_PROCESSOR, BF16), (MANY_PROCESSORS, F16), (MANY_PROCESSORS, BF16)],
    ids=["fused-float32", "fused-bfloat16", "staged-float16", "staged-bfloat16"],
)
def test_each_pass_equals_the_torch_backend_in_float64(dtype, target, dropout_p, device):
    problem = make_problem(
        T=65, N=33, M=29, R=12, R0=5, dtype=dtype, adapter_dtype=F32, per_expert=dtype != F32, bias=dtype != F16, seed=5
    )
    adapter, tensors = adapter_of(problem, device, dropout_p)
    exact, passes, oracle = doubled(adapter), TritonPasses(), TorchPasses()
    grad_y = torch.randn(65, 29, generator=torch.Generator().manual_seed(1)).to(dtype)

    def agree(name, result, expected, bound=dtype):
        assert_close(name, result.cpu(), expected, bound)

    with forced_target(target):
        y0, balance, routing = passes.prefill(tensors.x, adapter, tensors.bias, None)
        gradient = passes.hidden_gradient(
            grad_y.to(device), torch.tensor(0.7, device=device), adapter, routing, with_residual=True
        )
        needs = dict.fromkeys(("needs_A", "needs_B", "needs_router"), True)
        found_weights = passes.weight_gradients(tensors.x, grad_y.to(device), adapter, routing, gradient, **needs)
        grad_x = passes.input_prefill(adapter, routing, gradient)

    x, bias = problem.x.double(), None if problem.bias is None else problem.bias.double()
    y0_64, balance_64, routing_64 = oracle.prefill(x, exact, bias, None)
    agree("y0", y0, y0_64)
    agree("balance loss", balance, balance_64, F32)
    for name in ("weighted_TR", "gate_ET", "probs_ET", "load_E"):
        agree(name, getattr(routing, name), getattr(routing_64, name), dtype if name == "weighted_TR" else F32)

    # Further on each pass is given what the Triton passes before it wrote.
    given = doubled(Routing(*routing[:4], packed=routing.packed.new_empty(0)))
    gradient_64 = oracle.hidden_gradient(grad_y.double(), 0.7, exact, given, with_residual=True)
    found = torch.cat([gradient.grad_hidden_TR, gradient.logits_ET.t(), gradient.residual_TR0], dim=1)
    for name, part, expected in zip(
        ("dh", "dlogits", "dh0"), found.split([12, 4, 5], 1), gradient_64.columns.split([12, 4, 5], 1), strict=True
    ):
        agree(name, part, expected)
    taken = type(gradient_64)(found.cpu().double(), gradient.logits_ET.cpu().double())
    expected_weights = oracle.weight_gradients(x, grad_y.double(), exact, given, taken, **needs)
    for name, part, expected in zip(("dlora_A", "dlora_B", "drouter"), found_weights, expected_weights, strict=True):
        agree(name, part, expected)
    agree("dx", grad_x, oracle.input_prefill(exact, given, taken))


# --- dtypes of the adapter ----------------------------------------------------------------------------------------

MIXED = {
    "bfloat16-x-float64-adapter": (BF16, (F64, F64, F64, F64)),
    "float16-x-bfloat16-adapter": (F16, (BF16, BF16, BF16, BF16)),
    "bfloat16-x-one-float32-router": (BF16, (BF16, F32, BF16, BF16)),
    "float16-x-each-another": (F16, (F32, F64, F16, BF16)),
    "float32-x-bfloat16-adapter": (F32, (BF16, BF16, BF16, BF16)),
    "float32-x-float64-adapter": (F32, (F64, F64, F64, F64)),
    "float32-x-half-precision-residual": (F32, (F32, F32, F32, F16)),
}


@pytest.mark.long
@pytest.mark.parametrize("T", [30, 66], ids=["few", "many"])
@pytest.mark.parametrize(("dtype", "dtypes"), MIXED.values(), ids=MIXED.keys())
def test_adapters_of_other_dtypes_are_cast_and_get_gradients_of_their_own(dtype, dtypes, T, device):
    problem = make_problem(T, N=35, M=27, R0=5, dtype=dtype, adapter_dtype=F64)
    of_A, of_router, of_B, of_residual = dtypes
    problem = replace(
        problem,
        lora_A=problem.lora_A.to(of_A),
        router=problem.router.to(of_router),
        lora_B=problem.lora_B.to(of_B),
        residual=tuple(part.to(of_residual) for part in problem.residual),
    )
    outcome, audit = run_triton(problem, device, ONE_PROCESSOR)
    oracle = evaluate_oracle(problem, selection=selection_of(audit, problem))
    coarsest = max((dtype, of_A, of_router, of_B), key=lambda d: torch.finfo(d).eps)
    assert_outcomes_agree(outcome, oracle, coarsest)
    for name, of in {"lora_A": of_A, "router": of_router, "lora_B": of_B, "x": dtype}.items():
        assert outcome.gradients[name].dtype == of
        assert_close(name, outcome.gradients[name], oracle.gradients[name], max(dtype, of, key=precision_of))


def precision_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


# --- routing ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("E", [1, 2, 5, 8, 16, 33, 64])
def test_routing_orders_every_special_value_as_the_oracle_does(E, device):
    generator = torch.Generator().manual_seed(E)
    infinity = math.inf
    pools = [
        [0.0, -0.0],
        [-infinity, 1.0, -3e38],
        [-infinity],
        [math.nan, -math.nan, infinity, -infinity, 0.0, -0.0, 1.0, -1.0, 3e38, -3e38],
        [infinity, 3e38, 5.0],
        [-0.25, 0.5, 2.0, 0.5000001, -2.0],
    ]
    rows = [torch.tensor(pool)[torch.randint(len(pool), (20, E), generator=generator)] for pool in pools]
    logits = torch.cat([*rows, torch.randn(20, E, generator=generator)])
    for top_k in sorted({1, 2, 3, E // 2, E - 1, E} & set(range(1, E + 1))):
        gate, probs, selection = (result.cpu() for result in route_rows(logits.to(device), top_k))
        expected = select_top_k(logits, top_k)
        assert torch.equal(selection, expected)
        of_selected = torch.softmax(logits.masked_fill(~expected, -infinity), dim=1)
        torch.testing.assert_close(gate, of_selected, rtol=1e-5, atol=1e-7, equal_nan=True)
        torch.testing.assert_close(probs, torch.softmax(logits, dim=1), rtol=1e-5, atol=1e-7, equal_nan=True)


# --- dropout masks, bit for bit -----------------------------------------------------------------------------------


def kept_by_expert(gate_ET, T, N, K, dropout_p) -> torch.Tensor:
    """bool [T, E, N]: where the mask of an active expert's slot keeps x."""
    slots = expert_slots(gate_ET.t().cpu())
    masks = torch.stack([keep_mask(SEED, T, N, slot, dropout_p) for slot in range(K)])
    kept = torch.zeros(T, slots.shape[1], N, dtype=torch.bool)
    for t, e in itertools.product(range(T), range(slots.shape[1])):
        if slots[t, e] >= 0:
            kept[t, e] = masks[slots[t, e], t]
    return kept


def dropout_on_the_edge(T: int, N: int, slot: int) -> float:
    """A p whose threshold is the very hash of an element of ``slot``, which is then kept."""
    hashes = (_pair_bits(SEED, T, N, slot // 2) >> (16 * (slot % 2))) & 0xFFFF
    p = int(hashes[(hashes > 20_000) & (hashes < 40_000)][0]) / 65536
    assert bool((keep_mask(SEED, T, N, slot, p) != keep_mask(SEED, T, N, slot, p + 1 / 65536)).any())
    return p


@pytest.mark.long
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("E", "K"), [(8, 1), (8, 2), (8, 3), (8, 5), (20, 1), (20, 2)])
def test_masks_of_the_forward_equal_the_torch_backends_bit_for_bit(E, K, dtype, device):
    T, N = 35, 7
    p = dropout_on_the_edge(T, N, K - 1)
    problem = make_problem(T, N, M=3, R=E * N, E=E, K=K, dtype=dtype, adapter_dtype=F32)
    # Every expert's A is the identity and x is one: h~ is zero exactly where an expert's mask drops.
    problem = replace(problem, lora_A=torch.eye(N).repeat(E, 1), router=torch.randn(E, N))
    adapter, tensors = adapter_of(problem, device, p)
    logits_of = torch.randn(T, N).to(dtype)
    recorder = Recorder()
    with audited(ONE_PROCESSOR, recorder):
        _, _, routing = TritonPasses().prefill(signs_of(logits_of, device), adapter, None, None)
    assert ("fused_forward" in recorder.names) == (E <= 16 and K <= 2)
    found = (routing.weighted_TR != 0).view(T, E, N).cpu()
    expected = kept_by_expert(routing.gate_ET, T, N, K, p)
    assert torch.equal(found, expected)
    scaled = routing.weighted_TR.view(T, E, N).cpu().float().abs()
    ideal = tensors.scaling * routing.gate_ET.t().cpu()[:, :, None] * keep_scale(p) * expected
    assert_close("h~", scaled, ideal, dtype)


def signs_of(tensor, device) -> torch.Tensor:
    """+1 and -1: every logit differs, no element is zero."""
    return torch.where(tensor >= 0, 1.0, -1.0).to(tensor.dtype).to(device)


@pytest.mark.long
@pytest.mark.parametrize(("E", "K"), [(8, 1), (8, 2), (8, 3), (8, 5), (20, 2)])
@pytest.mark.parametrize(("target", "dtype"), [(ONE_PROCESSOR, BF16), (MANY_PROCESSORS, F32)], ids=["walking", "wide"])
def test_masks_of_the_backward_equal_the_torch_backends_bit_for_bit(target, E, K, dtype, device):
    T, N, D = 19, 37, 2
    p = dropout_on_the_edge(T, N, K - 1)
    problem = make_problem(T, N, M=3, R=E * D, E=E, K=K, dtype=dtype, adapter_dtype=F32)
    problem = replace(problem, lora_A=torch.ones(E * D, N))
    adapter, tensors = adapter_of(problem, device, p)
    with forced_target(target):
        _, _, routing = TritonPasses().prefill(tensors.x, adapter, None, None)
        kept = kept_by_expert(routing.gate_ET, T, N, K, p)
        slots = expert_slots(routing.gate_ET.t())

        def gradient(hidden_TE):
            """dh with ``hidden_TE`` in each expert's second column where it is active, and dlogits of zero."""
            hidden = torch.zeros(T, E, D, device=device)
            hidden[:, :, 1] = hidden_TE.to(device) * (slots >= 0)
            return TritonHiddenGradient(
                grad_hidden_TR=hidden.view(T, -1).to(dtype),
                logits_ET=torch.zeros(E, T, device=device),
                residual_TR0=None,
                partial_B=None,
            )

        # Slot j writes the bit j of dX; token t the bit t of dlora_A.
        grad_x = TritonPasses().input_prefill(adapter, routing, gradient(2.0**slots))
        powers = 2.0 ** torch.arange(T)
        grad_A, *_ = TritonPasses().weight_gradients(
            *(torch.ones_like(tensors.x), tensors.x.new_zeros(T, 3), adapter, routing, gradient(powers[:, None])),
            **{"needs_A": True, "needs_B": False, "needs_router": False},
        )
    expected = (kept * (2.0 ** slots.cpu())[:, :, None]).sum(dim=1)
    assert torch.equal((grad_x.cpu().float() / keep_scale(p)).round(), expected)
    expected = torch.einsum("ten,t->en", kept.float(), powers)
    assert torch.equal((grad_A.cpu().view(E, D, N)[:, 1] / keep_scale(p)).round(), expected)
    assert not bool(grad_A.view(E, D, N)[:, 0].any())
