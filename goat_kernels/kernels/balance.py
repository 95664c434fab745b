"""Balance loss: the row blocks' statistics added in their order."""

from __future__ import annotations

import triton
import triton.language as tl

from goat_kernels.kernels.common import share_of


@triton.jit(do_not_specialize=["programs", "T"])
def finish_balance(
    partial_ptr, load_ptr, balance_ptr, programs, T, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr
):
    """f_i = share of tokens of expert i, loss = E sum_i f_i P_i (docs/math.md, Balance loss). Grid: (1,).

    Reads partial_ptr float32 [programs, 2, E]: sums of probs, counts.
    Writes load_ptr float32 [E], balance_ptr float32 [].
    """
    expert = tl.arange(0, E_PAD)
    probs = tl.zeros((BLOCK, E_PAD), tl.float32)
    counts = tl.zeros((BLOCK, E_PAD), tl.float32)
    for start in range(0, programs, BLOCK):
        program = start + tl.arange(0, BLOCK)
        offsets = program.to(tl.int64)[:, None] * (2 * E) + expert[None, :]
        mask = (program < programs)[:, None] & (expert < E)[None, :]
        probs += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        counts += tl.load(partial_ptr + offsets + E, mask=mask, other=0.0)
    load = share_of(tl.sum(counts, axis=0), T)
    mean = share_of(tl.sum(probs, axis=0), T)
    tl.store(load_ptr + expert, load, mask=expert < E)
    tl.store(balance_ptr, tl.sum(load * mean, axis=0) * E)
