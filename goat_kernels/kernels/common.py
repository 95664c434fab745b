"""Device functions that every kernel uses: the matrix product, and rounding to x's dtype.

Both know what Triton's interpreter gets wrong in bfloat16 (``tl.dot`` multiplies the raw 16-bit integers, a cast from
float32 cuts off instead of rounding to nearest even), and work round it there. No other file needs to.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 when this module was first imported.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr, IMPRECISE: tl.constexpr = 0):
    """accumulator + a b in float32. PRECISION ("ieee" or "tf32") matters to float32 operands alone.

    IMPRECISE is Triton's max_num_imprecise_acc.
    """
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE, out_dtype=tl.float32)


@triton.jit
def precise_product(a, b, accumulator):
    """accumulator + a b for the router's logits: never tf32, and in half precision summed anew for each block.

    Matrix units cut off what does not fit their float32 accumulator. Along all of N that adds up, always towards zero;
    so each call starts from zero and an ordinary addition, which rounds, follows (docs/numerics.md, The router).
    """
    if a.dtype == tl.float32:
        accumulator = product(a, b, accumulator, "ieee")
    else:
        # Without a bound on imprecise sums the compiler would make one chain of the two again.
        accumulator += product(a, b, tl.zeros(accumulator.shape, tl.float32), "ieee", a.shape[1])
    return accumulator


@triton.jit
def long(value):
    """An integer as int64: products of strides pass 2^31."""
    return tl.cast(value, tl.int64)


@triton.jit
def cast(value, dtype: tl.constexpr):
    """``value`` in ``dtype``, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16 and value.dtype != tl.bfloat16:
        value = value.to(tl.float32)
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)
    return value.to(dtype)


@triton.jit
def share_of(part, whole):
    """part / whole in float32, rounded to nearest. On a GPU ``/`` is up to two units in the last place off."""
    return tl.div_rn(part, tl.cast(whole, tl.float32))


def padded(extent: int, minimum: int = 1) -> int:
    """The next power of two, at least ``minimum``."""
    return max(minimum, 1 << max(extent - 1, 0).bit_length())
