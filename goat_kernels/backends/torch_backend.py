"""The passes in plain PyTorch: the fast path on a CPU and wherever Triton cannot run.

Each pass is a handful of torch calls, because at small sizes the number of calls is the cost. In float32 and float64
the router and the residual ride in the same product as lora_A, so x is read once; in half precision the router takes
a float32 product of its own, because a bfloat16 one would pick other experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from goat_kernels.backends.base import Adapter, HiddenGradient, Routing
from goat_kernels.backends.dropout import expert_slots, keep_mask, keep_scale


def stats_dtype(x: Tensor) -> torch.dtype:
    """The dtype of router, gate and balance loss for inputs like x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class TorchPasses:
    """Implements :class:`goat_kernels.backends.base.Passes` with torch calls."""

    name = "torch"

    def unavailable_reason(self) -> str | None:
        return None

    def supports(self, device: torch.device) -> str | None:
        return None

    def prefill(
        self, x_TN: Tensor, adapter: Adapter, bias_M: Tensor | None, base_output_TM: Tensor | None
    ) -> tuple[Tensor, Tensor, Routing]:
        T = x_TN.shape[0]
        R, E = adapter.rank, adapter.num_experts
        compute, stats = x_TN.dtype, stats_dtype(x_TN)

        # 1. Hidden columns and logits.
        dropped = adapter.seed is not None
        matrices = [] if dropped else [adapter.lora_A]
        if compute == stats:
            matrices.append(adapter.router)
        if adapter.residual_A is not None:
            matrices.append(adapter.residual_A)
        columns = _times_transposed(x_TN, matrices)
        if compute == stats:
            logits_TE = columns[:, R : R + E] if not dropped else columns[:, :E]
        else:
            logits_TE = x_TN.to(stats) @ adapter.router.to(stats).t()

        # 2. Gate and balance loss.
        gate_TE, probs_TE, load_E = _route(logits_TE, adapter.top_k)
        balance_loss = E * torch.dot(load_E, probs_TE.sum(dim=0)) / max(T, 1)
        if dropped:
            hidden_TR = _dropped_hidden(x_TN, adapter, gate_TE)
        else:
            hidden_TR = columns[:, :R].contiguous() if columns.shape[1] > R else columns
        routing = Routing(hidden_TR, gate_TE, probs_TE, load_E)

        # 3. The adapter's share of y, onto the bias or the base's output.
        weighted = hidden_TR.new_empty(T, R + adapter.residual_rank)
        _weighted_hidden(adapter, routing, out=weighted[:, :R])
        out_matrix = adapter.lora_B.to(compute)
        if adapter.residual_A is not None:
            weighted[:, R:] = columns[:, columns.shape[1] - adapter.residual_rank :]
            out_matrix = torch.cat([out_matrix, -adapter.residual_B.to(compute)], dim=1)
        if base_output_TM is not None:
            y0_TM = torch.addmm(base_output_TM, weighted, out_matrix.t())
        elif bias_M is not None:
            y0_TM = torch.addmm(bias_M, weighted, out_matrix.t())
        else:
            y0_TM = weighted @ out_matrix.t()
        return y0_TM, balance_loss, routing

    def hidden_gradient(
        self,
        grad_y_TM: Tensor,
        grad_balance: Tensor | None,
        adapter: Adapter,
        routing: Routing,
        *,
        with_residual: bool,
    ) -> HiddenGradient:
        T = grad_y_TM.shape[0]
        R, E, D = adapter.rank, adapter.num_experts, adapter.expert_rank
        compute = grad_y_TM.dtype
        with_residual = with_residual and adapter.residual_A is not None
        out_matrix = adapter.lora_B.to(compute)
        if with_residual:
            out_matrix = torch.cat([out_matrix, -adapter.residual_B.to(compute)], dim=1)
        grad_weighted = grad_y_TM @ out_matrix  # gradient of [h~ | h0]
        grad_weighted_TED = grad_weighted[:, :R].unflatten(1, (E, D))

        # dgate_i = s_i <h_i, dh~_i>; then back through the softmax over the selected logits.
        scaling = adapter.scaling if adapter.scaling_E is None else adapter.scaling_E
        gate_TE, probs_TE = routing.gate_TE, routing.probs_TE
        stats = gate_TE.dtype
        products = routing.hidden_TR.to(stats).unflatten(1, (E, D)) * grad_weighted_TED
        gated_TE = products.sum(dim=-1) * scaling * gate_TE  # gate_i dgate_i
        grad_logits = torch.addcmul(gated_TE, gate_TE, gated_TE.sum(dim=-1, keepdim=True), value=-1)
        if grad_balance is not None:
            # balance = E/T sum_i f_i sum_t p_ti: a dense softmax gradient with the same dp for every token.
            grad_probs_E = routing.load_E * (grad_balance * (E / max(T, 1)))
            grad_logits += probs_TE * (grad_probs_E - (probs_TE @ grad_probs_E)[:, None])

        columns = grad_weighted.new_empty(T, grad_weighted.shape[1] + E)
        torch.mul(grad_weighted_TED, (gate_TE * scaling).unsqueeze(-1), out=columns[:, :R].unflatten(1, (E, D)))
        columns[:, R : R + E] = grad_logits
        if with_residual:
            columns[:, R + E :] = grad_weighted[:, R:]
        return HiddenGradient(columns)

    def lora_B_gradient(self, grad_y_TM: Tensor, adapter: Adapter, routing: Routing) -> Tensor:
        weighted_TR = torch.empty_like(routing.hidden_TR)
        _weighted_hidden(adapter, routing, out=weighted_TR)
        return (grad_y_TM.t() @ weighted_TR).to(adapter.lora_B.dtype)

    def lora_A_router_gradient(
        self, x_TN: Tensor, adapter: Adapter, routing: Routing, gradient: HiddenGradient
    ) -> tuple[Tensor, Tensor]:
        R, E = adapter.rank, adapter.num_experts
        dtype_A, dtype_router = adapter.lora_A.dtype, adapter.router.dtype
        if adapter.seed is None:
            # x^T [dh | dlogits] is the faster order on a CPU; the transposed result is small.
            stacked = (x_TN.t() @ gradient.columns[:, : R + E]).t()
            return stacked[:R].to(dtype_A).contiguous(), stacked[R:].to(dtype_router).contiguous()
        grad_router = (x_TN.t() @ gradient.columns[:, R : R + E]).t().to(dtype_router).contiguous()
        grad_A = adapter.lora_A.new_zeros(R, x_TN.shape[1], dtype=x_TN.dtype)
        for keep_TN, slot_columns in _slots(x_TN, adapter, routing.gate_TE, gradient.columns[:, :R]):
            grad_A += slot_columns.t() @ (x_TN * keep_TN)
        return (grad_A * keep_scale(adapter.dropout_p)).to(dtype_A), grad_router

    def input_prefill(self, adapter: Adapter, routing: Routing, gradient: HiddenGradient) -> Tensor:
        columns, compute = gradient.columns, gradient.columns.dtype
        R = adapter.rank
        matrices = [adapter.lora_A, adapter.router]
        if adapter.residual_A is not None:
            matrices.append(adapter.residual_A)
        if adapter.seed is None:
            return columns @ _stack(matrices, compute)
        grad_x_TN = columns[:, R:] @ _stack(matrices[1:], compute)
        lora_A = adapter.lora_A.to(compute) * keep_scale(adapter.dropout_p)
        for keep_TN, slot_columns in _slots(grad_x_TN, adapter, routing.gate_TE, columns[:, :R]):
            grad_x_TN += (slot_columns @ lora_A).mul_(keep_TN)
        return grad_x_TN


def _route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(gate [T, E], probs [T, E], load [E]) from the logits.

    The stable descending sort puts ties in index order and NaN above every number, on every device.
    """
    probs_TE = torch.softmax(logits_TE, dim=-1)
    T, E = logits_TE.shape
    if top_k == E:
        return probs_TE.clone(), probs_TE, logits_TE.new_full((E,), float(T > 0))
    values, order = torch.sort(logits_TE, dim=-1, descending=True, stable=True)
    chosen = order[:, :top_k]
    gate_TE = torch.zeros_like(probs_TE).scatter_(1, chosen, torch.softmax(values[:, :top_k], dim=-1))
    selected = torch.zeros_like(probs_TE).scatter_(1, chosen, 1.0)
    return gate_TE, probs_TE, selected.sum(dim=0) / max(T, 1)


def _weighted_hidden(adapter: Adapter, routing: Routing, out: Tensor) -> None:
    """out [T, R] = s expand(gate) h, rounded once to out's dtype."""
    shape = (adapter.num_experts, adapter.expert_rank)
    scaling = adapter.scaling if adapter.scaling_E is None else adapter.scaling_E
    factor = (routing.gate_TE * scaling).unsqueeze(-1)
    torch.mul(routing.hidden_TR.unflatten(1, shape), factor, out=out.unflatten(1, shape))


def _dropped_hidden(x_TN: Tensor, adapter: Adapter, gate_TE: Tensor) -> Tensor:
    """h [T, R] with each expert's x dropped by the mask of its slot; zero for experts the token does not use."""
    hidden_TR = x_TN.new_zeros(x_TN.shape[0], adapter.rank)
    lora_A = adapter.lora_A.to(x_TN.dtype) * keep_scale(adapter.dropout_p)
    ones = torch.ones_like(hidden_TR)
    for keep_TN, in_slot_TR in _slots(x_TN, adapter, gate_TE, ones):
        hidden_TR += ((x_TN * keep_TN) @ lora_A.t()).mul_(in_slot_TR)
    return hidden_TR


def _slots(like_TN: Tensor, adapter: Adapter, gate_TE: Tensor, columns_TR: Tensor):
    """For each slot: its keep mask [T, N] and ``columns_TR`` with the columns of other slots set to zero."""
    T, N = like_TN.shape
    slots_TR = expert_slots(gate_TE).repeat_interleave(adapter.expert_rank, dim=1)
    for slot in range(adapter.top_k):
        yield keep_mask(adapter.seed, T, N, slot, adapter.dropout_p), columns_TR * (slots_TR == slot)


def _stack(matrices: list[Tensor], dtype: torch.dtype) -> Tensor:
    if len(matrices) == 1:
        return matrices[0].to(dtype)
    return torch.cat([matrix.to(dtype) for matrix in matrices])


def _times_transposed(x_TN: Tensor, matrices: list[Tensor]) -> Tensor:
    """x [matrices]^T as one product; [T, 0] for no matrix."""
    if not matrices:
        return x_TN.new_empty(x_TN.shape[0], 0)
    return x_TN @ _stack(matrices, x_TN.dtype).t()
