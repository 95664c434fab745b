"""Skinny hidden columns times wide matrices: the prefill of dX, and of y where the forward runs in stages.

    dX0 = dh lora_A + dh0 A0 + dlogits router              (docs/math.md, Backward)
    y0  = h~ lora_B^T + (- x A0^T) B0^T + bias, or + the base's output

The base product then accumulates onto what is written here.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from goat_kernels.kernels.adapter import dropout_arguments, is_unaligned, onto_arguments, operands
from goat_kernels.kernels.common import cast, padded, precision, product
from goat_kernels.kernels.configs import choose_tile, current_target
from goat_kernels.kernels.dropout import column_slots, kept, of_slot, token_keys
from goat_kernels.kernels.hidden_gradient import TritonHiddenGradient
from goat_kernels.kernels.launch import Launch, blocks
from goat_kernels.passes import Adapter, Routing


def input_prefill(adapter: Adapter, routing: Routing, gradient: TritonHiddenGradient) -> tuple[list[Launch], Tensor]:
    """(launches, dX0): ``input_prefill`` of :class:`goat_kernels.passes.Passes`."""
    grad_hidden_TR = gradient.grad_hidden_TR
    grad_x_TN = grad_hidden_TR.new_empty(grad_hidden_TR.shape[0], adapter.lora_A.shape[1])
    matrices = operands(adapter, routing.packed)
    launches = expanded(
        grad_x_TN,
        grad_hidden_TR,
        matrices.A,
        gradient.residual_TR0,
        matrices.A0,
        experts=adapter.num_experts,
        logits_ET=gradient.logits_ET,
        router=matrices.router,
        dropped=adapter if adapter.seed is not None else None,
        gate_ET=routing.gate_ET,
    )
    return launches, grad_x_TN


def expanded(
    out_TN: Tensor,
    hidden_TR: Tensor,
    W: Tensor,
    residual_TR0: Tensor | None,
    V: Tensor | None,
    *,
    experts: int,
    bias_M: Tensor | None = None,
    base_output_TM: Tensor | None = None,
    logits_ET: Tensor | None = None,
    router: Tensor | None = None,
    dropped: Adapter | None = None,
    gate_ET: Tensor | None = None,
) -> list[Launch]:
    """The launch that writes out = hidden W [+ residual V] [+ logits router] [+ bias, or the base's output].

    W [R, N] and V [R0, N] may have any strides. None for T = 0.

    ``dropped``: the adapter whose dropout masks hidden's share, with ``gate_ET``; None without dropout.
    """
    T, N = out_TN.shape
    if T == 0:
        return []
    R, R0 = hidden_TR.shape[1], 0 if residual_TR0 is None else residual_TR0.shape[1]
    target = current_target(out_TN.device)
    kernel = "expand_columns"
    if dropped is not None:
        kernel += ".dropout"
    if is_unaligned(out_TN.dtype, (N,), (R, R0)):
        kernel += ".unaligned"
    read_itemsize = max(matrix.element_size() for matrix in (W, V, router) if matrix is not None)
    tile = choose_tile(kernel, R + R0, out_TN.element_size(), target, T, read_itemsize)
    row_blocks, steps = blocks(T, tile.rows), blocks(N, tile.features)
    chunks = max(1, min(2 * target.multiprocessors // max(row_blocks, 1), steps))
    chunk_steps = max(1, blocks(steps, chunks))
    onto, ONTO = onto_arguments(bias_M, base_output_TM)
    arguments = {
        "hidden_ptr": hidden_TR,
        "W_ptr": W,
        "residual_ptr": residual_TR0,
        "V_ptr": V if R0 else None,
        "logits_ptr": logits_ET,
        "router_ptr": router,
        "gate_ptr": None if dropped is None else gate_ET,
        "out_ptr": out_TN,
        "T": T,
        "N": N,
        "chunk_steps": chunk_steps,
        "stride_wc": W.stride(0),
        "stride_wn": W.stride(1),
        "stride_vc": V.stride(0) if R0 else 0,
        "stride_vn": V.stride(1) if R0 else 1,
        **onto,
        **dropout_arguments(dropped),
    }
    constants = {
        "E": experts,
        "R": R,
        "R0": R0,
        "TOP_K": 1 if dropped is None else dropped.top_k,
        "E_DOT": padded(experts, 16),
        "ONTO": ONTO,
        "BT": tile.rows,
        "BN": tile.features,
        "BC": min(padded(R, 16), tile.rank),
        "BC0": min(padded(R0, 16), tile.rank),
        "PRECISION": precision(out_TN.dtype),
    }
    return [Launch(expand_columns, (row_blocks, blocks(steps, chunk_steps)), arguments, constants, tile)]


@triton.jit
def hidden_block(hidden_ptr, rows, in_T, column, C: tl.constexpr):
    """[BT, BC] of hidden [T, C], contiguous; zero outside."""
    mask = in_T[:, None] & (column < C)[None, :]
    return tl.load(hidden_ptr + rows[:, None] * C + column[None, :], mask=mask, other=0.0)


@triton.jit
def wide_block(W_ptr, column, n, in_N, stride_wc, stride_wn, C: tl.constexpr, dtype: tl.constexpr):
    """[BC, BN] of W [C, N] by strides, cast to ``dtype``; zero outside."""
    mask = (column < C)[:, None] & in_N[None, :]
    return cast(tl.load(W_ptr + column[:, None] * stride_wc + n[None, :] * stride_wn, mask=mask, other=0.0), dtype)


@triton.jit
def add_dropped(
    y, hidden, w, slots, seed_ptr, keys, n, keep_threshold, keep_scale, TOP_K: tl.constexpr, PRECISION: tl.constexpr
):
    """y + the share of ``hidden`` through the masks of its slots."""
    for slot in range(TOP_K):
        in_slot = of_slot(hidden, slots, slot)
        share = product(in_slot, w, tl.zeros(y.shape, tl.float32), PRECISION)
        y += share * (kept(seed_ptr, keys[:, None], n[None, :], slot, keep_threshold) * keep_scale)
    return y


@triton.jit(do_not_specialize=["T", "chunk_steps", "keep_threshold"])
def expand_columns(
    hidden_ptr, W_ptr, residual_ptr, V_ptr, logits_ptr, router_ptr, onto_ptr, gate_ptr, seed_ptr, out_ptr,
    T, N, chunk_steps, stride_wc, stride_wn, stride_vc, stride_vn, stride_onto_t, stride_onto_m,
    keep_threshold, keep_scale,
    E: tl.constexpr, R: tl.constexpr, R0: tl.constexpr, TOP_K: tl.constexpr, E_DOT: tl.constexpr, ONTO: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BC0: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(T / BT), ceil(N / (chunk_steps * BN))); a program walks chunk_steps blocks of BN. For y0, N is M.

    Reads
        hidden_ptr   compute [T, R]; W_ptr [R, N] by strides (stride_wc, stride_wn), any dtype, cast to compute
        residual_ptr compute [T, R0]; V_ptr [R0, N] by strides; None where R0 = 0
        logits_ptr   float32 [E, T]; router_ptr [E, N] contiguous, any dtype; None in the forward
        onto_ptr     compute: bias [N] (ONTO "bias"), base output [T, N] (ONTO "base"), or None (ONTO "")
        gate_ptr     float32 [E, T] and seed_ptr int32 [2] with dropout (dX only), which drops the share of hidden_ptr
    Writes
        out_ptr      compute [T, N]
    Accumulates in float32.
    """
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    in_T = rows < T
    start_N = tl.program_id(1) * chunk_steps * BN
    dtype: tl.constexpr = out_ptr.dtype.element_ty

    # 1. What stays while the program walks: all hidden columns where they fit one block, and dlogits.
    column = tl.arange(0, BC)
    hidden = hidden_block(hidden_ptr, rows, in_T, column, R)
    if R0 > 0:
        column0 = tl.arange(0, BC0)
        residual = hidden_block(residual_ptr, rows, in_T, column0, R0)
    if seed_ptr is not None:
        keys = token_keys(seed_ptr, rows.to(tl.int32))
        slots = column_slots(gate_ptr, rows, in_T, tl.minimum(column // (R // E), E - 1), T, E)
    if logits_ptr is not None:
        expert = tl.arange(0, E_DOT)
        in_E = expert < E
        logits = cast(
            tl.load(
                logits_ptr + expert.to(tl.int64)[None, :] * T + rows[:, None],
                mask=in_T[:, None] & in_E[None, :],
                other=0.0,
            ),
            dtype,
        )

    # 2. The walk.
    for start in range(start_N, tl.minimum(start_N + chunk_steps * BN, N), BN):
        n = start + tl.arange(0, BN)
        in_N = n < N
        y = tl.zeros((BT, BN), tl.float32)
        w = wide_block(W_ptr, column, n, in_N, stride_wc, stride_wn, R, dtype)
        if seed_ptr is None:
            y = product(hidden, w, y, PRECISION)
        else:
            y = add_dropped(y, hidden, w, slots, seed_ptr, keys, n, keep_threshold, keep_scale, TOP_K, PRECISION)
        for first in range(BC, R, BC):  # none where the hidden columns fit one block
            further = first + tl.arange(0, BC)
            more = hidden_block(hidden_ptr, rows, in_T, further, R)
            w = wide_block(W_ptr, further, n, in_N, stride_wc, stride_wn, R, dtype)
            if seed_ptr is None:
                y = product(more, w, y, PRECISION)
            else:
                of_more = column_slots(gate_ptr, rows, in_T, tl.minimum(further // (R // E), E - 1), T, E)
                y = add_dropped(y, more, w, of_more, seed_ptr, keys, n, keep_threshold, keep_scale, TOP_K, PRECISION)
        if R0 > 0:
            v = wide_block(V_ptr, column0, n, in_N, stride_vc, stride_vn, R0, dtype)
            y = product(residual, v, y, PRECISION)
            for first in range(BC0, R0, BC0):
                further = first + tl.arange(0, BC0)
                more = hidden_block(residual_ptr, rows, in_T, further, R0)
                v = wide_block(V_ptr, further, n, in_N, stride_vc, stride_vn, R0, dtype)
                y = product(more, v, y, PRECISION)
        if logits_ptr is not None:
            router = tl.load(
                router_ptr + expert[:, None] * N + n[None, :], mask=in_E[:, None] & in_N[None, :], other=0.0
            )
            y = product(logits, cast(router, dtype), y, PRECISION)
        mask = in_T[:, None] & in_N[None, :]
        if ONTO == "bias":
            y += tl.load(onto_ptr + n, mask=in_N, other=0.0).to(tl.float32)[None, :]
        elif ONTO == "base":
            base = onto_ptr + rows[:, None] * stride_onto_t + n.to(tl.int64)[None, :] * stride_onto_m
            y += tl.load(base, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + rows[:, None] * N + n[None, :], cast(y, dtype), mask=mask)
