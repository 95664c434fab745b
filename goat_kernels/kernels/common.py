"""Device functions that several kernels use: products and casts, the padded layout of hidden columns, routing, y.

Padded layout: expert e owns columns e * D_PAD .. e * D_PAD + D_PAD - 1, D_PAD a power of two, so that repeating a gate
D times and summing D products are a broadcast and a sum over a reshaped register tile. Columns beyond D, and experts
beyond E, are zero. In memory everything is unpadded: column e * D + d.

Triton's interpreter gets bfloat16 wrong (``tl.dot`` multiplies the raw 16-bit integers, a cast from float32 cuts off
instead of rounding to nearest even): :func:`product` and :func:`cast` avoid both, so that no other file has to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 when this module was first imported.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

#: The lower half of the router's weights is stored times this, to stay clear of float16's smallest numbers.
LOW_PART_SCALE = 2048.0

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOW_PART_SCALE = tl.constexpr(LOW_PART_SCALE)
_LOWEST_KEY = tl.constexpr(-(2**31))
_NAN_KEY = tl.constexpr(2**31 - 1)


def padded(extent: int, minimum: int = 1) -> int:
    """The next power of two, at least ``minimum``."""
    return max(minimum, 1 << max(extent - 1, 0).bit_length())


def precision(compute: torch.dtype) -> str:
    """PRECISION of :func:`product`: how float32 is multiplied, by PyTorch's own switch. The logits never are tf32."""
    if compute == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


# --- products and casts ---------------------------------------------------------------------------------------------


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr, IMPRECISE: tl.constexpr = 0):
    """accumulator + a b in float32. PRECISION ("ieee" or "tf32") matters only to float32 operands.

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


# --- the padded layout ----------------------------------------------------------------------------------------------


@triton.jit
def hidden_columns(E: tl.constexpr, D: tl.constexpr, E_PAD: tl.constexpr, D_PAD: tl.constexpr):
    """(index [R_PAD] of each padded column in memory, whether it exists)."""
    column = tl.arange(0, E_PAD * D_PAD)
    index = column
    exists = column < E * D
    if D != D_PAD:
        index = (column // D_PAD) * D + column % D_PAD
        exists = (column // D_PAD < E) & (column % D_PAD < D)
    return index, exists  # contiguous if D allows it, so that loads are wide


@triton.jit
def expand(value_TE, E_PAD: tl.constexpr, D_PAD: tl.constexpr):
    """[T, E_PAD] -> [T, R_PAD]: each expert's value for all its columns."""
    rows: tl.constexpr = value_TE.shape[0]
    return tl.reshape(tl.broadcast_to(value_TE[:, :, None], (rows, E_PAD, D_PAD)), (rows, E_PAD * D_PAD))


@triton.jit
def scaling_experts(scaling, scaling_E_ptr, E: tl.constexpr, E_PAD: tl.constexpr):
    """[1, E_PAD]: s of each expert, from one number or from float32 [E]."""
    expert = tl.arange(0, E_PAD)
    values = tl.zeros((E_PAD,), tl.float32) + scaling
    if scaling_E_ptr is not None:
        values = tl.load(scaling_E_ptr + expert, mask=expert < E, other=0.0)
    return values[None, :]


# --- routing --------------------------------------------------------------------------------------------------------


@triton.jit
def selected_experts(logits_TE, E: tl.constexpr, E_PAD: tl.constexpr, TOP_K: tl.constexpr):
    """bool [T, E_PAD]: the TOP_K largest logits of each row; ties to the lower index, NaN above every number.

    Works on integer keys that are ordered as the floats are, so that -inf is above what has been chosen already.
    """
    expert = tl.arange(0, E_PAD)[None, :]
    bits = tl.where(logits_TE == 0.0, 0.0, logits_TE).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    key = tl.where(bits < 0, bits ^ _NAN_KEY, bits)
    key = tl.where(logits_TE != logits_TE, _NAN_KEY, key)
    key = tl.where(expert < E, key, _LOWEST_KEY)
    chosen = tl.zeros(logits_TE.shape, tl.int32)
    for _ in range(TOP_K):
        largest = tl.max(key, axis=1)
        first = tl.min(tl.where(key == largest[:, None], expert, E_PAD), axis=1)
        is_first = expert == first[:, None]
        chosen = tl.where(is_first, 1, chosen)
        key = tl.where(is_first, _LOWEST_KEY, key)
    return (chosen > 0) & (expert < E)


@triton.jit
def route(logits_TE, E: tl.constexpr, E_PAD: tl.constexpr, TOP_K: tl.constexpr):
    """(gate, probs, selected), each [T, E_PAD]: softmax over the selected logits and over all of them."""
    exists = (tl.arange(0, E_PAD) < E)[None, :]
    largest = tl.max(tl.where(exists, logits_TE, float("-inf")), axis=1)
    powers = tl.where(exists, tl.exp(logits_TE - largest[:, None]), 0.0)
    probs = powers / tl.sum(powers, axis=1)[:, None]
    selected = selected_experts(logits_TE, E, E_PAD, TOP_K)
    chosen_powers = tl.where(selected, powers, 0.0)
    gate = share_of(chosen_powers, tl.sum(chosen_powers, axis=1)[:, None])  # one of one is 1, of two tied ones 1/2
    return gate, probs, selected


@triton.jit
def store_routing(
    gate, probs, selected, gate_ptr, probs_ptr, partial_ptr, rows, T, program, E: tl.constexpr, E_PAD: tl.constexpr
):
    """Write gate and probs [E, T] float32, and this program's balance statistics.

    partial_ptr: float32 [programs, 2, E]: the sum over the program's tokens of probs, and how many chose each expert.
    """
    expert = tl.arange(0, E_PAD)
    in_T = rows < T
    mask = in_T[:, None] & (expert < E)[None, :]
    offsets = expert.to(tl.int64)[None, :] * T + rows[:, None]
    tl.store(gate_ptr + offsets, gate, mask=mask)
    tl.store(probs_ptr + offsets, probs, mask=mask)
    partial = partial_ptr + program.to(tl.int64) * (2 * E) + expert
    tl.store(partial, tl.sum(tl.where(mask, probs, 0.0), axis=0), mask=expert < E)
    tl.store(partial + E, tl.sum(tl.where(mask & selected, 1.0, 0.0), axis=0), mask=expert < E)


# --- y --------------------------------------------------------------------------------------------------------------


@triton.jit
def prefill_columns(
    weighted, residual, B_ptr, B0_ptr, onto_ptr, y_ptr,
    rows, columns, index_R, exists_R, T, M, stride_onto_t, stride_onto_m,
    R: tl.constexpr, R0: tl.constexpr, R0_PAD: tl.constexpr, ONTO: tl.constexpr, EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write y0 at ``rows`` [BT] int64 and ``columns`` [BM]: weighted B^T + residual B0^T + what it goes onto.

    weighted [BT, R_PAD] and residual [BT, R0_PAD] (with its minus sign) are in the compute dtype.
    """
    in_M = columns < M
    if EVEN_M:
        in_M = columns >= 0
    b = tl.load(B_ptr + columns[None, :] * R + index_R[:, None], mask=in_M[None, :] & exists_R[:, None], other=0.0)
    y = product(weighted, cast(b, weighted.dtype), tl.zeros((rows.shape[0], columns.shape[0]), tl.float32), PRECISION)
    if R0 > 0:
        index_R0 = tl.arange(0, R0_PAD)
        in_pair = in_M[None, :] & (index_R0 < R0)[:, None]
        b0 = tl.load(B0_ptr + columns[None, :] * R0 + index_R0[:, None], mask=in_pair, other=0.0)
        y = product(residual, cast(b0, weighted.dtype), y, PRECISION)
    mask = (rows < T)[:, None] & in_M[None, :]
    if ONTO == "bias":
        y += tl.load(onto_ptr + columns, mask=in_M, other=0.0).to(tl.float32)[None, :]
    elif ONTO == "base":
        base = onto_ptr + rows[:, None] * stride_onto_t + columns.to(tl.int64)[None, :] * stride_onto_m
        y += tl.load(base, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * M + columns[None, :], cast(y, y_ptr.dtype.element_ty), mask=mask)
