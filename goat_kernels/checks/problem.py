"""The layers that the checks run: their sizes and dtypes, and random tensors for them.

Letters as everywhere: T tokens, N in_features, M out_features, R total rank, E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from goat_kernels.dropout import expert_slots, keep_masks, keep_scale
from goat_kernels.kernels.configs import KNOWN_TARGETS, Target, current_target, forced_target, forced_tile
from goat_kernels.kernels.launch import Launch, observed
from goat_kernels.kernels.tiles import Tile
from goat_kernels.passes import Adapter, Passes
from goat_kernels.reference import select_top_k

#: Tokens whose K-th and next logit are nearer than this, relative to the largest, are not drawn: there two right
#: implementations may choose different experts, and nothing after that choice could be compared.
CLEAR_GAP = 1e-3

#: s of a layer without one for each expert.
_SCALING = 1.7


@dataclass(frozen=True)
class LayerCase:
    """One layer.

    Attributes:
        T, N, M, R, E, K: sizes.
        dtype, adapter_dtype: of x and the base; of lora_A, lora_B, router and the frozen pair.
        path: with a frozen pair, R0 = R, and a scaling per expert; or fold: neither.
        dropout_p: 0 is none.
        onto_base: the adapter is added onto the output of a base that ran elsewhere; else the bias.
        target: the GPU whose tiles are taken; None is the one at hand.
    """

    T: int
    N: int
    M: int
    R: int = 32
    E: int = 8
    K: int = 2
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32
    path: bool = True
    dropout_p: float = 0.0
    onto_base: bool = False
    target: Target | None = None

    @property
    def sizes(self) -> str:
        return " ".join(f"{letter}={getattr(self, letter)}" for letter in "TNMREK")

    @property
    def dtypes(self) -> str:
        x, adapter = (name_of(dtype) for dtype in (self.dtype, self.adapter_dtype))
        return x if x == adapter else f"{x}, adapter {adapter}"

    @property
    def form(self) -> str:
        return ("path" if self.path else "fold") + (f", dropout {self.dropout_p:g}" if self.dropout_p else "")

    def __str__(self) -> str:
        return f"{self.dtypes}; {self.form}; {self.sizes}"


def imitated(multiprocessors: int) -> Target:
    """An H200 with fewer multiprocessors, so that a small T takes the kernels that a large T takes on a whole one.

    Two are filled by 128 tokens in tiles of 64, the tallest; forty are not, so that stages run.
    """
    return replace(KNOWN_TARGETS["sm_90"], multiprocessors=multiprocessors)


@dataclass(frozen=True)
class Problem:
    """A layer's tensors: x, W0, bias or the base's output, dY, the gradient [] of the balance loss, the adapter."""

    x_TN: Tensor
    weight_MN: Tensor
    bias_M: Tensor | None
    base_output_TM: Tensor | None
    grad_y_TM: Tensor
    grad_balance: Tensor
    adapter: Adapter

    def double(self) -> Problem:
        """The same (rounded) values in float64, for the oracle."""
        return self.map(doubled)

    def map(self, function: Callable[[Any], Any]) -> Problem:
        """``function`` of every field, and of every field of the adapter."""
        fields = {name: function(value) for name, value in vars(self).items() if name != "adapter"}
        return Problem(**fields, adapter=Adapter(*map(function, self.adapter)))


def make_problem(case: LayerCase, device: torch.device | str) -> Problem:
    """Random tensors of unit scale: every product has entries of about 1. The same whenever it is called on a device.

    Args:
        case: the layer.
        device: where the tensors are; "meta" gives tensors without values.
    """
    T, N, M, R, E = case.T, case.N, case.M, case.R, case.E
    is_meta = torch.device(device).type == "meta"
    generator = None if is_meta else torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, to: torch.dtype = case.adapter_dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(to)

    router = normal(E, N, scale=N**-0.5)
    x_TN = normal(T, N, to=case.dtype)
    if not is_meta:
        candidates = torch.cat([x_TN, normal(T // 4 + 16, N, to=case.dtype)])
        x_TN = candidates[_clearly_routed(candidates, router, case.K)][:T].contiguous()
    adapter = Adapter(
        lora_A=normal(R, N, scale=N**-0.5),
        lora_B=normal(M, R, scale=R**-0.5),
        router=router,
        residual_A=normal(R, N, scale=N**-0.5) if case.path else None,
        residual_B=normal(M, R, scale=R**-0.5) if case.path else None,
        scaling=1.0 if case.path else _SCALING,
        scaling_E=torch.linspace(0.5, 2.0, E, device=device) if case.path else None,
        top_k=case.K,
        dropout_p=case.dropout_p,
        seed=torch.tensor([0x1234567, -0x7654321], dtype=torch.int32, device=device) if case.dropout_p else None,
    )
    return Problem(
        x_TN=x_TN,
        weight_MN=normal(M, N, scale=N**-0.5, to=case.dtype),
        bias_M=None if case.onto_base else normal(M, to=case.dtype),
        base_output_TM=normal(T, M, to=case.dtype) if case.onto_base else None,
        grad_y_TM=normal(T, M, to=case.dtype),
        grad_balance=torch.tensor(0.7, device=device),
        adapter=adapter,
    )


def _clearly_routed(x_TN: Tensor, router: Tensor, top_k: int) -> Tensor:
    """bool [T]: whether the K-th logit is clear of the next."""
    logits_TE = x_TN.double() @ router.double().t()
    ordered = logits_TE.sort(dim=-1, descending=True).values
    if top_k == logits_TE.shape[1]:
        return torch.ones_like(ordered[:, 0], dtype=torch.bool)
    return ordered[:, top_k - 1] - ordered[:, top_k] > CLEAR_GAP * logits_TE.abs().amax(dim=-1)


def run_passes(
    passes: Passes, problem: Problem, around: Callable[[str], AbstractContextManager] = lambda name: nullcontext()
) -> dict[str, Any]:
    """One forward and backward, without the base product: pass -> its results. Each runs inside ``around(its name)``.

    In the order, and with the conditions, of ``forward_backward.py``.
    """
    adapter, x, grad_y, results = problem.adapter, problem.x_TN, problem.grad_y_TM, {}
    with around("prefill"):
        results["prefill"] = passes.prefill(x, adapter, problem.bias_M, problem.base_output_TM)
    routing = results["prefill"][2]
    with around("hidden_gradient"):
        gradient = passes.hidden_gradient(
            grad_y, problem.grad_balance, adapter, routing, with_residual=True, needs_B=True
        )
    results["hidden_gradient"] = gradient
    with around("weight_gradients"):
        needs = dict.fromkeys(("needs_A", "needs_B", "needs_router"), True)
        results["weight_gradients"] = passes.weight_gradients(x, grad_y, adapter, routing, gradient, **needs)
    with around("input_prefill"):
        results["input_prefill"] = passes.input_prefill(adapter, routing, gradient._replace(partial_B=None))
    return results


def compile_ahead(
    problems: Iterable[Problem], device: torch.device, tiles: Iterable[tuple[str, Tile]] | None = None
) -> None:
    """Compile every launch of a forward and backward of ``problems`` for ``device`` on all processors; none is made.

    Args:
        problems: on "meta": their tensors need no values.
        device: a GPU.
        tiles: (kernel, tile) to compile with, each in turn, in place of the tiles that would be taken. Errors are
            left to the launches: a tile that does not fit raises again there.
    """
    import triton

    from goat_kernels.kernels.passes import TritonPasses

    with (
        forced_target(current_target(device)),
        ThreadPoolExecutor() as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
        observed(_compile),
    ):
        for problem in problems:
            if tiles is None:
                run_passes(TritonPasses(), problem)
            for kernel, tile in tiles or ():
                with forced_tile(kernel, tile), suppress(Exception):
                    run_passes(TritonPasses(), problem)


def _compile(launch: Launch) -> None:
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages}
    launch.kernel.warmup(**launch.arguments, **launch.constants, grid=launch.grid, **options)


def dropout_masks(problem: Problem, seed: Tensor) -> Tensor:
    """float64 [E, T, N]: what x is multiplied by in front of each expert's A."""
    adapter, (T, N) = problem.adapter, problem.x_TN.shape
    selection_TE = select_top_k(problem.x_TN.double() @ adapter.router.double().t(), adapter.top_k)
    slots_TE = expert_slots(selection_TE.double())
    masks = torch.zeros(adapter.num_experts, T, N, dtype=torch.float64, device=seed.device)
    for slot, keep_TN in enumerate(keep_masks(seed, T, N, adapter.top_k, adapter.dropout_p)):
        masks += (slots_TE == slot).t()[:, :, None] * keep_TN
    return masks * keep_scale(adapter.dropout_p)


def doubled(value):
    """A floating tensor in float64; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
