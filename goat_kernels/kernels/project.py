"""Skinny products in stages: partial sums of x [router; W1; W2]^T over splits of the inner dimension.

The forward uses it with x [T, N] and [router; lora_A; A0] where the fused kernel does not serve (few tokens, large R
or E); the backward with dY [T, M] and [lora_B | B0]. A second stage (``route.py``, ``hidden_gradient.py``) adds the
splits in their order. Splitting the inner dimension is what fills the GPU when there are few tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from goat_kernels.kernels.common import cast, long, precise_product, product
from goat_kernels.kernels.dropout import column_slots, kept, token_keys
from goat_kernels.kernels.routing import LOW_PART_SCALE

_LOW_PART_SCALE = tl.constexpr(LOW_PART_SCALE)


@triton.jit
def router_block(
    router_ptr, column, n, in_N, N, E: tl.constexpr, STORED_PARTS: tl.constexpr, PARTS: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """[BN, BC] of the router's parts: as stored, or (STORED_PARTS < PARTS) split here from a wider router."""
    mask = (column < PARTS * E)[None, :] & in_N[:, None]
    if STORED_PARTS == PARTS:
        block = cast(tl.load(router_ptr + column[None, :] * N + n[:, None], mask=mask, other=0.0), dtype)
    else:
        whole = tl.load(router_ptr + (column % E)[None, :] * N + n[:, None], mask=mask, other=0.0).to(tl.float32)
        high = cast(whole, dtype)
        low = cast((whole - high.to(tl.float32)) * _LOW_PART_SCALE, dtype)
        block = tl.where((column < E)[None, :], high, low)
    return block


@triton.jit
def weight_block(
    W1_ptr, W2_ptr, column, n, in_N, stride_1c, stride_1n, stride_2c, stride_2n, C1: tl.constexpr, C2: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """[BN, BC] of [W1; W2]."""
    first = W1_ptr + column[None, :] * stride_1c + n[:, None] * stride_1n
    block = cast(tl.load(first, mask=(column < C1)[None, :] & in_N[:, None], other=0.0), dtype)
    if C2 > 0:
        in_second = (column >= C1) & (column < C1 + C2)
        second = W2_ptr + (column - C1)[None, :] * stride_2c + n[:, None] * stride_2n
        other = cast(tl.load(second, mask=in_second[None, :] & in_N[:, None], other=0.0), dtype)
        block = tl.where(in_second[None, :], other, block)
    return block


@triton.jit(do_not_specialize=["T", "split_steps"])
def project(
    x_ptr, router_ptr, W1_ptr, W2_ptr, out_ptr, T, N, split_steps, stride_xt, stride_xn, stride_1c, stride_1n,
    stride_2c, stride_2n, E: tl.constexpr, STORED_PARTS: tl.constexpr, PARTS: tl.constexpr, C1: tl.constexpr,
    C2: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(T / BT), ceil(PARTS * E / BC) + ceil((C1 + C2) / BC), splits of N).

    Reads
        x_ptr      compute [T, N], strides (stride_xt, stride_xn)
        router_ptr [STORED_PARTS * E, N] contiguous, compute dtype or (split here) wider; None where PARTS = 0
        W1_ptr     [C1, N], strides (stride_1c, stride_1n), any dtype, cast to compute; W2_ptr [C2, N] likewise, or None
    Writes
        out_ptr    float32 [splits, T, PARTS * E + C1 + C2]: the sum over the split_steps * BN inputs of the split
    The router's columns have programs of their own, the first along axis 1, because their products are always "ieee".
    """
    ROUTER_BLOCKS: tl.constexpr = (PARTS * E + BC - 1) // BC
    C: tl.constexpr = PARTS * E + C1 + C2
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    in_T = rows < T
    split = tl.program_id(2)
    start_N = split * split_steps * BN
    stop_N = tl.minimum(start_N + split_steps * BN, N)
    lane = tl.arange(0, BN)
    x_ptrs = x_ptr + rows[:, None] * stride_xt + (start_N + lane).to(tl.int64)[None, :] * stride_xn
    out = out_ptr + (split.to(tl.int64) * T + rows[:, None]) * C
    accumulator = tl.zeros((BT, BC), tl.float32)
    if tl.program_id(1) < ROUTER_BLOCKS:
        if PARTS > 0:
            column = tl.program_id(1) * BC + tl.arange(0, BC)
            for start in range(start_N, stop_N, BN):
                n = start + lane
                in_N = n < stop_N
                x = tl.load(x_ptrs, mask=in_T[:, None] & in_N[None, :], other=0.0)
                w = router_block(router_ptr, column, n, in_N, N, E, STORED_PARTS, PARTS, x.dtype)
                accumulator = precise_product(x, w, accumulator)
                x_ptrs += BN * long(stride_xn)
            tl.store(out + column[None, :], accumulator, mask=in_T[:, None] & (column < PARTS * E)[None, :])
    else:
        if C1 > 0:
            column = (tl.program_id(1) - ROUTER_BLOCKS) * BC + tl.arange(0, BC)
            for start in range(start_N, stop_N, BN):
                n = start + lane
                in_N = n < stop_N
                x = tl.load(x_ptrs, mask=in_T[:, None] & in_N[None, :], other=0.0)
                w = weight_block(
                    W1_ptr, W2_ptr, column, n, in_N, stride_1c, stride_1n, stride_2c, stride_2n, C1, C2, x.dtype
                )
                accumulator = product(x, w, accumulator, PRECISION)
                x_ptrs += BN * long(stride_xn)
            in_C = (column < C1 + C2)[None, :]
            tl.store(out + (PARTS * E + column[None, :]), accumulator, mask=in_T[:, None] & in_C)


@triton.jit(do_not_specialize=["T", "keep_threshold"])
def dropped_hidden(
    x_ptr,
    A_ptr,
    gate_ptr,
    scaling_E_ptr,
    seed_ptr,
    weighted_ptr,
    T,
    N,
    stride_xt,
    stride_xn,
    scaling,
    keep_threshold,
    keep_scale,
    E: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h~ = s expand(gate) (dropout(x) lora_A^T) where the fused kernel does not serve; the gate is known already.

    Grid: (ceil(T / BT), ceil(R / BC)). Each slot takes a pass over x, and its columns are kept.

    Reads x_ptr compute [T, N] (strides), A_ptr [R, N] any dtype, gate_ptr float32 [E, T], scaling_E_ptr float32 [E] or
    None, seed_ptr int32 [2]. Writes weighted_ptr compute [T, R].
    """
    R: tl.constexpr = E * D
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    in_T = rows < T
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    in_R = column < R
    expert = tl.minimum(column // D, E - 1)
    slots = column_slots(gate_ptr, rows, in_T, expert, T, E)
    keys = token_keys(seed_ptr, rows.to(tl.int32))
    lane = tl.arange(0, BN)
    hidden = tl.zeros((BT, BC), tl.float32)
    for slot in range(TOP_K):
        accumulator = tl.zeros((BT, BC), tl.float32)
        x_ptrs = x_ptr + rows[:, None] * stride_xt + lane.to(tl.int64)[None, :] * stride_xn
        for start in range(0, N, BN):
            n = start + lane
            in_N = n < N
            x = tl.load(x_ptrs, mask=in_T[:, None] & in_N[None, :], other=0.0)
            x = cast(x * kept(seed_ptr, keys[:, None], n[None, :], slot, keep_threshold), x.dtype)
            a = tl.load(A_ptr + column[None, :] * N + n[:, None], mask=in_R[None, :] & in_N[:, None], other=0.0)
            accumulator = product(x, cast(a, x.dtype), accumulator, PRECISION)
            x_ptrs += BN * long(stride_xn)
        hidden = tl.where(slots == slot, accumulator, hidden)
    mask = in_T[:, None] & in_R[None, :]
    gate = tl.load(gate_ptr + expert.to(tl.int64)[None, :] * T + rows[:, None], mask=mask, other=0.0)
    if scaling_E_ptr is None:
        factor = gate * scaling
    else:
        factor = gate * tl.load(scaling_E_ptr + expert)[None, :]
    weighted = factor * (hidden * keep_scale)
    tl.store(weighted_ptr + rows[:, None] * R + column[None, :], cast(weighted, x_ptr.dtype.element_ty), mask=mask)
