"""Kernel 1, the fused forward: one read of x, one write of y's adapter share.

    [h | logits | h0] = x [lora_A; router; A0]^T                   (docs/math.md, Forward; Thm 3.4 for the pair)
    gate = softmax over the K largest logits,  h~ = s expand(gate) h
    y0   = h~ lora_B^T - h0 B0^T + bias   (or + the base's output)

Used where :func:`fused_tile` finds a tile; otherwise the same is done in stages (``staged_forward.py``). The base
product then accumulates onto y0.
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
    LOW_PART_SCALE,
    cast,
    expand,
    hidden_columns,
    long,
    padded,
    precise_product,
    precision,
    prefill_columns,
    product,
    route,
    scaling_experts,
    share_of,
    store_routing,
)
from goat_kernels.kernels.configs import current_target, find_tile
from goat_kernels.kernels.dropout import pair_bits, token_keys
from goat_kernels.kernels.launch import Launch, blocks
from goat_kernels.kernels.tiles import Tile
from goat_kernels.passes import Adapter, Routing

#: More experts than this route in a stage of their own: their logits' accumulators would crowd out the hidden columns'.
FUSED_EXPERTS = 16

#: Slots that the fused kernel keeps accumulators for.
FUSED_SLOTS = 2

_BALANCE = Tile(rows=64, features=16, warps=4, stages=1)
_LOW_PART_SCALE = tl.constexpr(LOW_PART_SCALE)


def fused_tile(x_TN: Tensor, adapter: Adapter) -> Tile | None:
    """The fused kernel's tile; None where the accumulators of a block of tokens do not fit the registers, or the
    blocks would leave more than half of the GPU idle."""
    (T, N), M, widths, target = x_TN.shape, adapter.lora_B.shape[0], Widths.of(adapter), current_target(x_TN.device)
    slots = adapter.top_k if adapter.seed is not None else 1
    if widths.E > FUSED_EXPERTS or slots > FUSED_SLOTS or (T <= FEW_TOKENS and adapter.seed is None):
        return None
    columns = widths.columns + (slots - 1) * widths.E_PAD * widths.D_PAD
    kernel = "fused_forward"
    if adapter.seed is not None:
        kernel += ".dropout"
    elif is_unaligned(x_TN.dtype, (N, M, x_TN.stride(0)), ()):
        kernel += ".unaligned"
    tile = find_tile(kernel, columns, x_TN.dtype.itemsize, target, T)
    if tile is None or (adapter.seed is None and 2 * blocks(T, tile.rows) < target.multiprocessors):
        return None
    return tile


def fused(
    tile: Tile,
    x_TN: Tensor,
    adapter: Adapter,
    matrices: Operands,
    bias_M: Tensor | None,
    base_output_TM: Tensor | None,
    y_TM: Tensor,
    balance_loss: Tensor,
    routing: Routing,
) -> list[Launch]:
    """The launches of a fused forward that fill ``y_TM``, ``balance_loss`` and ``routing``."""
    (T, N), M, widths = x_TN.shape, y_TM.shape[1], Widths.of(adapter)
    programs, (onto, ONTO) = blocks(T, tile.rows), onto_arguments(bias_M, base_output_TM)
    partial = y_TM.new_empty(programs, 2, widths.E, dtype=routing.load_E.dtype)
    arguments = {
        "x_ptr": x_TN,
        "A_ptr": matrices.A,
        "router_ptr": matrices.router,
        "A0_ptr": matrices.A0,
        "B_ptr": matrices.B,
        "B0_ptr": matrices.B0,
        "y_ptr": y_TM,
        "weighted_ptr": routing.weighted_TR,
        "gate_ptr": routing.gate_ET,
        "probs_ptr": routing.probs_ET,
        "partial_ptr": partial,
        "T": T,
        "N": N,
        "M": M,
        "stride_xt": x_TN.stride(0),
        "stride_xn": x_TN.stride(1),
        **onto,
        **scaling_arguments(adapter),
        **dropout_arguments(adapter),
    }
    constants = {
        **widths._asdict(),
        "TOP_K": adapter.top_k,
        "PARTS": matrices.parts,
        "L_PAD": max(16, matrices.parts * widths.E_PAD),
        "ONTO": ONTO,
        "BT": tile.rows,
        "BN": tile.features,
        "BM": tile.features,
        "EVEN_N": N % tile.features == 0,
        "EVEN_M": M % tile.features == 0,
        "PRECISION": precision(x_TN.dtype),
    }
    return [
        Launch(fused_forward, (programs,), arguments, constants, tile),
        finish(partial, T, balance_loss, routing),
    ]


@triton.jit
def join_logit_parts(parts_TL, E_PAD: tl.constexpr):
    """[T, PARTS * E_PAD] -> [T, E_PAD]: high part + low part / LOW_PART_SCALE; further parts are zero."""
    parts: tl.constexpr = parts_TL.shape[1] // E_PAD
    part = tl.arange(0, parts)
    weight = tl.where(part == 0, 1.0, 1.0 / _LOW_PART_SCALE)
    return tl.sum(tl.reshape(parts_TL, (parts_TL.shape[0], parts, E_PAD)) * weight[None, :, None], axis=1)


@triton.jit(do_not_specialize=["T", "keep_threshold"])
def fused_forward(
    x_ptr, A_ptr, router_ptr, A0_ptr, B_ptr, B0_ptr, onto_ptr, scaling_E_ptr, seed_ptr,
    y_ptr, weighted_ptr, gate_ptr, probs_ptr, partial_ptr,
    T, N, M, stride_xt, stride_xn, stride_onto_t, stride_onto_m, scaling, keep_threshold, keep_scale,
    E: tl.constexpr, D: tl.constexpr, R0: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr,
    E_PAD: tl.constexpr, D_PAD: tl.constexpr, L_PAD: tl.constexpr, R0_PAD: tl.constexpr, ONTO: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
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
        partial_ptr   float32 [programs, 2, E], summed by ``finish_balance``
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
            weighted, compute_residual, B_ptr, B0_ptr, onto_ptr, y_ptr,
            rows, start + tl.arange(0, BM), index_R, exists_R, T, M, stride_onto_t, stride_onto_m,
            R, R0, R0_PAD, ONTO, EVEN_M, PRECISION,
        )  # fmt: skip


def finish(partial: Tensor, T: int, balance_loss: Tensor, routing: Routing) -> Launch:
    """f and the balance loss of T tokens, from the row blocks' sums."""
    E = routing.load_E.shape[0]
    arguments = {
        "partial_ptr": partial,
        "load_ptr": routing.load_E,
        "balance_ptr": balance_loss,
        "programs": partial.shape[0],
        "T": T,
    }
    constants = {"E": E, "E_PAD": padded(E), "BLOCK": _BALANCE.rows}
    return Launch(finish_balance, (min(partial.shape[0], 1),), arguments, constants, _BALANCE)


@triton.jit(do_not_specialize=["programs", "T"])
def finish_balance(
    partial_ptr, load_ptr, balance_ptr, programs, T, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr
):
    """f_i = share of tokens of expert i, loss = E sum_i f_i P_i (docs/math.md, Balance loss). Grid: (1,).

    Reads partial_ptr float32 [programs, 2, E]: sums of probs, counts.
    Writes load_ptr float32 [E], balance_ptr float32 [].
    """
    expert = tl.arange(0, E_PAD)
    probs = tl.zeros((BLOCK, E_PAD), tl.float32)
    counts = tl.zeros((BLOCK, E_PAD), tl.float32)
    for start in range(0, programs, BLOCK):
        program = start + tl.arange(0, BLOCK)
        offsets = program.to(tl.int64)[:, None] * (2 * E) + expert[None, :]
        mask = (program < programs)[:, None] & (expert < E)[None, :]
        probs += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        counts += tl.load(partial_ptr + offsets + E, mask=mask, other=0.0)
    load = share_of(tl.sum(counts, axis=0), T)
    mean = share_of(tl.sum(probs, axis=0), T)
    tl.store(load_ptr + expert, load, mask=expert < E)
    tl.store(balance_ptr, tl.sum(load * mean, axis=0) * E)
