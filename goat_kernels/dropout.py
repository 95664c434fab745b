"""Dropout masks by slot, from a counter hash: the numbers every backend regenerates instead of storing a mask.

The paper drops x independently for each expert. A token uses K experts, so K independent masks suffice: the j-th
active expert of a token, in index order, is its slot j. An expert is active where its gate is above zero, so the
backward finds the same slots from the saved gate.

Token t, input n, slot j is kept where a 16-bit hash is at least round(p * 65536); the scale 1 / (1 - p) uses that
rounded p, so the mask is exactly unbiased. With 32-bit words, the seed (s0, s1) and q = j // 2:

    key  = mix(t ^ s0, s1)                          one word per token
    bits = mix((n * 0x9E3779B1) ^ key, s1 + q * 0x85EBCA77)
    slot j takes the low half of bits for even j, the high half for odd j

    mix(v, k):  v ^= v >> 16;  v *= 0x7FEB352D;  v ^= k;  v ^= v >> 15;  v *= 0x846CA68B;  v ^= v >> 16

(two multiplications, shifts logical, arithmetic modulo 2^32). No word exceeds 32 bits for any T or N below 2^31.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

HALF_RANGE = 1 << 16


def _signed(word: int) -> int:
    """The int32 with the bits of an unsigned 32-bit word: torch has no uint32 arithmetic on all devices."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


COLUMN_FACTOR = _signed(0x9E3779B1)
PAIR_FACTOR = _signed(0x85EBCA77)
FIRST_FACTOR = _signed(0x7FEB352D)
SECOND_FACTOR = _signed(0x846CA68B)


def keep_threshold(dropout_p: float) -> int:
    """A 16-bit hash below this drops its element."""
    return min(round(dropout_p * HALF_RANGE), HALF_RANGE - 1)


def keep_scale(dropout_p: float) -> float:
    """1 / (probability of keeping), of the probability as rounded to 16 bits."""
    return HALF_RANGE / (HALF_RANGE - keep_threshold(dropout_p))


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed, int32 [2] on ``device``, from its default generator: checkpointing and graph replay see it."""
    return torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=device)


def _mix_(word: Tensor, key: Tensor) -> Tensor:
    """Two rounds of multiply and shift on int32 words, in place; torch's ``>>`` keeps the sign, so it is masked."""
    word ^= (word >> 16) & 0xFFFF
    word *= FIRST_FACTOR
    word ^= key
    word ^= (word >> 15) & 0x1FFFF
    word *= SECOND_FACTOR
    word ^= (word >> 16) & 0xFFFF
    return word


def _pair_bits(seed: Tensor, T: int, N: int, pair: int) -> Tensor:
    """int32 [T, N]: 16 bits for slot 2*pair (low half) and 16 for slot 2*pair + 1 (high half)."""
    s0, s1 = seed[0], seed[1]
    rows = torch.arange(T, dtype=torch.int32, device=seed.device)
    columns = torch.arange(N, dtype=torch.int32, device=seed.device) * COLUMN_FACTOR
    key = _mix_(rows ^ s0, s1)
    return _mix_(columns ^ key[:, None], s1 + _signed(pair * PAIR_FACTOR))


def keep_masks(seed: Tensor, T: int, N: int, slots: int, dropout_p: float) -> Iterator[Tensor]:
    """The masks of slots 0..slots-1, bool [T, N] each, True where the slot keeps the element; ``seed`` is int32 [2]."""
    threshold = keep_threshold(dropout_p)
    for slot in range(slots):
        if slot % 2 == 0:
            bits = _pair_bits(seed, T, N, slot // 2)
            yield (bits & 0xFFFF) >= threshold
        else:
            yield ((bits >> 16) & 0xFFFF) >= threshold


def expert_slots(gate_TE: Tensor) -> Tensor:
    """int64 [T, E]: the slot of each active expert, -1 for experts that the token does not use."""
    active = gate_TE > 0
    return (active.cumsum(dim=-1) - 1).masked_fill(~active, -1)
