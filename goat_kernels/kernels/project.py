"""Skinny products in stages: partial sums of x [router; W1; W2]^T over splits of the inner dimension, and their sum.

The forward uses it with x [T, N] and [router; lora_A; A0] where the fused kernel does not serve (few tokens, large R
or E); the backward with dY [T, M] and [lora_B | B0]. A second stage (``staged_forward.py``, ``hidden_gradient.py``)
adds the splits in their order. Splitting the inner dimension is what fills the GPU when there are few tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from goat_kernels.kernels.adapter import FEW_TOKENS, Operands
from goat_kernels.kernels.common import LOW_PART_SCALE, cast, long, precise_product, precision, product
from goat_kernels.kernels.configs import Target, choose_tile
from goat_kernels.kernels.launch import Launch, blocks

#: The most splits of a product that is short of programs: more would fill the GPU better, and take longer to add up.
MOST_SPLITS = 32

#: See :func:`split_stages`.
FEW_SPLITS, MOST_SPLIT_STAGES = 4, 8

_LOW_PART_SCALE = tl.constexpr(LOW_PART_SCALE)


def splits_of(
    programs: int, steps: int, target: Target, least_steps: int = 4, most_splits: int | None = None, fill: int = 2
) -> tuple[int, int]:
    """(splits, steps of each) of a loop: enough to fill the GPU ``fill`` times, of ``least_steps`` or more."""
    most = most_splits or steps
    wanted = max(1, min(fill * target.multiprocessors // max(programs, 1), steps // least_steps, most))
    per_split = max(1, blocks(steps, wanted))
    return max(1, blocks(steps, per_split)), per_split


def split_stages(splits: int, elements: int, target: Target) -> int:
    """How deep a loop that adds up splits is pipelined: loads are that many splits, less one, ahead of the additions.

    Without that every split would wait for a round trip through memory. The splits under way, of ``elements``
    float32 each, may take a third of the shared memory. A few splits do not pay for the way through it, nor do large
    ones, whose own loads are many.
    """
    ahead = min(target.shared_bytes // 3 // (4 * elements), MOST_SPLIT_STAGES - 1)
    return 1 if splits <= FEW_SPLITS or ahead < 3 else 1 + ahead


def project_columns(
    x_TN: Tensor,
    matrices: Operands,
    W1: Tensor | None,
    W2: Tensor | None,
    target: Target,
    *,
    experts: int,
    with_router: bool,
) -> tuple[Tensor, Launch]:
    """(float32 [splits, T, C] for partial sums of x [router parts; W1; W2]^T, the launch that fills it).

    W1 [C1, N] and W2 [C2, N] have any strides.
    """
    T, N = x_TN.shape
    if W1 is None:
        W1, W2 = W2, None
    C1, C2 = (0 if W is None else W.shape[0] for W in (W1, W2))
    parts = matrices.parts if with_router else 0
    read_itemsize = matrices.read_itemsize(with_router=with_router)
    tile = choose_tile("project", parts * experts + C1 + C2, x_TN.dtype.itemsize, target, T, read_itemsize)
    row_blocks = blocks(T, tile.rows)
    column_blocks = blocks(parts * experts, tile.rank) + blocks(C1 + C2, tile.rank)
    least_steps = 2 if T <= FEW_TOKENS else 4
    splits, split_steps = splits_of(
        row_blocks * column_blocks, blocks(N, tile.features), target, least_steps, MOST_SPLITS
    )
    raw = x_TN.new_empty(splits, T, parts * experts + C1 + C2, dtype=torch.float32)
    arguments = {
        "x_ptr": x_TN,
        "router_ptr": matrices.router if with_router else None,
        "W1_ptr": W1,
        "W2_ptr": W2,
        "out_ptr": raw,
        "T": T,
        "N": N,
        "split_steps": split_steps,
        "stride_xt": x_TN.stride(0),
        "stride_xn": x_TN.stride(1),
        "stride_1c": W1.stride(0) if C1 else 0,
        "stride_1n": W1.stride(1) if C1 else 1,
        "stride_2c": W2.stride(0) if C2 else 0,
        "stride_2n": W2.stride(1) if C2 else 1,
    }
    constants = {
        "E": experts,
        "STORED_PARTS": matrices.stored_parts,
        "PARTS": parts,
        "C1": C1,
        "C2": C2,
        "BT": tile.rows,
        "BN": tile.features,
        "BC": tile.rank,
        "PRECISION": precision(x_TN.dtype),
    }
    return raw, Launch(project, (row_blocks, column_blocks, splits), arguments, constants, tile)


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
