"""What every module with routed experts shows to the outside: statistics of its last forward, balance-loss injection.

``GoatLinear`` and the PEFT layer inherit it, so that the balance loss, callbacks and reports find both the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def never_bypass(module: nn.Module) -> None:
    """Keep PyTorch's fused inference paths from reading ``module.weight`` without calling the module.

    nn.TransformerEncoderLayer does so in evaluation, and an adapter inside would silently have no effect; it takes its
    ordinary path where a hook is present.
    """
    module.register_forward_pre_hook(_be_present)


def _be_present(module: nn.Module, args: tuple) -> None:
    return None


class RoutedModule:
    """Mixin of the modules that route tokens to experts.

    Attributes:
        balance_coefficient: weight of the balance loss that the layer injects in backward while training.
        balance_scale: 0-d float32 tensor read in backward, what the trainer scales its loss by; None is 1
            (``goat_kernels.training`` attaches it).
        balance_loss: the last forward's balance loss, detached, 0-d float32 (float64 for float64 input); None before.
        expert_load: the last forward's share of tokens per expert [E], summing to K, detached; None before.
    """

    balance_coefficient: float = 0.0
    balance_scale: Tensor | None = None
    balance_loss: Tensor | None = None
    expert_load: Tensor | None = None

    def _remember(self, balance_loss: Tensor, load: Tensor) -> None:
        """Keep a forward's statistics; ``load`` has no gradient.

        Past nn.Module's __setattr__, whose questions are felt in a small layer.
        """
        self.__dict__.update(balance_loss=balance_loss.detach(), expert_load=load)

    @property
    def routing_device(self) -> torch.device | None:
        """Where the module routes; None while it has no parameters."""
        parameter = next(self.parameters(), None)
        return None if parameter is None else parameter.device
