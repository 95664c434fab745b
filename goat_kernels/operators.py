"""Forward and backward of a GOAT layer: the passes of a backend strung together with the base product.

What a call brings beside x is one record, :class:`Layer`. Eager mode calls :func:`run_forward` and :func:`run_backward`
from the autograd Function of ``functional.py``. The same two are registered as custom operators,
``goat_kernels::forward`` and ``goat_kernels::backward``, opaque to a tracer: torch.compile sees one node per direction,
and the in-place accumulation of the base product onto the prefilled output survives. Each operator has a fake (shapes
and dtypes alone) and a FLOP count.

Where a TorchDispatchMode watches an eager call (selective checkpointing, fake tensors, FLOP counters), it sees the
passes as ``goat_kernels::forward`` without a weight and ``goat_kernels::folded_weight``, and the base product as
``aten::addmm``. Such a mode may keep a tensor and give it back later, so in its sight none is written after it was
returned.

Everything about the order of passes, and about which gradients are computed, is here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from goat_kernels.autocast import autocast_disabled
from goat_kernels.backends import get_backend
from goat_kernels.passes import Adapter, Passes, Routing, stats_dtype


class Layer(NamedTuple):
    """One adapted layer, as a call brings it: everything but x.

    weight: [M, N], or None.
    base_output: [..., M], what a base layer that ran elsewhere gave; None where ``weight`` is given.
    bias: [M] or None.
    adapter: the adapter's tensors and options.
    balance_scale, balance_coefficient: their product is added to the gradient of the balance loss in backward, which is
        how the loss reaches any trainer (training/balance.py); no ``balance_scale`` (0-d) counts as 1.
    """

    weight: Tensor | None
    base_output: Tensor | None
    bias: Tensor | None
    adapter: Adapter
    balance_scale: Tensor | None = None
    balance_coefficient: float = 0.0


#: A layer as an operator's arguments: the tensors that it has, which of the possible ones those are, and its options.
FlatLayer = tuple[list[Tensor], list[bool], list[float], list[int]]
_FLAT_LAYER = "Tensor[] tensors, bool[] present, float[] numbers, int[] counts"


def flattened(layer: Layer) -> FlatLayer:
    """``layer`` as lists, those that can have a gradient first; the inverse of :func:`rebuilt`.

    Lists of layers can be joined in the same four arguments.
    """
    weight, base_output, bias, adapter, balance_scale, balance_coefficient = layer
    lora_A, lora_B, router, residual_A, residual_B, scaling, scaling_E, top_k, dropout_p, seed = adapter
    possible = (
        weight,
        base_output,
        bias,
        lora_A,
        lora_B,
        router,
        residual_A,
        residual_B,
        scaling_E,
        seed,
        balance_scale,
    )
    return (
        [tensor for tensor in possible if tensor is not None],
        [tensor is not None for tensor in possible],
        [scaling, dropout_p, balance_coefficient],
        [top_k],
    )


def rebuilt(tensors: list[Tensor], present: list[bool], numbers: list[float], counts: list[int]) -> Layer:
    """The layer that :func:`flattened` made lists of."""
    given = iter(tensors)
    weight, base_output, bias, lora_A, lora_B, router, residual_A, residual_B, scaling_E, seed, balance_scale = (
        next(given) if is_there else None for is_there in present
    )
    scaling, dropout_p, balance_coefficient = numbers
    (top_k,) = counts
    adapter = Adapter(lora_A, lora_B, router, residual_A, residual_B, scaling, scaling_E, top_k, dropout_p, seed)
    return Layer(weight, base_output, bias, adapter, balance_scale, balance_coefficient)


#: The gradients that ``backward`` can return, in the order of its ``needs``.
GRADIENTS = ("x", "weight", "bias", "lora_A", "lora_B", "router")


# --- the order of the passes --------------------------------------------------------------------------------------


def run_forward(x: Tensor, layer: Layer, backend: str, *, observed: bool = False) -> tuple[Tensor, Tensor, Routing]:
    """(y [..., M], balance loss [], what the backward needs). With neither a weight nor a base's output, y lacks W x.

    ``observed``: whether a TorchDispatchMode watches and is to see operators.
    """
    with autocast_disabled(x.device.type):  # its casts have been done
        passes = get_backend(backend)
        x_TN = _flattened_tokens(x)
        weight, adapter = _fold_if_cheaper(passes, x_TN, layer, folding_operator if observed else passes.folded_weight)
        base_output_TM = None if layer.base_output is None else _flattened_tokens(layer.base_output)
        if observed:
            unweighted = layer._replace(weight=None, base_output=base_output_TM, adapter=adapter)
            y_TM, balance_loss, *kept = forward_operator(x_TN, *flattened(unweighted), backend)
            routing = Routing(*kept)
        else:
            y_TM, balance_loss, routing = passes.call(_prefill, x_TN, adapter, layer.bias, base_output_TM)
        if weight is not None:
            y_TM = torch.addmm(y_TM, x_TN, weight.t(), out=None if observed else y_TM)
        # Not a view for autograd's eyes (as in torch's own linear), so that the caller may modify y in place.
        y = y_TM if x.ndim == 2 else torch.ops.aten._unsafe_view.default(y_TM, (*x.shape[:-1], y_TM.shape[1]))
        return y, balance_loss, routing


def _flattened_tokens(tensor: Tensor) -> Tensor:
    """[..., C] as [tokens, C]; itself where it is that already, because each call into torch costs time."""
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def _fold_if_cheaper(
    passes: Passes, x_TN: Tensor, layer: Layer, fold: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> tuple[Tensor | None, Adapter]:
    """(weight, adapter) of ``layer``, with W0 - B0 A0 from ``fold`` and no residual pair where that is cheaper here."""
    weight, adapter = layer.weight, layer.adapter
    if weight is None or adapter.residual_A is None or not passes.folds(x_TN, weight, adapter.residual_A):
        return weight, adapter
    folded = fold(weight, adapter.residual_A, adapter.residual_B)
    return folded, adapter._replace(residual_A=None, residual_B=None)


def _prefill(
    passes: Passes, x_TN: Tensor, adapter: Adapter, bias_M: Tensor | None, base_output_TM: Tensor | None
) -> tuple[Tensor, Tensor, Routing]:
    return passes.prefill(x_TN, adapter, bias_M, base_output_TM)


def run_backward(
    grad_y: Tensor | None,
    grad_balance: Tensor | None,
    x: Tensor,
    layer: Layer,
    routing: Routing,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order of ``GRADIENTS`` and without gaps.

    ``layer`` without what they do not need: the bias, the base's output, and for no gradient of x the weight.
    """
    needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_router = needs
    with autocast_disabled(x.device.type):  # its casts have been done
        passes = get_backend(backend)
        x_TN, weight, adapter = _flattened_tokens(x), layer.weight, layer.adapter
        if needs_x:
            weight, adapter = _fold_if_cheaper(passes, x_TN, layer, passes.folded_weight)
        if grad_y is None:  # only the balance loss was differentiated
            grad_y_TM = x_TN.new_zeros(x_TN.shape[0], adapter.lora_B.shape[0])
        else:
            grad_y_TM = _flattened_tokens(grad_y)
            if layer.balance_coefficient:
                injected = layer.balance_coefficient
                if layer.balance_scale is not None:
                    injected = layer.balance_scale.to(routing.gate_ET.dtype) * injected
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
        if hidden_gradient.partial_B is not None:  # free before allocating dX
            hidden_gradient = hidden_gradient._replace(partial_B=None)
        grad_x_TN = passes.input_prefill(adapter, routing, hidden_gradient)
    return grad_x_TN, grad_A, grad_B, grad_router


# --- the operators: implementation, fake, FLOP count --------------------------------------------------------------

_library = torch.library.Library("goat_kernels", "DEF")


def _forward(x, tensors, present, numbers, counts, backend):
    y, balance_loss, routing = run_forward(x, rebuilt(tensors, present, numbers, counts), backend)
    return (y, balance_loss, *routing)


def _forward_fake(x, tensors, present, numbers, counts, backend):
    adapter, stats = rebuilt(tensors, present, numbers, counts).adapter, stats_dtype(x)
    T = x.numel() // x.shape[-1] if x.shape[-1] else 0
    R, E = adapter.rank, adapter.num_experts
    routing = Routing(
        weighted_TR=x.new_empty(T, R),
        gate_ET=x.new_empty(E, T, dtype=stats),
        probs_ET=x.new_empty(E, T, dtype=stats),
        load_E=x.new_empty(E, dtype=stats),
        packed=x.new_empty(get_backend(backend).packed_numel(adapter, x.dtype, T)),
    )
    return (x.new_empty(*x.shape[:-1], adapter.lora_B.shape[0]), x.new_empty((), dtype=stats), *routing)


def _forward_flops(x_shape, tensors, present, *_, **__):
    layer = rebuilt(tensors, present, [0.0] * 3, [0])
    (R, N), (M, _R), (E, _N) = layer.adapter.lora_A, layer.adapter.lora_B, layer.adapter.router
    R0 = layer.adapter.residual_A[0] if layer.adapter.residual_A else 0
    base = N * M if layer.weight is not None else 0
    return 2 * _tokens(x_shape) * (base + (R + E + R0) * N + (R + R0) * M)


def _backward(grad_y, grad_balance, x, routing, tensors, present, numbers, counts, needs, backend):
    layer = rebuilt(tensors, present, numbers, counts)
    return run_backward(grad_y, grad_balance, x, layer, Routing(*routing), needs, backend)


def _backward_fake(grad_y, grad_balance, x, routing, tensors, present, numbers, counts, needs, backend):
    adapter = rebuilt(tensors, present, numbers, counts).adapter
    M = adapter.lora_B.shape[0]
    shapes = {"x": x.shape, "weight": (M, x.shape[-1]), "bias": (M,)}
    return [
        x.new_empty(shapes[name])
        if name in shapes
        else torch.empty_like(getattr(adapter, name), memory_format=torch.contiguous_format)
        for name, needed in zip(GRADIENTS, needs, strict=True)
        if needed
    ]


def _backward_flops(grad_y_shape, grad_balance_shape, x_shape, routing, tensors, present, *rest, **_):
    needs_x, needs_weight, _bias, needs_A, needs_B, needs_router = rest[2]
    layer = rebuilt(tensors, present, [0.0] * 3, [0])
    (R, N), (M, _R), (E, _N) = layer.adapter.lora_A, layer.adapter.lora_B, layer.adapter.router
    R0 = layer.adapter.residual_A[0] if layer.adapter.residual_A and needs_x else 0
    products = (R * needs_A + E * needs_router) * N + R * needs_B * M + M * N * needs_weight
    if needs_x or needs_A or needs_router:
        products += (R + R0) * M
    if needs_x:
        products += (R + E + R0) * N + (M * N if layer.weight is not None else 0)
    return 2 * _tokens(x_shape) * products


def _folded_weight(weight: Tensor, residual_A: Tensor, residual_B: Tensor) -> Tensor:
    """W0 - B0 A0 [M, N] as a tensor of its own; the bits are those of a backend's ``folded_weight``."""
    return torch.addmm(weight, residual_B.to(weight.dtype), residual_A.to(weight.dtype), alpha=-1)


def _folded_weight_flops(weight_shape, A0_shape, B0_shape, **_):
    return 2 * A0_shape[0] * weight_shape[0] * weight_shape[1]


def _tokens(x_shape) -> int:
    return torch.Size(x_shape).numel() // max(x_shape[-1], 1)


def _operator(name: str, schema: str, run: Callable, fake: Callable, flops: Callable):
    _library.define(f"{name}{schema}")
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"goat_kernels::{name}", fake, lib=_library)
    packet = getattr(torch.ops.goat_kernels, name)
    register_flop_formula(packet)(flops)
    return packet.default


forward_operator = _operator(
    "forward",
    f"(Tensor x, {_FLAT_LAYER}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _forward_flops,
)
backward_operator = _operator(
    "backward",
    f"(Tensor? grad_y, Tensor? grad_balance, Tensor x, Tensor[] routing, {_FLAT_LAYER}, bool[] needs, str backend) "
    "-> Tensor[]",
    _backward,
    _backward_fake,
    _backward_flops,
)
folding_operator = _operator(
    "folded_weight",
    "(Tensor weight, Tensor residual_A, Tensor residual_B) -> Tensor",
    _folded_weight,
    _folded_weight,
    _folded_weight_flops,
)
