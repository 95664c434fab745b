"""Kernel 2: the gradients of the hidden columns and of the router's logits, from one read of dY.

    [dh~ | dh0] = dY [lora_B | -B0]                                        (docs/math.md, Backward)
    dh      = s expand(gate) dh~
    dlogits = q - gate sum q + the balance loss's share,  q_i = <h~_i, dh~_i>

dlora_B = dY^T h~ can ride in the same read of dY: every program then writes a partial sum of it.

Fused where one block of tokens fits the registers and the blocks fill the GPU; else ``project.py`` forms
dY [lora_B | B0] in splits, and :func:`finish_hidden_gradient` does the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from goat_kernels.kernels.common import cast, long, product
from goat_kernels.kernels.route import sum_splits
from goat_kernels.kernels.routing import expand, hidden_columns, load_experts, logit_gradient, scaling_experts


@triton.jit
def store_hidden_gradient(
    grad_weighted,
    weighted_ptr,
    gate_ptr,
    probs_ptr,
    load_E_ptr,
    grad_balance_ptr,
    scaling_E_ptr,
    hidden_ptr,
    logits_ptr,
    rows,
    T,
    scaling,
    balance_coefficient,
    E: tl.constexpr,
    D: tl.constexpr,
    E_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    HAS_BALANCE: tl.constexpr,
):
    """From dh~ [BT, R_PAD] float32: write dh and dlogits."""
    R: tl.constexpr = E * D
    index_R, exists_R = hidden_columns(E, D, E_PAD, D_PAD)
    in_T = rows < T
    mask = in_T[:, None] & exists_R[None, :]
    offsets = rows[:, None] * R + index_R[None, :]
    weighted = tl.load(weighted_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = load_experts(gate_ptr, rows, T, E, E_PAD)
    probs = gate
    grad_balance = balance_coefficient
    if HAS_BALANCE:
        probs = load_experts(probs_ptr, rows, T, E, E_PAD)
        if grad_balance_ptr is not None:
            grad_balance = tl.load(grad_balance_ptr)
    grad_logits = logit_gradient(
        weighted * grad_weighted, gate, probs, load_E_ptr, grad_balance, T, E, E_PAD, D_PAD, HAS_BALANCE
    )
    expert = tl.arange(0, E_PAD)
    tl.store(
        logits_ptr + expert.to(tl.int64)[None, :] * T + rows[:, None],
        grad_logits,
        mask=in_T[:, None] & (expert < E)[None, :],
    )
    factor = expand(gate * scaling_experts(scaling, scaling_E_ptr, E, E_PAD), E_PAD, D_PAD)
    tl.store(hidden_ptr + offsets, cast(factor * grad_weighted, hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def fused_hidden_gradient(
    grad_y_ptr,
    B_ptr,
    B0_ptr,
    weighted_ptr,
    gate_ptr,
    probs_ptr,
    load_E_ptr,
    grad_balance_ptr,
    scaling_E_ptr,
    hidden_ptr,
    logits_ptr,
    residual_ptr,
    partial_ptr,
    T,
    M,
    stride_yt,
    stride_ym,
    scaling,
    balance_coefficient,
    E: tl.constexpr,
    D: tl.constexpr,
    R0: tl.constexpr,
    E_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    R0_PAD: tl.constexpr,
    HAS_BALANCE: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (ceil(T / BT),).

    Reads
        grad_y_ptr    compute [T, M], strides (stride_yt, stride_ym)
        B_ptr [M, R], B0_ptr [M, R0] any dtype, cast to compute; weighted_ptr compute [T, R], h~
        gate_ptr, probs_ptr float32 [E, T]; load_E_ptr float32 [E]
        grad_balance_ptr float32 [] or None for the number ``balance_coefficient``; scaling_E_ptr float32 [E] or None
    Writes
        hidden_ptr    compute [T, R], dh; logits_ptr float32 [E, T], dlogits; residual_ptr compute [T, R0], dh0
        partial_ptr   float32 [programs, M, R], dY^T h~ of the program's tokens, for ``add_splits``; or None
    Accumulates in float32.
    """
    R: tl.constexpr = E * D
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    in_T = rows < T
    index_R, exists_R = hidden_columns(E, D, E_PAD, D_PAD)
    grad_weighted = tl.zeros((BT, E_PAD * D_PAD), tl.float32)
    if R0 > 0:
        residual = tl.zeros((BT, R0_PAD), tl.float32)
        index_R0 = tl.arange(0, R0_PAD)
    if partial_ptr is not None:
        weighted = tl.load(
            weighted_ptr + rows[:, None] * R + index_R[None, :], mask=in_T[:, None] & exists_R[None, :], other=0.0
        )
        partial_ptrs = partial_ptr + tl.program_id(0).to(tl.int64) * M * R + index_R[None, :]
    lane = tl.arange(0, BM)
    y_ptrs = grad_y_ptr + rows[:, None] * stride_yt + lane.to(tl.int64)[None, :] * stride_ym
    for start in range(0, M, BM):
        m = start + lane
        in_M = m < M
        if EVEN_M:
            in_M = m >= 0
        grad_y = tl.load(y_ptrs, mask=in_T[:, None] & in_M[None, :], other=0.0)
        b = tl.load(B_ptr + m[:, None] * R + index_R[None, :], mask=in_M[:, None] & exists_R[None, :], other=0.0)
        grad_weighted = product(grad_y, cast(b, grad_y.dtype), grad_weighted, PRECISION)
        if R0 > 0:
            b0 = tl.load(
                B0_ptr + m[:, None] * R0 + index_R0[None, :], mask=in_M[:, None] & (index_R0 < R0)[None, :], other=0.0
            )
            residual = product(grad_y, cast(b0, grad_y.dtype), residual, PRECISION)
        if partial_ptr is not None:
            grad_B = product(tl.trans(grad_y), weighted, tl.zeros((BM, E_PAD * D_PAD), tl.float32), PRECISION)
            tl.store(partial_ptrs + m[:, None] * R, grad_B, mask=in_M[:, None] & exists_R[None, :])
        y_ptrs += BM * long(stride_ym)
    if R0 > 0:
        tl.store(
            residual_ptr + rows[:, None] * R0 + index_R0[None, :],
            cast(-residual, residual_ptr.dtype.element_ty),
            mask=in_T[:, None] & (index_R0 < R0)[None, :],
        )
    store_hidden_gradient(
        grad_weighted,
        weighted_ptr,
        gate_ptr,
        probs_ptr,
        load_E_ptr,
        grad_balance_ptr,
        scaling_E_ptr,
        hidden_ptr,
        logits_ptr,
        rows,
        T,
        scaling,
        balance_coefficient,
        E,
        D,
        E_PAD,
        D_PAD,
        HAS_BALANCE,
    )


@triton.jit(do_not_specialize=["T", "splits"])
def finish_hidden_gradient(
    raw_ptr,
    weighted_ptr,
    gate_ptr,
    probs_ptr,
    load_E_ptr,
    grad_balance_ptr,
    scaling_E_ptr,
    hidden_ptr,
    logits_ptr,
    residual_ptr,
    T,
    splits,
    scaling,
    balance_coefficient,
    E: tl.constexpr,
    D: tl.constexpr,
    R0: tl.constexpr,
    E_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    R0_PAD: tl.constexpr,
    HAS_BALANCE: tl.constexpr,
    SPLIT_STAGES: tl.constexpr,
    BT: tl.constexpr,
):
    """The same from raw_ptr float32 [splits, T, R + R0], partial sums of dY [lora_B | B0]. Grid: (ceil(T / BT),)."""
    R: tl.constexpr = E * D
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    in_T = rows < T
    index_R, exists_R = hidden_columns(E, D, E_PAD, D_PAD)
    _, grad_weighted, residual = sum_splits(
        raw_ptr, rows, index_R, exists_R, T, R + R0, splits, E, R, R0, E_PAD, R0_PAD, 0, SPLIT_STAGES
    )
    if R0 > 0:
        index_R0 = tl.arange(0, R0_PAD)
        tl.store(
            residual_ptr + rows[:, None] * R0 + index_R0[None, :],
            cast(-residual, residual_ptr.dtype.element_ty),
            mask=in_T[:, None] & (index_R0 < R0)[None, :],
        )
    store_hidden_gradient(
        grad_weighted,
        weighted_ptr,
        gate_ptr,
        probs_ptr,
        load_E_ptr,
        grad_balance_ptr,
        scaling_E_ptr,
        hidden_ptr,
        logits_ptr,
        rows,
        T,
        scaling,
        balance_coefficient,
        E,
        D,
        E_PAD,
        D_PAD,
        HAS_BALANCE,
    )
