"""How far a result may be from the float64 oracle: the error metric and the one table of tolerances.

Tests, ``goat-kernels check`` and benchmarks all read this table; no other file holds a tolerance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """The bound on :func:`relative_error` for one dtype."""

    relative: float


#: Error of output, balance loss and every gradient against the float64 oracle on the same selection, for random
#: inputs of unit scale. At N, T up to some thousands a float product loses about eps * sqrt(N) relative to the norm.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-10),  # eps is 2.2e-16; two orders of summation, with four orders of magnitude to spare
    torch.float32: Tolerance(1e-5),  # eps is 1.2e-7; sums over N and T of up to some thousands of terms
    torch.float16: Tolerance(4e-3),  # eps is 9.8e-4; hidden, output and gradients are each rounded to 10 bits
    torch.bfloat16: Tolerance(3e-2),  # eps is 7.8e-3; hidden, output and gradients are each rounded to 7 bits
}

#: Largest gap between the K-th and the next logit, relative to the largest |logit|, at which two implementations may
#: select different experts: the rounding of a float32 (float64) product over N terms.
SELECTION_GAP: dict[torch.dtype, float] = {torch.float32: 1e-5, torch.float64: 1e-13}


def relative_error(result: Tensor, oracle: Tensor) -> float:
    """||result - oracle|| / ||oracle|| in float64; the absolute error where the oracle is zero; NaN where any is."""
    if result.shape != oracle.shape:
        raise ValueError(f"result must have the oracle's shape {tuple(oracle.shape)}, got {tuple(result.shape)}")
    difference = torch.linalg.vector_norm(result.double() - oracle.double())
    norm = torch.linalg.vector_norm(oracle.double())
    return float(difference / norm) if float(norm) > 0 else float(difference)
