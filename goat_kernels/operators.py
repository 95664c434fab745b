"""Forward and backward of a GOAT layer: the passes of a backend strung together with the base product.

Eager mode calls :func:`run_forward` and :func:`run_backward` from the autograd Function of ``functional.py``. The same
two are registered as custom operators, ``goat_kernels::forward`` and ``goat_kernels::backward``, opaque to a tracer:
torch.compile sees one node per direction, and the in-place accumulation of the base product onto the prefilled output
survives. Each operator has a fake (shapes and dtypes alone) and a FLOP count.

Where a TorchDispatchMode watches an eager call (selective checkpointing, fake tensors, FLOP counters), it sees the
passes as ``goat_kernels::prefill`` and ``goat_kernels::folded_weight``, and the base product as ``aten::addmm``. Such a
mode may keep a tensor and give it back later, so in its sight none is written after it was returned.

Everything about the order of passes, and about which gradients are computed, is here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from goat_kernels.autocast import autocast_disabled
from goat_kernels.backends import get_backend
from goat_kernels.passes import Adapter, Passes, Routing, stats_dtype

_library = torch.library.Library("goat_kernels", "DEF")

# Tensors of the adapter, in one order for both operators.
_ADAPTER = (
    "Tensor lora_A, Tensor lora_B, Tensor router, Tensor? residual_A, Tensor? residual_B, Tensor? scaling_E, "
    "Tensor? seed"
)
_OPTIONS = "float scaling, int top_k, float dropout_p, float balance_coefficient, str backend"

_library.define(
    f"forward(Tensor x, Tensor? weight, Tensor? base_output, Tensor? bias, {_ADAPTER}, Tensor? balance_scale, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"prefill(Tensor x_TN, Tensor? base_output_TM, Tensor? bias, {_ADAPTER}, float scaling, int top_k, "
    "float dropout_p, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("folded_weight(Tensor weight, Tensor residual_A, Tensor residual_B) -> Tensor")
_library.define(
    f"backward(Tensor? grad_y, Tensor? grad_balance, Tensor x, Tensor? weight, {_ADAPTER}, Tensor? balance_scale, "
    f"Tensor weighted, Tensor gate, Tensor probs, Tensor load, Tensor packed, {_OPTIONS}, bool[] needs) -> Tensor[]"
)

#: The gradients that ``backward`` can return, in the order of its ``needs``.
GRADIENTS = ("x", "weight", "bias", "lora_A", "lora_B", "router")


def _fold_if_cheaper(
    passes: Passes,
    fold: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_TN: Tensor,
    weight: Tensor | None,
    residual_A: Tensor | None,
    residual_B: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(weight, residual_A, residual_B), with W0 - B0 A0 from ``fold`` and no pair where that is cheaper here."""
    if weight is not None and residual_A is not None and passes.folds(x_TN, weight, residual_A):
        return fold(weight, residual_A, residual_B), None, None
    return weight, residual_A, residual_B


def run_forward(
    x: Tensor,
    weight: Tensor | None,
    base_output: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    router: Tensor,
    residual_A: Tensor | None,
    residual_B: Tensor | None,
    scaling_E: Tensor | None,
    seed: Tensor | None,
    balance_scale: Tensor | None,
    scaling: float,
    top_k: int,
    dropout_p: float,
    balance_coefficient: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y [..., M], balance loss [], load [E], h~ [T, R], gate [E, T], probs [E, T], the packed adapter).

    Exactly one of ``weight`` (the base product runs here) and ``base_output`` [..., M] (it has run elsewhere) is
    given. ``balance_scale`` and ``balance_coefficient`` matter to the backward alone.
    """
    observed = torch._C._len_torch_dispatch_stack() > 0
    with autocast_disabled(x.device.type):  # its casts have been done
        passes = get_backend(backend)
        x_TN = _flattened(x)
        fold, prefill = (folding_operator, prefill_operator) if observed else (passes.folded_weight, run_prefill)
        weight, residual_A, residual_B = _fold_if_cheaper(passes, fold, x_TN, weight, residual_A, residual_B)
        base_output_TM = None if base_output is None else _flattened(base_output)
        adapter = (lora_A, lora_B, router, residual_A, residual_B, scaling_E, seed)
        y_TM, *kept = prefill(x_TN, base_output_TM, bias, *adapter, scaling, top_k, dropout_p, backend)
        if weight is not None:
            y_TM = torch.addmm(y_TM, x_TN, weight.t(), out=None if observed else y_TM)
        # Not a view for autograd's eyes (as in torch's own linear), so that the caller may modify y in place.
        y = y_TM if x.ndim == 2 else torch.ops.aten._unsafe_view.default(y_TM, (*x.shape[:-1], y_TM.shape[1]))
        return (y, *kept)


def _flattened(tensor: Tensor) -> Tensor:
    """[..., C] as [tokens, C]; itself where it is that, because each call into torch is felt at small sizes."""
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def run_prefill(
    x_TN: Tensor,
    base_output_TM: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    router: Tensor,
    residual_A: Tensor | None,
    residual_B: Tensor | None,
    scaling_E: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    top_k: int,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`run_forward` returns, of flattened tokens and without the base product."""
    adapter = Adapter(lora_A, lora_B, router, residual_A, residual_B, scaling, scaling_E, top_k, dropout_p, seed)
    y_TM, balance_loss, routing = get_backend(backend).call(_prefill, x_TN, adapter, bias, base_output_TM)
    weighted, gate, probs, load, packed = routing
    return y_TM, balance_loss, load, weighted, gate, probs, packed


def _prefill(
    passes: Passes, x_TN: Tensor, adapter: Adapter, bias_M: Tensor | None, base_output_TM: Tensor | None
) -> tuple[Tensor, Tensor, Routing]:
    return passes.prefill(x_TN, adapter, bias_M, base_output_TM)


def _folded_weight(weight: Tensor, residual_A: Tensor, residual_B: Tensor) -> Tensor:
    """W0 - B0 A0 [M, N] as a tensor of its own; the bits are those of a backend's ``folded_weight``."""
    return torch.addmm(weight, residual_B.to(weight.dtype), residual_A.to(weight.dtype), alpha=-1)


def run_backward(
    grad_y: Tensor | None,
    grad_balance: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    router: Tensor,
    residual_A: Tensor | None,
    residual_B: Tensor | None,
    scaling_E: Tensor | None,
    seed: Tensor | None,
    balance_scale: Tensor | None,
    weighted: Tensor,
    gate: Tensor,
    probs: Tensor,
    load: Tensor,
    packed: Tensor,
    scaling: float,
    top_k: int,
    dropout_p: float,
    balance_coefficient: float,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order of ``GRADIENTS`` and without gaps.

    ``balance_coefficient`` * ``balance_scale`` (1 where there is none) is added to the gradient of the balance loss:
    this is how the loss reaches any trainer (training/balance.py).
    """
    needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_router = needs
    with autocast_disabled(x.device.type):  # its casts have been done
        passes = get_backend(backend)
        x_TN = _flattened(x)
        if needs_x:
            fold = passes.folded_weight
            weight, residual_A, residual_B = _fold_if_cheaper(passes, fold, x_TN, weight, residual_A, residual_B)
        adapter = Adapter(lora_A, lora_B, router, residual_A, residual_B, scaling, scaling_E, top_k, dropout_p, seed)
        routing = Routing(weighted, gate, probs, load, packed)
        if grad_y is None:  # only the balance loss was differentiated
            grad_y_TM = x_TN.new_zeros(x_TN.shape[0], lora_B.shape[0])
        else:
            grad_y_TM = _flattened(grad_y)
            if balance_coefficient:
                injected = balance_coefficient
                if balance_scale is not None:
                    injected = balance_scale.to(gate.dtype) * balance_coefficient
                grad_balance = injected if grad_balance is None else grad_balance + injected

        gradients: dict[str, Tensor | None] = {}
        if needs_bias:
            gradients["bias"] = grad_y_TM.sum(dim=0)
        if needs_weight:
            gradients["weight"] = grad_y_TM.t() @ x_TN
        grad_x_TN, gradients["lora_A"], gradients["lora_B"], gradients["router"] = passes.call(
            _adapter_gradients,
            x_TN,
            grad_y_TM,
            grad_balance,
            adapter,
            routing,
            needs_x=needs_x,
            needs_A=needs_A,
            needs_B=needs_B,
            needs_router=needs_router,
        )
        if grad_x_TN is not None:
            if weight is not None and grad_y is not None:
                torch.addmm(grad_x_TN, grad_y_TM, weight, out=grad_x_TN)
            gradients["x"] = grad_x_TN if x.ndim == 2 else grad_x_TN.view(x.shape)
        return [gradients[name] for name, needed in zip(GRADIENTS, needs, strict=True) if needed]


def _adapter_gradients(
    passes: Passes,
    x_TN: Tensor,
    grad_y_TM: Tensor,
    grad_balance: Tensor | float | None,
    adapter: Adapter,
    routing: Routing,
    *,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
    needs_router: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX0 [T, N], onto which dY W accumulates, and the gradients of lora_A, lora_B, router; None where not needed.

    dY is read first, then x; dX0 is written last, so that it is still in the cache for the base product.
    """
    grad_x_TN = grad_A = grad_B = grad_router = hidden_gradient = None
    if needs_x or needs_A or needs_router:
        hidden_gradient = passes.hidden_gradient(
            grad_y_TM, grad_balance, adapter, routing, with_residual=needs_x, needs_B=needs_B
        )
    if needs_A or needs_B or needs_router:
        grad_A, grad_B, grad_router = passes.weight_gradients(
            x_TN,
            grad_y_TM,
            adapter,
            routing,
            hidden_gradient,
            needs_A=needs_A,
            needs_B=needs_B,
            needs_router=needs_router,
        )
    if needs_x:
        if hidden_gradient.partial_B is not None:  # of no more use: let its memory go before dX takes as much
            hidden_gradient = hidden_gradient._replace(partial_B=None)
        grad_x_TN = passes.input_prefill(adapter, routing, hidden_gradient)
    return grad_x_TN, grad_A, grad_B, grad_router


def _forward_fake(
    x, weight, base_output, bias, lora_A, lora_B, router, residual_A, residual_B, scaling_E, seed, balance_scale,
    scaling, top_k, dropout_p, balance_coefficient, backend,
):  # fmt: skip
    T = x.numel() // x.shape[-1] if x.shape[-1] else 0
    adapter = (lora_A, lora_B, router, residual_A, residual_B, scaling_E, seed)
    x_TN = x.new_empty(T, x.shape[-1])
    _, *kept = _prefill_fake(x_TN, None, None, *adapter, scaling, top_k, dropout_p, backend)
    return (x.new_empty(*x.shape[:-1], lora_B.shape[0]), *kept)


def _prefill_fake(
    x_TN, base_output_TM, bias, lora_A, lora_B, router, residual_A, residual_B, scaling_E, seed,
    scaling, top_k, dropout_p, backend,
):  # fmt: skip
    (T, _), E, stats = x_TN.shape, router.shape[0], stats_dtype(x_TN)
    adapter = Adapter(lora_A, lora_B, router, residual_A, residual_B, scaling, scaling_E, top_k, dropout_p, seed)
    return (
        x_TN.new_empty(T, lora_B.shape[0]),
        x_TN.new_empty((), dtype=stats),
        x_TN.new_empty(E, dtype=stats),
        x_TN.new_empty(T, lora_A.shape[0]),
        x_TN.new_empty(E, T, dtype=stats),
        x_TN.new_empty(E, T, dtype=stats),
        x_TN.new_empty(get_backend(backend).packed_numel(adapter, x_TN.dtype, T)),
    )


def _backward_fake(grad_y, grad_balance, x, weight, lora_A, lora_B, router, *rest):
    needs = rest[-1]
    M = lora_B.shape[0]
    fakes = {
        "x": lambda: x.new_empty(x.shape),
        "weight": lambda: x.new_empty(M, x.shape[-1]),
        "bias": lambda: x.new_empty(M),
        "lora_A": lambda: torch.empty_like(lora_A, memory_format=torch.contiguous_format),
        "lora_B": lambda: torch.empty_like(lora_B, memory_format=torch.contiguous_format),
        "router": lambda: torch.empty_like(router, memory_format=torch.contiguous_format),
    }
    return [fakes[name]() for name, needed in zip(GRADIENTS, needs, strict=True) if needed]


_library.impl("forward", run_forward, "CompositeExplicitAutograd")
_library.impl("backward", run_backward, "CompositeExplicitAutograd")
_library.impl("prefill", run_prefill, "CompositeExplicitAutograd")
_library.impl("folded_weight", _folded_weight, "CompositeExplicitAutograd")
torch.library.register_fake("goat_kernels::forward", _forward_fake, lib=_library)
torch.library.register_fake("goat_kernels::backward", _backward_fake, lib=_library)
torch.library.register_fake("goat_kernels::prefill", _prefill_fake, lib=_library)
torch.library.register_fake("goat_kernels::folded_weight", _folded_weight, lib=_library)

forward_operator = torch.ops.goat_kernels.forward.default
backward_operator = torch.ops.goat_kernels.backward.default
prefill_operator = torch.ops.goat_kernels.prefill.default
folding_operator = torch.ops.goat_kernels.folded_weight.default


def _tokens(x_shape: torch.Size) -> int:
    return x_shape.numel() // max(x_shape[-1], 1)


@register_flop_formula(torch.ops.goat_kernels.forward)
def _forward_flops(x_shape, weight_shape, base_shape, bias_shape, A_shape, B_shape, *rest, **_):
    base = 0 if weight_shape is None else 2 * _tokens(torch.Size(x_shape)) * A_shape[1] * B_shape[0]
    return base + _prefill_flops(x_shape, base_shape, bias_shape, A_shape, B_shape, *rest)


@register_flop_formula(torch.ops.goat_kernels.prefill)
def _prefill_flops(x_shape, base_shape, bias_shape, A_shape, B_shape, router_shape, A0_shape, *rest, **_):
    (R, N), M, E = A_shape, B_shape[0], router_shape[0]
    R0 = A0_shape[0] if A0_shape else 0
    return 2 * _tokens(torch.Size(x_shape)) * ((R + E + R0) * N + (R + R0) * M)


@register_flop_formula(torch.ops.goat_kernels.folded_weight)
def _folded_weight_flops(weight_shape, A0_shape, B0_shape, **_):
    return 2 * A0_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.goat_kernels.backward)
def _backward_flops(
    grad_y_shape, grad_balance_shape, x_shape, weight_shape, A_shape, B_shape, router_shape, A0_shape, *rest, **_
):
    needs_x, needs_weight, _bias, needs_A, needs_B, needs_router = next(
        r for r in reversed(rest) if isinstance(r, list)
    )
    (R, N), M, E = A_shape, B_shape[0], router_shape[0]
    R0 = A0_shape[0] if A0_shape and needs_x else 0
    products = 0
    if needs_x or needs_A or needs_router:
        products += (R + R0) * M
    if needs_x:
        products += (R + E + R0) * N + (M * N if weight_shape is not None else 0)
    if needs_weight:
        products += M * N
    products += (R * needs_A + E * needs_router) * N
    if needs_B:
        products += R * M
    return 2 * _tokens(torch.Size(x_shape)) * products
