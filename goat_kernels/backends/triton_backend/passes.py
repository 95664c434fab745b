"""The Triton passes behind the interface that every backend has."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from goat_kernels.backends.base import Adapter, Routing
from goat_kernels.backends.triton_backend import backward, forward
from goat_kernels.backends.triton_backend.backward import TritonHiddenGradient
from goat_kernels.backends.triton_backend.operands import on_device_of, packed_numel
from goat_kernels.backends.triton_backend.plans import Plans


class TritonPasses:
    """Implements :class:`goat_kernels.backends.base.Passes` with the kernels of ``goat_kernels/kernels``."""

    def __init__(self) -> None:
        self.plans = Plans()

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Hashable) -> Any:
        return self.plans.run(function, self, arguments, options)

    def folds(self, x_TN: Tensor, weight_MN: Tensor, residual_A: Tensor) -> bool:
        return False  # the residual's columns ride in reads that happen anyway

    def folded_weight(self, weight_MN: Tensor, residual_A: Tensor, residual_B: Tensor) -> Tensor:
        raise NotImplementedError("this backend never folds")

    def packed_numel(self, adapter: Adapter, compute: torch.dtype, T: int) -> int:
        return packed_numel(adapter, compute, T)

    def prefill(
        self, x_TN: Tensor, adapter: Adapter, bias_M: Tensor | None, base_output_TM: Tensor | None
    ) -> tuple[Tensor, Tensor, Routing]:
        with on_device_of(x_TN):
            return forward.run(x_TN, adapter, bias_M, base_output_TM)

    def hidden_gradient(
        self,
        grad_y_TM: Tensor,
        grad_balance: Tensor | float | None,
        adapter: Adapter,
        routing: Routing,
        *,
        with_residual: bool,
        needs_B: bool = False,
    ) -> TritonHiddenGradient:
        with on_device_of(grad_y_TM):
            return backward.hidden_gradient(
                grad_y_TM, grad_balance, adapter, routing, with_residual=with_residual, needs_B=needs_B
            )

    def weight_gradients(
        self,
        x_TN: Tensor,
        grad_y_TM: Tensor,
        adapter: Adapter,
        routing: Routing,
        gradient: TritonHiddenGradient | None,
        *,
        needs_A: bool,
        needs_B: bool,
        needs_router: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        with on_device_of(x_TN):
            return backward.weight_gradients(
                x_TN,
                grad_y_TM,
                adapter,
                routing,
                gradient,
                needs_A=needs_A,
                needs_B=needs_B,
                needs_router=needs_router,
            )

    def input_prefill(self, adapter: Adapter, routing: Routing, gradient: TritonHiddenGradient) -> Tensor:
        with on_device_of(gradient.hidden_TR):
            return backward.input_prefill(adapter, routing, gradient)
