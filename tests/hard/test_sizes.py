"""Sizes at the ends: each works, or is refused by name before anything is allocated.

What is too large to compute here is launched on tensors without memory, and its grids are held to a GPU's limits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from drawn_layers import BF16, F32, observed_routing, selection_of
from goat_problems import assert_outcomes_agree, evaluate, evaluate_oracle, make_problem
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import forced_tiles, goat_on

from goat_kernels import goat_linear
from goat_kernels.checks.problem import LayerCase, run_passes
from goat_kernels.checks.problem import make_problem as make_layer
from goat_kernels.kernels.common import INTERPRETED
from goat_kernels.kernels.configs import KNOWN_TARGETS, forced_target
from goat_kernels.kernels.launch import Launch, observed
from goat_kernels.kernels.passes import TritonPasses
from goat_kernels.kernels.tiles import Tile
from goat_kernels.numerics import TOLERANCES, relative_error
from goat_kernels.operators import _forward, forward_operator

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter


#: Walks in few steps: the interpreter takes a millisecond for each.
_LONG_STEPS = {
    "project": Tile(16, 8192, 4, 1, 16),
    "weight_gradient": Tile(16, 8192, 4, 1, 16),
    "expand_columns": Tile(16, 8192, 4, 1, 16),
}


def agree(problem, backend: str, device: torch.device, **options) -> None:
    with observed_routing(backend) as routings:
        outcome = evaluate(goat_on(device, backend), problem, **options)
    oracle = evaluate_oracle(problem, selection=selection_of(routings[0], problem), **options)
    assert_outcomes_agree(outcome, oracle, problem.x.dtype)


def test_131072_features(backend, device):
    problem = make_problem(3, 131072, 4, R0=3, dtype=BF16, adapter_dtype=F32)
    with forced_tiles(_LONG_STEPS if INTERPRETED else {}):
        agree(problem, backend, device, needs=("x", "lora_A", "lora_B", "router"))


@pytest.mark.long
@pytest.mark.parametrize("T", [3, 70])
def test_64_experts_of_rank_8(backend, T, device):
    agree(make_problem(T, 24, 20, R=512, E=64, K=8, R0=512, dtype=BF16, adapter_dtype=F32), backend, device)


def test_a_million_tokens():
    """On the torch backend; float32 sums over so many tokens err by more than over some thousands, as its root says."""
    problem = make_problem(1_000_000, 8, 8, R0=3, dtype=F32)
    needs = ("lora_A", "lora_B", "router")
    with observed_routing("torch") as routings:
        outcome = evaluate(goat_linear, problem, needs=needs, backend="torch")
    oracle = evaluate_oracle(problem, needs=needs, selection=selection_of(routings[0], problem))
    assert relative_error(outcome.output, oracle.output) <= TOLERANCES[F32].relative
    assert relative_error(outcome.balance_loss, oracle.balance_loss) <= TOLERANCES[F32].relative
    for name in needs:
        error = relative_error(outcome.gradients[name], oracle.gradients[name])
        assert error <= torch.finfo(F32).eps * 1_000_000**0.5, name


#: Read from pages that do not exist before they are written: 8.6 GB of zeros take no memory.
_BEYOND = """
import mmap, torch
from goat_kernels import goat_linear
torch.set_num_threads(1)
T, N = 16400, 131072
memory = mmap.mmap(-1, 4 * T * N, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
x = torch.frombuffer(memory, dtype=torch.float32).view(T, N)
assert x.numel() > 2**31
rows = [0, 8191, T - 2, T - 1]
x[rows] = torch.randn(4, N)
tensors = [torch.randn(2, N), torch.randn(2, N), torch.randn(2, 2), torch.randn(2, N)]
outputs = []
for tokens in (x, x[rows]):
    leaves = [tensor.clone().requires_grad_(i > 0) for i, tensor in enumerate(tensors)]
    result = goat_linear(tokens, *leaves, scaling=1.0, top_k=1, backend="torch")
    result.output.sum().backward()
    outputs.append([result.output[rows] if len(tokens) > 4 else result.output, *(leaf.grad for leaf in leaves[1:3])])
for found, expected in zip(*outputs):
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max())), (found, expected)
print("passed")
"""


@pytest.mark.long
def test_more_than_two_to_the_31_elements_on_the_torch_backend():
    """The Triton kernels' offsets are held to this in test_triton_limits.py."""
    done = subprocess.run([sys.executable, "-c", _BEYOND], capture_output=True, text=True, env=os.environ, timeout=600)
    assert done.stdout.strip() == "passed", (done.returncode, done.stderr[-2000:])


# --- grids --------------------------------------------------------------------------------------------------------

#: T, N, M, R, E far beyond what runs here.
GIANTS = {
    "million-tokens": {"T": 1_000_000, "N": 64, "M": 64},
    "beyond-int32": {"T": 1 << 19, "N": 1 << 13, "M": 1 << 13},
    "wide": {"T": 4096, "N": 131072, "M": 131072, "R": 512, "E": 64},
    "decoding-wide": {"T": 1, "N": 131072, "M": 131072, "R": 512, "E": 64},
    "decoding-vocabulary": {"T": 16, "N": 64, "M": 1 << 21},
    "float32": {"T": 1_000_000, "N": 131072, "M": 64, "R": 512, "E": 64, "dtype": F32},
    "dropout": {"T": 1_000_000, "N": 131072, "M": 131072, "dropout_p": 0.1},
}


@pytest.mark.parametrize("target", KNOWN_TARGETS.values(), ids=KNOWN_TARGETS.keys())
@pytest.mark.parametrize("size", GIANTS.values(), ids=GIANTS.keys())
def test_grids_of_giant_layers_fit_a_gpu(size, target):
    launches: list[Launch] = []
    with observed(launches.append), forced_target(target):
        run_passes(TritonPasses(), make_layer(LayerCase(**size), "meta"))
    assert len(launches) >= 4
    for launch in launches:
        first, *others = launch.grid
        assert 0 < first < 2**31 and all(0 < count <= 65535 for count in others), (launch.name, launch.grid)


# --- refused ------------------------------------------------------------------------------------------------------


class _NothingIsAllocated(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is forward_operator:  # a mode sees the passes as one operator: look into it
            with self:
                return _forward(*arguments, **(options or {}))
        result = function(*arguments, **(options or {}))
        allocating = ("empty", "zeros", "clone", "copy", "contiguous", "mm", "new_")
        assert not any(word in str(function) for word in allocating), f"{function} came before the refusal"
        return result


REFUSED = {
    "rank": ({"R": 8192, "E": 8}, {}, r"lora_A.*rank.*backend='torch'"),
    "lora_A": ({}, {"lora_A": (1 << 11, 1 << 20), "N": 1 << 20}, r"lora_A and router.*2\^31.*backend='torch'"),
    "lora_B": ({}, {"lora_B": (1 << 28, 8), "M": 1 << 28}, r"lora_B.*2\^31.*backend='torch'"),
}


@pytest.mark.parametrize(("size", "huge", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_kernels_do_not_hold_is_refused_before_anything_is_allocated(size, huge, words, device):
    problem = make_problem(T=3, N=2, M=2, bias=False, dtype=F32, **size).map(lambda t: t.to(device))
    one = torch.zeros((), device=device)  # matrices of one number, repeated: they take no memory
    N, M = huge.get("N", 2), huge.get("M", 2)
    R = huge.get("lora_A", (problem.lora_A.shape[0],))[0]
    problem = replace(
        problem,
        **{"x": one.expand(3, N), "weight": one.expand(M, N), "router": one.expand(len(problem.router), N)},
        **{"lora_A": one.expand(R, N), "lora_B": one.expand(M, R)},
    )
    tensors = (problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.router)
    with pytest.raises(ValueError, match=words), _NothingIsAllocated():
        goat_linear(*tensors, scaling=1.0, top_k=2, backend="triton")
