"""Forward and backward of one adapted layer: the passes of a backend strung together with the base product.

What a call brings beside x is one record, :class:`Layer`. Everything about the order of passes, and about which
gradients are computed, is here and nowhere else. ``functional.py`` calls both directions from its autograd Function,
``operators.py`` makes custom operators of them for torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goat_kernels.autocast import autocast_disabled
from goat_kernels.backends import get_backend
from goat_kernels.passes import Adapter, Passes, Routing


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


#: The gradients that ``backward`` can return, in the order of its ``needs``.
GRADIENTS = ("x", "weight", "bias", "lora_A", "lora_B", "router")


def run_forward(x: Tensor, layer: Layer, backend: str, as_operators: Any = None) -> tuple[Tensor, Tensor, Routing]:
    """(y [..., M], balance loss [], what the backward needs). With neither a weight nor a base's output, y lacks W x.

    ``as_operators``: None, or the module ``operators`` where a TorchDispatchMode watches and is to see operators.
    Such a mode may keep a tensor and give it back later, so in its sight none is written after it was returned.
    """
    with autocast_disabled(x.device.type):  # its casts have been done
        passes = get_backend(backend)
        x_TN = _flattened_tokens(x)
        fold = as_operators.folding_operator if as_operators else passes.folded_weight
        weight, adapter = _fold_if_cheaper(passes, x_TN, layer, fold)
        base_output_TM = None if layer.base_output is None else _flattened_tokens(layer.base_output)
        if as_operators:
            unweighted = layer._replace(weight=None, base_output=base_output_TM, adapter=adapter)
            y_TM, balance_loss, routing = as_operators.forward(x_TN, unweighted, backend)
        else:
            y_TM, balance_loss, routing = passes.call(_prefill, x_TN, adapter, layer.bias, base_output_TM)
        if weight is not None:
            y_TM = torch.addmm(y_TM, x_TN, weight.t(), out=None if as_operators else y_TM)
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
