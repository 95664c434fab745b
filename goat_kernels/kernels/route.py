"""The second stage of the forward in stages: add the splits, route, weight the hidden columns, and prefill y.

With few tokens (decoding) its programs also write y, so that a forward is two launches and the base's; otherwise
``expand.py`` writes y in a launch of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from goat_kernels.kernels.common import cast, long, share_of
from goat_kernels.kernels.forward import prefill_columns
from goat_kernels.kernels.routing import (
    LOW_PART_SCALE,
    expand,
    hidden_columns,
    route,
    scaling_experts,
    store_routing,
)

_LOW_PART_SCALE = tl.constexpr(LOW_PART_SCALE)


@triton.jit
def add_split(total, raw_ptr, split, rows, column, exists, T, C):
    """``total`` [T, columns] + one split of raw [splits, T, C]."""
    of_split = raw_ptr + long(split) * T * C
    mask = (rows < T)[:, None] & exists[None, :]
    return total + tl.load(of_split + (rows[:, None] * C + column[None, :]), mask=mask, other=0.0)


@triton.jit
def sum_splits(
    raw_ptr, rows, index_R, exists_R, T, C, splits, E: tl.constexpr, R: tl.constexpr, R0: tl.constexpr,
    E_PAD: tl.constexpr, R0_PAD: tl.constexpr, PARTS: tl.constexpr, SPLIT_STAGES: tl.constexpr,
):  # fmt: skip
    """float32 (logits [T, E_PAD], hidden [T, R_PAD], residual [T, R0_PAD]): raw added over its splits, in their order.

    raw float32 [splits, T, C] has PARTS * E, R and R0 columns, in this order; what it has none of is zero. The
    additions are a chain, one split after the other; the loads run SPLIT_STAGES - 1 splits ahead of them.
    """
    expert = tl.arange(0, E_PAD)
    index_R0 = tl.arange(0, R0_PAD)
    logits = tl.zeros((rows.shape[0], E_PAD), tl.float32)
    low = tl.zeros((rows.shape[0], E_PAD), tl.float32)
    hidden = tl.zeros((rows.shape[0], index_R.shape[0]), tl.float32)
    residual = tl.zeros((rows.shape[0], R0_PAD), tl.float32)
    for split in tl.range(0, splits, num_stages=SPLIT_STAGES):
        if PARTS > 0:
            logits = add_split(logits, raw_ptr, split, rows, expert, expert < E, T, C)
        if PARTS == 2:
            low = add_split(low, raw_ptr, split, rows, E + expert, expert < E, T, C)
        if R > 0:
            hidden = add_split(hidden, raw_ptr, split, rows, PARTS * E + index_R, exists_R, T, C)
        if R0 > 0:
            residual = add_split(residual, raw_ptr, split, rows, PARTS * E + R + index_R0, index_R0 < R0, T, C)
    if PARTS == 2:
        logits += low * (1.0 / _LOW_PART_SCALE)
    return logits, hidden, residual


@triton.jit
def store_balance(probs, selected, in_T, load_ptr, balance_ptr, T, E: tl.constexpr, E_PAD: tl.constexpr):
    """f and the balance loss of tokens that one program holds all of."""
    expert = tl.arange(0, E_PAD)
    counted = in_T[:, None] & (expert < E)[None, :]
    load = share_of(tl.sum(tl.where(counted & selected, 1.0, 0.0), axis=0), T)
    mean = share_of(tl.sum(tl.where(counted, probs, 0.0), axis=0), T)
    tl.store(load_ptr + expert, load, mask=expert < E)
    tl.store(balance_ptr, tl.sum(load * mean, axis=0) * E)


@triton.jit(do_not_specialize=["T", "splits"])
def route_and_prefill(
    raw_ptr,
    B_ptr,
    B0_ptr,
    onto_ptr,
    scaling_E_ptr,
    y_ptr,
    weighted_ptr,
    residual_ptr,
    gate_ptr,
    probs_ptr,
    partial_ptr,
    load_ptr,
    balance_ptr,
    T,
    M,
    splits,
    stride_onto_t,
    stride_onto_m,
    scaling,
    E: tl.constexpr,
    D: tl.constexpr,
    R0: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    E_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    R0_PAD: tl.constexpr,
    ONTO: tl.constexpr,
    WITH_HIDDEN: tl.constexpr,
    WITH_PREFILL: tl.constexpr,
    BALANCE: tl.constexpr,
    MOST_TOKENS: tl.constexpr,
    SPLIT_STAGES: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (ceil(T / BT), ceil(M / BM) with WITH_PREFILL, else 1). Every program of a row block routes it; the first
    of them writes what is kept.

    Reads
        raw_ptr       float32 [splits, T, C], C = PARTS * E + R + R0 (no R columns without WITH_HIDDEN, with dropout)
        B_ptr [M, R] and B0_ptr [M, R0], any dtype, cast to compute; onto_ptr, scaling_E_ptr as in ``forward.py``
    Writes
        weighted_ptr  compute [T, R], h~ (WITH_HIDDEN); gate_ptr, probs_ptr float32 [E, T]
        residual_ptr  compute [T, R0], - x A0^T (without WITH_PREFILL)
        partial_ptr   float32 [row blocks, 2, E]
        load_ptr [E], balance_ptr [] float32: with few tokens (BALANCE), by the very first program, which then routes
                      every row block: "one" where it has done so anyway, or "all"
        y_ptr         compute [T, M] (WITH_PREFILL)
    """
    R: tl.constexpr = E * D
    HIDDEN: tl.constexpr = R if WITH_HIDDEN else 0
    C: tl.constexpr = PARTS * E + HIDDEN + R0
    program = tl.program_id(0)
    first = tl.program_id(1) == 0
    rows = program.to(tl.int64) * BT + tl.arange(0, BT)
    in_T = rows < T

    # 1. The sums over the splits, and the gate.
    index_R, exists_R = hidden_columns(E, D, E_PAD, D_PAD)
    logits, hidden, residual = sum_splits(
        raw_ptr, rows, index_R, exists_R, T, C, splits, E, HIDDEN, R0, E_PAD, R0_PAD, PARTS, SPLIT_STAGES
    )
    gate, probs, selected = route(logits, E, E_PAD, TOP_K)
    if first:
        store_routing(gate, probs, selected, gate_ptr, probs_ptr, partial_ptr, rows, T, program, E, E_PAD)
        if BALANCE == "one":
            store_balance(probs, selected, in_T, load_ptr, balance_ptr, T, E, E_PAD)
        elif BALANCE == "all":  # noqa: SIM102 (a constant around a run-time condition)
            if program == 0:
                every = tl.arange(0, MOST_TOKENS).to(tl.int64)
                logits_of_all, _, _ = sum_splits(
                    raw_ptr, every, index_R, exists_R, T, C, splits, E, 0, 0, E_PAD, R0_PAD, PARTS, SPLIT_STAGES
                )
                _, probs_of_all, selected_of_all = route(logits_of_all, E, E_PAD, TOP_K)
                store_balance(probs_of_all, selected_of_all, every < T, load_ptr, balance_ptr, T, E, E_PAD)

    # 2. h~ and the residual columns.
    if WITH_HIDDEN:
        factor = expand(gate * scaling_experts(scaling, scaling_E_ptr, E, E_PAD), E_PAD, D_PAD)
        weighted = cast(factor * hidden, weighted_ptr.dtype.element_ty)
        if first:
            tl.store(
                weighted_ptr + rows[:, None] * R + index_R[None, :], weighted, mask=in_T[:, None] & exists_R[None, :]
            )
    if R0 > 0:
        index_R0 = tl.arange(0, R0_PAD)
        residual = cast(-residual, weighted_ptr.dtype.element_ty)
        if not WITH_PREFILL:
            offsets = rows[:, None] * R0 + index_R0[None, :]
            tl.store(residual_ptr + offsets, residual, mask=in_T[:, None] & (index_R0 < R0)[None, :])

    # 3. The adapter's share of y.
    if WITH_PREFILL:
        if R0 == 0:
            residual = weighted
        columns = tl.program_id(1) * BM + tl.arange(0, BM)
        prefill_columns(
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
            R,
            R0,
            R0_PAD,
            ONTO,
            EVEN_M,
            PRECISION,
        )
