"""What a tracer sees of a layer: its forward and its backward as custom operators.

``goat_kernels::forward`` and ``goat_kernels::backward`` run what ``forward_backward.py`` strings together, and are
opaque: torch.compile sees one node per direction, and the in-place accumulation of the base product onto the prefilled
output survives. Each has a fake (shapes and dtypes only) and a FLOP count.

Where a TorchDispatchMode watches an eager call (selective checkpointing, fake tensors, FLOP counters), it sees the
passes as ``goat_kernels::forward`` without a weight and ``goat_kernels::folded_weight``, and the base product as
``aten::addmm``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from goat_kernels.backends import get_backend
from goat_kernels.forward_backward import GRADIENTS, Layer, run_backward, run_forward
from goat_kernels.passes import Adapter, Routing, stats_dtype

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


def forward(x: Tensor, layer: Layer, backend: str) -> tuple[Tensor, Tensor, Routing]:
    """``run_forward`` as one operator."""
    y, balance_loss, *kept = forward_operator(x, *flattened(layer), backend)
    return y, balance_loss, Routing(*kept)


def backward(
    grad_y: Tensor | None,
    grad_balance: Tensor | None,
    x: Tensor,
    layer: Layer,
    routing: Routing,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """``run_backward`` as one operator."""
    return backward_operator(grad_y, grad_balance, x, [*routing], *flattened(layer), needs, backend)
