"""Kernel 2: the gradients of the hidden columns and of the router's logits, from one read of dY.

    [dh~ | dh0] = dY [lora_B | -B0]                                        (docs/math.md, Backward)
    dh      = s expand(gate) dh~
    dlogits = q - gate sum q + the balance loss's share,  q_i = <h~_i, dh~_i>

dlora_B = dY^T h~ can ride in the same read of dY: every program then writes a partial sum of it.

Fused where one block of tokens fits the registers and the blocks fill the GPU; else ``project.py`` forms
dY [lora_B | B0] in splits, and :func:`finish_hidden_gradient` does the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from goat_kernels.kernels.adapter import Widths, is_unaligned, operands, scaling_arguments
from goat_kernels.kernels.common import cast, expand, hidden_columns, long, precision, product, scaling_experts
from goat_kernels.kernels.configs import choose_tile, current_target, find_tile
from goat_kernels.kernels.forward import FUSED_EXPERTS
from goat_kernels.kernels.launch import Launch, blocks
from goat_kernels.kernels.project import project_columns, split_stages, sum_splits
from goat_kernels.passes import Adapter, Routing


def rides(rank: int, rows: int) -> bool:
    """Whether lora_B's gradient is cheaper in the hidden gradient's read of dY than in a pass of its own.

    Programs of ``rows`` tokens write, and ``add_splits`` reads, partial sums of 4 * rank / rows of a half-precision dY
    together, where the pass of its own reads dY once more.
    """
    return 4 * rank < rows


class TritonHiddenGradient(NamedTuple):
    """dh [T, R] and dh0 [T, R0] (None without residual) in the compute dtype, dlogits [E, T] in float32.

    partial_B: float32 [blocks of tokens, M * R], sums of lora_B's gradient that came with the same read of dY, or None.
    """

    grad_hidden_TR: Tensor
    logits_ET: Tensor
    residual_TR0: Tensor | None
    partial_B: Tensor | None


def hidden_gradient(
    grad_y_TM: Tensor,
    grad_balance: Tensor | float | None,
    adapter: Adapter,
    routing: Routing,
    *,
    with_residual: bool,
    needs_B: bool = False,
) -> tuple[list[Launch], TritonHiddenGradient]:
    """(launches, dh, dlogits and dh0): ``hidden_gradient`` of :class:`goat_kernels.passes.Passes`."""
    (T, M), compute = grad_y_TM.shape, grad_y_TM.dtype
    target = current_target(grad_y_TM.device)
    widths = Widths.of(adapter, with_residual=with_residual)
    matrices = operands(adapter, routing.packed)
    read_itemsize = matrices.read_itemsize(with_router=False)
    kernel = "fused_hidden_gradient"
    if (widths.D != widths.D_PAD and compute.itemsize == 2) or is_unaligned(compute, (M,), (adapter.rank, widths.R0)):
        kernel += ".unaligned"
    tile = find_tile(kernel, widths.columns, compute.itemsize, target, T, read_itemsize)
    is_fused = tile is not None and widths.E <= FUSED_EXPERTS and 2 * blocks(T, tile.rows) >= target.multiprocessors
    partial_B = None
    if needs_B and is_fused and rides(adapter.rank, tile.rows):
        partial_B = grad_y_TM.new_empty(blocks(T, tile.rows), M * adapter.rank, dtype=torch.float32)
    gradient = TritonHiddenGradient(
        grad_hidden_TR=torch.empty_like(routing.weighted_TR),
        logits_ET=torch.empty_like(routing.gate_ET),
        residual_TR0=grad_y_TM.new_empty(T, widths.R0) if widths.R0 else None,
        partial_B=partial_B,
    )
    is_tensor = isinstance(grad_balance, Tensor)
    arguments = {
        "weighted_ptr": routing.weighted_TR,
        "gate_ptr": routing.gate_ET,
        "probs_ptr": routing.probs_ET,
        "load_E_ptr": routing.load_E,
        "grad_balance_ptr": grad_balance.to(grad_y_TM.device, torch.float32) if is_tensor else None,
        "hidden_ptr": gradient.grad_hidden_TR,
        "logits_ptr": gradient.logits_ET,
        "residual_ptr": gradient.residual_TR0,
        "T": T,
        "balance_gradient": float(grad_balance) if grad_balance is not None and not is_tensor else 0.0,
        **scaling_arguments(adapter),
    }
    constants = {**widths._asdict(), "HAS_BALANCE": grad_balance is not None}
    if is_fused:
        arguments |= {
            "partial_ptr": partial_B,
            "grad_y_ptr": grad_y_TM,
            "B_ptr": matrices.B,
            "B0_ptr": matrices.B0 if widths.R0 else None,
            "M": M,
            "stride_yt": grad_y_TM.stride(0),
            "stride_ym": grad_y_TM.stride(1),
        }
        constants |= {
            "BT": tile.rows,
            "BM": tile.features,
            "EVEN_M": M % tile.features == 0,
            "PRECISION": precision(compute),
        }
        return [Launch(fused_hidden_gradient, (blocks(T, tile.rows),), arguments, constants, tile)], gradient
    B0 = matrices.B0.t() if widths.R0 else None
    raw, projecting = project_columns(
        grad_y_TM, matrices, matrices.B.t(), B0, target, experts=widths.E, with_router=False
    )
    tile = choose_tile("finish_hidden_gradient", widths.columns, compute.itemsize, target, T)
    arguments |= {"raw_ptr": raw, "splits": raw.shape[0]}
    constants |= {"SPLIT_STAGES": split_stages(raw.shape[0], tile.rows * widths.columns, target), "BT": tile.rows}
    return [projecting, Launch(finish_hidden_gradient, (blocks(T, tile.rows),), arguments, constants, tile)], gradient


@triton.jit
def sum_experts(value_TR, E_PAD: tl.constexpr, D_PAD: tl.constexpr):
    """[T, R_PAD] -> [T, E_PAD]: the sum over each expert's columns."""
    return tl.sum(tl.reshape(value_TR, (value_TR.shape[0], E_PAD, D_PAD)), axis=2)


@triton.jit
def load_experts(ptr, rows, T, E: tl.constexpr, E_PAD: tl.constexpr):
    """[T, E_PAD] float32 from [E, T]; zero outside."""
    expert = tl.arange(0, E_PAD)
    mask = (rows < T)[:, None] & (expert < E)[None, :]
    return tl.load(ptr + expert.to(tl.int64)[None, :] * T + rows[:, None], mask=mask, other=0.0)


@triton.jit
def logit_gradient(
    hidden_products_TR, gate, probs, load_E_ptr, grad_balance, T,
    E: tl.constexpr, E_PAD: tl.constexpr, D_PAD: tl.constexpr, HAS_BALANCE: tl.constexpr,
):  # fmt: skip
    """dlogits [T, E_PAD] from h~ * dh~ and, with HAS_BALANCE, from the gradient of the balance loss.

    gate_i dgate_i = <h~_i, dh~_i>, back through the softmax over the selected logits; the balance loss is
    E / T sum_i f_i sum_t p_ti, a dense softmax gradient with the same dp for every token (docs/math.md).
    """
    gated = sum_experts(hidden_products_TR, E_PAD, D_PAD)
    gradient = gated - gate * tl.sum(gated, axis=1)[:, None]
    if HAS_BALANCE:
        expert = tl.arange(0, E_PAD)
        grad_probs = tl.load(load_E_ptr + expert, mask=expert < E, other=0.0) * (grad_balance * (E / T))
        mean = tl.sum(grad_probs[None, :] * probs, axis=1)
        gradient += probs * (grad_probs[None, :] - mean[:, None])
    return gradient


@triton.jit
def store_hidden_gradient(
    grad_weighted, weighted_ptr, gate_ptr, probs_ptr, load_E_ptr, grad_balance_ptr, scaling_E_ptr,
    hidden_ptr, logits_ptr, rows, T, scaling, balance_gradient,
    E: tl.constexpr, D: tl.constexpr, E_PAD: tl.constexpr, D_PAD: tl.constexpr, HAS_BALANCE: tl.constexpr,
):  # fmt: skip
    """From dh~ [BT, R_PAD] float32: write dh and dlogits."""
    R: tl.constexpr = E * D
    index_R, exists_R = hidden_columns(E, D, E_PAD, D_PAD)
    in_T = rows < T
    mask = in_T[:, None] & exists_R[None, :]
    offsets = rows[:, None] * R + index_R[None, :]
    weighted = tl.load(weighted_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = load_experts(gate_ptr, rows, T, E, E_PAD)
    probs = gate
    grad_balance = balance_gradient
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
    grad_y_ptr, B_ptr, B0_ptr, weighted_ptr, gate_ptr, probs_ptr, load_E_ptr, grad_balance_ptr, scaling_E_ptr,
    hidden_ptr, logits_ptr, residual_ptr, partial_ptr,
    T, M, stride_yt, stride_ym, scaling, balance_gradient,
    E: tl.constexpr, D: tl.constexpr, R0: tl.constexpr, E_PAD: tl.constexpr, D_PAD: tl.constexpr,
    R0_PAD: tl.constexpr, HAS_BALANCE: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(T / BT),).

    Reads
        grad_y_ptr    compute [T, M], strides (stride_yt, stride_ym)
        B_ptr [M, R], B0_ptr [M, R0] any dtype, cast to compute; weighted_ptr compute [T, R], h~
        gate_ptr, probs_ptr float32 [E, T]; load_E_ptr float32 [E]
        grad_balance_ptr float32 [] or None for the number ``balance_gradient``; scaling_E_ptr float32 [E] or None
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
        grad_weighted, weighted_ptr, gate_ptr, probs_ptr, load_E_ptr, grad_balance_ptr, scaling_E_ptr,
        hidden_ptr, logits_ptr, rows, T, scaling, balance_gradient, E, D, E_PAD, D_PAD, HAS_BALANCE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "splits"])
def finish_hidden_gradient(
    raw_ptr, weighted_ptr, gate_ptr, probs_ptr, load_E_ptr, grad_balance_ptr, scaling_E_ptr,
    hidden_ptr, logits_ptr, residual_ptr, T, splits, scaling, balance_gradient,
    E: tl.constexpr, D: tl.constexpr, R0: tl.constexpr, E_PAD: tl.constexpr, D_PAD: tl.constexpr,
    R0_PAD: tl.constexpr, HAS_BALANCE: tl.constexpr, SPLIT_STAGES: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
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
        grad_weighted, weighted_ptr, gate_ptr, probs_ptr, load_E_ptr, grad_balance_ptr, scaling_E_ptr,
        hidden_ptr, logits_ptr, rows, T, scaling, balance_gradient, E, D, E_PAD, D_PAD, HAS_BALANCE,
    )  # fmt: skip
