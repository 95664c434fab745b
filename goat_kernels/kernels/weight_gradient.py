"""Kernel 3, the weight gradients: dlora_B = dY^T h~ from one read of dY, [dlora_A; drouter] = [dh | dlogits]^T x from
one of x (docs/math.md, Backward), in one launch.

Both sum over tokens. Each program sums one split of the tokens for one block of in- or out-features; the splits are
then added in their order (:func:`add_splits`), so that no atomics are needed and results repeat bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from goat_kernels.kernels.adapter import dropout_arguments, is_unaligned
from goat_kernels.kernels.common import cast, padded, precision, product
from goat_kernels.kernels.configs import choose_tile, current_target
from goat_kernels.kernels.dropout import column_slots, kept, of_slot, token_keys
from goat_kernels.kernels.hidden_gradient import TritonHiddenGradient
from goat_kernels.kernels.launch import Launch, blocks
from goat_kernels.kernels.project import splits_of
from goat_kernels.kernels.tiles import Tile
from goat_kernels.passes import Adapter, Routing

#: ``add_splits``: splits at a time, elements of a program; the second where few elements would leave the GPU idle.
_SUM = Tile(rows=16, features=512, warps=4, stages=1)
_SMALL_SUM = Tile(rows=32, features=128, warps=4, stages=1)


class _Wanted(NamedTuple):
    """The weight gradients to fill, contiguous in the parameters' dtypes; None for those not needed."""

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
) -> tuple[list[Launch], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """(launches, gradients of lora_A, lora_B, router): ``weight_gradients`` of :class:`goat_kernels.passes.Passes`."""
    wanted = _Wanted(
        _contiguous_like(adapter.lora_B) if needs_B else None,
        _contiguous_like(adapter.lora_A) if needs_A else None,
        _contiguous_like(adapter.router) if needs_router else None,
    )
    tensors = (x_TN, grad_y_TM, adapter, routing, gradient)
    of_x = wanted._replace(B_MR=None)
    if needs_B and gradient is not None and gradient.partial_B is not None:
        launches, partial = _over_tokens(*tensors, of_x)
        partial = partial._replace(B=gradient.partial_B)
    elif needs_B and needs_A and adapter.seed is not None:
        # Dropping x takes other tiles, which would slow the read of dY.
        launches, of_y = _over_tokens(*tensors, _Wanted(B_MR=wanted.B_MR))
        more, partial = _over_tokens(*tensors, of_x)
        launches, partial = launches + more, partial._replace(B=of_y.B)
    else:
        launches, partial = _over_tokens(*tensors, wanted)
    return launches + _add_splits(partial, wanted), (wanted.A_RN, wanted.B_MR, wanted.router_EN)


def _over_tokens(
    x_TN: Tensor,
    grad_y_TM: Tensor,
    adapter: Adapter,
    routing: Routing,
    gradient: TritonHiddenGradient | None,
    wanted: _Wanted,
) -> tuple[list[Launch], _Partial]:
    """The launches that fill ``wanted``, or the partial sums that make it up, where the tokens are summed in splits."""
    of_y, of_x = wanted.B_MR is not None, wanted.A_RN is not None or wanted.router_EN is not None
    if not (of_y or of_x):
        return [], _Partial()
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
    blocks_M, blocks_N = blocks(M, tile.features) if of_y else 0, blocks(N, tile.features) if of_x else 0
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
        "hidden_ptr": None if to.A_RN is None else gradient.grad_hidden_TR,
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
        **dropout_arguments(adapter if dropped else None),
    }
    constants = {
        "E": E,
        "D": adapter.expert_rank,
        "TOP_K": adapter.top_k,
        "E_DOT": padded(E, 16),
        "BT": tile.rows,
        "BN": tile.features,
        "BC": rank,
        "EVEN_M": not of_y or M % tile.features == 0,
        "EVEN_N": not of_x or N % tile.features == 0,
        "PRECISION": precision(x_TN.dtype),
    }
    grid = (blocks_M + blocks_N, splits, rank_blocks)
    return [Launch(weight_gradient, grid, arguments, constants, tile)], partial


def _contiguous_like(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)


@triton.jit
def sum_over_tokens(
    x_ptr, hidden_ptr, logits_ptr, gate_ptr, seed_ptr, out_ptr, out_logits_ptr,
    block, T, N, split_T, stride_xt, stride_xn, stride_oc, stride_on, keep_threshold, keep_scale,
    E: tl.constexpr, D: tl.constexpr, TOP_K: tl.constexpr, E_DOT: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of hidden^T x [R, N] and logits x [E, N], for features ``block`` * BN .. and one block of R.

    hidden_ptr compute [T, R]; logits_ptr float32 [E, T]; None for those not needed. x is dropped in front of
    hidden's columns where seed_ptr is not None. The splits lie behind one another, of logits behind hidden's.
    """
    R: tl.constexpr = E * D
    n = block * BN + tl.arange(0, BN)
    in_N = n < N
    if EVEN_N:
        in_N = n >= 0
    split = tl.program_id(1).to(tl.int64)
    start_T = split * split_T
    stop_T = tl.minimum(start_T + split_T, T)
    column = tl.program_id(2) * BC + tl.arange(0, BC)
    in_R = column < R
    expert = tl.arange(0, E_DOT)
    accumulator = tl.zeros((BN, BC), tl.float32)
    logits_accumulator = tl.zeros((BN, E_DOT), tl.float32)
    for step in range(0, split_T, BT):
        rows = start_T + step + tl.arange(0, BT)
        in_T = rows < stop_T
        x = tl.load(
            x_ptr + rows[None, :] * stride_xt + n.to(tl.int64)[:, None] * stride_xn,
            mask=in_N[:, None] & in_T[None, :],
            other=0.0,
        )
        if hidden_ptr is not None:
            hidden = tl.load(
                hidden_ptr + rows[:, None] * R + column[None, :], mask=in_T[:, None] & in_R[None, :], other=0.0
            )
            if seed_ptr is None:
                accumulator = product(x, hidden, accumulator, PRECISION)
            else:
                slots = column_slots(gate_ptr, rows, in_T, tl.minimum(column // D, E - 1), T, E)
                keys = token_keys(seed_ptr, rows.to(tl.int32))
                for slot in range(TOP_K):
                    keep = kept(seed_ptr, keys[None, :], n[:, None], slot, keep_threshold)
                    in_slot = of_slot(hidden, slots, slot)
                    accumulator = product(cast(x * keep, x.dtype), in_slot, accumulator, PRECISION)
        if logits_ptr is not None:
            logits = tl.load(
                logits_ptr + expert.to(tl.int64)[None, :] * T + rows[:, None],
                mask=in_T[:, None] & (expert < E)[None, :],
                other=0.0,
            )
            if x.dtype == tl.float16:
                # The balance loss's share is about 1e-3 / T a token, which float16 cannot hold: scale the block.
                largest = tl.max(tl.abs(logits))
                exponent = tl.where(largest > 0, tl.floor(tl.log2(largest)), 0.0)
                scale = tl.exp2(tl.minimum(tl.maximum(exponent, -110.0), 110.0))
                part = product(x, cast(logits / scale, tl.float16), tl.zeros((BN, E_DOT), tl.float32), PRECISION)
                logits_accumulator += part * scale
            else:
                logits_accumulator = product(x, cast(logits, x.dtype), logits_accumulator, PRECISION)
    of_split = split * N * ((R if hidden_ptr is not None else 0) + (E if logits_ptr is not None else 0))
    if hidden_ptr is not None:
        if seed_ptr is not None:
            accumulator = accumulator * keep_scale
        out = out_ptr + of_split + column[None, :] * stride_oc + n[:, None] * stride_on
        tl.store(out, cast(accumulator, out_ptr.dtype.element_ty), mask=in_N[:, None] & in_R[None, :])
    if logits_ptr is not None:  # noqa: SIM102 (a constant around a run-time condition)
        if tl.program_id(2) == 0:
            out_logits = out_logits_ptr + of_split + expert[None, :] * N + n[:, None]
            total = cast(logits_accumulator, out_logits_ptr.dtype.element_ty)
            tl.store(out_logits, total, mask=in_N[:, None] & (expert < E)[None, :])


@triton.jit(do_not_specialize=["blocks_M", "split_T", "keep_threshold"])
def weight_gradient(
    grad_y_ptr, weighted_ptr, x_ptr, hidden_ptr, logits_ptr, gate_ptr, seed_ptr, out_B_ptr, out_A_ptr, out_router_ptr,
    T, M, N, blocks_M, split_T, stride_yt, stride_ym, stride_xt, stride_xn, keep_threshold, keep_scale,
    E: tl.constexpr, D: tl.constexpr, TOP_K: tl.constexpr, E_DOT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks_M + ceil(N / BN), splits of T, ceil(R / BC)); blocks_M is ceil(M / BN), 0 without out_B_ptr.

    Reads
        grad_y_ptr  compute [T, M], strides (stride_yt, stride_ym); weighted_ptr compute [T, R], h~
        x_ptr       compute [T, N], strides (stride_xt, stride_xn)
        hidden_ptr  compute [T, R], dh; logits_ptr float32 [E, T], dlogits
        gate_ptr    float32 [E, T] and seed_ptr int32 [2] where x is dropped in front of lora_A; else None
    Writes, in any dtype, what is asked for; the inputs and outputs of the rest are None
        out_B_ptr       [splits, M, R], from dY and h~
        out_A_ptr       [splits, R, N], from x and dh
        out_router_ptr  [splits, E, N], from x and dlogits, by the first block along axis 2; where both are written, a
                        split's out_A is followed by its out_router
    Accumulates in float32. dY^T and x^T stand on the left, because matrix units want the longer side there.
    """
    R: tl.constexpr = E * D
    block = tl.program_id(0)
    # dY goes first: the hidden gradient has just read it, and some of it may still be in the cache.
    if out_B_ptr is not None:  # noqa: SIM102 (a constant around a run-time condition)
        if block < blocks_M:
            sum_over_tokens(
                grad_y_ptr, weighted_ptr, None, None, None, out_B_ptr, None, block, T, M, split_T,
                stride_yt, stride_ym, 1, R, keep_threshold, keep_scale,
                E, D, TOP_K, E_DOT, BT, BN, BC, EVEN_M, PRECISION,
            )  # fmt: skip
    if x_ptr is not None:
        reads_x = block >= blocks_M
        if hidden_ptr is None:  # the router only: one block along axis 2, however many lora_B has
            reads_x = reads_x & (tl.program_id(2) == 0)
        if reads_x:
            sum_over_tokens(
                x_ptr, hidden_ptr, logits_ptr, gate_ptr, seed_ptr, out_A_ptr, out_router_ptr, block - blocks_M, T, N,
                split_T, stride_xt, stride_xn, N, 1, keep_threshold, keep_scale,
                E, D, TOP_K, E_DOT, BT, BN, BC, EVEN_N, PRECISION,
            )  # fmt: skip


def _add_splits(partial: _Partial, wanted: _Wanted) -> list[Launch]:
    """The launch that sums what is in splits into ``wanted``, if anything is."""
    of_B, of_A = partial.B is not None, partial.A_router is not None
    if not (of_B or of_A):
        return []
    splits_B, splits_A = (0 if sums is None else sums.shape[0] for sums in partial)
    size_B = wanted.B_MR.numel() if of_B else 0
    size_A = wanted.A_RN.numel() if of_A and wanted.A_RN is not None else 0
    size_router = wanted.router_EN.numel() if of_A and wanted.router_EN is not None else 0
    tile = _SUM if size_B + size_A + size_router > 100 * _SUM.features else _SMALL_SUM
    blocks_B = blocks(size_B, tile.features)
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
    constants = {"SPLITS": min(padded(max(splits_B, splits_A)), tile.rows), "BLOCK": tile.features}
    grid = (blocks_B + blocks(size_A + size_router, tile.features),)
    return [Launch(add_splits, grid, arguments, constants, tile)]


@triton.jit(do_not_specialize=["splits_B", "splits_A", "blocks_B"])
def add_splits(
    partial_B_ptr, partial_A_ptr, out_B_ptr, out_A_ptr, out_router_ptr,
    splits_B, splits_A, blocks_B, size_B, size_A, size_router, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum partial_B float32 [splits_B, size_B] and partial_A [splits_A, size_A + size_router] over their splits.

    Grid: (blocks_B + ceil((size_A + size_router) / BLOCK),), blocks_B is ceil(size_B / BLOCK). SPLITS at a time, in
    their order. The sums go to out_B_ptr; to out_A_ptr and what is behind size_A to out_router_ptr; in their dtypes,
    None where the size is 0.
    """
    block = tl.program_id(0)
    if partial_B_ptr is not None:  # noqa: SIM102 (a constant around a run-time condition)
        if block < blocks_B:
            index, total = sum_block(partial_B_ptr, block, splits_B, size_B, SPLITS, BLOCK)
            tl.store(out_B_ptr + index, cast(total, out_B_ptr.dtype.element_ty), mask=index < size_B)
    if partial_A_ptr is not None:  # noqa: SIM102
        if block >= blocks_B:
            index, total = sum_block(partial_A_ptr, block - blocks_B, splits_A, size_A + size_router, SPLITS, BLOCK)
            if out_A_ptr is not None:
                tl.store(out_A_ptr + index, cast(total, out_A_ptr.dtype.element_ty), mask=index < size_A)
            if out_router_ptr is not None:
                of_router = (index >= size_A) & (index < size_A + size_router)
                total = cast(total, out_router_ptr.dtype.element_ty)
                tl.store(out_router_ptr + (index - size_A), total, mask=of_router)


@triton.jit
def sum_block(partial_ptr, block, splits, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """(the indices of one block [BLOCK], its sums over the splits of partial_ptr float32 [splits, size])."""
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        offsets = split.to(tl.int64)[:, None] * size + index[None, :]
        mask = (split < splits)[:, None] & (index < size)[None, :]
        total += tl.sum(tl.load(partial_ptr + offsets, mask=mask, other=0.0), axis=0)
    return index, total
