"""Which kernels make a backward: the hidden gradient fused or in stages, and the weight gradients in splits of T.

fused     fused_hidden_gradient, in whose read of dY lora_B's gradient may ride
staged    project  finish_hidden_gradient
weights   weight_gradient for all that are asked for, lora_B's apart with dropout  [add_splits]
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
    is_unaligned,
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

    partial_B: float32 [blocks of tokens, M * R], sums of lora_B's gradient that came with the same read of dY, or None.
    """

    hidden_TR: Tensor
    logits_ET: Tensor
    residual_TR0: Tensor | None
    partial_B: Tensor | None


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
    kernel = "fused_hidden_gradient"
    if (widths.D != widths.D_PAD and compute.itemsize == 2) or is_unaligned(compute, (M,), (adapter.rank, widths.R0)):
        kernel += ".unaligned"
    tile = find_tile(kernel, widths.columns, compute.itemsize, target, T, read_width)
    is_fused = tile is not None and widths.E <= FUSED_EXPERTS and 2 * blocks(T, tile.rows) >= target.multiprocessors
    partial_B = None
    if needs_B and is_fused and rides(adapter.rank, tile.rows):
        partial_B = grad_y_TM.new_empty(blocks(T, tile.rows), M * adapter.rank, dtype=torch.float32)
    gradient = TritonHiddenGradient(
        hidden_TR=torch.empty_like(routing.weighted_TR),
        logits_ET=torch.empty_like(routing.gate_ET),
        residual_TR0=grad_y_TM.new_empty(T, widths.R0) if widths.R0 else None,
        partial_B=partial_B,
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
        arguments |= {
            "partial_ptr": partial_B,
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
        launch(fused_hidden_gradient, (blocks(T, tile.rows),), tile, arguments, constants)
        return gradient
    B0 = matrices.B0.t() if widths.R0 else None
    raw = project_columns(grad_y_TM, adapter, matrices, matrices.B.t(), B0, target, with_router=False)
    tile = choose_tile("finish_hidden_gradient", widths.columns, compute.itemsize, target, T)
    arguments |= {"raw_ptr": raw, "splits": raw.shape[0]}
    constants |= {"SPLIT_STAGES": split_stages(raw.shape[0], tile.rows * widths.columns, target), "BT": tile.rows}
    launch(finish_hidden_gradient, (blocks(T, tile.rows),), tile, arguments, constants)
    return gradient


class _Wanted(NamedTuple):
    """The weight gradients to fill, contiguous in the parameters' dtypes; None for what nobody asked for."""

    B_MR: Tensor | None = None
    A_RN: Tensor | None = None
    router_EN: Tensor | None = None


class _Partial(NamedTuple):
    """Partial sums of weight gradients, float32: of lora_B [splits, M * R]; of lora_A and, behind it in each split, the
    router [splits, R * N + E * N]. None where a gradient is not asked for, or came whole."""

    B: Tensor | None = None
    A_router: Tensor | None = None


def weight_gradients(
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
    """``weight_gradients`` of :class:`goat_kernels.backends.base.Passes`."""
    wanted = _Wanted(
        _contiguous_like(adapter.lora_B) if needs_B else None,
        _contiguous_like(adapter.lora_A) if needs_A else None,
        _contiguous_like(adapter.router) if needs_router else None,
    )
    tensors = (x_TN, grad_y_TM, adapter, routing, gradient)
    of_x = wanted._replace(B_MR=None)
    if needs_B and gradient is not None and gradient.partial_B is not None:
        partial = _Partial(gradient.partial_B, _sum_over_tokens(*tensors, of_x).A_router)
    elif needs_B and needs_A and adapter.seed is not None:
        # Dropping x takes other tiles, which would slow the read of dY.
        of_y = _sum_over_tokens(*tensors, _Wanted(B_MR=wanted.B_MR))
        partial = _Partial(of_y.B, _sum_over_tokens(*tensors, of_x).A_router)
    else:
        partial = _sum_over_tokens(*tensors, wanted)
    _add_splits(partial, wanted)
    return wanted.A_RN, wanted.B_MR, wanted.router_EN


def _sum_over_tokens(
    x_TN: Tensor,
    grad_y_TM: Tensor,
    adapter: Adapter,
    routing: Routing,
    gradient: TritonHiddenGradient | None,
    wanted: _Wanted,
) -> _Partial:
    """Fill ``wanted``, or return the partial sums that make it up, where the tokens are summed in splits."""
    of_y, of_x = wanted.B_MR is not None, wanted.A_RN is not None or wanted.router_EN is not None
    if not (of_y or of_x):
        return _Partial()
    (T, N), M, R, E = x_TN.shape, grad_y_TM.shape[1], adapter.rank, adapter.num_experts
    target = current_target(x_TN.device)
    has_columns = of_y or wanted.A_RN is not None
    columns = padded(R, 16) if has_columns else 16
    of_logits = padded(E, 16) if wanted.router_EN is not None else 0
    dropped = adapter.seed is not None and wanted.A_RN is not None
    kernel = "weight_gradient"
    if dropped:
        kernel += ".dropout"
    elif is_unaligned(x_TN.dtype, (M * of_y, N * of_x), (R,)):
        kernel += ".unaligned"
    tile = choose_tile(kernel, columns + (of_logits if of_logits > 16 else 0), x_TN.dtype.itemsize, target, T)
    rank = min(tile.rank, columns)
    blocks_M, blocks_N = blocks(M, tile.columns) if of_y else 0, blocks(N, tile.columns) if of_x else 0
    rank_blocks = blocks(R, rank) if has_columns else 1
    programs = (blocks_M + blocks_N) * rank_blocks
    # Where one split would leave most of a second wave empty, two.
    fill = 2 if programs <= target.multiprocessors else 3
    splits, split_steps = splits_of(programs, blocks(T, tile.rows), target, fill=fill)
    partial, to = _Partial(), wanted
    if splits > 1:
        size_A, size_router = (0 if out is None else out.numel() for out in (wanted.A_RN, wanted.router_EN))
        partial = _Partial(
            x_TN.new_empty(splits, M * R, dtype=torch.float32) if of_y else None,
            x_TN.new_empty(splits, size_A + size_router, dtype=torch.float32) if of_x else None,
        )
        to = _Wanted(
            partial.B,
            None if wanted.A_RN is None else partial.A_router,
            None if wanted.router_EN is None else partial.A_router[0, size_A:],
        )
    arguments = {
        "grad_y_ptr": grad_y_TM if of_y else None,
        "weighted_ptr": routing.weighted_TR if of_y else None,
        "x_ptr": x_TN if of_x else None,
        "hidden_ptr": None if to.A_RN is None else gradient.hidden_TR,
        "logits_ptr": None if to.router_EN is None else gradient.logits_ET,
        "gate_ptr": routing.gate_ET if dropped else None,
        "out_B_ptr": to.B_MR,
        "out_A_ptr": to.A_RN,
        "out_router_ptr": to.router_EN,
        "T": T,
        "M": M if of_y else 0,
        "N": N if of_x else 0,
        "blocks_M": blocks_M,
        "split_T": split_steps * tile.rows,
        "stride_yt": grad_y_TM.stride(0) if of_y else 0,
        "stride_ym": grad_y_TM.stride(1) if of_y else 0,
        "stride_xt": x_TN.stride(0) if of_x else 0,
        "stride_xn": x_TN.stride(1) if of_x else 0,
        **(dropout_arguments(adapter) if dropped else NO_DROPOUT),
    }
    constants = {
        "E": E,
        "D": adapter.expert_rank,
        "TOP_K": adapter.top_k,
        "E_DOT": padded(E, 16),
        "BT": tile.rows,
        "BN": tile.columns,
        "BC": rank,
        "EVEN_M": not of_y or M % tile.columns == 0,
        "EVEN_N": not of_x or N % tile.columns == 0,
        "PRECISION": precision(x_TN.dtype),
    }
    launch(weight_gradient, (blocks_M + blocks_N, splits, rank_blocks), tile, arguments, constants)
    return partial


def _add_splits(partial: _Partial, wanted: _Wanted) -> None:
    """Sum what is in splits into ``wanted``."""
    of_B, of_A = partial.B is not None, partial.A_router is not None
    if not (of_B or of_A):
        return
    splits_B, splits_A = (0 if sums is None else sums.shape[0] for sums in partial)
    size_B = wanted.B_MR.numel() if of_B else 0
    size_A = wanted.A_RN.numel() if of_A and wanted.A_RN is not None else 0
    size_router = wanted.router_EN.numel() if of_A and wanted.router_EN is not None else 0
    tile = _SUM if size_B + size_A + size_router > 100 * _SUM.columns else _SMALL_SUM
    blocks_B = blocks(size_B, tile.columns)
    arguments = {
        "partial_B_ptr": partial.B,
        "partial_A_ptr": partial.A_router,
        "out_B_ptr": wanted.B_MR if of_B else None,
        "out_A_ptr": wanted.A_RN if of_A else None,
        "out_router_ptr": wanted.router_EN if of_A else None,
        "splits_B": splits_B,
        "splits_A": splits_A,
        "blocks_B": blocks_B,
        "size_B": size_B,
        "size_A": size_A,
        "size_router": size_router,
    }
    constants = {"SPLITS": min(padded(max(splits_B, splits_A)), tile.rows), "BLOCK": tile.columns}
    launch(add_splits, (blocks_B + blocks(size_A + size_router, tile.columns),), tile, arguments, constants)


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


def _contiguous_like(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)
