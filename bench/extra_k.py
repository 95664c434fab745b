"""The peer of the design's order of products: one matmul of our own whose K loop runs over the rank as well.

    y  = [x | h~] [W | lora_B]^T + bias            dX = [dY | dh | dlogits] [W; lora_A; router]

What is saved against the design is one write and one read of y (dX); what it costs is the distance of a matmul in
Triton from the vendor's. Nothing in the package calls it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from goat_kernels.checks.problem import Problem
from goat_kernels.kernels.common import cast, padded, precision, product
from goat_kernels.kernels.launch import blocks, on_device
from goat_kernels.passes import Passes

#: (rows, columns, K step, warps, stages) by bytes of an element: the usual tiles of a large half-precision product.
_TILES = {2: (128, 256, 64, 8, 3), 4: (64, 64, 32, 4, 2)}


@triton.jit
def matmul_with_extra_k(
    x_ptr,
    W_ptr,
    hidden_ptr,
    extra_ptr,
    bias_ptr,
    y_ptr,
    T,
    N,
    M,
    stride_wn,
    stride_wm,
    stride_ec,
    stride_em,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = [x | hidden] [W; extra] + bias. Grid: (ceil(T / BT) * ceil(M / BM),), in groups of GROUP row blocks,
    whose programs follow each other and find the weight's columns in the cache.

    Reads
        x_ptr       compute [T, N], contiguous; W_ptr compute [N, M] by strides
        hidden_ptr  compute [T, C], contiguous; extra_ptr [C, M] by strides, any dtype, cast to compute
        bias_ptr    compute [M], or None
    Writes
        y_ptr       compute [T, M], contiguous
    Accumulates in float32.
    """
    row_blocks, column_blocks = tl.cdiv(T, BT), tl.cdiv(M, BM)
    group = tl.program_id(0) // (GROUP * column_blocks)
    of_group = tl.program_id(0) % (GROUP * column_blocks)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    rows = (group * GROUP + of_group % height).to(tl.int64) * BT + tl.arange(0, BT)
    m = (of_group // height).to(tl.int64) * BM + tl.arange(0, BM)
    in_T, in_M = rows < T, m < M
    dtype: tl.constexpr = y_ptr.dtype.element_ty

    # 1. The base's K.
    y = tl.zeros([BT, BM], tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        x = tl.load(x_ptr + rows[:, None] * N + n[None, :], mask=in_T[:, None] & (n < N)[None, :], other=0.0)
        w = tl.load(
            W_ptr + n.to(tl.int64)[:, None] * stride_wn + m[None, :] * stride_wm,
            mask=(n < N)[:, None] & in_M[None, :],
            other=0.0,
        )
        y = product(x, w, y, PRECISION)

    # 2. The rank as more of it.
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        hidden = tl.load(hidden_ptr + rows[:, None] * C + c[None, :], mask=in_T[:, None] & (c < C)[None, :], other=0.0)
        extra = tl.load(
            extra_ptr + c[:, None] * stride_ec + m[None, :] * stride_em,
            mask=(c < C)[:, None] & in_M[None, :],
            other=0.0,
        )
        y = product(hidden, cast(extra, dtype), y, PRECISION)

    # 3. Bias and rounding.
    if bias_ptr is not None:
        y += tl.load(bias_ptr + m, mask=in_M, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * M + m[None, :], cast(y, dtype), mask=in_T[:, None] & in_M[None, :])


def extra_k(x_TN: Tensor, W_NM: Tensor, hidden_TC: Tensor, extra_CM: Tensor, bias_M: Tensor | None) -> Tensor:
    """[x | hidden] [W; extra] + bias, [T, M]; W and extra of any strides."""
    (T, N), M, C = x_TN.shape, W_NM.shape[1], hidden_TC.shape[1]
    rows, columns, step, warps, stages = _TILES[x_TN.element_size()]
    y_TM = x_TN.new_empty(T, M)
    with on_device(x_TN.device):
        matmul_with_extra_k[(blocks(T, rows) * blocks(M, columns),)](
            x_TN,
            W_NM,
            hidden_TC.contiguous(),
            extra_CM,
            bias_M,
            y_TM,
            T,
            N,
            M,
            *W_NM.stride(),
            *extra_CM.stride(),
            C=C,
            GROUP=8,
            BT=rows,
            BM=columns,
            BN=step,
            BC=min(step, padded(C, minimum=16)),
            PRECISION=precision(x_TN.dtype),
            num_warps=warps,
            num_stages=stages,
        )
    return y_TM


def forward(passes: Passes, p: Problem) -> Tensor:
    """y of a folded layer: routing alone, by a prefill of no columns, then the product."""
    routed = p.adapter._replace(lora_B=p.adapter.lora_B[:0])
    _, _, routing = passes.prefill(p.x_TN, routed, None, None)
    return extra_k(p.x_TN, p.weight_MN.t(), routing.weighted_TR, p.adapter.lora_B.t(), p.bias_M)


def input_gradient(p: Problem, grad_hidden_TR: Tensor, logits_ET: Tensor) -> Tensor:
    """dX of a folded layer."""
    hidden = torch.cat([grad_hidden_TR, logits_ET.t().to(grad_hidden_TR.dtype)], dim=1)
    extra = torch.cat([p.adapter.lora_A, p.adapter.router])
    return extra_k(p.grad_y_TM, p.weight_MN, hidden, extra, None)
