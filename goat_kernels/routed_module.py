"""What every module with routed experts shows to the outside: statistics of its last forward, and the balance scale.

``GoatLinear`` and the PEFT layer inherit it, so that the balance loss, callbacks and reports find both the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    """Mixin of the modules that route tokens to experts; it comes before nn.Module among their bases.

    Attributes:
        balance_scale: 0-d float32 tensor read in backward, what the trainer scales its loss by; None is 1
            (``goat_kernels.training`` attaches it).

    An eager forward keeps its statistics by binding new tensors. Compiled code writes them into the tensors that are
    bound then, because within a checkpoint a traced forward may write tensors but bind no attributes. So there is
    always a pair, [1] and [E], to write into; before the first forward its load is negative, which no load is.
    """

    balance_scale: Tensor | None = None
    _balance_loss: Tensor | None = None
    _expert_load: Tensor | None = None
    _may_be_unused = True  # that pair may be the one of before the first forward

    @property
    def balance_loss(self) -> Tensor | None:
        """The last forward's balance loss, detached, 0-d float32 (float64 for float64 input); None before."""
        return self._balance_loss.reshape(()).clone() if self._has_statistics() else None

    @property
    def expert_load(self) -> Tensor | None:
        """The last forward's share of tokens per expert [E], summing to K, detached; None before."""
        return self._expert_load.clone() if self._has_statistics() else None

    def _has_statistics(self) -> bool:
        load = self._expert_load
        if load is None or load.is_meta:
            return False
        if torch.compiler.is_compiling():  # which cannot ask the device, and follows a forward
            return True
        if self._may_be_unused:  # asked of the device until it says no
            self._may_be_unused = bool(load[0] < 0)
        return not self._may_be_unused

    def _remember(self, balance_loss: Tensor, load: Tensor | None) -> None:
        """Keep a forward's statistics, unless there are none or they are no ordinary tensors (fake ones, for example).

        ``load`` has no gradient.
        """
        if load is None:
            return
        balance_loss = balance_loss.detach().reshape(1)  # what compiled code writes to a 0-d float64 tensor is lost
        if torch.compiler.is_compiling():
            pairs = ((self._balance_loss, balance_loss), (self._expert_load, load))
            if all(k is not None and (k.shape, k.dtype, k.device) == (n.shape, n.dtype, n.device) for k, n in pairs):
                self._balance_loss.copy_(balance_loss)
                self._expert_load.copy_(load)
                return
        elif type(load) is not Tensor:
            return
        elif load.is_inference():  # compiled code could not write into these outside inference mode
            with torch.inference_mode(False):
                balance_loss, load = balance_loss.clone(), load.clone()
        # Past nn.Module's __setattr__, whose questions cost noticeable time in a small layer.
        self.__dict__.update(_balance_loss=balance_loss, _expert_load=load)

    def _place_statistics(self) -> None:
        """See to a pair of the right size, where and in what dtype the next forward computes its own."""
        router, load = self._last_router(), self._expert_load
        if router is None:
            return
        dtype = torch.float64 if router.dtype == torch.float64 else torch.float32
        with torch.no_grad(), torch.inference_mode(False):
            if load is None or load.is_meta or len(load) != len(router):
                self._balance_loss = torch.zeros(1, dtype=dtype, device=router.device)
                self._expert_load = torch.full((len(router),), -1.0, dtype=dtype, device=router.device)
                self._may_be_unused = True
            elif not router.is_meta:
                self._balance_loss = self._balance_loss.to(router.device, dtype)
                self._expert_load = load.to(router.device, dtype)

    def _last_router(self) -> Tensor | None:
        """The router [E, N] whose load is kept; None while there is none."""
        return getattr(self, "router", None)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._place_statistics()
        return self

    @property
    def routing_device(self) -> torch.device | None:
        """Where the module routes; None while it has no parameters."""
        parameter = next(self.parameters(), None)
        return None if parameter is None else parameter.device


def routed_modules(model: nn.Module) -> Iterator[tuple[str, RoutedModule]]:
    """(name, module) of every routed module in ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedModule):
            yield name, module
