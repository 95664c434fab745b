"""Is what this machine computes right? Every pass and the whole layer against float64, for every dtype and form.

A pass is handed what the passes before it give in float64, rounded to its dtypes, and its results are compared with
those of the torch passes in float64 on the same rounded inputs: an error belongs to one pass. The whole layer is
compared with the oracle, ``goat_kernels/reference.py``. Beside each error stands that of the torch backend in the same
dtype; both are held to ``goat_kernels.numerics.TOLERANCES``. ``check_replay`` repeats a layer's calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from goat_kernels.backends import get_backend
from goat_kernels.backends.torch_backend import TorchHiddenGradient, TorchPasses
from goat_kernels.checks.problem import LayerCase, Problem, doubled, dropout_masks, imitated, make_problem
from goat_kernels.dropout import draw_seed
from goat_kernels.functional import goat_linear
from goat_kernels.kernels.configs import forced_target
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


#: (with a frozen pair or without, dropout)
_ALL_FORMS = ((False, 0.0), (False, _DROPOUT_P), (True, 0.0), (True, _DROPOUT_P))
_WITHOUT_DROPOUT = ((False, 0.0), (True, 0.0))

_REAL = (
    ("many tokens", {"T": 4096, "N": 1024, "M": 1536}, _ALL_FORMS),
    ("large rank", {"T": 1000, "N": 768, "M": 768, "R": 256}, _ALL_FORMS),
    ("small rank", {"T": 16384, "N": 1024, "M": 1024, "R": 8}, _WITHOUT_DROPOUT),
    ("few tokens", {"T": 16, "N": 1024, "M": 1536}, _WITHOUT_DROPOUT),
)


def groups(*, interpreted: bool, dtypes: tuple[torch.dtype, ...]) -> list[tuple[str, list[LayerCase]]]:
    """What to check, in order: (title, cases of one shape and dtypes in several forms), each a block of the table.

    Args:
        interpreted: sizes for the interpreter, in which a GPU with few multiprocessors is imitated, so that they take
            the same kernels; else sizes of real use.
        dtypes: of x.
    """
    found = []
    for dtype, adapter_dtype in DTYPES:
        if dtype in dtypes:
            for title, sizes, forms in _interpreted(dtype, adapter_dtype) if interpreted else _REAL:
                layer = LayerCase(**sizes, dtype=dtype, adapter_dtype=adapter_dtype)
                found.append((title, [replace(layer, path=path, dropout_p=p) for path, p in forms]))
    return found


def _interpreted(dtype: torch.dtype, adapter_dtype: torch.dtype) -> Iterator[tuple[str, dict, tuple]]:
    """(title, sizes, forms): multiples of nothing, so that every mask is met, and two steps of each kernel's loops."""
    N, M = (136, 72) if dtype.itemsize == 2 else (40, 36)
    yield "many tokens", {"T": 66, "N": N, "M": M, "R": 12, "E": 4, "target": imitated(2)}, _ALL_FORMS
    if dtype.itemsize == 2 and adapter_dtype == dtype:
        return  # what an adapter in x's dtype changes has been seen
    # Three slots, or so many multiprocessors, lead to the staged kernels.
    sizes = {"T": 66, "N": N // 2 + 4, "M": 36, "R": 20, "E": 4, "K": 3, "target": imitated(24)}
    yield "in stages", sizes, ((False, 0.0), (True, _DROPOUT_P))
    yield "few tokens", {"T": 5, "N": N, "M": M, "R": 12, "E": 4, "target": imitated(2)}, _WITHOUT_DROPOUT


def compare(case: LayerCase, backend: str, device: torch.device) -> list[dict]:
    """Run one case.

    Args:
        case: the layer.
        backend: "triton", or "torch", which then has nothing beside it.
        device: where it runs.

    Returns:
        One row for each pass and for each result of the whole layer:

        what: the pass or result.
        kernels: "fused" or "staged" where there are two ways to a pass, for the one taken; else None.
        error: relative error of the backend against float64; NaN where anything is.
        torch_error: the torch backend's, or None where that is the one that is checked.
        lora_error: that of the arithmetic of PEFT's LoRA with float32 adapters; for results of a half-precision layer.
        bound: on ``error`` and ``torch_error``.
        passed: whether both are within it.
    """
    problem = make_problem(case, device)
    with forced_target(case.target):
        routing, gradient = _pass_inputs(problem)
        exact = Routing(*map(doubled, routing)), [*map(doubled, gradient)]
        expected, _ = _run_passes(TorchPasses(), problem.double(), *exact)
        torch.manual_seed(0)
        masks = dropout_masks(problem, draw_seed(device)) if case.dropout_p else None
        expected |= _as_lists(run_layer(goat_reference, problem.double(), dropout_masks=masks))
        results = {}
        for name in dict.fromkeys(("torch", backend)):  # the kernels that are kept are those of ``backend``
            results[name], kernels = _run_passes(get_backend(name), problem, routing, gradient)
            torch.manual_seed(0)  # the layer draws the seed that the oracle's masks come from
            layer = run_layer(goat_linear, problem, dropout_p=case.dropout_p, training=True, backend=name)
            results[name] |= _as_lists(layer)
        if case.dtype.itemsize == 2 and case.adapter_dtype == torch.float32:
            results["lora"] = _as_lists(run_layer(_goat_as_lora, problem, dropout_masks=masks))
    fused = {"prefill": "fused_forward", "hidden gradient": "fused_hidden_gradient"}
    rows = []
    for what, oracles in expected.items():
        # Router and gate work in float32, whatever x is.
        dtype = torch.float32 if what in ("gate and balance loss", "balance loss") else case.dtype
        bound = TOLERANCES[dtype].relative
        errors = {name: _largest_error(found[what], oracles) for name, found in results.items() if what in found}
        way = ("fused" if fused[what] in kernels else "staged") if kernels and what in fused else None
        rows.append(
            {
                "what": what,
                "kernels": way,
                "error": errors[backend],
                "torch_error": errors["torch"] if backend != "torch" else None,
                "lora_error": errors.get("lora"),
                "bound": bound,
                "passed": all(errors[name] <= bound for name in ("torch", backend)),
            }
        )
    return rows


def _as_lists(results: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    return {what: [result] for what, result in results.items()}


def _largest_error(results: list[Tensor], oracles: list[Tensor]) -> float:
    oracles = oracles * (len(results) // len(oracles))  # several ways to the same results
    errors = [relative_error(result, oracle) for result, oracle in zip(results, oracles, strict=True)]
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


# --- the passes ---------------------------------------------------------------------------------------------------


def _pass_inputs(problem: Problem) -> tuple[Routing, list[Tensor]]:
    """What the passes after the first are handed, in the dtypes of a run: a routing, and a gradient's parts."""
    exact, oracle, compute = problem.double(), TorchPasses(), problem.x_TN.dtype
    _, _, (weighted_TR, *statistics, _) = oracle.prefill(exact.x_TN, exact.adapter, exact.bias_M, None)
    routing = Routing(weighted_TR.to(compute), *(value.float() for value in statistics), problem.x_TN.new_empty(0))
    gradient = oracle.hidden_gradient(
        exact.grad_y_TM, exact.grad_balance, exact.adapter, Routing(*map(doubled, routing)), with_residual=True
    )
    hidden_TR, logits_ET, *residual = gradient_parts(gradient, problem)
    return routing, [hidden_TR.to(compute), logits_ET.float().contiguous(), *(part.to(compute) for part in residual)]


def gradient_parts(gradient, problem: Problem) -> list[Tensor]:
    """dh, dlogits [E, T], and dh0 where there is a frozen pair, from any backend's hidden gradient."""
    if not isinstance(gradient, TorchHiddenGradient):
        parts = (gradient.grad_hidden_TR, gradient.logits_ET, gradient.residual_TR0)
        return [part for part in parts if part is not None]
    R, E = problem.adapter.rank, problem.adapter.num_experts
    hidden_TR, _, residual_TR0 = gradient.columns.tensor_split((R, R + E), dim=1)
    return [hidden_TR, gradient.logits_ET, *([residual_TR0] if residual_TR0.shape[1] else [])]


def _run_passes(
    passes: Passes, problem: Problem, routing: Routing, parts: list[Tensor]
) -> tuple[dict[str, list[Tensor]], set[str]]:
    """(pass -> its results, the kernels that were launched), of passes that get what ``_pass_inputs`` returns."""
    x_TN, grad_y_TM, adapter, kernels = problem.x_TN, problem.grad_y_TM, problem.adapter, set()

    def observe(launch: Launch) -> None:
        kernels.add(launch.name)
        launch.run()

    def weight_gradients(gradient) -> tuple[Tensor, Tensor, Tensor]:
        needs = dict.fromkeys(("needs_A", "needs_B", "needs_router"), True)
        return passes.weight_gradients(x_TN, grad_y_TM, adapter, routing, gradient, **needs)

    with observed(observe):
        y_TM, balance, own = passes.prefill(x_TN, adapter, problem.bias_M, None)
        routing = routing._replace(packed=own.packed)
        own_gradient = passes.hidden_gradient(
            grad_y_TM, problem.grad_balance, adapter, routing, with_residual=True, needs_B=True
        )
        hidden_TR, logits_ET, *residual = parts
        if isinstance(own_gradient, TorchHiddenGradient):
            columns = [hidden_TR, logits_ET.t().to(hidden_TR.dtype), *residual]
            gradient = TorchHiddenGradient(torch.cat(columns, dim=1), logits_ET)
        else:
            gradient = type(own_gradient)(hidden_TR, logits_ET, residual[0] if residual else None, partial_B=None)
        grad_A, grad_B, grad_router = weight_gradients(gradient)
        of_B, of_x = [grad_B], [grad_A, grad_router]
        if own_gradient.partial_B is not None:  # sums of it rode in the hidden gradient's read of dY
            grad_A, grad_B, grad_router = weight_gradients(gradient._replace(partial_B=own_gradient.partial_B))
            of_B, of_x = [*of_B, grad_B], [*of_x, grad_A, grad_router]
        grad_x = passes.input_prefill(adapter, routing, gradient)
    results = {
        "prefill": [y_TM, own.weighted_TR],
        "gate and balance loss": [balance, own.gate_ET, own.probs_ET, own.load_E],
        "hidden gradient": gradient_parts(own_gradient, problem),
        "lora_B gradient": of_B,
        "lora_A and router gradient": of_x,
        "input gradient": [grad_x],
    }
    return results, kernels


# --- the whole layer ----------------------------------------------------------------------------------------------


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


# --- replay -------------------------------------------------------------------------------------------------------

#: Forward and backward of one layer, so many times: the first two run the passes.
_STEPS = 3


def check_replay(case: LayerCase, device: torch.device) -> tuple[str, str | None]:
    """Equal steps of the layer ``case`` on the Triton backend: what came of them in words, and the fault, if any."""
    from goat_kernels.kernels.replay import REPLAY_VARIABLE, Plans  # imports Triton

    passes, problem = get_backend("triton"), make_problem(case, device)
    before, passes.plans = passes.plans, Plans()  # what ran before does not count, and nothing is left behind
    try:
        with forced_target(case.target):
            first, *others = (run_layer(goat_linear, problem, backend="triton") for _ in range(_STEPS))
        plans = passes.plans
    finally:
        passes.plans = before
    identical = all(torch.equal(_bits(first[name]), _bits(other[name])) for other in others for name in first)
    switch = f"on ({REPLAY_VARIABLE}=0 turns it off)"
    if not plans.is_on:
        switch = f"off ({REPLAY_VARIABLE}=0), every call runs the passes"
    bits = "with the bits of the first" if identical else "with OTHER BITS than the first"
    told = f"{switch}: {_STEPS} steps of one layer, {plans.replayed} of {plans.calls} calls replayed, {bits}"
    if not identical:
        return told, "a repeated step gives other bits than the first"
    if plans.is_on and not plans.replayed:
        refusals = ", ".join(dict.fromkeys(plans.refusals())) or "launches are observed"
        return told, f"it is on, and no call was replayed: {refusals}"
    return told, None


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: one NaN equals another."""
    return tensor.reshape(-1).view(torch.uint8)
