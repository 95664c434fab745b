"""Does this machine replay a layer's repeated calls, and with the bits of the calls that ran the passes?"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from goat_kernels.backends import get_backend
from goat_kernels.checks.correctness import run_layer
from goat_kernels.checks.problem import LayerCase, make_problem
from goat_kernels.functional import goat_linear
from goat_kernels.kernels.configs import forced_target

#: Forward and backward of one layer, so many times: the first two run the passes.
STEPS = 3


@dataclass(frozen=True)
class Replay:
    """What came of ``STEPS`` equal steps of a layer.

    Attributes:
        is_on: whether GOAT_KERNELS_REPLAY leaves replay on.
        calls, replayed: calls into the backend, one for a forward and one for a backward; how many were replayed.
        identical: whether every step gave the bits of the first.
        refusals: why calls without a plan have none.
    """

    is_on: bool
    calls: int
    replayed: int
    identical: bool
    refusals: tuple[str, ...]

    def fault(self) -> str | None:
        """None, or what is wrong with it."""
        if not self.identical:
            return "a repeated step gives other bits than the first"
        if self.is_on and not self.replayed:
            return f"it is on, and no call was replayed: {', '.join(self.refusals) or 'launches are observed'}"
        return None


def check_replay(case: LayerCase, device: torch.device) -> Replay:
    """``STEPS`` equal steps of the layer ``case`` on the Triton backend."""
    from goat_kernels.kernels.replay import Plans  # imports Triton

    passes, problem = get_backend("triton"), make_problem(case, device)
    before, passes.plans = passes.plans, Plans()  # what ran before does not count, and nothing is left behind
    try:
        with forced_target(case.target) if case.target is not None else contextlib.nullcontext():
            first, *others = (run_layer(goat_linear, problem, backend="triton") for _ in range(STEPS))
        plans = passes.plans
    finally:
        passes.plans = before
    identical = all(torch.equal(_bits(first[name]), _bits(other[name])) for other in others for name in first)
    return Replay(plans.is_on, plans.calls, plans.replayed, identical, tuple(dict.fromkeys(plans.refusals())))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: one NaN equals another."""
    return tensor.reshape(-1).view(torch.uint8)
