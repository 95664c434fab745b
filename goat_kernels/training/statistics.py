"""How the experts of a model were used in its last forward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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

    @property
    def relative_load(self) -> tuple[float, ...]:
        """The load over an even load, E f_i / K: 1 is even; zeros for a batch without tokens."""
        total = sum(self.load) or 1.0
        return tuple(share * len(self.load) / total for share in self.load)

    @property
    def load_entropy(self) -> float:
        """-sum_i p_i ln p_i / ln E, p_i = f_i / K: 1 is even, 0 is one expert for all; 1 where there is only one."""
        if len(self.load) == 1:
            return 1.0
        shares = [relative / len(self.load) for relative in self.relative_load]
        return sum(-share * math.log(share) for share in shares if share > 0) / math.log(len(shares))


def routed_modules(model: nn.Module) -> Iterator[tuple[str, RoutedModule]]:
    """(name, module) of every routed module in ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedModule):
            yield name, module


def router_statistics(model: nn.Module) -> dict[str, RouterStatistics]:
    """The routing statistics of every layer that has run, by its name in ``model``; one transfer per device."""
    ran = [(name, module) for name, module in routed_modules(model) if _has_run(module)]
    numbers: dict[str, list[float]] = {}
    for device in {module.expert_load.device for _, module in ran}:
        here = [(name, module) for name, module in ran if module.expert_load.device == device]
        rows = [torch.cat((_scalar(module.balance_loss, device), module.expert_load.double())) for _, module in here]
        read = torch.cat(rows).tolist()
        for (name, _), row in zip(here, rows, strict=True):
            numbers[name], read = read[: len(row)], read[len(row) :]
    return {name: RouterStatistics(numbers[name][0], tuple(numbers[name][1:])) for name, _ in ran}


def _has_run(module: RoutedModule) -> bool:
    return module.balance_loss is not None and module.expert_load is not None


def _scalar(value: Tensor, device: torch.device) -> Tensor:
    return value.to(device, torch.float64).reshape(1)
