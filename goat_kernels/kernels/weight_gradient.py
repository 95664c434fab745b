"""Kernel 3, the weight gradients: dlora_B = dY^T h~ from one read of dY, [dlora_A; drouter] = [dh | dlogits]^T x from
one of x (docs/math.md, Backward), in one launch.

Both sum over tokens. Each program sums one split of the tokens for one block of in- or out-features; the splits are
then added in their order (:func:`add_splits`), so that no atomics are needed and results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from goat_kernels.kernels.common import cast, product
from goat_kernels.kernels.dropout import column_slots, kept, of_slot, token_keys


@triton.jit
def sum_over_tokens(
    x_ptr,
    hidden_ptr,
    logits_ptr,
    gate_ptr,
    seed_ptr,
    out_ptr,
    out_logits_ptr,
    block,
    T,
    N,
    split_T,
    stride_xt,
    stride_xn,
    stride_oc,
    stride_on,
    keep_threshold,
    keep_scale,
    E: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    E_DOT: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split of hidden^T x [R, N] and logits x [E, N], for features ``block`` * BN .. and one block of R.

    hidden_ptr compute [T, R]; logits_ptr float32 [E, T]; None for what nobody asked for. x is dropped in front of
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
    grad_y_ptr,
    weighted_ptr,
    x_ptr,
    hidden_ptr,
    logits_ptr,
    gate_ptr,
    seed_ptr,
    out_B_ptr,
    out_A_ptr,
    out_router_ptr,
    T,
    M,
    N,
    blocks_M,
    split_T,
    stride_yt,
    stride_ym,
    stride_xt,
    stride_xn,
    keep_threshold,
    keep_scale,
    E: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    E_DOT: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
        if hidden_ptr is None:  # the router alone: one block along axis 2, whatever lora_B has
            reads_x = reads_x & (tl.program_id(2) == 0)
        if reads_x:
            sum_over_tokens(
                x_ptr, hidden_ptr, logits_ptr, gate_ptr, seed_ptr, out_A_ptr, out_router_ptr, block - blocks_M, T, N,
                split_T, stride_xt, stride_xn, N, 1, keep_threshold, keep_scale,
                E, D, TOP_K, E_DOT, BT, BN, BC, EVEN_N, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["splits_B", "splits_A", "blocks_B"])
def add_splits(
    partial_B_ptr,
    partial_A_ptr,
    out_B_ptr,
    out_A_ptr,
    out_router_ptr,
    splits_B,
    splits_A,
    blocks_B,
    size_B,
    size_A,
    size_router,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
