"""The adapter in the compute dtype: cast once per forward, read by every row block, kept for the backward.

Only where the adapter's dtype is another than x's (float32 adapters over a half-precision base). The router becomes
two parts, high and low, whose sum is the float32 weight to 16 bits or more: half precision alone picks other experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from goat_kernels.kernels.common import cast
from goat_kernels.kernels.routing import LOW_PART_SCALE

_LOW_PART_SCALE = tl.constexpr(LOW_PART_SCALE)


@triton.jit
def pack_adapter(
    A_ptr,
    router_ptr,
    B_ptr,
    A0_ptr,
    B0_ptr,
    out_ptr,
    size_A,
    size_router,
    size_B,
    size_A0,
    size_B0,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program per BLOCK elements of each of A, router (its PARTS: high, low), B, A0, B0 in turn.

    Reads the five matrices, contiguous, by their sizes in elements (0 for an absent one, whose pointer is None).
    Writes out_ptr compute: the five one after the other, each beginning at a multiple of BLOCK.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    out = out_ptr + program.to(tl.int64) * BLOCK + lane
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    first_router = tl.cdiv(size_A, BLOCK)
    first_B = first_router + tl.cdiv(PARTS * size_router, BLOCK)
    first_A0 = first_B + tl.cdiv(size_B, BLOCK)
    first_B0 = first_A0 + tl.cdiv(size_A0, BLOCK)
    if program < first_router:
        index = program * BLOCK + lane
        tl.store(out, cast(tl.load(A_ptr + index, mask=index < size_A, other=0.0), dtype))
    elif program < first_B:
        index = (program - first_router) * BLOCK + lane
        is_high = index < size_router
        source = tl.where(is_high, index, index - size_router)
        whole = tl.load(router_ptr + source, mask=index < PARTS * size_router, other=0.0).to(tl.float32)
        high = cast(whole, dtype)
        low = cast((whole - high.to(tl.float32)) * _LOW_PART_SCALE, dtype)
        tl.store(out, tl.where(is_high, high, low))
    elif program < first_A0:
        index = (program - first_B) * BLOCK + lane
        tl.store(out, cast(tl.load(B_ptr + index, mask=index < size_B, other=0.0), dtype))
    elif program < first_B0:
        if A0_ptr is not None:
            index = (program - first_A0) * BLOCK + lane
            tl.store(out, cast(tl.load(A0_ptr + index, mask=index < size_A0, other=0.0), dtype))
    else:
        if B0_ptr is not None:
            index = (program - first_B0) * BLOCK + lane
            tl.store(out, cast(tl.load(B0_ptr + index, mask=index < size_B0, other=0.0), dtype))
