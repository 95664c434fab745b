"""``residual="fold"``: a weight that holds W0 - W_res for a while and gets W0 back, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FoldedWeight:
    """Overwrites a weight with W0 - B0 A0 in place and restores W0 exactly.

    The Parameter object stays the same, so optimisers, tied references and hooks keep seeing it. W0 is kept as a copy
    on the CPU: a subtraction in half precision cannot be undone by an addition.

    Attributes:
        folded: whether the weight now holds W0 - W_res.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        """``weight``: [M, N], float16, bfloat16, float32 or float64, on a real device."""
        self.weight = weight
        self._original: Tensor | None = None

    @property
    def folded(self) -> bool:
        return self._original is not None

    @property
    def original(self) -> Tensor | None:
        """W0 [M, N] on the CPU while folded, else None."""
        return self._original

    @torch.no_grad()
    def fold(self, A0: Tensor, B0: Tensor) -> None:
        """Overwrite the weight with W0 - B0 A0, computed in float32 or better and rounded once.

        Args:
            A0: [R', N].
            B0: [M, R'], with every factor (s, 1/E) inside.

        Raises:
            RuntimeError: the weight is folded already.
        """
        if self.folded:
            raise RuntimeError("the weight is folded already; restore() it before folding another pair")
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        W_res = B0.to(self.weight.device, wide) @ A0.to(self.weight.device, wide)
        self._original = self.weight.detach().to("cpu", copy=True)
        self.weight.copy_(self.weight.to(wide) - W_res)

    @torch.no_grad()
    def restore(self) -> None:
        """Write W0 back; does nothing on a weight that is not folded."""
        if self._original is None:
            return
        self.weight.copy_(self._original)
        self._original = None
