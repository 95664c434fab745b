"""Kernel 1, the fused forward: one read of x, one write of y's adapter share.

    [h | logits | h0] = x [lora_A; router; A0]^T                   (docs/math.md, Forward; Thm 3.4 for the pair)
    gate = softmax over the K largest logits,  h~ = s expand(gate) h
    y0   = h~ lora_B^T - h0 B0^T + bias   (or + the base's output)

Used where the accumulators of one block of tokens fit the registers and the blocks fill the GPU; otherwise the same is
done in stages (``project.py``, ``route.py``, ``expand.py``). The base product then accumulates onto y0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from goat_kernels.kernels.common import cast, long, precise_product, product
from goat_kernels.kernels.dropout import pair_bits, token_keys
from goat_kernels.kernels.routing import (
    expand,
    hidden_columns,
    join_logit_parts,
    route,
    scaling_experts,
    store_routing,
)


@triton.jit
def prefill_columns(
    weighted,
    residual,
    B_ptr,
    B0_ptr,
    onto_ptr,
    y_ptr,
    rows,
    columns,
    index_R,
    exists_R,
    T,
    M,
    stride_onto_t,
    stride_onto_m,
    R: tl.constexpr,
    R0: tl.constexpr,
    R0_PAD: tl.constexpr,
    ONTO: tl.constexpr,
    EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write y0 at ``rows`` [BT] int64 and ``columns`` [BM]: weighted B^T + residual B0^T + what it goes onto.

    weighted [BT, R_PAD] and residual [BT, R0_PAD] (with its minus sign) are in the compute dtype.
    """
    in_M = columns < M
    if EVEN_M:
        in_M = columns >= 0
    b = tl.load(B_ptr + columns[None, :] * R + index_R[:, None], mask=in_M[None, :] & exists_R[:, None], other=0.0)
    y = product(weighted, cast(b, weighted.dtype), tl.zeros((rows.shape[0], columns.shape[0]), tl.float32), PRECISION)
    if R0 > 0:
        index_R0 = tl.arange(0, R0_PAD)
        b0 = cast(
            tl.load(
                B0_ptr + columns[None, :] * R0 + index_R0[:, None],
                mask=in_M[None, :] & (index_R0 < R0)[:, None],
                other=0.0,
            ),
            weighted.dtype,
        )
        y = product(residual, b0, y, PRECISION)
    mask = (rows < T)[:, None] & in_M[None, :]
    if ONTO == "bias":
        y += tl.load(onto_ptr + columns, mask=in_M, other=0.0).to(tl.float32)[None, :]
    elif ONTO == "base":
        base = onto_ptr + rows[:, None] * stride_onto_t + columns.to(tl.int64)[None, :] * stride_onto_m
        y += tl.load(base, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * M + columns[None, :], cast(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "keep_threshold"])
def fused_forward(
    x_ptr,
    A_ptr,
    router_ptr,
    A0_ptr,
    B_ptr,
    B0_ptr,
    onto_ptr,
    scaling_E_ptr,
    seed_ptr,
    y_ptr,
    weighted_ptr,
    gate_ptr,
    probs_ptr,
    partial_ptr,
    T,
    N,
    M,
    stride_xt,
    stride_xn,
    stride_onto_t,
    stride_onto_m,
    scaling,
    keep_threshold,
    keep_scale,
    E: tl.constexpr,
    D: tl.constexpr,
    R0: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    E_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    L_PAD: tl.constexpr,
    R0_PAD: tl.constexpr,
    ONTO: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (ceil(T / BT),), one block of tokens per program.

    Reads
        x_ptr         compute [T, N], strides (stride_xt, stride_xn)
        A_ptr         compute [R, N]; router_ptr compute [PARTS * E, N], the high and, with PARTS = 2, the low part
        A0_ptr        compute [R0, N]; B_ptr compute [M, R]; B0_ptr compute [M, R0]; None where R0 = 0
        onto_ptr      compute: bias [M] (ONTO "bias"), base output [T, M] (ONTO "base"), or None (ONTO "")
        scaling_E_ptr float32 [E], or None for the number ``scaling``; seed_ptr int32 [2], or None without dropout
    Writes
        y_ptr         compute [T, M]
        weighted_ptr  compute [T, R], h~; gate_ptr, probs_ptr float32 [E, T]
        partial_ptr   float32 [programs, 2, E], summed by ``balance.py``
    Accumulates in float32. With dropout TOP_K is 1 or 2: one accumulator per slot, chosen when the gates are known.
    """
    R: tl.constexpr = E * D
    R_PAD: tl.constexpr = E_PAD * D_PAD
    program = tl.program_id(0)
    rows = program.to(tl.int64) * BT + tl.arange(0, BT)
    in_T = rows < T
    index_R, exists_R = hidden_columns(E, D, E_PAD, D_PAD)
    column_L = tl.arange(0, L_PAD)
    index_L = (column_L // E_PAD) * E + column_L % E_PAD
    exists_L = (column_L // E_PAD < PARTS) & (column_L % E_PAD < E)

    # 1. Hidden columns, logits and residual columns from one read of x.
    hidden = tl.zeros((BT, R_PAD), tl.float32)
    hidden_second = tl.zeros((BT, R_PAD), tl.float32)  # slot 1; unused without dropout
    logit_parts = tl.zeros((BT, L_PAD), tl.float32)
    if R0 > 0:
        residual = tl.zeros((BT, R0_PAD), tl.float32)
        index_R0 = tl.arange(0, R0_PAD)
    if seed_ptr is not None:
        keys = token_keys(seed_ptr, rows.to(tl.int32))
    columns = tl.arange(0, BN)
    x_ptrs = x_ptr + rows[:, None] * stride_xt + columns.to(tl.int64)[None, :] * stride_xn
    for start in range(0, N, BN):
        n = start + columns
        in_N = n < N
        if EVEN_N:
            in_N = n >= 0
        x = tl.load(x_ptrs, mask=in_T[:, None] & in_N[None, :], other=0.0)
        r = tl.load(router_ptr + index_L[None, :] * N + n[:, None], mask=exists_L[None, :] & in_N[:, None], other=0.0)
        logit_parts = precise_product(x, r, logit_parts)
        a = tl.load(A_ptr + index_R[None, :] * N + n[:, None], mask=exists_R[None, :] & in_N[:, None], other=0.0)
        if seed_ptr is None:
            hidden = product(x, a, hidden, PRECISION)
        else:
            bits = pair_bits(seed_ptr, keys[:, None], n[None, :], 0)
            threshold = keep_threshold.to(tl.uint32)
            hidden = product(tl.where((bits & 0xFFFF) >= threshold, x, 0.0), a, hidden, PRECISION)
            if TOP_K > 1:
                hidden_second = product(tl.where((bits >> 16) >= threshold, x, 0.0), a, hidden_second, PRECISION)
        if R0 > 0:
            a0 = tl.load(
                A0_ptr + index_R0[None, :] * N + n[:, None], mask=(index_R0 < R0)[None, :] & in_N[:, None], other=0.0
            )
            residual = product(x, a0, residual, PRECISION)
        x_ptrs += BN * long(stride_xn)

    # 2. Gate, balance statistics, h~.
    gate, probs, selected = route(join_logit_parts(logit_parts, E_PAD), E, E_PAD, TOP_K)
    store_routing(gate, probs, selected, gate_ptr, probs_ptr, partial_ptr, rows, T, program, E, E_PAD)
    if seed_ptr is not None:
        if TOP_K > 1:
            slots = tl.cumsum((gate > 0).to(tl.int32), axis=1) - 1
            hidden = tl.where(expand(slots, E_PAD, D_PAD) == 1, hidden_second, hidden)
        hidden = hidden * keep_scale
    factor = expand(gate * scaling_experts(scaling, scaling_E_ptr, E, E_PAD), E_PAD, D_PAD)
    weighted = cast(factor * hidden, x_ptr.dtype.element_ty)
    tl.store(weighted_ptr + rows[:, None] * R + index_R[None, :], weighted, mask=in_T[:, None] & exists_R[None, :])

    # 3. The adapter's share of y.
    compute_residual = weighted
    if R0 > 0:
        compute_residual = cast(-residual, x_ptr.dtype.element_ty)
    for start in range(0, M, BM):
        prefill_columns(
            weighted,
            compute_residual,
            B_ptr,
            B0_ptr,
            onto_ptr,
            y_ptr,
            rows,
            start + tl.arange(0, BM),
            index_R,
            exists_R,
            T,
            M,
            stride_onto_t,
            stride_onto_m,
            R,
            R0,
            R0_PAD,
            ONTO,
            EVEN_M,
            PRECISION,
        )
