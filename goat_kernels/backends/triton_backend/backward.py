"""Which kernels make a backward: the hidden gradient fused or in stages, and the weight gradients in splits of T.

fused     fused_hidden_gradient  [add_splits for lora_B, where it rides in the same read of dY]
staged    project  finish_hidden_gradient
weights   weight_gradient  add_splits
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from goat_kernels.backends.base import Adapter, Routing
from goat_kernels.backends.triton_backend.expansion import NO_DROPOUT, expand
from goat_kernels.backends.triton_backend.forward import FUSED_EXPERTS, project_columns
from goat_kernels.backends.triton_backend.operands import (
    Widths,
    dropout_arguments,
    operands,
    precision,
    split_stages,
    splits_of,
    with_contiguous_vectors,
)
from goat_kernels.kernels.common import padded
from goat_kernels.kernels.configs import choose_tile, current_target, find_tile
from goat_kernels.kernels.hidden_gradient import finish_hidden_gradient, fused_hidden_gradient
from goat_kernels.kernels.launch import blocks, launch
from goat_kernels.kernels.tiles import Tile
from goat_kernels.kernels.weight_gradient import add_splits, weight_gradient

#: ``add_splits``: splits at a time, elements of a program; the second where few elements would leave the GPU idle.
_SUM = Tile(rows=16, columns=512, warps=4, stages=1)
_SMALL_SUM = Tile(rows=32, columns=128, warps=4, stages=1)


def rides(rank: int, rows: int) -> bool:
    """Whether lora_B's gradient is cheaper in the hidden gradient's read of dY than in a pass of its own.

    Programs of ``rows`` tokens write, and ``add_splits`` reads, partial sums of 4 * rank / rows of a half-precision dY
    together, where the pass of its own reads dY once more.
    """
    return 4 * rank < rows


class TritonHiddenGradient(NamedTuple):
    """dh [T, R] and dh0 [T, R0] (None without residual) in the compute dtype, dlogits [E, T] in float32.

    lora_B: its gradient [M, R], where it came with the same read of dY.
    """

    hidden_TR: Tensor
    logits_ET: Tensor
    residual_TR0: Tensor | None
    lora_B: Tensor | None


def hidden_gradient(
    grad_y_TM: Tensor,
    grad_balance: Tensor | float | None,
    adapter: Adapter,
    routing: Routing,
    *,
    with_residual: bool,
    needs_B: bool = False,
) -> TritonHiddenGradient:
    """``hidden_gradient`` of :class:`goat_kernels.backends.base.Passes`."""
    (T, M), compute = grad_y_TM.shape, grad_y_TM.dtype
    adapter = with_contiguous_vectors(adapter)
    target = current_target(grad_y_TM.device)
    widths = Widths.of(adapter, with_residual=with_residual)
    matrices = operands(adapter, routing.packed)
    read_width = matrices.read_width(with_router=False)
    tile = find_tile("fused_hidden_gradient", widths.columns, compute.itemsize, target, T, read_width)
    is_fused = tile is not None and widths.E <= FUSED_EXPERTS and 2 * blocks(T, tile.rows) >= target.multiprocessors
    gradient = TritonHiddenGradient(
        hidden_TR=torch.empty_like(routing.weighted_TR),
        logits_ET=torch.empty_like(routing.gate_ET),
        residual_TR0=grad_y_TM.new_empty(T, widths.R0) if widths.R0 else None,
        lora_B=_contiguous_like(adapter.lora_B) if needs_B and is_fused and rides(adapter.rank, tile.rows) else None,
    )
    is_tensor = isinstance(grad_balance, Tensor)
    arguments = {
        "weighted_ptr": routing.weighted_TR,
        "gate_ptr": routing.gate_ET,
        "probs_ptr": routing.probs_ET,
        "load_E_ptr": routing.load_E,
        "grad_balance_ptr": grad_balance.to(grad_y_TM.device, torch.float32) if is_tensor else None,
        "scaling_E_ptr": adapter.scaling_E,
        "hidden_ptr": gradient.hidden_TR,
        "logits_ptr": gradient.logits_ET,
        "residual_ptr": gradient.residual_TR0,
        "T": T,
        "scaling": adapter.scaling,
        "balance_coefficient": float(grad_balance) if grad_balance is not None and not is_tensor else 0.0,
    }
    constants = {**widths._asdict(), "HAS_BALANCE": grad_balance is not None}
    if is_fused:
        programs, partial = blocks(T, tile.rows), None
        if gradient.lora_B is not None:
            partial = grad_y_TM.new_empty(programs, M * adapter.rank, dtype=torch.float32)
        arguments |= {
            "partial_ptr": partial,
            "grad_y_ptr": grad_y_TM,
            "B_ptr": matrices.B,
            "B0_ptr": matrices.B0 if widths.R0 else None,
            "M": M,
            "stride_yt": grad_y_TM.stride(0),
            "stride_ym": grad_y_TM.stride(1),
        }
        constants |= {
            "BT": tile.rows,
            "BM": tile.columns,
            "EVEN_M": M % tile.columns == 0,
            "PRECISION": precision(compute),
        }
        launch(fused_hidden_gradient, (programs,), tile, arguments, constants)
        if partial is not None:
            _add_splits(partial, gradient.lora_B, None)
        return gradient
    B0 = matrices.B0.t() if widths.R0 else None
    raw = project_columns(grad_y_TM, adapter, matrices, matrices.B.t(), B0, target, with_router=False)
    tile = choose_tile("finish_hidden_gradient", widths.columns, compute.itemsize, target, T)
    arguments |= {"raw_ptr": raw, "splits": raw.shape[0]}
    constants |= {"SPLIT_STAGES": split_stages(raw.shape[0], tile.rows * widths.columns, target), "BT": tile.rows}
    launch(finish_hidden_gradient, (blocks(T, tile.rows),), tile, arguments, constants)
    return gradient


def lora_B_gradient(grad_y_TM: Tensor, adapter: Adapter, routing: Routing) -> Tensor:
    """``lora_B_gradient`` of :class:`goat_kernels.backends.base.Passes`."""
    grad_MR = _contiguous_like(adapter.lora_B)
    sum_over_tokens(grad_y_TM, adapter, routing.weighted_TR, None, grad_MR.t(), None)
    return grad_MR


def lora_A_router_gradient(
    x_TN: Tensor,
    adapter: Adapter,
    routing: Routing,
    gradient: TritonHiddenGradient,
    *,
    needs_A: bool,
    needs_router: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``lora_A_router_gradient`` of :class:`goat_kernels.backends.base.Passes`."""
    hidden_TR = logits_ET = grad_RN = grad_EN = None
    if needs_A:
        hidden_TR, grad_RN = gradient.hidden_TR, _contiguous_like(adapter.lora_A)
    if needs_router:
        logits_ET, grad_EN = gradient.logits_ET, _contiguous_like(adapter.router)
    sum_over_tokens(x_TN, adapter, hidden_TR, logits_ET, grad_RN, grad_EN, gate_ET=routing.gate_ET)
    return grad_RN, grad_EN


def input_prefill(adapter: Adapter, routing: Routing, gradient: TritonHiddenGradient) -> Tensor:
    """``input_prefill`` of :class:`goat_kernels.backends.base.Passes`."""
    hidden_TR = gradient.hidden_TR
    grad_x_TN = hidden_TR.new_empty(hidden_TR.shape[0], adapter.lora_A.shape[1])
    matrices = operands(adapter, routing.packed)
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


def sum_over_tokens(
    x_TN: Tensor,
    adapter: Adapter,
    hidden_TR: Tensor | None,
    logits_ET: Tensor | None,
    out_RN: Tensor | None,
    out_EN: Tensor | None,
    *,
    gate_ET: Tensor | None = None,
) -> None:
    """Write out_RN = hidden^T x (any strides) and out_EN = logits x (contiguous); None for what nobody asked for.

    With ``gate_ET`` and a dropout in the adapter, x is dropped in front of hidden's columns.
    """
    (T, N), R, E = x_TN.shape, adapter.rank, adapter.num_experts
    target = current_target(x_TN.device)
    columns = padded(R, 16) if hidden_TR is not None else 16
    of_logits = padded(E, 16) if logits_ET is not None else 0
    dropped = gate_ET is not None and adapter.seed is not None and hidden_TR is not None
    kernel = "weight_gradient.dropout" if dropped else "weight_gradient"
    tile = choose_tile(kernel, columns + (of_logits if of_logits > 16 else 0), x_TN.dtype.itemsize, target, T)
    rank = min(tile.rank, columns)
    feature_blocks, rank_blocks = blocks(N, tile.columns), blocks(R, rank) if hidden_TR is not None else 1
    splits, split_steps = splits_of(feature_blocks * rank_blocks, blocks(T, tile.rows), target)
    R_out, E_out = R if hidden_TR is not None else 0, E if logits_ET is not None else 0
    to_RN, to_EN = out_RN, out_EN
    if splits > 1:
        partial = x_TN.new_empty(splits, (R_out + E_out) * N, dtype=torch.float32)
        if hidden_TR is not None:  # in the memory order of out_RN, so that the splits add up without a transposition
            to_RN = partial[0, : R * N].as_strided((R, N), out_RN.stride())
        if logits_ET is not None:
            to_EN = partial[0, R_out * N :].view(E, N)
    arguments = {
        "x_ptr": x_TN,
        "hidden_ptr": hidden_TR,
        "logits_ptr": logits_ET,
        "gate_ptr": gate_ET if dropped else None,
        "out_ptr": to_RN,
        "out_logits_ptr": to_EN,
        "T": T,
        "N": N,
        "split_T": split_steps * tile.rows,
        "stride_xt": x_TN.stride(0),
        "stride_xn": x_TN.stride(1),
        "stride_os": (R_out + E_out) * N,
        "stride_oc": to_RN.stride(0) if hidden_TR is not None else 0,
        "stride_on": to_RN.stride(1) if hidden_TR is not None else 1,
        "stride_ls": (R_out + E_out) * N,
        **(dropout_arguments(adapter) if dropped else NO_DROPOUT),
    }
    constants = {
        "E": E,
        "D": adapter.expert_rank,
        "TOP_K": adapter.top_k,
        "E_DOT": padded(E, 16),
        "WITH_HIDDEN": hidden_TR is not None,
        "WITH_LOGITS": logits_ET is not None,
        "BT": tile.rows,
        "BN": tile.columns,
        "BC": rank,
        "EVEN_N": N % tile.columns == 0,
        "PRECISION": precision(x_TN.dtype),
    }
    launch(weight_gradient, (feature_blocks, splits, rank_blocks), tile, arguments, constants)
    if splits > 1:
        _add_splits(partial, out_RN, out_EN)


def _add_splits(partial: Tensor, first: Tensor | None, second: Tensor | None) -> None:
    """Sum partial [splits, sizes] over its splits into ``first`` and ``second``, in their memory order."""
    splits = partial.shape[0]
    arguments = {
        "partial_ptr": partial,
        "first_ptr": first,
        "second_ptr": second,
        "splits": splits,
        "first_size": 0 if first is None else first.numel(),
        "second_size": 0 if second is None else second.numel(),
    }
    tile = _SUM if partial.shape[1] > 100 * _SUM.columns else _SMALL_SUM
    constants = {"SPLITS": min(padded(splits), tile.rows), "BLOCK": tile.columns}
    launch(add_splits, (blocks(partial.shape[1], tile.columns),), tile, arguments, constants)


def _contiguous_like(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)
