"""Weight gradients: dlora_B = dY^T h~, and kernel 3, [dlora_A; drouter] = [dh | dlogits]^T x from one read of x.

Both sum over tokens. Each program sums one split of the tokens for one block of in- or out-features; the splits are
then added in their order (:func:`add_splits`), so that no atomics are needed and results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from goat_kernels.kernels.common import cast, product
from goat_kernels.kernels.dropout import column_slots, kept, of_slot, token_keys


@triton.jit(do_not_specialize=["split_T", "keep_threshold"])
def weight_gradient(
    x_ptr,
    hidden_ptr,
    logits_ptr,
    gate_ptr,
    seed_ptr,
    out_ptr,
    out_logits_ptr,
    T,
    N,
    split_T,
    stride_xt,
    stride_xn,
    stride_os,
    stride_oc,
    stride_on,
    stride_ls,
    keep_threshold,
    keep_scale,
    E: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    E_DOT: tl.constexpr,
    WITH_HIDDEN: tl.constexpr,
    WITH_LOGITS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (ceil(N / BN), splits of T, ceil(R / BC)). For lora_B, x is dY and N is M.

    Reads
        x_ptr       compute [T, N], strides (stride_xt, stride_xn)
        hidden_ptr  compute [T, R]: dh, or h~ for lora_B (WITH_HIDDEN)
        logits_ptr  float32 [E, T]: dlogits (WITH_LOGITS)
        gate_ptr    float32 [E, T] and seed_ptr int32 [2] where x is dropped for hidden_ptr's columns; else None
    Writes
        out_ptr        [splits, R, N] by strides (stride_os, stride_oc, stride_on), any dtype
        out_logits_ptr [splits, E, N] by strides (stride_ls, N, 1), any dtype; by the first block along axis 2
    Accumulates in float32. x^T stands on the left, because matrix units want the longer side there.
    """
    R: tl.constexpr = E * D
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    in_N = n < N
    if EVEN_N:
        in_N = n >= 0
    split = tl.program_id(1)
    start_T = split.to(tl.int64) * split_T
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
        if WITH_HIDDEN:
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
        if WITH_LOGITS:
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
    if WITH_HIDDEN:
        if seed_ptr is not None:
            accumulator = accumulator * keep_scale
        out = out_ptr + split.to(tl.int64) * stride_os + column[None, :] * stride_oc + n[:, None] * stride_on
        tl.store(out, cast(accumulator, out_ptr.dtype.element_ty), mask=in_N[:, None] & in_R[None, :])
    if WITH_LOGITS:  # noqa: SIM102 (a constant around a run-time condition)
        if tl.program_id(2) == 0:
            out_logits = out_logits_ptr + split.to(tl.int64) * stride_ls + expert[None, :] * N + n[:, None]
            total = cast(logits_accumulator, out_logits_ptr.dtype.element_ty)
            tl.store(out_logits, total, mask=in_N[:, None] & (expert < E)[None, :])


@triton.jit(do_not_specialize=["splits"])
def add_splits(
    partial_ptr, first_ptr, second_ptr, splits, first_size, second_size, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum partial [splits, first_size + second_size] float32 over its splits, SPLITS at a time in their order.

    Grid: (ceil((first_size + second_size) / BLOCK),).

    The first ``first_size`` sums go to first_ptr, the others to second_ptr, in their dtypes; None where the size is 0.
    """
    size = first_size + second_size
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        offsets = split.to(tl.int64)[:, None] * size + index[None, :]
        total += tl.sum(
            tl.load(partial_ptr + offsets, mask=(split < splits)[:, None] & (index < size)[None, :], other=0.0), axis=0
        )
    if first_ptr is not None:
        tl.store(first_ptr + index, cast(total, first_ptr.dtype.element_ty), mask=index < first_size)
    if second_ptr is not None:
        in_second = (index >= first_size) & (index < size)
        tl.store(second_ptr + (index - first_size), cast(total, second_ptr.dtype.element_ty), mask=in_second)
