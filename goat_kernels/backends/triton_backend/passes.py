"""The Triton passes behind the interface that every backend has."""

from __future__ import annotations

import torch
from torch import Tensor

from goat_kernels.backends.base import Adapter, Routing
from goat_kernels.backends.triton_backend import backward, forward
from goat_kernels.backends.triton_backend.backward import TritonHiddenGradient, sum_over_tokens
from goat_kernels.backends.triton_backend.expansion import expand
from goat_kernels.backends.triton_backend.operands import on_device_of, operands, packed_numel


class TritonPasses:
    """Implements :class:`goat_kernels.backends.base.Passes` with the kernels of ``goat_kernels/kernels``."""

    def folded_weight(self, x_TN: Tensor, weight_MN: Tensor, residual_A: Tensor, residual_B: Tensor) -> None:
        return None  # the residual's columns ride in reads that happen anyway

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

    def lora_B_gradient(self, grad_y_TM: Tensor, adapter: Adapter, routing: Routing) -> Tensor:
        grad_MR = torch.empty_like(adapter.lora_B, memory_format=torch.contiguous_format)
        with on_device_of(grad_y_TM):
            sum_over_tokens(grad_y_TM, adapter, routing.weighted_TR, None, grad_MR.t(), None)
        return grad_MR

    def lora_A_router_gradient(
        self,
        x_TN: Tensor,
        adapter: Adapter,
        routing: Routing,
        gradient: TritonHiddenGradient,
        *,
        needs_A: bool,
        needs_router: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        hidden_TR = logits_ET = grad_RN = grad_EN = None
        if needs_A:
            hidden_TR = gradient.hidden_TR
            grad_RN = torch.empty_like(adapter.lora_A, memory_format=torch.contiguous_format)
        if needs_router:
            logits_ET = gradient.logits_ET
            grad_EN = torch.empty_like(adapter.router, memory_format=torch.contiguous_format)
        with on_device_of(x_TN):
            sum_over_tokens(x_TN, adapter, hidden_TR, logits_ET, grad_RN, grad_EN, gate_ET=routing.gate_ET)
        return grad_RN, grad_EN

    def input_prefill(self, adapter: Adapter, routing: Routing, gradient: TritonHiddenGradient) -> Tensor:
        hidden_TR = gradient.hidden_TR
        grad_x_TN = hidden_TR.new_empty(hidden_TR.shape[0], adapter.lora_A.shape[1])
        matrices = operands(adapter, routing.packed)
        with on_device_of(hidden_TR):
            expand(
                grad_x_TN,
                hidden_TR,
                matrices.A,
                gradient.residual_TR0,
                matrices.A0,
                experts=adapter.num_experts,
                logits_ET=gradient.logits_ET,
                router=matrices.router,
                dropped=adapter if adapter.seed is not None else None,
                gate_ET=routing.gate_ET,
            )
        return grad_x_TN
