"""How the experts of a model were used in its last forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from goat_kernels.routed_module import RoutedModule


@dataclass(frozen=True)
class RouterStatistics:
    """The routing of one layer's last forward.

    Attributes:
        balance_loss: E * sum_i f_i P_i; K when the load is even.
        load: f_i, the share of tokens that used expert i; sums to K.
    """

    balance_loss: float
    load: tuple[float, ...]


def routed_modules(model: nn.Module) -> Iterator[tuple[str, RoutedModule]]:
    """(name, module) of every routed module in ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedModule):
            yield name, module


def router_statistics(model: nn.Module) -> dict[str, RouterStatistics]:
    """The routing statistics of every layer that has run, by its name in ``model``. Synchronises with the device."""
    return {
        name: RouterStatistics(float(module.balance_loss), tuple(module.expert_load.tolist()))
        for name, module in routed_modules(model)
        if module.balance_loss is not None and module.expert_load is not None
    }
