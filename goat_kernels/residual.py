"""``residual="fold"``: W_res subtracted inside the weight, and the pretrained weight restored exactly.

Rounding makes the subtraction impossible to undo by arithmetic (in bfloat16 it loses a good part of W_res), so the
original is kept, in host memory, for as long as the weight is folded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FoldedWeight:
    """A weight that can hold W = W0 - B0 A0 in place of W0, and give W0 back bit for bit.

    The Parameter object stays the same throughout: only its values change, under no_grad.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self._original: Tensor | None = None

    @property
    def folded(self) -> bool:
        """Whether the weight holds W rather than W0."""
        return self._original is not None

    def original(self) -> Tensor:
        """W0 [M, N]: the kept copy (in host memory) while folded, the weight itself otherwise."""
        return self.weight.detach() if self._original is None else self._original

    @torch.no_grad()
    def fold(self, residual_A: Tensor, residual_B: Tensor) -> None:
        """Subtract B0 A0 ([M, R'] x [R', N]) in float32 or better, rounded once to the weight's dtype."""
        if self._original is not None:
            raise RuntimeError("the weight is folded already; restore it first")
        weight = self.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._original = weight.detach().to("cpu", copy=True)
        W_res = residual_B.to(wide) @ residual_A.to(wide)
        weight.copy_(weight.to(wide) - W_res)

    @torch.no_grad()
    def restore(self) -> None:
        """Put W0 back, bit for bit; nothing happens to a weight that is not folded."""
        if self._original is not None:
            self.weight.copy_(self._original)
            self._original = None
