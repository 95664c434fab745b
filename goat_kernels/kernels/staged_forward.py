"""The forward in stages, where the fused kernel does not serve: few tokens (decoding), large R or E, few blocks.

    few tokens    project  route_and_prefill                                     up to FEW_TOKENS, no dropout
    else          project  route_and_prefill  [finish_balance]  [dropped_hidden]  expand_columns

``route_and_prefill`` adds the splits of ``project.py``, routes and weights the hidden columns. With few tokens its
programs also write y, so that a forward is two launches and the base's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from goat_kernels.kernels.adapter import (
    FEW_TOKENS,
    Operands,
    Widths,
    dropout_arguments,
    is_unaligned,
    onto_arguments,
    scaling_arguments,
)
from goat_kernels.kernels.common import (
    cast,
    expand,
    hidden_columns,
    long,
    precision,
    prefill_columns,
    product,
    route,
    scaling_experts,
    share_of,
    store_routing,
)
from goat_kernels.kernels.configs import choose_tile, current_target
from goat_kernels.kernels.dropout import column_slots, kept, token_keys
from goat_kernels.kernels.expand import expanded
from goat_kernels.kernels.forward import finish
from goat_kernels.kernels.launch import Launch, blocks
from goat_kernels.kernels.project import project_columns, split_stages, sum_splits
from goat_kernels.passes import Adapter, Routing

#: More hidden columns than this leave no registers for a block of y beside them.
PREFILLED_COLUMNS = 256

#: A grid has at most 65535 programs along its second axis, and the lowest tile is 16 features wide.
PREFILLED_FEATURES = 65535 * 16


def staged(
    x_TN: Tensor,
    adapter: Adapter,
    matrices: Operands,
    bias_M: Tensor | None,
    base_output_TM: Tensor | None,
    y_TM: Tensor,
    balance_loss: Tensor,
    routing: Routing,
) -> list[Launch]:
    """The launches of a forward in stages that fill ``y_TM``, ``balance_loss`` and ``routing``."""
    (T, M), widths, target = y_TM.shape, Widths.of(adapter), current_target(x_TN.device)
    itemsize, dropout = x_TN.dtype.itemsize, adapter.seed is not None
    prefills = T <= FEW_TOKENS and not dropout and widths.columns <= PREFILLED_COLUMNS and M <= PREFILLED_FEATURES
    kernel = "route_and_prefill" if prefills else "route_and_prefill.alone"
    tile = choose_tile(kernel, widths.columns, itemsize, target, T, matrices.read_itemsize(with_router=False))
    W1 = None if dropout else matrices.A
    raw, projecting = project_columns(x_TN, matrices, W1, matrices.A0, target, experts=widths.E, with_router=True)
    programs = blocks(T, tile.rows)
    balance = "one" if programs == 1 else "all" if T <= FEW_TOKENS else ""
    partial = y_TM.new_empty(programs, 2, widths.E, dtype=routing.load_E.dtype)
    residual_TR0 = None if prefills or not widths.R0 else x_TN.new_empty(T, widths.R0)
    onto, ONTO = onto_arguments(bias_M, base_output_TM)
    logits = matrices.parts * widths.E_PAD
    summed = max(tile.rows * (logits + widths.columns), FEW_TOKENS * logits if balance == "all" else 0)
    arguments = {
        "raw_ptr": raw,
        "B_ptr": matrices.B,
        "B0_ptr": matrices.B0,
        "y_ptr": y_TM,
        "weighted_ptr": routing.weighted_TR,
        "residual_ptr": residual_TR0,
        "gate_ptr": routing.gate_ET,
        "probs_ptr": routing.probs_ET,
        "partial_ptr": partial,
        "load_ptr": routing.load_E,
        "balance_ptr": balance_loss,
        "T": T,
        "M": M,
        "splits": raw.shape[0],
        **onto,
        **scaling_arguments(adapter),
    }
    constants = {
        **widths._asdict(),
        "TOP_K": adapter.top_k,
        "PARTS": matrices.parts,
        "ONTO": ONTO,
        "WITH_HIDDEN": not dropout,
        "WITH_PREFILL": prefills,
        "BALANCE": balance,
        "MOST_TOKENS": FEW_TOKENS,
        "SPLIT_STAGES": split_stages(raw.shape[0], summed, target),
        "BT": tile.rows,
        "BM": tile.features,
        "EVEN_M": M % tile.features == 0,
        "PRECISION": precision(x_TN.dtype),
    }
    grid = (programs, blocks(M, tile.features) if prefills else 1)
    launches = [projecting, Launch(route_and_prefill, grid, arguments, constants, tile)]
    if not balance:
        launches.append(finish(partial, T, balance_loss, routing))
    if dropout:
        launches.append(_dropped(x_TN, adapter, matrices, routing))
    if not prefills:
        B0 = None if matrices.B0 is None else matrices.B0.t()
        launches += expanded(
            y_TM,
            routing.weighted_TR,
            matrices.B.t(),
            residual_TR0,
            B0,
            experts=widths.E,
            bias_M=bias_M,
            base_output_TM=base_output_TM,
        )
    return launches


def _dropped(x_TN: Tensor, adapter: Adapter, matrices: Operands, routing: Routing) -> Launch:
    """h~ under dropout, from the gates that ``route_and_prefill`` has written."""
    T, N = x_TN.shape
    kernel = "dropped_hidden"
    if is_unaligned(x_TN.dtype, (N, x_TN.stride(0)), ()):
        kernel += ".unaligned"
    tile = choose_tile(kernel, adapter.rank, x_TN.dtype.itemsize, current_target(x_TN.device), T)
    arguments = {
        "x_ptr": x_TN,
        "A_ptr": matrices.A,
        "gate_ptr": routing.gate_ET,
        "weighted_ptr": routing.weighted_TR,
        "T": T,
        "N": N,
        "stride_xt": x_TN.stride(0),
        "stride_xn": x_TN.stride(1),
        **scaling_arguments(adapter),
        **dropout_arguments(adapter),
    }
    constants = {
        "E": adapter.num_experts,
        "D": adapter.expert_rank,
        "TOP_K": adapter.top_k,
        "BT": tile.rows,
        "BN": tile.features,
        "BC": tile.rank,
        "PRECISION": precision(x_TN.dtype),
    }
    grid = (blocks(T, tile.rows), blocks(adapter.rank, tile.rank))
    return Launch(dropped_hidden, grid, arguments, constants, tile)


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
    raw_ptr, B_ptr, B0_ptr, onto_ptr, scaling_E_ptr,
    y_ptr, weighted_ptr, residual_ptr, gate_ptr, probs_ptr, partial_ptr, load_ptr, balance_ptr,
    T, M, splits, stride_onto_t, stride_onto_m, scaling,
    E: tl.constexpr, D: tl.constexpr, R0: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr,
    E_PAD: tl.constexpr, D_PAD: tl.constexpr, R0_PAD: tl.constexpr, ONTO: tl.constexpr,
    WITH_HIDDEN: tl.constexpr, WITH_PREFILL: tl.constexpr, BALANCE: tl.constexpr, MOST_TOKENS: tl.constexpr,
    SPLIT_STAGES: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, EVEN_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(T / BT), ceil(M / BM) with WITH_PREFILL, else 1). Every program of a row block routes it; the first
    of them writes what is kept.

    Reads
        raw_ptr       float32 [splits, T, C], C = PARTS * E + R + R0 (no R columns without WITH_HIDDEN, with dropout)
        B_ptr [M, R] and B0_ptr [M, R0], any dtype, cast to compute; onto_ptr, scaling_E_ptr as in ``fused_forward``
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
            weighted, residual, B_ptr, B0_ptr, onto_ptr, y_ptr,
            rows, columns, index_R, exists_R, T, M, stride_onto_t, stride_onto_m,
            R, R0, R0_PAD, ONTO, EVEN_M, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "keep_threshold"])
def dropped_hidden(
    x_ptr, A_ptr, gate_ptr, scaling_E_ptr, seed_ptr, weighted_ptr,
    T, N, stride_xt, stride_xn, scaling, keep_threshold, keep_scale,
    E: tl.constexpr, D: tl.constexpr, TOP_K: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
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
