"""Device functions for dropout: the numbers of ``goat_kernels/dropout.py``, bit for bit.

A kernel regenerates the mask of a slot wherever it reads x or writes dX; nothing is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from goat_kernels.kernels.common import cast


@triton.jit
def mix(word, key):
    """Two rounds of multiply and shift on uint32 words."""
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ key
    word = word ^ (word >> 15)
    word = word * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def token_keys(seed_ptr, rows_T):
    """uint32 [T]: one word per token. ``seed_ptr`` int32 [2]; ``rows_T`` int32."""
    s0 = tl.load(seed_ptr).to(tl.uint32, bitcast=True)
    s1 = tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True)
    return mix(rows_T.to(tl.uint32, bitcast=True) ^ s0, s1)


@triton.jit
def pair_bits(seed_ptr, keys, columns, pair):
    """uint32: 16 bits for slot 2 * pair (low half) and 16 for the next (high half) of each token and input.

    keys and columns (int32) broadcast against each other: [T, 1] and [1, N], or the other way round.
    """
    s1 = tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True)
    key = s1 + tl.cast(pair, tl.uint32) * 0x85EBCA77
    return mix(columns.to(tl.uint32, bitcast=True) * 0x9E3779B1 ^ keys, key)


@triton.jit
def kept(seed_ptr, keys, columns, slot, threshold):
    """float32, 1 where ``slot`` keeps an element and 0 where not; shapes as in :func:`pair_bits`.

    ``threshold`` is round(p * 65536). In integers, not bools: compilers fail to move a tile of bools between layouts.
    """
    slot = tl.cast(slot, tl.uint32)
    half = (pair_bits(seed_ptr, keys, columns, slot // 2) >> (16 * (slot % 2))) & 0xFFFF
    return (1 + ((half.to(tl.int32) - threshold) >> 31)).to(tl.float32)


@triton.jit
def of_slot(value, slots, slot):
    """``value`` where ``slots`` (int32) is ``slot``, 0 elsewhere; in integers for the same reason as :func:`kept`."""
    return cast(value * (1 - tl.minimum(tl.abs(slots - slot), 1)).to(tl.float32), value.dtype)


@triton.jit
def column_slots(gate_ptr, rows_T, in_T, experts_C, T, E: tl.constexpr):
    """int32 [T, C]: the slot of each column's expert, -1 where the token does not use it.

    gate_ptr: [E, T] float32. rows_T int64, in_T: rows below T. experts_C: the expert of each column, below E.
    """
    slots_TC = tl.zeros((rows_T.shape[0], experts_C.shape[0]), tl.int32)
    used_TC = tl.zeros((rows_T.shape[0], experts_C.shape[0]), tl.int32)
    for expert in range(E):
        active_T = (tl.load(gate_ptr + tl.cast(expert, tl.int64) * T + rows_T, mask=in_T, other=0.0) > 0).to(tl.int32)
        slots_TC += active_T[:, None] * (experts_C >= expert).to(tl.int32)[None, :]
        used_TC += active_T[:, None] * (experts_C == expert).to(tl.int32)[None, :]
    return tl.where(used_TC > 0, slots_TC - 1, -1)
