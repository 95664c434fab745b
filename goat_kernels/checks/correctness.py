"""Is what this machine computes right? Every pass and the whole layer against float64, for every dtype and form.

A pass is handed what the passes before it give in float64, rounded to its dtypes, and its results are compared with
those of the torch passes in float64 on the same rounded inputs: an error belongs to one pass. The whole layer is
compared with the oracle, ``goat_kernels/reference.py``. Beside each error stands that of the torch backend in the same
dtype; both are held to ``goat_kernels.numerics.TOLERANCES``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from goat_kernels.backends import get_backend
from goat_kernels.backends.torch_backend import TorchHiddenGradient, TorchPasses
from goat_kernels.checks.problem import LayerCase, Problem, doubled, dropout_masks, make_problem
from goat_kernels.dropout import draw_seed
from goat_kernels.functional import goat_linear
from goat_kernels.kernels.configs import KNOWN_TARGETS, Target, forced_target
from goat_kernels.kernels.launch import Launch, observed
from goat_kernels.numerics import TOLERANCES, relative_error
from goat_kernels.passes import Passes, Routing
from goat_kernels.reference import ReferenceOutput, goat_reference

#: (x's dtype, the adapter's).
DTYPES: tuple[tuple[torch.dtype, torch.dtype], ...] = (
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
)

_DROPOUT_P = 0.2


@dataclass(frozen=True)
class Comparison:
    """One line of the table, for one case.

    Attributes:
        case: the layer.
        what: a pass, or a result of the whole layer.
        kernels: "fused" or "staged" where there are two ways to a pass, for the one taken; else "".
        error: relative error against float64 of the backend that is checked; NaN where anything is.
        torch_error: the torch backend's, or None where that is the one that is checked.
        bound: on both.
        lora_error: that of the arithmetic of PEFT's LoRA with float32 adapters; for results of a half-precision layer.
    """

    case: LayerCase
    what: str
    kernels: str
    error: float
    torch_error: float | None
    bound: float
    lora_error: float | None = None

    @property
    def label(self) -> str:
        """In the table: what, and which kernels."""
        return self.what + (f" ({self.kernels})" if self.kernels else "")

    @property
    def passed(self) -> bool:
        return all(error <= self.bound for error in (self.error, self.torch_error) if error is not None)


@dataclass(frozen=True)
class CaseGroup:
    """Cases of one shape and dtypes, in several forms: a block of the table."""

    title: str
    cases: tuple[LayerCase, ...]


def groups(*, interpreted: bool, dtypes: tuple[torch.dtype, ...]) -> list[CaseGroup]:
    """What to check, in order.

    Args:
        interpreted: sizes for the interpreter, in which a GPU with few multiprocessors is imitated, so that they take
            the same kernels; else sizes of real use.
        dtypes: of x.
    """
    return [
        CaseGroup(
            title,
            tuple(
                LayerCase(**sizes, dtype=dtype, adapter_dtype=adapter_dtype, path=path, dropout_p=dropout_p)
                for path, dropout_p in forms
            ),
        )
        for dtype, adapter_dtype in DTYPES
        if dtype in dtypes
        for title, sizes, forms in (_interpreted(dtype, adapter_dtype) if interpreted else _REAL)
    ]


#: (with a frozen pair or without, dropout)
_ALL_FORMS = ((False, 0.0), (False, _DROPOUT_P), (True, 0.0), (True, _DROPOUT_P))
_WITHOUT_DROPOUT = ((False, 0.0), (True, 0.0))

_REAL = (
    ("many tokens", {"T": 4096, "N": 1024, "M": 1536}, _ALL_FORMS),
    ("large rank", {"T": 1000, "N": 768, "M": 768, "R": 256}, _ALL_FORMS),
    ("small rank", {"T": 16384, "N": 1024, "M": 1024, "R": 8}, _WITHOUT_DROPOUT),
    ("few tokens", {"T": 16, "N": 1024, "M": 1536}, _WITHOUT_DROPOUT),
)


def _imitated(multiprocessors: int) -> Target:
    return dataclasses.replace(KNOWN_TARGETS["sm_90"], multiprocessors=multiprocessors)


def _interpreted(dtype: torch.dtype, adapter_dtype: torch.dtype) -> Iterator[tuple[str, dict, tuple]]:
    """(title, sizes, forms): multiples of nothing, so that every mask is met, and two steps of each kernel's loops."""
    N, M = (136, 72) if dtype.itemsize == 2 else (40, 36)
    yield "many tokens", {"T": 66, "N": N, "M": M, "R": 12, "E": 4, "target": _imitated(2)}, _ALL_FORMS
    if dtype.itemsize == 2 and adapter_dtype == dtype:
        return  # what an adapter in x's dtype changes has been seen
    # Three slots, or so many multiprocessors, lead to the staged kernels.
    sizes = {"T": 66, "N": N // 2 + 4, "M": 36, "R": 20, "E": 4, "K": 3, "target": _imitated(24)}
    yield "in stages", sizes, ((False, 0.0), (True, _DROPOUT_P))
    yield "few tokens", {"T": 5, "N": N, "M": M, "R": 12, "E": 4, "target": _imitated(2)}, _WITHOUT_DROPOUT


def compare(case: LayerCase, backend: str, device: torch.device) -> list[Comparison]:
    """Run one case.

    Args:
        case: the layer.
        backend: "triton", or "torch", which then has nothing beside it.
        device: where it runs.
    """
    problem = make_problem(case, device)
    names = list(dict.fromkeys((backend, "torch")))
    rows = []
    with forced_target(case.target) if case.target is not None else contextlib.nullcontext():
        inputs = _pass_inputs(problem)
        of_lora = _lora_errors(problem)
        for errors in (
            [_pass_errors(name, problem, inputs) for name in names],
            [_layer_errors(name, problem) for name in names],
        ):
            for what, (kernels, error, bound) in errors[0].items():
                torch_error = errors[1][what][1] if len(names) == 2 else None
                rows.append(Comparison(case, what, kernels, error, torch_error, bound, of_lora.get(what)))
    return rows


# --- the passes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PassInputs:
    """What the passes after the first are handed, in the dtypes of a run; the gradient as its three parts."""

    routing: Routing
    hidden_TR: Tensor
    logits_ET: Tensor
    residual_TR0: Tensor | None

    def double(self) -> _PassInputs:
        routing = Routing(*map(doubled, self.routing))
        return _PassInputs(routing, *map(doubled, (self.hidden_TR, self.logits_ET, self.residual_TR0)))

    def gradient(self, backend: str):
        """In the backend's own layout."""
        if backend == "triton":
            from goat_kernels.kernels.hidden_gradient import TritonHiddenGradient  # imports Triton

            return TritonHiddenGradient(self.hidden_TR, self.logits_ET, self.residual_TR0, partial_B=None)
        parts = [self.hidden_TR, self.logits_ET.t().to(self.hidden_TR.dtype)]
        if self.residual_TR0 is not None:
            parts.append(self.residual_TR0)
        return TorchHiddenGradient(torch.cat(parts, dim=1), self.logits_ET)


def _pass_inputs(problem: Problem) -> _PassInputs:
    exact, oracle, compute = problem.double(), TorchPasses(), problem.x_TN.dtype
    _, _, routing = oracle.prefill(exact.x_TN, exact.adapter, exact.bias_M, None)
    weighted_TR, *statistics, _ = routing
    routing = Routing(weighted_TR.to(compute), *(value.float() for value in statistics), problem.x_TN.new_empty(0))
    parts = gradient_parts(
        oracle.hidden_gradient(
            exact.grad_y_TM, exact.grad_balance, exact.adapter, Routing(*map(doubled, routing)), with_residual=True
        ),
        problem,
    )
    hidden_TR, logits_ET, *residual = parts
    return _PassInputs(
        routing, hidden_TR.to(compute), logits_ET.float().contiguous(), residual[0].to(compute) if residual else None
    )


def gradient_parts(gradient, problem: Problem) -> list[Tensor]:
    """dh, dlogits [E, T], and dh0 where there is a frozen pair, from any backend's hidden gradient."""
    if not isinstance(gradient, TorchHiddenGradient):
        parts = (gradient.hidden_TR, gradient.logits_ET, gradient.residual_TR0)
        return [part for part in parts if part is not None]
    R, E = problem.adapter.rank, problem.adapter.num_experts
    hidden_TR, _, residual_TR0 = gradient.columns.tensor_split((R, R + E), dim=1)
    return [hidden_TR, gradient.logits_ET, *([residual_TR0] if residual_TR0.shape[1] else [])]


def _run_passes(backend: str, problem: Problem, inputs: _PassInputs, passes: Passes) -> Iterator[tuple]:
    """(name, which kernels, results) of each pass."""
    adapter, gradient = problem.adapter, inputs.gradient(backend)
    with _kernels() as kernels:
        y_TM, balance, own = passes.prefill(problem.x_TN, adapter, problem.bias_M, None)
    yield "prefill", _way(kernels), [y_TM, own.weighted_TR]
    yield "gate and balance loss", "", [balance, own.gate_ET, own.probs_ET, own.load_E]
    routing = inputs.routing._replace(packed=own.packed)
    with _kernels() as kernels:
        own_gradient = passes.hidden_gradient(
            problem.grad_y_TM, problem.grad_balance, adapter, routing, with_residual=True, needs_B=True
        )
    yield "hidden gradient", _way(kernels), gradient_parts(own_gradient, problem)

    def weight_gradients(gradient) -> tuple[Tensor, Tensor, Tensor]:
        needs = dict.fromkeys(("needs_A", "needs_B", "needs_router"), True)
        return passes.weight_gradients(problem.x_TN, problem.grad_y_TM, adapter, routing, gradient, **needs)

    grad_A, grad_B, grad_router = weight_gradients(gradient)
    of_B, of_x = [grad_B], [grad_A, grad_router]
    if own_gradient.partial_B is not None:  # sums of it rode in the hidden gradient's read of dY
        grad_A, grad_B, grad_router = weight_gradients(gradient._replace(partial_B=own_gradient.partial_B))
        of_B, of_x = [*of_B, grad_B], [*of_x, grad_A, grad_router]
    yield "lora_B gradient", "", of_B
    yield "lora_A and router gradient", "", of_x
    yield "input gradient", "", [passes.input_prefill(adapter, routing, gradient)]


@contextlib.contextmanager
def _kernels() -> Iterator[set[str]]:
    """The names of the kernels that are launched inside the block."""
    names = set()

    def observe(launch: Launch) -> None:
        names.add(launch.name)
        launch.run()

    with observed(observe):
        yield names


def _way(kernels: set[str]) -> str:
    if not kernels:
        return ""
    return "fused" if kernels & {"fused_forward", "fused_hidden_gradient"} else "staged"


def _pass_errors(backend: str, problem: Problem, inputs: _PassInputs) -> dict[str, tuple[str, float, float]]:
    """Pass -> (which kernels, the largest error of its results, bound)."""
    results = _run_passes(backend, problem, inputs, get_backend(backend))
    expected = _run_passes("torch", problem.double(), inputs.double(), TorchPasses())
    errors = {}
    for (what, kernels, tensors), (_, _, oracles) in zip(results, expected, strict=True):
        # Router and gate work in float32, whatever x is.
        dtype = torch.float32 if what == "gate and balance loss" else problem.x_TN.dtype
        errors[what] = (kernels, _largest_error(tensors, oracles), TOLERANCES[dtype].relative)
    return errors


def _largest_error(results: list[Tensor], oracles: list[Tensor]) -> float:
    oracles = oracles * (len(results) // len(oracles))  # several ways to the same results
    errors = [relative_error(result, oracle) for result, oracle in zip(results, oracles, strict=True)]
    return max(errors, key=lambda error: float("inf") if error != error else error)


# --- the whole layer ----------------------------------------------------------------------------------------------


def _oracle(problem: Problem) -> tuple[dict[str, Tensor], Tensor | None]:
    """(results of the layer in float64, dropout masks)."""
    torch.manual_seed(0)
    masks = dropout_masks(problem, draw_seed(problem.x_TN.device)) if problem.adapter.dropout_p else None
    return run_layer(goat_reference, problem.double(), dropout_masks=masks), masks


def _lora_errors(problem: Problem) -> dict[str, float]:
    """Result of the layer -> error in PEFT's arithmetic; empty where that is not another than float32's."""
    if problem.x_TN.dtype.itemsize != 2 or problem.adapter.lora_A.dtype != torch.float32:
        return {}
    expected, masks = _oracle(problem)
    results = run_layer(_goat_as_lora, problem, dropout_masks=masks)
    return {what: relative_error(results[what], expected[what]) for what in expected}


def _goat_as_lora(
    x: Tensor, weight: Tensor, *, bias: Tensor, dropout_masks: Tensor | None, **adapter
) -> ReferenceOutput:
    """GOAT as PEFT's ``lora.Linear`` computes a LoRA with float32 adapters over a half-precision base.

    The base's output is rounded to x's dtype; x is cast up, everything of the adapter is float32, and the sum is
    rounded once more. docs/numerics.md sets the fused layer's errors beside these.
    """
    nothing = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
    masks = None if dropout_masks is None else dropout_masks.float()
    in_float32 = goat_reference(x.float(), nothing, dropout_masks=masks, **adapter)
    return in_float32._replace(output=(F.linear(x, weight, bias) + in_float32.output).to(x.dtype))


def _layer_errors(backend: str, problem: Problem) -> dict[str, tuple[str, float, float]]:
    """Result of the layer -> ("", error, bound)."""
    expected, _ = _oracle(problem)
    torch.manual_seed(0)  # the layer draws the seed that the oracle's masks come from
    results = run_layer(goat_linear, problem, dropout_p=problem.adapter.dropout_p, training=True, backend=backend)
    bounds = {"balance loss": TOLERANCES[torch.float32].relative}
    bound = TOLERANCES[problem.x_TN.dtype].relative
    return {what: ("", relative_error(results[what], expected[what]), bounds.get(what, bound)) for what in expected}


def run_layer(function: Callable, problem: Problem, **options) -> dict[str, Tensor]:
    """Output, balance loss and every gradient of ``goat_linear`` or ``goat_reference``."""
    adapter = problem.adapter
    leaves = {
        name: tensor.detach().clone().requires_grad_(True)
        for name, tensor in {
            "x": problem.x_TN,
            "weight": problem.weight_MN,
            "bias": problem.bias_M,
            "lora_A": adapter.lora_A,
            "lora_B": adapter.lora_B,
            "router": adapter.router,
        }.items()
    }
    result = function(
        **leaves,
        scaling=adapter.scaling if adapter.scaling_E is None else adapter.scaling_E,
        top_k=adapter.top_k,
        residual=None if adapter.residual_A is None else (adapter.residual_A, adapter.residual_B),
        **options,
    )
    torch.autograd.backward(
        [result.output, result.balance_loss], [problem.grad_y_TM, problem.grad_balance.to(result.balance_loss.dtype)]
    )
    results = {"output": result.output.detach(), "balance loss": result.balance_loss.detach()}
    return results | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
