"""The passes in plain PyTorch: the fast path on a CPU, and where Triton cannot run.

Each pass is a handful of torch calls, because at small sizes the number of calls is the cost. Per-expert quantities
are laid out expert-major, [E, T], because a softmax along contiguous tokens is several times faster than over rows of
eight; repeating a gate D times, and summing D products, are products with a constant 0/1 matrix.

In float32 and float64 the router and the residual ride in the same product as lora_A, so x is read once; in half
precision the router takes a float32 product of its own, because a bfloat16 one would pick other experts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goat_kernels.dropout import expert_slots, keep_masks, keep_scale
from goat_kernels.passes import Adapter, Routing, stats_dtype

#: Two measured costs that decide between two exact ways of the residual, in arithmetic operations of a large product:
#: copying one element of the weight, and a skinny product's operation (at the CPU sizes of ``goat-kernels bench``).
_OPERATIONS_PER_COPIED_ELEMENT = 64
_COLUMN_PENALTY = 1.3

_workspaces = threading.local()


class TorchHiddenGradient(NamedTuple):
    """What hidden_gradient hands to the weight and input gradients.

    columns: [T, R + E + R'] = [dh | dlogits | dh0], compute dtype; dh is the gradient of the hidden columns, dh0 that
        of the residual's. dh0 is absent where no input gradient was asked for.
    logits_ET: dlogits, stats dtype.
    """

    columns: Tensor
    logits_ET: Tensor
    partial_B: None = None  # always from a read of dY of its own


class TorchPasses:
    """Implements :class:`goat_kernels.passes.Passes` with torch calls."""

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Hashable) -> Any:
        return function(self, *arguments, **options)

    def packed_numel(self, adapter: Adapter, compute: torch.dtype, T: int) -> int:
        return 0  # the matrices are cast where they are used

    def folds(self, x_TN: Tensor, weight_MN: Tensor, residual_A: Tensor) -> bool:
        if x_TN.device.type != "cpu" or type(weight_MN) not in (Tensor, torch.nn.Parameter):
            return False  # the costs below are a CPU's; a tracer's fake tensors may not meet the workspace
        if x_TN.dtype not in (torch.float32, torch.float64):
            return False  # in half precision the subtraction would round W_res away
        T, (M, N), R0 = x_TN.shape[0], weight_MN.shape, residual_A.shape[0]
        forming = M * N * (2 * R0 + _OPERATIONS_PER_COPIED_ELEMENT)
        return forming < _COLUMN_PENALTY * 2 * T * R0 * (M + N)

    def folded_weight(self, weight_MN: Tensor, residual_A: Tensor, residual_B: Tensor) -> Tensor:
        folded = _workspace_like(weight_MN).copy_(weight_MN)
        return folded.addmm_(residual_B.to(folded.dtype), residual_A.to(folded.dtype), alpha=-1)

    def prefill(
        self, x_TN: Tensor, adapter: Adapter, bias_M: Tensor | None, base_output_TM: Tensor | None
    ) -> tuple[Tensor, Tensor, Routing]:
        return prefill(x_TN, adapter, bias_M, base_output_TM, in_place=True)

    def hidden_gradient(
        self,
        grad_y_TM: Tensor,
        grad_balance: Tensor | float | None,
        adapter: Adapter,
        routing: Routing,
        *,
        with_residual: bool,
        needs_B: bool = False,
    ) -> TorchHiddenGradient:
        R, E = adapter.rank, adapter.num_experts
        R0 = adapter.residual_rank if with_residual else 0
        compute, stats = grad_y_TM.dtype, routing.gate_ET.dtype
        columns = grad_y_TM.new_empty(grad_y_TM.shape[0], R + E + R0)

        # gate_i dgate_i = <h~_i, dh~_i>; then back through the softmax over the selected logits.
        grad_weighted_TR = grad_y_TM @ adapter.lora_B.to(compute)
        products_TR = routing.weighted_TR.to(stats) * grad_weighted_TR
        gated_ET = _expansion(E, adapter.expert_rank, 1.0, stats, products_TR.device) @ products_TR.t()
        grad_logits_ET = gated_ET.addcmul(routing.gate_ET, gated_ET.sum(dim=0), value=-1)
        if grad_balance is not None:
            # balance = E/T sum_i f_i sum_t p_ti: a dense softmax gradient with the same dp for every token.
            grad_probs_E = routing.load_E * (grad_balance * (E / max(grad_y_TM.shape[0], 1)))
            centred_ET = grad_probs_E[:, None] - grad_probs_E @ routing.probs_ET
            grad_logits_ET.addcmul_(routing.probs_ET, centred_ET)

        torch.mul(grad_weighted_TR, _factor(adapter, routing.gate_ET), out=columns[:, :R])
        columns[:, R : R + E] = grad_logits_ET.t()
        if R0:
            # The sign of - W_res x goes here, so that A0 itself multiplies the columns in input_prefill.
            torch.mm(grad_y_TM, adapter.residual_B.to(compute).neg(), out=columns[:, R + E :])
        return TorchHiddenGradient(columns, grad_logits_ET)

    def weight_gradients(
        self,
        x_TN: Tensor,
        grad_y_TM: Tensor,
        adapter: Adapter,
        routing: Routing,
        gradient: TorchHiddenGradient | None,
        *,
        needs_A: bool,
        needs_B: bool,
        needs_router: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        R, E = adapter.rank, adapter.num_experts
        dtype_A, dtype_router = adapter.lora_A.dtype, adapter.router.dtype
        grad_A = grad_B = grad_router = None
        if needs_B:
            grad_B = (grad_y_TM.t() @ routing.weighted_TR).to(adapter.lora_B.dtype)
        # One product where the router's gradient needs none in a dtype of its own.
        if needs_A and needs_router and adapter.seed is None and x_TN.dtype == gradient.logits_ET.dtype:
            stacked = gradient.columns[:, : R + E].t() @ x_TN
            return stacked[:R].to(dtype_A, copy=True), grad_B, stacked[R:].to(dtype_router, copy=True)
        if needs_router:
            grad_router = (gradient.logits_ET @ x_TN.to(gradient.logits_ET.dtype)).to(dtype_router)
        if needs_A and adapter.seed is None:
            grad_A = (gradient.columns[:, :R].t() @ x_TN).to(dtype_A)
        elif needs_A:
            grad_A = x_TN.new_zeros(R, x_TN.shape[1])
            for keep_TN, in_slot_TR in _slots(x_TN, adapter, routing.gate_ET):
                grad_A += (gradient.columns[:, :R] * in_slot_TR).t() @ (x_TN * keep_TN)
            grad_A = (grad_A * keep_scale(adapter.dropout_p)).to(dtype_A)
        return grad_A, grad_B, grad_router

    def input_prefill(self, adapter: Adapter, routing: Routing, gradient: TorchHiddenGradient) -> Tensor:
        columns, R = gradient.columns, adapter.rank
        matrices = [adapter.lora_A, adapter.router]
        if adapter.residual_A is not None:
            matrices.append(adapter.residual_A)
        if adapter.seed is None:
            return columns @ _stack(matrices, columns.dtype)
        grad_x_TN = columns[:, R:] @ _stack(matrices[1:], columns.dtype)
        lora_A = adapter.lora_A.to(columns.dtype) * keep_scale(adapter.dropout_p)
        for keep_TN, in_slot_TR in _slots(grad_x_TN, adapter, routing.gate_ET):
            grad_x_TN += ((columns[:, :R] * in_slot_TR) @ lora_A).mul_(keep_TN)
        return grad_x_TN


def prefill(
    x_TN: Tensor, adapter: Adapter, bias_M: Tensor | None, base_output_TM: Tensor | None, *, in_place: bool
) -> tuple[Tensor, Tensor, Routing]:
    """``prefill`` of :class:`goat_kernels.passes.Passes`.

    ``in_place``: whether y0 may be written twice and constants kept for later calls, which only tensors of an ordinary
    eager call without autograd allow; without it these are torch calls that autograd, vmap and exporters understand.
    """
    R, E, R0 = adapter.rank, adapter.num_experts, adapter.residual_rank
    compute, stats = x_TN.dtype, stats_dtype(x_TN)

    # 1. Hidden columns and logits, from one product where the dtypes and the dropout allow it.
    in_product = {
        "hidden": (adapter.lora_A, R if adapter.seed is None else 0),
        "logits": (adapter.router, E if compute == stats else 0),
        "residual": (adapter.residual_A, R0),
    }
    widths = [width for _, width in in_product.values()]
    matrices = [matrix for matrix, width in in_product.values() if width]
    columns = x_TN @ _stack(matrices, compute).t() if matrices else x_TN.new_empty(x_TN.shape[0], 0)
    hidden_TR, logits_TE, residual_hidden = columns.split(widths, dim=1)
    if not widths[1]:
        logits_TE = x_TN.to(stats) @ adapter.router.to(stats).t()

    # 2. Gate and balance loss.
    gate_ET, probs_ET, load_E, balance_loss = _route(logits_TE.t().contiguous(), adapter.top_k, in_place=in_place)
    if adapter.seed is not None:
        hidden_TR = _dropped_hidden(x_TN, adapter, gate_ET)
    weighted_TR = hidden_TR * (_factor if in_place else _plain_factor)(adapter, gate_ET)
    if compute != stats:  # a cast that changes nothing takes as long as the product
        weighted_TR = weighted_TR.to(compute)

    # 3. The adapter's share of y, onto the bias or the base's output.
    onto = bias_M if base_output_TM is None else base_output_TM
    lora_B_t = adapter.lora_B.to(compute).t()
    y0_TM = weighted_TR @ lora_B_t if onto is None else torch.addmm(onto, weighted_TR, lora_B_t)
    if R0:
        out = y0_TM if in_place else None
        y0_TM = torch.addmm(y0_TM, residual_hidden, adapter.residual_B.to(compute).t(), alpha=-1, out=out)
    return y0_TM, balance_loss, Routing(weighted_TR, gate_ET, probs_ET, load_E, x_TN.new_empty(0))


def _route(logits_ET: Tensor, top_k: int, *, in_place: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gate [E, T], probs [E, T], load [E], balance loss 0-d) from the logits.

    K rounds of "largest, then set aside". torch.max takes the first of equal entries and NaN above every number;
    -inf is raised to the lowest finite number first, so that what is still to be chosen differs from what is not.
    """
    E, T = logits_ET.shape
    probs_ET = torch.softmax(logits_ET, dim=0)
    if top_k == E:
        gate_ET, load_E = probs_ET.clone(), logits_ET.new_full((E,), 1.0 if T else 0.0)
    else:
        left_ET = logits_ET.clamp(min=torch.finfo(logits_ET.dtype).min)
        for _ in range(top_k):
            scatter = left_ET.scatter_ if in_place else left_ET.scatter
            left_ET = scatter(0, left_ET.max(dim=0, keepdim=True).indices, float("-inf"))
        unselected = left_ET != float("-inf")
        gate_ET = torch.softmax(logits_ET.masked_fill(unselected, float("-inf")), dim=0)
        # Subtracted before it is divided: an expert without tokens has a share of exactly 0.
        load_E = unselected.sum(dim=1, dtype=logits_ET.dtype).neg_().add_(T).div_(max(T, 1))
    balance_loss = torch.dot(load_E, probs_ET.sum(dim=1)) * (E / max(T, 1))
    return gate_ET, probs_ET, load_E, balance_loss


def _expansion(E: int, D: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[E, R] with ``value`` in expert i's D columns of row i: gate^T times it repeats, and scales, the gates."""
    key = (E, D, value, dtype, device)
    expansion = _expansions.get(key)
    if expansion is None:
        with torch.inference_mode(False):
            expansion = torch.eye(E, dtype=dtype, device=device).mul_(value).repeat_interleave(D, dim=1)
        if _may_outlive_the_call(expansion):
            _expansions[key] = expansion
    return expansion


#: A model has as many entries as it has combinations of rank, scaling and device.
_expansions: dict[tuple, Tensor] = {}


def _may_outlive_the_call(tensor: Tensor) -> bool:
    """Not so for the fake tensors of a tracer, and for memory that belongs to a CUDA graph being captured."""
    return type(tensor) is Tensor and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _factor(adapter: Adapter, gate_ET: Tensor) -> Tensor:
    """s expand(gate) [T, R], stats dtype."""
    E, D = adapter.num_experts, adapter.expert_rank
    expansion_ER = _expansion(E, D, adapter.scaling, gate_ET.dtype, gate_ET.device)
    if adapter.scaling_E is not None:
        expansion_ER = expansion_ER * adapter.scaling_E[:, None]
    return gate_ET.t() @ expansion_ER


def _plain_factor(adapter: Adapter, gate_ET: Tensor) -> Tensor:
    """The same numbers without a matrix that is kept from call to call."""
    factor_TE = gate_ET.t() * (adapter.scaling if adapter.scaling_E is None else adapter.scaling_E)
    return factor_TE.repeat_interleave(adapter.expert_rank, dim=1)


def _dropped_hidden(x_TN: Tensor, adapter: Adapter, gate_ET: Tensor) -> Tensor:
    """h [T, R] with each expert's x dropped by the mask of its slot; zero for experts the token does not use."""
    lora_A_t = (adapter.lora_A.to(x_TN.dtype) * keep_scale(adapter.dropout_p)).t()
    return sum(((x_TN * keep_TN) @ lora_A_t) * in_slot_TR for keep_TN, in_slot_TR in _slots(x_TN, adapter, gate_ET))


def _slots(like_TN: Tensor, adapter: Adapter, gate_ET: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each slot: its keep mask, bool [T, N], and which hidden columns belong to it, bool [T, R]."""
    T, N = like_TN.shape
    slots_TR = expert_slots(gate_ET.t()).repeat_interleave(adapter.expert_rank, dim=1)
    masks = keep_masks(adapter.seed, T, N, adapter.top_k, adapter.dropout_p)
    for slot, keep_TN in enumerate(masks):
        yield keep_TN, slots_TR == slot


def _workspace_like(weight_MN: Tensor) -> Tensor:
    """An uninitialised [M, N] on the CPU, from one buffer per thread and dtype, as large as any asked for.

    A fresh matrix costs more in page faults than the product that fills it.
    """
    buffers = _workspaces.__dict__
    buffer = buffers.get(weight_MN.dtype)
    if buffer is None or buffer.numel() < weight_MN.numel():
        with torch.inference_mode(False):  # a buffer made in inference mode could never be written outside it
            buffer = torch.empty(weight_MN.numel(), dtype=weight_MN.dtype, device="cpu")
        if not _may_outlive_the_call(buffer):
            return buffer.view(weight_MN.shape)
        buffers[weight_MN.dtype] = buffer
    return buffer[: weight_MN.numel()].view(weight_MN.shape)


def _stack(matrices: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The matrices below one another, in ``dtype``."""
    if len(matrices) == 1:
        return matrices[0].to(dtype)
    return torch.cat([matrix.to(dtype) for matrix in matrices])
