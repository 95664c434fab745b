"""Device functions for routing: top-K, gate, balance-loss statistics, and the padded layout of hidden columns.

Padded layout: expert e owns columns e * D_PAD .. e * D_PAD + D_PAD - 1, D_PAD a power of two, so that repeating a gate
D times and summing D products are a broadcast and a sum over a reshaped register tile. Columns beyond D, and experts
beyond E, are zero. In memory everything is unpadded: column e * D + d.
"""

from __future__ import annotations

import triton
import triton.language as tl

from goat_kernels.kernels.common import share_of

#: The lower half of the router's weights is stored times this, to stay clear of float16's smallest numbers.
LOW_PART_SCALE = 2048.0

_LOW_PART_SCALE = tl.constexpr(LOW_PART_SCALE)
_LOWEST_KEY = tl.constexpr(-(2**31))
_NAN_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def hidden_columns(E: tl.constexpr, D: tl.constexpr, E_PAD: tl.constexpr, D_PAD: tl.constexpr):
    """(index [R_PAD] of each padded column in memory, whether it exists)."""
    column = tl.arange(0, E_PAD * D_PAD)
    index = column
    exists = column < E * D
    if D != D_PAD:
        index = (column // D_PAD) * D + column % D_PAD
        exists = (column // D_PAD < E) & (column % D_PAD < D)
    return index, exists  # contiguous wherever D allows, so that loads are wide


@triton.jit
def expand(value_TE, E_PAD: tl.constexpr, D_PAD: tl.constexpr):
    """[T, E_PAD] -> [T, R_PAD]: each expert's value for all its columns."""
    rows: tl.constexpr = value_TE.shape[0]
    return tl.reshape(tl.broadcast_to(value_TE[:, :, None], (rows, E_PAD, D_PAD)), (rows, E_PAD * D_PAD))


@triton.jit
def sum_experts(value_TR, E_PAD: tl.constexpr, D_PAD: tl.constexpr):
    """[T, R_PAD] -> [T, E_PAD]: the sum over each expert's columns."""
    return tl.sum(tl.reshape(value_TR, (value_TR.shape[0], E_PAD, D_PAD)), axis=2)


@triton.jit
def join_logit_parts(parts_TL, E_PAD: tl.constexpr):
    """[T, PARTS * E_PAD] -> [T, E_PAD]: high part + low part / LOW_PART_SCALE; further parts are zero."""
    parts: tl.constexpr = parts_TL.shape[1] // E_PAD
    part = tl.arange(0, parts)
    weight = tl.where(part == 0, 1.0, 1.0 / _LOW_PART_SCALE)
    return tl.sum(tl.reshape(parts_TL, (parts_TL.shape[0], parts, E_PAD)) * weight[None, :, None], axis=1)


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


@triton.jit
def load_experts(ptr, rows, T, E: tl.constexpr, E_PAD: tl.constexpr):
    """[T, E_PAD] float32 from [E, T]; zero outside."""
    expert = tl.arange(0, E_PAD)
    mask = (rows < T)[:, None] & (expert < E)[None, :]
    return tl.load(ptr + expert.to(tl.int64)[None, :] * T + rows[:, None], mask=mask, other=0.0)


@triton.jit
def scaling_experts(scaling, scaling_E_ptr, E: tl.constexpr, E_PAD: tl.constexpr):
    """[1, E_PAD]: s of each expert, from one number or from float32 [E]."""
    expert = tl.arange(0, E_PAD)
    values = tl.zeros((E_PAD,), tl.float32) + scaling
    if scaling_E_ptr is not None:
        values = tl.load(scaling_E_ptr + expert, mask=expert < E, other=0.0)
    return values[None, :]


@triton.jit
def logit_gradient(
    hidden_products_TR,
    gate,
    probs,
    load_E_ptr,
    grad_balance,
    T,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    HAS_BALANCE: tl.constexpr,
):
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
