"""Selective activation checkpointing, and other modes that watch the operators of an eager call.

A policy may keep what an operator returned and give it back when the forward runs again: nothing that it sees may be
written afterwards, and both runs have to call the same operators.
"""

from __future__ import annotations

import collections
import copy
from functools import partial

import pytest
import torch
from goat_problems import BALANCE_SHARE, TRAINABLE, make_problem, output_weights
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from goat_kernels import GoatLinear, goat_linear
from goat_kernels.backends import get_backend
from goat_kernels.forward_backward import Layer
from goat_kernels.functional import routed_linear
from goat_kernels.operators import flattened, folding_operator, forward_operator
from goat_kernels.passes import Adapter

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default)


def every_product(ctx, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def everything_but_views(ctx, operator, *args, **kwargs):
    return CheckpointPolicy.PREFER_RECOMPUTE if operator.is_view else CheckpointPolicy.MUST_SAVE


def the_fused_passes(ctx, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if operator is forward_operator else CheckpointPolicy.PREFER_RECOMPUTE


def every_second_product():
    seen = collections.Counter()

    def policy(ctx, operator, *args, **kwargs):
        if operator not in PRODUCTS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        seen[ctx.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if seen[ctx.is_recompute] % 2 == 0 else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


#: What makes a policy, anew for each run.
POLICIES = {
    "list": lambda: list(PRODUCTS),
    "products": lambda: every_product,
    "second": every_second_product,
    "everything": lambda: everything_but_views,
    "passes": lambda: the_fused_passes,
}


def selectively(module, policy):
    contexts = partial(create_selective_checkpoint_contexts, POLICIES[policy]())
    return lambda *args: checkpoint(module, *args, use_reentrant=False, context_fn=contexts)


def gradients(module, run, x):
    """Output and gradients of ``run``, which calls ``module``; twice, since a kept plan changes what a call does."""
    for _ in range(2):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(11)
        output = run(leaf)
        (output.float() * output_weights(output).float()).sum().backward()
    return [output.detach(), leaf.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


def assert_bits_agree(found, expected):
    assert len(found) == len(expected) > 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Block(nn.Module):
    """Two layers, the first one's output modified in place, as a checkpointed block of a model has them."""

    def __init__(self, **options):
        super().__init__()
        settings = {"num_experts": 3, "top_k": 2, "balance_coefficient": 0.2, **options}
        self.inner = GoatLinear(20, 44, r=6, bias=False, **settings)
        self.outer = GoatLinear(44, 28, r=12, **settings)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)).mul(1.5))


@pytest.mark.long
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("residual", ["path", "fold"])
def test_selective_checkpointing_changes_no_bit(backend, residual, dropout, policy, device):
    block = Block(residual=residual, dropout=dropout, backend=backend).to(device)
    x = torch.randn(2, 5, 20, device=device)
    assert_bits_agree(gradients(block, selectively(block, policy), x), gradients(block, block, x))


@pytest.mark.parametrize("policy", POLICIES)
def test_it_changes_no_bit_where_the_residual_is_folded_for_the_call(policy):
    layer = GoatLinear(20, 44, r=12, num_experts=3)
    x = torch.randn(900, 20)
    assert get_backend("torch").folds(x, layer.weight, layer.residual_A), "many tokens, so W0 - B0 A0 is formed"
    assert_bits_agree(gradients(layer, selectively(layer, policy), x), gradients(layer, layer, x))


@pytest.mark.parametrize("policy", ["list", "second", "everything"])
def test_it_works_on_a_base_that_ran_elsewhere_and_under_autocast(policy):
    block = Block()

    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return block(x)

    x = torch.randn(7, 20)
    assert_bits_agree(gradients(block, selectively(run, policy), x), gradients(block, run, x))
    problem = make_problem(T=9, dtype=torch.float32, R0=3)
    leaves = problem.leaves(TRAINABLE)

    def on_base(x, base):
        arguments = {"base_output": base, "scaling": 1.3, "top_k": 2, "residual": leaves.residual, "dropout_p": 0.2}
        return routed_linear(x, leaves.lora_A, leaves.lora_B, leaves.router, **arguments).output

    outcomes = []
    for run in (on_base, selectively(on_base, policy)):
        base = torch.linspace(-1, 1, 99).reshape(9, 11).requires_grad_()
        torch.manual_seed(4)
        inputs = (leaves.x, base, leaves.lora_A, leaves.lora_B, leaves.router)
        outcomes.append(torch.autograd.grad(run(leaves.x, base).square().sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


class Executed(TorchDispatchMode):
    """Counts the operators that really run: a checkpoint's own mode, which lies above, swallows what it gives back."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count[function] += 1
        return function(*arguments, **(keywords or {}))


def test_a_kept_base_product_does_not_run_again(backend, device):
    layer = GoatLinear(20, 44, r=6, num_experts=3, backend=backend).to(device)
    x = torch.randn(5, 20, device=device, requires_grad=True)
    for policy, again in (("products", 0), ("passes", 1)):
        output = selectively(lambda x: layer(x).sin(), policy)(x)
        with Executed() as executed:
            output.sum().backward()
        assert executed.count[aten.addmm.default] == again
        assert executed.count[forward_operator] == 1 - again


# --- other modes --------------------------------------------------------------------------------------------------


def test_a_mode_that_only_looks_changes_no_bit_and_sees_the_passes_and_the_base_product():
    block = Block()
    x = torch.randn(3, 20)
    expected = gradients(block, block, x)
    with Executed() as executed:
        assert_bits_agree(gradients(block, block, x), expected)
    assert executed.count[aten.addmm.default] == executed.count[forward_operator] == 4
    assert executed.count[torch.ops.goat_kernels.backward.default] == 4


def test_fake_tensors_go_through_and_leave_nothing_behind(backend, device):
    layer = GoatLinear(20, 44, r=6, num_experts=3, backend=backend).to(device)
    real = layer(torch.randn(4, 20, device=device))
    load = layer.expert_load
    mode = FakeTensorMode()
    fakes = {n: mode.from_tensor(t.detach()).requires_grad_(t.requires_grad) for n, t in layer.named_parameters()}
    fakes |= {n: mode.from_tensor(t) for n, t in layer.named_buffers()}
    with mode:
        x = torch.randn(4, 20, device=device, requires_grad=True)
        y = torch.func.functional_call(layer, fakes, (x,))
        y.sum().backward()
    assert (y.shape, y.dtype, y.device) == (real.shape, real.dtype, real.device)
    assert x.grad.shape == x.shape and fakes["router"].grad.shape == (3, 20)
    assert torch.equal(layer.expert_load, load)
    before = GoatLinear(20, 44, r=6, num_experts=3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        before(torch.randn(4, 20))
    assert before.expert_load is None


@pytest.mark.parametrize(("T", "folds"), [(6, False), (700, True)])
def test_flops_of_an_eager_call_are_those_of_its_products(T, folds):
    N, M, R, E = 20, 44, 6, 3
    layer = GoatLinear(N, M, r=R, num_experts=E, backend="torch")
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(T, N))
    adapter, base = 2 * T * ((R + E) * N + R * M), 2 * T * N * M
    residual = 2 * R * N * M if folds else 2 * T * R * (N + M)
    assert counter.get_total_flops() == adapter + base + residual


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck_of_the_operators_that_a_mode_sees(backend, dropout_p, device):
    problem = make_problem(T=5, R0=3, dtype=torch.float32).map(lambda t: t.to(device))
    seed = torch.tensor([3, 4], dtype=torch.int32, device=device) if dropout_p else None
    matrices = (problem.lora_A, problem.lora_B, problem.router, *problem.residual)
    layer = Layer(None, None, problem.bias, Adapter(*matrices, 1.7, None, 2, dropout_p, seed))
    arguments = (problem.x, *flattened(layer), backend)
    torch.library.opcheck(forward_operator, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(folding_operator, (problem.weight, *problem.residual))
    folded = get_backend("torch").folded_weight(problem.weight.cpu(), *(t.cpu() for t in problem.residual))
    assert torch.equal(folding_operator(problem.weight, *problem.residual).cpu(), folded)


def test_goat_linear_itself_and_its_balance_loss_are_checkpointed_too():
    problem = make_problem(T=8, dtype=torch.float32, R0=3)
    outcomes = []
    for policy in (None, *POLICIES):
        leaves = problem.leaves(TRAINABLE)

        def run(x, leaves=leaves):
            tensors = (x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.router)
            return tuple(goat_linear(*tensors, bias=leaves.bias, scaling=1.7, top_k=2, residual=leaves.residual))

        output, balance_loss = (run if policy is None else selectively(run, policy))(leaves.x)
        ((output * output_weights(output)).sum() + BALANCE_SHARE * balance_loss).backward()
        outcomes.append([copy.copy(getattr(leaves, name).grad) for name in TRAINABLE])
    for found in outcomes[1:]:
        assert_bits_agree(found, outcomes[0])
