"""One call of a layer as what is timed: its forward, its backward, or both; or a forward without gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: The coefficient of the balance loss, the paper's.
BALANCE_COEFFICIENT = 1e-3


def outputs_of(layer: nn.Module, x: Tensor, grad_y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(what the layer computed, the gradient of each): y, and the balance loss where the layer hands it out.

    ``GoatLinear`` injects its balance loss in backward; a layer that leaves it to the trainer has it as ``loss``.
    """
    y = layer(x)
    loss = getattr(layer, "loss", None)
    if loss is None:
        return [y], [grad_y]
    return [y, loss], [grad_y, torch.full_like(loss, BALANCE_COEFFICIENT)]


def differentiated(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """x and the trainable parameters, in the order in which the layer registered them."""
    return [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]


def call_of(mode: str, layer: nn.Module, x: Tensor, grad_y: Tensor) -> Callable[[], object]:
    """What is timed.

    Args:
        mode: "forward" keeps what the backward needs; "backward" has run the forward before; "both"; "inference"
            keeps nothing.
        layer: the contender.
        x: [T, N].
        grad_y: [T, M].
    """
    # A leaf of its own: autograd keeps, with a leaf, the stream on which it was first used, and a capture on another
    # stream would have to wait for that one.
    x = x.detach().requires_grad_()
    if mode == "inference":

        def infer() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return infer
    if mode == "forward":
        return lambda: layer(x)
    inputs = differentiated(layer, x)
    if mode == "backward":
        outputs, gradients = outputs_of(layer, x, grad_y)
        return lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)

    def forward_and_backward() -> tuple[Tensor, ...]:
        outputs, gradients = outputs_of(layer, x, grad_y)
        return torch.autograd.grad(outputs, inputs, gradients)

    return forward_and_backward
